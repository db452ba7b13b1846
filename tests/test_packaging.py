# SPDX-License-Identifier: Apache-2.0
"""What is installed: the wheel's contents, the public names, and what each extra pulls in."""

import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import ltxrt

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
BASE = {"numpy", "onnxruntime", "av", "soxr", "pillow", "tokenizers", "typer", "rich", "pydantic"}
MAX_BUNDLE_BYTES = 16 * 10**6


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def packaged(root, package):
    """Every file of a package in the checkout that belongs into the wheel."""
    return {
        path.relative_to(ROOT / root).as_posix()
        for path in (ROOT / root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_the_three_packages_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    packages = {"ltxrt": "runtime", "ltxrt_kernels": "kernels", "ltxrt_export": "export"}
    assert names == set().union(*(packaged(root, package) for package, root in packages.items()))
    assert {PurePosixPath(name).parts[0] for name in names} == set(packages)
    assert {f"{package}/py.typed" for package in packages} <= names
    assert {f"ltxrt/presets/{name}.toml" for name in ("low", "medium", "high", "maximum")} <= names
    assert {"ltxrt/assets/speech.flac", "ltxrt/assets/ORIGIN.md"} <= names
    assert not [name for name in names if "test_" in name or "conftest" in name]


def test_wheel_holds_the_tiny_bundle(wheel):
    bundle = [entry for entry in wheel.infolist() if entry.filename.startswith("ltxrt/bundles/tiny/")]
    assert "ltxrt/bundles/tiny/manifest.json" in {entry.filename for entry in bundle}
    assert sum(entry.file_size for entry in bundle) < MAX_BUNDLE_BYTES


def test_wheel_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "ltxrt = ltxrt.cli:main\nltxrt-export = ltxrt_export.cli:main" in wheel.read(name).decode()
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL"))
    assert "Tag: py3-none-any" in wheel.read(name).decode()


# --- requirements ---


def requirement_name(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


def test_base_requirements_are_these_alone():
    assert {requirement_name(requirement) for requirement in PROJECT["dependencies"]} == BASE
    assert len(PROJECT["dependencies"]) == len(BASE)


def test_requirements_have_a_floor_and_a_ceiling():
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *(item for extra in extras.values() for item in extra)]:
        specifiers = requirement.split("[")[-1].split("]")[-1]
        assert "==" in specifiers or (">=" in specifiers and "<" in specifiers), requirement


def test_no_extra_installs_the_other_onnxruntime():
    # The two distributions overwrite each other's files, and the base requires the one.
    for extra, requirements in PROJECT["optional-dependencies"].items():
        assert "onnxruntime-gpu" not in map(requirement_name, requirements), extra


def test_only_the_export_extra_needs_torch():
    extras = PROJECT["optional-dependencies"]
    assert [name for name, items in extras.items() if "torch" in map(requirement_name, items)] == ["export"]


# --- public names ---


def test_public_names():
    assert ltxrt.__all__ == sorted(ltxrt.__all__)
    for name in ltxrt.__all__:
        assert getattr(ltxrt, name) is not None
    assert set(ltxrt.__all__) <= set(dir(ltxrt))
    assert ltxrt.Pipeline is importlib.import_module("ltxrt.pipeline").Pipeline
    assert set(importlib.import_module("ltxrt.errors").__all__) <= set(ltxrt.__all__)
    assert ltxrt.__version__ == PROJECT["version"]
    with pytest.raises(AttributeError, match="no attribute 'Pipelime'"):
        _ = ltxrt.Pipelime


def test_import_is_light():
    script = "import sys; before = set(sys.modules); import ltxrt; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    own = {name for name in loaded if name.startswith("ltxrt")}
    assert own == {"ltxrt"}
    assert not {"numpy", "pydantic", "onnxruntime", "av", "typer", "rich"} & set(loaded)
