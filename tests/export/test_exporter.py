# SPDX-License-Identifier: Apache-2.0
"""From a model's files to a bundle that the runtime renders with."""

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ltxrt.bundle import Bundle
from ltxrt.errors import ExportError, OutputError
from ltxrt.manifest import NETWORK_NAMES
from ltxrt.media import bundled_speech
from ltxrt.pipeline import Pipeline
from ltxrt.preset import PRESET_NAMES, load_preset
from ltxrt.readback import check_clip
from ltxrt.request import Request
from ltxrt_export.exporter import ExportOptions, Sources, export_bundle, tables
from ltxrt_export.networks.spec import NetworkSpec, axis_of
from ltxrt_export.quantize.calibration import Calibration, LayerRange, NetworkRanges, Origin
from ltxrt_export.quantize.graph import linears
from ltxrt_export.tiny.write import TinyPaths, write_tiny
from ltxrt_export.tiny_bundle import shipped_tiny

#: Exports all presets once undisturbed and then again and again, killed before a random one of the operations on files
#: that the first run counted: a process for every run, forked from this one, which has imported what they need.
KILLED = """
import json, os, random, signal, sys
from pathlib import Path

import onnx

from ltxrt.bundle import Bundle
from ltxrt.errors import BundleError
from ltxrt_export import exporter
from ltxrt_export.exporter import ExportOptions, Sources, export_bundle
from ltxrt_export.quantize.calibration import Calibration

given = json.loads(sys.argv[1])
out, graphs = Path(given["out"]), given["graphs"]
sources = Sources.open(*map(Path, given["model"]))
ranges = Calibration.load(Path(given["ranges"]))
options = ExportOptions(check=False, overwrite=True, precisions="presets", backend="cpu", calibration=ranges)
# Tracing is left out: it takes most of the time, and writes nothing.
loaded = lambda spec, location: onnx.load(graphs[spec.name], load_external_data=False)
exporter.export_model = exporter.export_denoiser = loaded

def ended(kill_at=None):
    # Status of a run, and how many operations it made.
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        count = 0

        def watch(event, arguments):
            nonlocal count
            where = arguments[0] if arguments else None
            if event.startswith(("open", "os.")) and isinstance(where, (str, Path)) and str(out.parent) in str(where):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        for _ in export_bundle(sources, out, options):
            pass
        os.write(writing, str(count).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        count = pipe.read()
    return os.waitpid(process, 0)[1], count

def left():
    if not out.exists():
        return "nothing"
    try:
        return Bundle.open(out, verify=True).manifest.model_dump_json()
    except BundleError as error:
        return f"damaged: {error}"

status, operations = ended()
assert status == 0
whole, chance = left(), random.Random(given["seed"])
for index in range(given["kills"]):
    if index % 2 == 0 and out.exists():  # every other one finds a bundle to replace, if the one before left it
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        out.rmdir()
    at = chance.randint(1, int(operations))
    status, _ = ended(at)
    found = left()
    print(json.dumps({"at": at, "signal": os.WTERMSIG(status), "left": "whole" if found == whole else found}))
status, _ = ended()
assert status == 0
print(json.dumps({"left": "whole" if left() == whole else left(), "beside": sorted(os.listdir(out.parent))}))
"""


@pytest.fixture
def paths(tmp_path: Path) -> TinyPaths:
    return shipped_tiny(tmp_path / "model")


@pytest.mark.parametrize("missing", ["checkpoint", "text_encoder", "upsampler"])
@pytest.mark.parametrize("damage", ["gone", "cut", "text"])
def test_files_that_are_missing_or_damaged(paths: TinyPaths, missing: str, damage: str) -> None:
    path: Path = getattr(paths, missing)
    file = path / "model.safetensors" if path.is_dir() else path
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.write_text("not a model, in at least sixteen letters")
    with pytest.raises(ExportError) as caught:
        Sources.open(paths.checkpoint, paths.text_encoder, paths.upsampler)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"hidden_size": 64', '"hidden_size": 96', r"text_config has .*96.* needs .*64"),
        ('"num_hidden_layers": 6', '"num_hidden_layers": 5', r"text_config has .*5.* needs .*6"),
    ],
)
def test_a_text_encoder_of_another_size(paths: TinyPaths, old: str, new: str, match: str) -> None:
    config = paths.text_encoder / "config.json"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(ExportError, match=match):
        Sources.open(paths.checkpoint, paths.text_encoder, paths.upsampler)


def test_a_context_that_the_registers_do_not_divide(paths: TinyPaths) -> None:
    (paths.text_encoder / "tokenizer_config.json").write_text('{"model_max_length": 200}')
    with pytest.raises(ExportError, match="model_max_length 200 is not a multiple of the 128 registers"):
        Sources.open(paths.checkpoint, paths.text_encoder, paths.upsampler)


def test_swapped_files(paths: TinyPaths) -> None:
    with pytest.raises(ExportError, match=rf"^{paths.upsampler}: "):
        Sources.open(paths.upsampler, paths.text_encoder, paths.checkpoint)


def test_random_weights_are_a_model_too(tmp_path: Path) -> None:
    paths = write_tiny(tmp_path)
    sources = Sources.open(paths.checkpoint, paths.text_encoder, paths.upsampler)
    assert sources.checkpoint.name == "ltx-2.3-tiny"


def test_nothing_runs_before_the_first_step(shipped_sources: Sources, tmp_path: Path) -> None:
    export_bundle(shipped_sources, tmp_path / "bundle", ExportOptions())
    assert not any(tmp_path.iterdir())


def test_an_existing_bundle_is_refused_at_the_first_step(shipped_sources: Sources) -> None:
    with pytest.raises(OutputError, match="exists already"):
        next(export_bundle(shipped_sources, Bundle.open().path, ExportOptions()))


def test_closing_early_leaves_nothing(shipped_sources: Sources, tmp_path: Path) -> None:
    steps = export_bundle(shipped_sources, tmp_path / "new" / "bundle", ExportOptions())
    step = next(steps)
    while step.description != NETWORK_NAMES[0]:
        step = next(steps)
    assert any(tmp_path.rglob("*.safetensors"))
    steps.close()
    assert not any(tmp_path.iterdir())


def test_specs_are_whole(shipped_specs: Mapping[str, NetworkSpec]) -> None:
    """Every symbol has a range, and every parameter a stored tensor."""
    assert set(shipped_specs) == set(NETWORK_NAMES)
    for name, spec in shipped_specs.items():
        assert spec.name == name
        parsed = [axis_of(entry) for port in (*spec.inputs, *spec.outputs) for entry in port.shape]
        assert {axis[1] for axis in parsed if axis is not None} == set(spec.axes)
        for axis in spec.axes.values():
            assert axis.minimum <= axis.maximum
            assert max(2, axis.minimum) <= axis.example <= (axis.traced_maximum or axis.maximum)
        if name != "denoiser":  # whose parts name their parameters as the whole model does
            assert set(spec.module.state_dict()) <= set(spec.weights)


def test_tables(shipped_sources: Sources) -> None:
    found = tables(shipped_sources)
    config = shipped_sources.checkpoint.config["transformer"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    for name, count in (("rope_video", width // 6), ("rope_cross", config["audio_cross_attention_dim"] // 2)):
        # theta^(i / (count - 1)) * pi / 2 in real numbers, rounded once.
        theta = config["positional_embedding_theta"]
        exact = [theta ** (i / (count - 1)) * math.pi / 2 for i in range(count)]
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], np.array(exact, np.float64).astype(np.float32))
    preset = load_preset("high")
    assert tuple(found["sigmas_stage_1"]) == preset.stage_1_sigmas
    assert tuple(found["sigmas_stage_2"]) == preset.stage_2_sigmas
    statistics = shipped_sources.checkpoint.component("video_vae").load().state_dict()
    for name in ("latents_mean", "latents_std"):
        np.testing.assert_array_equal(found[name], statistics[name].numpy())


@pytest.mark.slow
def test_steps_and_parity_figures(regenerated: Any) -> None:
    steps = regenerated.steps
    order = list(dict.fromkeys(step.description for step in steps))
    assert order == ["weights", *NETWORK_NAMES, "manifest", "done"]
    assert [step.index for step in steps] == sorted(step.index for step in steps)
    assert steps[-1].index == steps[-1].total
    rows = [row for step in steps for row in step.rows]
    assert list(dict.fromkeys(row.network for row in rows)) == list(NETWORK_NAMES)
    assert all(row.passed for row in rows)
    # Far below the limits: what is near them is a defect that hides.
    assert all(row.error < 1e-5 for row in rows if row.unit == "(relative L2)")


@pytest.mark.slow
def test_every_preset_has_every_network(regenerated: Any) -> None:
    manifest = Bundle.open(regenerated.path, verify=True).manifest
    assert set(manifest.presets) == set(PRESET_NAMES)
    assert len(manifest.networks) == len(NETWORK_NAMES)
    for keys in manifest.presets.values():
        assert {name: manifest.networks[key].network for name, key in keys.items()} == {n: n for n in NETWORK_NAMES}
    assert not [path for path in regenerated.path.rglob("*") if path.is_symlink()]
    assert [path.name for path in regenerated.path.parent.iterdir()] == ["tiny"]


@pytest.mark.slow
def test_the_runtime_renders_with_the_bundle(regenerated: Any, tmp_path: Path) -> None:
    # Moved: nothing in it points back to where it was made.
    moved = shutil.copytree(regenerated.path, tmp_path / "moved")
    request = Request(
        prompt="A red ball.",
        input_audio=bundled_speech(),
        match_audio_length=False,
        num_frames=9,
        resolution="128x128",
        seed=3,
    )
    pipeline = Pipeline.open(moved)
    clip = tmp_path / "clip.mp4"
    result = pipeline.render(request, clip)
    assert (result.frames, result.model) == (9, "ltx-2.3-tiny")
    report = check_clip(clip)
    assert report.ok
    assert (report.frames, report.width, report.height) == (9, 128, 128)


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_no_wrong_bundle_and_the_next_run_finishes(
    shipped_sources: Sources, fp32_graphs: Mapping[str, Path], tmp_path: Path
) -> None:
    """SIGKILL at random; the fixed points of the swap itself are in test_staging.py."""
    ranges = {
        name: NetworkRanges(layers={layer.key: LayerRange(amax=8.0, percentile=8.0) for layer in found}, large={})
        for name, path in fp32_graphs.items()
        if (found := linears(onnx.load(path, load_external_data=False).graph))
    }
    model = Bundle.open().manifest.model
    origin = Origin(
        model=model.name,
        checkpoint_sha256=model.checkpoint_sha256,
        semantics=model.semantics,
        stage_1_sigmas=(),
        stage_2_sigmas=(),
        clips=(),
    )
    Calibration(made_from=origin, networks=ranges).save(tmp_path / "ranges.json")
    folder = tmp_path / "out"
    folder.mkdir()
    files = shipped_sources.checkpoint.path, shipped_sources.text_encoder.path, shipped_sources.upsampler.path
    given = {
        "out": str(folder / "bundle"),
        "graphs": {name: str(path) for name, path in fp32_graphs.items()},
        "model": [str(path) for path in files],
        "ranges": str(tmp_path / "ranges.json"),
        "kills": 6,
        "seed": 4,
    }
    ran = subprocess.run([sys.executable, "-c", KILLED, json.dumps(given)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    *kills, last = map(json.loads, ran.stdout.splitlines())
    assert {kill["left"] for kill in kills} <= {"nothing", "whole"}
    assert [kill["signal"] for kill in kills] == [signal.SIGKILL] * 6
    assert last == {"left": "whole", "beside": ["bundle"]}
