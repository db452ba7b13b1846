# SPDX-License-Identifier: Apache-2.0
"""The 22B denoiser as a graph, from the published header over holes: what is in it, what is not, and what it costs."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import onnx
import pytest

from ltxrt_export import published
from ltxrt_export.synthetic import write_synthetic

BLOCKS = 48

# A process of its own: a peak of memory never comes down again.
_EXPORT = """
import json, sys, time
from pathlib import Path
from ltxrt_export.denoiser_graph import export_denoiser
from ltxrt_export.exporter import Sources, network_specs
from ltxrt_export.networks.denoiser import Semantics

folder, checkpoint, text_encoder, upsampler = (Path(word) for word in sys.argv[1:])
spec = network_specs(Sources.open(checkpoint, text_encoder, upsampler), Semantics.R3)[0]["denoiser"]
begin = time.process_time()
model = export_denoiser(spec, lambda path: path.relative_to(folder).as_posix())
seconds = time.process_time() - begin
(folder / "denoiser.onnx").write_bytes(model.SerializeToString(deterministic=True))
# Not ru_maxrss, which begins at what the parent had when it started this process.
status = Path("/proc/self/status").read_text()
peak_bytes = int(status.split("VmHWM:")[1].split()[0]) * 1024
stored = [ref.key for ref in spec.weights.values()]
print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes, "stored": stored}))
"""

# The first two blocks of the graph and what leads to them, as a calibration runs what does not fit.
_CALIBRATED = """
import json, sys
from pathlib import Path
import numpy as np
import onnx
from ltxrt_export.quantize.graph import drop_unused, linears
from ltxrt_export.quantize.memory import SEGMENT_BYTES
from ltxrt_export.quantize.recording import SegmentTap
from ltxrt_export.quantize.segments import cut, weight_bytes

folder = Path(sys.argv[1])
model = onnx.load(folder / "denoiser.onnx", load_external_data=False)
graph = model.graph
del graph.output[:]
ends = ("video/2", "audio/2")
graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ends)
drop_unused(graph)
sizes = {"Nv": 12, "Na": 5, "f": 2, "h": 3, "w": 2}
feeds = {}
for port in graph.input:
    shape = [dim.dim_value or sizes[dim.dim_param] for dim in port.type.tensor_type.shape.dim]
    dtype = np.int64 if port.type.tensor_type.elem_type == onnx.TensorProto.INT64 else np.float32
    feeds[port.name] = np.ones(shape, dtype)
watched = sorted({linear.activation for linear in linears(graph)})
seen = set()
(found,) = SegmentTap(model, folder, watched, SEGMENT_BYTES).run([feeds], lambda taps: seen.update(taps.values))
assert seen == set(watched) and set(found) == set(ends)
sizes = [weight_bytes(part.model.graph) for part in cut(model, SEGMENT_BYTES)]
status = Path("/proc/self/status").read_text()
peak_bytes = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"weight_bytes": weight_bytes(graph), "parts": sizes, "peak_bytes": peak_bytes}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full")


@pytest.fixture(scope="module")
def exported(folder: Path) -> dict[str, Any]:
    model = write_synthetic(folder)
    paths = (folder, model.checkpoint, model.text_encoder, model.upsampler)
    command = [sys.executable, "-c", _EXPORT, *map(str, paths)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def graph(folder: Path, exported: dict[str, Any]) -> onnx.GraphProto:
    return onnx.load(folder / "denoiser.onnx", load_external_data=False).graph


@pytest.mark.slow
def test_a_minute_and_a_gigabyte(exported: dict[str, Any]) -> None:
    """Processor seconds, since the wall time of a busy machine says nothing."""
    assert exported["seconds"] < 60
    assert exported["peak_bytes"] < 10**9


@pytest.mark.slow
def test_the_graph_is_valid(folder: Path, exported: dict[str, Any]) -> None:
    onnx.checker.check_model(str(folder / "denoiser.onnx"))


@pytest.mark.slow
def test_every_block_is_the_same_but_the_last(graph: onnx.GraphProto) -> None:
    counts = {index: 0 for index in range(BLOCKS)}
    for node in graph.node:
        if node.name.startswith("block."):
            counts[int(node.name.split("/")[0].removeprefix("block."))] += 1
    *same, last = counts.values()
    assert len(set(same)) == 1
    assert 0 < last < same[0]


@pytest.mark.slow
def test_all_parameters_but_those_of_dead_parts(graph: onnx.GraphProto, exported: dict[str, Any]) -> None:
    """The audio stream's way out: nothing reads it, since the sound is given."""
    used = {tensor.name: prod(tensor.dims) for tensor in graph.initializer if tensor.external_data}
    unused = set(exported["stored"]) - set(used)
    last = f"transformer_blocks.{BLOCKS - 1}."
    assert all(last in key or "audio_proj_out" in key or "audio_scale_shift_table" in key for key in unused), unused
    assert any("audio_ff" in key for key in unused)
    assert any("audio_proj_out" in key for key in unused)
    assert not any(last in key and "audio_ff" in key for key in used)
    dead = published.PARAMETERS["transformer"] - sum(used.values())
    # At most the last block's audio branch and what it gives to the video stream no more, and the audio head.
    assert 0 < dead < 0.3 * published.PARAMETERS["transformer"] / BLOCKS


@pytest.mark.slow
def test_a_calibration_holds_a_few_layers_at_a_time(folder: Path, exported: dict[str, Any]) -> None:
    """Of two blocks at full width: less than one of them takes in fp32, and not in a process with torch in it."""
    command = [sys.executable, "-c", _CALIBRATED, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    found = json.loads(done.stdout.splitlines()[-1])
    block = 4 * published.PARAMETERS["transformer"] / BLOCKS
    assert found["weight_bytes"] > 2 * block
    assert found["peak_bytes"] < max(found["parts"]) + block
