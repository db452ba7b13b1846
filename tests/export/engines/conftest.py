# SPDX-License-Identifier: Apache-2.0
"""A machine that builds engines: a fake TensorRT, a fake driver, and bundles to build."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from ltxrt.bundle import tiny_bundle_path
from ltxrt.gpu import Gpu
from ltxrt_export.engines.environment import Toolchain

HERE = Path(__file__).parent
H200 = Gpu(
    index=0,
    name="NVIDIA H200",
    compute_capability=(9, 0),
    memory_bytes=139 * 1024**3,
    cuda_version=(13, 0),
)


def load(name: str) -> Any:
    """A module of this folder, which is no package."""
    if name not in sys.modules:
        spec = spec_from_file_location(name, HERE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class FakeDriver:
    """The driver's calls that a build makes."""

    def __init__(self, free: int = 100 * 1024**3) -> None:
        self.free = free
        self.current_gpus: list[int] = []

    @contextmanager
    def current(self, gpu: Gpu) -> Iterator[None]:
        self.current_gpus.append(gpu.index)
        yield
        self.current_gpus.pop()

    def free_bytes(self) -> int:
        assert self.current_gpus, "asked outside of a context"
        return self.free


@pytest.fixture
def gpu() -> Gpu:
    return H200


@pytest.fixture
def fake() -> Any:
    """A fake ``tensorrt`` module: see ``fake_tensorrt.py``."""
    return load("fake_tensorrt").FakeTensorRT()


@pytest.fixture
def tools(fake: Any, gpu: Gpu) -> Toolchain:
    return Toolchain(fake, FakeDriver(), gpu, "580.65.06")  # type: ignore[arg-type]


@pytest.fixture
def copy_bundle(tmp_path: Path) -> Callable[[str], Path]:
    """``copy_bundle(name)``: a tiny bundle of one's own, without engines."""

    def copy(name: str = "bundle") -> Path:
        source = tiny_bundle_path()
        shutil.copytree(source, tmp_path / name, copy_function=_link)
        return tmp_path / name

    return copy


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


@pytest.fixture
def bundle(copy_bundle: Callable[..., Path]) -> Path:
    return copy_bundle()
