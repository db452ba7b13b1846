# SPDX-License-Identifier: Apache-2.0
"""``ltxrt-export build``."""

import json
import shutil

import pytest
import typer
from typer.testing import CliRunner

from ltxrt.bundle import Bundle, tiny_bundle_path
from ltxrt.errors import EngineError, ExportError, RequestError
from ltxrt_export.engines import cli, environment


@pytest.fixture
def run(monkeypatch, tools):
    """``run("build", ...)`` on a machine with a fake GPU: (exit code, stdout, stderr), or what it raises."""
    parent = typer.Typer()
    parent.callback()(lambda: None)
    parent.add_typer(cli.app)

    def open_toolchain(choice):
        environment.choose_gpu((tools.gpu,), choice)
        return tools

    monkeypatch.setattr(environment, "open_toolchain", open_toolchain)

    def invoke(*arguments):
        result = CliRunner().invoke(parent, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return invoke


def test_a_build_and_a_second_one(run, bundle) -> None:
    code, out, err = run("build", bundle)
    assert (code, out) == (0, f"{bundle}\n")
    lines = err.splitlines()
    assert lines[0] == "TensorRT 11.4.0.106, GPU 0: NVIDIA H200"
    assert sum("built in" in line for line in lines) == 6
    assert any(line.endswith("Building 66 %") for line in lines)
    assert not any("Timing" in line for line in lines)
    assert len(Bundle.open(bundle).manifest.engines) == 6
    _, _, err = run("build", bundle)
    assert sum("unchanged" in line for line in err.splitlines()) == 6


def test_json_and_another_folder(run, bundle, tmp_path) -> None:
    out_folder = tmp_path / "out"
    code, out, _ = run("build", bundle, "--out", out_folder, "--json", "--preset", "low", "--preset", "high")
    assert code == 0
    result = json.loads(out)
    assert result["bundle"] == str(out_folder)
    manifest = Bundle.open(out_folder).manifest
    for row in result["engines"]:
        assert row["status"] == "built"
        assert manifest.engines[row["engine"]].network == row["network"]
        assert (out_folder / row["file"]).stat().st_size == row["bytes"]
    assert Bundle.open(bundle).manifest.engines == {}


def test_options_reach_the_build(run, bundle, fake, tmp_path) -> None:
    timings = tmp_path / "mine.timing"
    run("build", bundle, "--timing-cache", timings, "--workspace-gib", 3, "--optimization-level", 1)
    assert timings.is_file()
    assert {size for _, size in fake.named("BuilderConfig.set_memory_pool_limit")} == {3 * 1024**3}
    options = [entry.key.options for entry in Bundle.open(bundle).manifest.engines.values()]
    assert all(option["optimization_level"] == 1 and option["workspace_gib"] == 3 for option in options)


def test_what_would_be_built(run, fake) -> None:
    code, out, _ = run("build", tiny_bundle_path(), "--dry-run")
    assert code == 0
    assert sum(line.startswith(("denoiser", "video_decoder")) for line in out.splitlines()) == 2
    assert "  short_full: Nv " in out
    code, out, _ = run("build", tiny_bundle_path(), "--dry-run", "--json")
    rows = {row["network"].partition("-")[0]: row for row in json.loads(out)["networks"]}
    assert rows["denoiser"]["weight_bytes"] > 10**6
    low, tuned, high = rows["denoiser"]["profiles"]["long_full"]["Nv"]
    assert low < tuned < high
    assert fake.calls == []


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("--gpu", "3"), RequestError, "gpu: '3' is not allowed; allowed: auto, 0 (NVIDIA H200)"),
        (("--preset", "ultra"), RequestError, "preset: 'ultra' is not allowed"),
        (("--buckets", "none.toml"), ExportError, "none.toml cannot be read"),
        (("--dry-run", "--preset", "ultra"), RequestError, "preset: 'ultra' is not allowed"),
    ],
)
def test_refusals(run, bundle, arguments, kind, message) -> None:
    with pytest.raises(kind) as caught:
        run("build", bundle, *arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("arguments", [("--workspace-gib", "0"), ("--optimization-level", "6"), ("--gpus", "0")])
def test_usage_errors(run, bundle, arguments) -> None:
    assert run("build", bundle, *arguments)[0] == 2


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a driver")
def test_a_machine_without_a_gpu(bundle) -> None:
    parent = typer.Typer()
    parent.callback()(lambda: None)
    parent.add_typer(cli.app)
    result = CliRunner().invoke(parent, ["build", str(bundle)])
    assert isinstance(result.exception, EngineError)
    assert "no NVIDIA driver" in str(result.exception)
    assert not (bundle / "engines").exists()
