# SPDX-License-Identifier: Apache-2.0
"""What doctor says about machines that are not this one."""

import json
from importlib import metadata

import pytest

from ltxrt import cli, doctor
from ltxrt.backends import this_machine
from ltxrt.bundle import Bundle
from ltxrt.engine_store import EngineStore
from ltxrt.errors import BundleError, EngineError
from ltxrt.testing import fake_pipeline

H100 = "NVIDIA H100 80GB HBM3, 580.95.05, 81559 MiB, 9.0\n"


@pytest.fixture
def whole_bundle(monkeypatch):
    """A tiny bundle that opens and loads."""
    monkeypatch.setattr(Bundle, "open", classmethod(lambda cls, path=None, *, verify=False: fake_pipeline().bundle))
    monkeypatch.setattr(EngineStore, "engines", lambda self, preset: None)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """``tool(script)`` puts an ``nvidia-smi`` with that shell script in the place of all programs."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def write(script):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return write


def finding(name):
    return next(found for found in doctor.examine() if found.name == name)


def without(monkeypatch, *modules):
    """Importing these modules fails, as with a broken installation."""
    real = doctor.import_module

    def broken(name):
        if name in modules:
            raise ImportError("libfoo.so.1: cannot open shared object file\nmore")
        return real(name)

    monkeypatch.setattr(doctor, "import_module", broken)


def test_a_whole_machine(whole_bundle, capsys):
    findings = tuple(doctor.examine())
    assert doctor.works(findings)
    names = [found.name for found in findings]
    assert len(names) == len(set(names))
    expected = {"python", "platform", "cpu", "memory", "ltxrt", "numpy", "onnxruntime", "av", "nvidia", "encoders"}
    assert expected <= set(names)
    assert {"tensorrt", "onnxruntime-cuda", "onnxruntime-cpu", "tiny bundle", "onnxruntime files"} <= set(names)
    assert not {"torch", "hatchling", "pytest", "fastapi"} & set(names)  # extras are no part of the CPU path
    assert all(found.detail and "\n" not in found.detail for found in findings)
    assert cli.run(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("ok ")
    assert cli.run(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert {"name": "encoders", "status": "ok", "detail": "libx264, aac"} in told["findings"]


@pytest.mark.skipif(this_machine().gpu is not None, reason="this machine has a GPU")
def test_faster_backends_are_off_with_a_reason():
    off = {found.name: found for found in doctor.examine() if found.status == "off"}
    assert {"tensorrt", "onnxruntime-cuda"} <= set(off)
    assert "no NVIDIA driver" in off["tensorrt"].detail
    assert "no NVIDIA driver" in off["onnxruntime-cuda"].detail


def test_gpus(tool):
    tool(f"echo '{H100.strip()}'; echo '{H100.strip()}'")
    found = doctor.nvidia()
    assert found.status == "ok"
    assert found.detail.count("NVIDIA H100 80GB HBM3 / 580.95.05 / 81559 MiB / 9.0") == 2


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        ("echo 'No devices were found'; exit 6", "finds no GPU (No devices were found)"),
        ("echo 'driver/library version mismatch' >&2; exit 18", "finds no GPU (driver/library version mismatch)"),
        ("exit 0", "finds no GPU (it says nothing)"),
    ],
)
def test_a_driver_without_gpus(tool, script, detail):
    tool(script)
    assert doctor.nvidia() == doctor.Finding("nvidia", "off", f"nvidia-smi {detail}")


def test_a_driver_that_hangs(tool, monkeypatch):
    tool("while :; do :; done")
    monkeypatch.setattr(doctor, "_SMI_SECONDS", 0.2)
    assert doctor.nvidia().detail == "nvidia-smi does not answer (TimeoutExpired)"


def test_a_tool_that_does_not_start(tmp_path, tool):
    tool("")
    (tmp_path / "nvidia-smi").write_bytes(b"\x7fELF")
    assert doctor.nvidia().detail == "nvidia-smi does not answer (OSError)"


def test_no_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: None)
    assert doctor.nvidia().detail == "no nvidia-smi; a driver library (libcuda.so.1) is installed"

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(doctor.ctypes, "CDLL", missing)
    assert doctor.nvidia().detail == "no nvidia-smi; no NVIDIA driver (libcuda.so.1) is installed"


def test_both_onnxruntimes(monkeypatch):
    version = metadata.version
    monkeypatch.setattr(
        doctor.metadata, "version", lambda name: "1.31.0" if name == "onnxruntime-gpu" else version(name)
    )
    found = finding("onnxruntime files")
    assert found.status == "warning"
    assert "overwrite each other's files" in found.detail


def test_a_missing_requirement(monkeypatch, capsys):
    version = metadata.version

    def incomplete(name):
        if name == "soxr":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", incomplete)
    found = finding("soxr")
    assert found.status == "failed"
    assert found.detail.startswith("not installed; ltxrt requires soxr")
    assert cli.run(["doctor"]) == 1
    assert "failed  soxr" in capsys.readouterr().out


def test_a_checkout_that_is_not_installed(monkeypatch):
    version = metadata.version

    def unknown(name):
        if name == "ltxrt":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", unknown)
    found = finding("ltxrt")
    assert found.status == "warning"
    assert found.detail.startswith("runs from its sources")


def test_packages_that_do_not_load(monkeypatch):
    without(monkeypatch, "ltxrt.engine_store", "av.codec", "ltxrt.bundle")
    broken = {found.name: found.detail for found in doctor.examine() if found.status == "failed"}
    assert set(broken) == {"onnxruntime-cpu", "encoders", "tiny bundle"}
    assert broken["onnxruntime-cpu"] == "does not load: libfoo.so.1: cannot open shared object file"


def test_missing_encoders(monkeypatch):
    codec = doctor.import_module("av.codec")
    monkeypatch.setattr(codec, "codecs_available", {"aac", "mpeg4"})
    assert finding("encoders") == doctor.Finding("encoders", "failed", "this build of FFmpeg lacks libx264")


@pytest.mark.parametrize("error", [BundleError("tables.npz is damaged"), EngineError("denoiser: cannot load")])
def test_a_broken_bundle(whole_bundle, monkeypatch, error):
    def fails(*_, **__):
        raise error

    target, name = (Bundle, "open") if isinstance(error, BundleError) else (EngineStore, "engines")
    monkeypatch.setattr(target, name, fails)
    assert finding("tiny bundle") == doctor.Finding("tiny bundle", "failed", str(error))


@pytest.mark.parametrize(("limit", "less"), [("1073741824\n", True), ("max\n", False), (f"{2**62}\n", False)])
def test_memory_of_a_container(tmp_path, monkeypatch, limit, less):
    path = tmp_path / "memory.max"
    monkeypatch.setattr(doctor, "_CGROUP_LIMIT", path)
    physical = finding("memory").detail
    path.write_text(limit)
    assert finding("memory").detail == ("1.0 GiB" if less else physical)
