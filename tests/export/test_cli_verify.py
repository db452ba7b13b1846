# SPDX-License-Identifier: Apache-2.0
"""``ltxrt-export verify``: the shipped bundle passes; a bundle that was tampered with fails, hashes or not."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.torch import load_file, save_file

from ltxrt.bundle import Bundle
from ltxrt_export.cli import run
from ltxrt_export.tiny.write import write_tiny
from ltxrt_export.weights import TensorFile

Capture = pytest.CaptureFixture[str]
FLAGS = ("--network", "upsampler", "--seed", "3")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(Bundle.open().path, folder)
    return folder


def manifest(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "manifest.json").read_text("utf-8"))


def rehashed(bundle: Path, **changes: Any) -> None:
    """Make the manifest agree with the files, as whoever meant to deceive would."""
    data = manifest(bundle)
    for name in data["files"]:
        content = (bundle / name).read_bytes()
        data["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (bundle / "manifest.json").write_text(json.dumps(data | changes), "utf-8")


def upsampler(bundle: Path) -> Path:
    return Bundle.open(bundle).file(Bundle.open(bundle).network("high", "upsampler").file)


def test_the_shipped_bundle_passes(capsys: Capture) -> None:
    assert run(["verify", *FLAGS]) == 0
    out, err = capsys.readouterr()
    header, weights, outputs = out.splitlines()
    assert header.split() == ["network", "precision", "presets", "output", "runs", "error", "limit", "worst", "at"]
    assert weights.split()[:6] == ["upsampler", "fp32", "low,medium,high,maximum", "weights", "1", "0.00e+00"]
    assert outputs.split()[:5] == ["upsampler", "fp32", "low,medium,high,maximum", "upsampled", "5"]
    assert weights.endswith("ok")
    assert outputs.endswith("ok")
    assert "inputs of seed 3" in err
    assert "upsampler: 10/10" in err


def test_json(capsys: Capture) -> None:
    assert run(["verify", str(Bundle.open().path), *FLAGS, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["passed"], result["seed"], result["engines_not_run"]) == (True, 3, [])
    (network,) = result["networks"]
    assert (network["network"], network["precision"], network["passed"]) == ("upsampler", "fp32", True)
    checks = network["checks"]
    assert [check["output"] for check in checks] == ["weights"] + ["upsampled"] * 5
    assert checks[-1]["sizes"] == {"f": 2, "h": 2, "w": 64}
    assert all(check["passed"] and check["error"] <= check["limit"] for check in checks)


def test_without_a_seed_a_fresh_one_is_shown(capsys: Capture) -> None:
    shown: set[str] = set()
    for _ in range(2):
        assert run(["verify", "--network", "upsampler"]) == 0
        shown.add(capsys.readouterr().err.splitlines()[0])
    assert len(shown) == 2
    assert all(line.startswith("inputs of seed ") for line in shown)


def test_flipped_weights(capsys: Capture, copied: Path) -> None:
    file = copied / "networks" / "ltx-2.3-tiny-upscaler.safetensors"
    ref = TensorFile.open(file).tensors["final_conv.weight"]
    data = bytearray(file.read_bytes())
    for index in range(64):
        data[ref.offset + 2 * index + 1] ^= 0x80
    file.write_bytes(data)
    # The manifest still has the old hash.
    assert run(["verify", str(copied), *FLAGS]) == 5
    assert "does not have the hash of the manifest" in capsys.readouterr().err
    rehashed(copied)
    assert run(["verify", str(copied), *FLAGS]) == 9
    out, err = capsys.readouterr()
    _, weights, outputs = out.splitlines()
    assert "weights: final_conv.weight" in weights
    assert weights.endswith("FAIL")
    assert outputs.endswith("FAIL")
    assert err.splitlines()[-1] == f"error: {copied}: upsampler fp32: not what the torch class makes of the same inputs"


def test_a_graph_with_another_activation(capsys: Capture, copied: Path) -> None:
    """No weight file differs: only running it tells."""
    path = upsampler(copied)
    model = onnx.load(path, load_external_data=False)
    first = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    first.op_type = "Tanh"
    path.write_bytes(model.SerializeToString())
    rehashed(copied)
    assert run(["verify", str(copied), *FLAGS, "--json"]) == 9
    result = json.loads(capsys.readouterr().out)
    checks = result["networks"][0]["checks"]
    assert checks[0]["passed"]
    assert not any(check["passed"] for check in checks[1:])
    assert result["passed"] is False


def test_infinities_are_no_number_in_json(capsys: Capture, copied: Path) -> None:
    file = copied / "networks" / "ltx-2.3-tiny-upscaler.safetensors"
    ref = TensorFile.open(file).tensors["final_conv.weight"]
    data = bytearray(file.read_bytes())
    data[ref.offset : ref.offset + 2] = b"\xc0\x7f"
    file.write_bytes(data)
    rehashed(copied)
    assert run(["verify", str(copied), *FLAGS, "--json"]) == 9
    text = capsys.readouterr().out
    checks = json.loads(text, parse_constant=lambda name: pytest.fail(name))["networks"][0]["checks"]
    assert [check["error"] for check in checks] == [None] * 6


def test_engines_are_said_not_to_be_run(capsys: Capture, copied: Path) -> None:
    key = manifest(copied)["presets"]["high"]["upsampler"]
    digest = "0" * 64
    engine = {
        "network": key,
        "file": "networks/engine.plan",
        "layers": "networks/engine.json",
        "key": {
            "schema_version": 1,
            "onnx_sha256": digest,
            "weights_sha256": [],
            "gpu_name": "NVIDIA L40S",
            "compute_capability": "8.9",
            "tensorrt_version": "11.4.0",
            "cuda_version": "13.0",
            "profiles": [],
            "options": {},
        },
        "key_sha256": digest,
        "built_with": {},
    }
    data = manifest(copied)
    for name in ("networks/engine.plan", "networks/engine.json"):
        (copied / name).write_bytes(b"{}")
        data["files"][name] = {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}
    (copied / "manifest.json").write_text(json.dumps(data | {"engines": {"upsampler-l40s": engine}}), "utf-8")
    assert run(["verify", str(copied), *FLAGS]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"engine upsampler-l40s of {key} for NVIDIA L40S: not run: ")
    assert run(["verify", str(copied), *FLAGS, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["engines_not_run"]
    assert (entry["key"], entry["network"]) == ("upsampler-l40s", key)
    assert "NVIDIA" in entry["reason"]


def test_another_checkpoint(capsys: Capture, tmp_path: Path) -> None:
    paths = write_tiny(tmp_path / "other", seed=7)
    flags = [
        f"--checkpoint={paths.checkpoint}",
        f"--text-encoder={paths.text_encoder}",
        f"--upsampler={paths.upsampler}",
    ]
    assert run(["verify", *FLAGS, *flags]) == 9
    error = capsys.readouterr().err.splitlines()[-1]
    made = Bundle.open().manifest.model.checkpoint_sha256[:12]
    assert f"made from ltx-2.3-tiny with sha256 {made}…; {paths.checkpoint} has " in error


def test_a_bundle_of_another_model_needs_its_files(capsys: Capture, copied: Path) -> None:
    data = manifest(copied)
    data["model"] |= {"checkpoint_sha256": "0" * 64, "name": "ltx-2.3-22b-distilled-1.1"}
    (copied / "manifest.json").write_text(json.dumps(data), "utf-8")
    assert run(["verify", str(copied), *FLAGS]) == 9
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"error: {copied}: made from ltx-2.3-22b-distilled-1.1; name its --checkpoint, --text-encoder and --upsampler"
    )


def test_other_loras(capsys: Capture, copied: Path, tmp_path: Path) -> None:
    stored = load_file(copied / "networks" / "ltx-2.3-tiny.safetensors")
    layer = "diffusion_model.transformer_blocks.0.attn1.to_q"
    rows, columns = stored[f"model.{layer}.weight"].shape
    lora = tmp_path / "style.safetensors"
    tensor = stored[f"model.{layer}.weight"]
    save_file(
        {f"{layer}.lora_A.weight": tensor[:2].clone(), f"{layer}.lora_B.weight": tensor[:, :2].clone()}, str(lora)
    )
    assert (rows, columns) == tensor.shape
    assert run(["verify", str(copied), *FLAGS, f"--lora={lora}:0.5"]) == 9
    assert "made with other LoRAs than are given; allowed: no --lora" in capsys.readouterr().err
    data = manifest(copied)
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    data["model"]["loras"] = [{"name": "style", "scale": 0.5, "sha256": digest}]
    (copied / "manifest.json").write_text(json.dumps(data), "utf-8")
    for given in ([], [f"--lora={lora}:0.6"]):
        assert run(["verify", str(copied), *FLAGS, *given]) == 9
        assert "allowed: --lora style.safetensors:0.5" in capsys.readouterr().err
    assert run(["verify", str(copied), *FLAGS, f"--lora={lora}:0.5"]) == 0


def test_a_network_that_there_is_not(capsys: Capture) -> None:
    assert run(["verify", "--network", "vocoder"]) == 2
    assert "'vocoder' is no network; allowed: text_encoder, audio_encoder" in capsys.readouterr().err


@pytest.mark.slow
def test_every_network_of_the_shipped_bundle(capsys: Capture) -> None:
    assert run(["verify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["networks"]) == 6
    streams = [c for n in result["networks"] for c in n["checks"] if c["output"] == "stream"]
    assert sorted(check["sizes"]["chunk"] for check in streams) == [1, 4]
