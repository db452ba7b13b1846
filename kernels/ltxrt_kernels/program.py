# SPDX-License-Identifier: Apache-2.0
"""Everything that reaches the compiler for one kernel, once, in one canonical form: the key of what it makes.

Paths are left out on purpose: they say where the headers lie, their digest says what is in them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from .spec import Problem

__all__ = ["ARCHITECTURES", "KEY_SCHEMA", "CompilerIdentity", "Program", "architecture_for", "program"]

#: Architectures that kernels are compiled for: Ampere, Ada, Hopper, and both Blackwells.
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")

#: Raise it when this package changes what it makes of equal inputs: every key changes with it.
KEY_SCHEMA = 1

_INCLUDES = ("ltxrt.cuh",)
_OPTIONS = ("--std=c++17",)


@dataclass(frozen=True, slots=True)
class CompilerIdentity:
    """Which compiler it is, as far as the result may depend on it.

    Attributes:
        version: Of NVRTC, to the patch level.
        headers_sha256: Of the toolkit's headers that kernels include.
    """

    version: str
    headers_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One kernel's source, ready to compile.

    Attributes:
        entry: Name of the kernel's function.
        architecture: One of ``ARCHITECTURES``.
        source: CUDA C++.
        includes: Text of this package's own headers, by name.
        options: Of the compiler, sorted, without paths.
    """

    entry: str
    architecture: str
    source: str
    includes: Mapping[str, str]
    options: tuple[str, ...]

    def key(self, compiler: CompilerIdentity) -> str:
        """Hex SHA-256 of all that the result depends on."""
        content = {
            "schema": KEY_SCHEMA,
            "entry": self.entry,
            "architecture": self.architecture,
            "source": self.source,
            "includes": dict(self.includes),
            "options": self.options,
            "compiler": compiler.version,
            "headers": compiler.headers_sha256,
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()


def program(problem: Problem, architecture: str) -> Program:
    """The program behind a problem.

    Args:
        problem: Its launch table says what the source is compiled with.
        architecture: One of ``ARCHITECTURES``.

    Raises:
        ValueError: Another architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: {architecture!r} is not allowed; allowed: {', '.join(ARCHITECTURES)}")
    defines = sorted(f"--define-macro={name}={value}" for name, value in problem.launch().defines.items())
    return Program(
        entry=problem.op,
        architecture=architecture,
        source=_text(f"{problem.op}/kernel.cu"),
        includes={name: _text(f"include/{name}") for name in _INCLUDES},
        options=(*_OPTIONS, *defines),
    )


def architecture_for(compute_capability: tuple[int, int]) -> str:
    """The architecture whose code runs on a GPU.

    Code for a minor version runs on later ones of the same major version; code for ``sm_90a`` on 9.0 alone.

    Args:
        compute_capability: Major and minor version.

    Raises:
        ValueError: None does.
    """
    major, minor = compute_capability
    fitting = [
        name
        for name in ARCHITECTURES
        if divmod(int(name.removeprefix("sm_").removesuffix("a")), 10) <= (major, minor)
        and int(name.removeprefix("sm_").removesuffix("a")) // 10 == major
    ]
    if not fitting:
        raise ValueError(f"compute capability: {major}.{minor} is not allowed; allowed: 8.0 to 9.0, 10.x and 12.x")
    return fitting[-1]


@cache
def _text(path: str) -> str:
    return (files("ltxrt_kernels") / path).read_text("utf-8")
