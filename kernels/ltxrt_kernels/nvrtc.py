# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's runtime compiler, which needs neither a GPU nor a driver.

It comes with the ``gpu`` extra, as do the toolkit's headers; nothing here is imported before it is needed.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from .program import CompilerIdentity, Program
from .resources import Resources, resources_of

__all__ = ["Compiled", "CompilerError", "compile_program", "identity"]

#: What kernels include of the toolkit, and the headers that those include in turn.
_HEADERS = re.compile(r"cuda_(bf16|fp16|fp8|fp6|fp4)\.(h|hpp)|vector_(types|functions)\.(h|hpp)")
_EXTRA = "pip install 'ltxrt[gpu]'"


class CompilerError(RuntimeError):
    """There is no compiler, or a kernel does not compile."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel for one architecture.

    Attributes:
        code: CUBIN, or PTX as text.
        resources: What a thread and a block of it use; None for PTX, which is not allocated yet.
    """

    code: bytes
    resources: Resources | None


@cache
def identity() -> CompilerIdentity:
    """The compiler that is installed, and its headers.

    Raises:
        CompilerError: There is none, or its headers are missing.
    """
    version = _answer(_nvrtc().nvrtcVersion(), "nvrtcVersion")
    try:
        exact = metadata.version("nvidia-cuda-nvrtc")
    except metadata.PackageNotFoundError:  # from a toolkit that is installed otherwise
        exact = "unknown"
    digest = hashlib.sha256()
    for folder in _include_folders():
        for path in sorted(path for path in folder.iterdir() if _HEADERS.fullmatch(path.name)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        for path in sorted((folder / "nv").rglob("*")):
            digest.update(path.read_bytes() if path.is_file() else b"")
    return CompilerIdentity(f"{'.'.join(map(str, version))} ({exact})", digest.hexdigest())


def compile_program(program: Program, form: Literal["cubin", "ptx"] = "cubin") -> Compiled:
    """Compile a kernel.

    Args:
        program: What to compile.
        form: CUBIN, which is loaded as it is, or PTX, which TensorRT's ahead-of-time plugins take.

    Raises:
        CompilerError: There is no compiler, or it refuses the program; the message is its first error.
    """
    nvrtc = _nvrtc()
    names = [name.encode() for name in program.includes]
    texts = [text.encode() for text in program.includes.values()]
    made = nvrtc.nvrtcCreateProgram(program.source.encode(), f"{program.entry}.cu".encode(), len(names), texts, names)
    handle = _answer(made, "nvrtcCreateProgram")
    try:
        options = [
            f"--gpu-architecture={program.architecture}",
            *program.options,
            *(f"--include-path={folder}" for folder in _include_folders()),
            "--ptxas-options=-v",
        ]
        (status,) = nvrtc.nvrtcCompileProgram(handle, len(options), [option.encode() for option in options])
        log = _text_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, handle).decode(errors="replace")
        if status.value:
            raise CompilerError(f"{program.entry} for {program.architecture}: {_first_error(log) or status.name}")
        if form == "ptx":
            return Compiled(_text_of(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, handle).rstrip(b"\0"), None)
        code = _text_of(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, handle)
        return Compiled(code, resources_of(log, program.entry))
    finally:
        nvrtc.nvrtcDestroyProgram(handle)


@cache
def _nvrtc() -> Any:
    """The bindings, once the library behind them has been found."""
    try:
        bindings = import_module("cuda.bindings.nvrtc")
        pathfinder = import_module("cuda.pathfinder")
    except ImportError as error:
        raise CompilerError(f"NVRTC is not installed ({error}); {_EXTRA}") from error
    try:
        pathfinder.load_nvidia_dynamic_lib("nvrtc")
    except RuntimeError as error:  # pathfinder's own error is one
        raise CompilerError(f"NVRTC's library does not load ({str(error).splitlines()[0]}); {_EXTRA}") from error
    return bindings


@cache
def _include_folders() -> tuple[Path, ...]:
    pathfinder = import_module("cuda.pathfinder")
    found = {name: pathfinder.find_nvidia_header_directory(name) for name in ("cudart", "cccl")}
    missing = [name for name, folder in found.items() if folder is None]
    if missing:
        raise CompilerError(f"the CUDA headers of {' and '.join(missing)} are not installed; {_EXTRA}")
    return tuple(Path(folder) for folder in found.values())


def _answer(returned: tuple[Any, ...], call: str) -> Any:
    """What a call gives beside its status.

    Raises:
        CompilerError: It failed.
    """
    status, *values = returned
    if status.value:
        raise CompilerError(f"{call}: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _text_of(size_of: Any, get: Any, handle: Any) -> bytes:
    """One of the program's results: first its size, then the bytes, which the bindings write into what they get."""
    content = b" " * _answer(size_of(handle), "size")
    if content:
        _answer((*get(handle, content), None), "result")
    return content


def _first_error(log: str) -> str:
    return next((line.strip() for line in log.splitlines() if "error" in line), "")
