# SPDX-License-Identifier: Apache-2.0
"""Everything that ltxrt raises on purpose, and the exit code that the command line gives it.

    LtxrtError                      1
    ├── RequestError (ValueError)   3   a field of the request is refused
    │   └── MediaError              4   the audio or image behind a field is refused
    ├── BundleError                 5   the bundle is missing, damaged or of another version
    ├── EngineError (RuntimeError)  6   a network cannot be loaded or run on this machine
    │   └── CapacityError           6   the clip is more than its engines or memory serve
    ├── OutputError (OSError)       7   the result cannot be written
    ├── VerificationError           8   a finished file is not what it should be
    └── ExportError                 9   a checkpoint cannot be turned into a bundle

Exit code 0 is success, 2 a command line that does not parse, 130 an interruption (Ctrl-C).
Every message is one line: what was wrong, the value that arrived, and what is allowed.
"""

from typing import Any

__all__ = [
    "BundleError",
    "CapacityError",
    "EngineError",
    "ExportError",
    "LtxrtError",
    "MediaError",
    "OutputError",
    "RequestError",
    "VerificationError",
]

_LONGEST_NAME = 60


class LtxrtError(Exception):
    """Base of all errors that ltxrt raises on purpose."""

    exit_code = 1


class RequestError(LtxrtError, ValueError):
    """A field of the request is refused.

    Attributes:
        field: The field's name as in the request, for example ``num_frames``.
        value: What arrived.
        allowed: What would have been accepted, in words.
    """

    exit_code = 3

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(f"{_name(field)}: {shown(value)} is not allowed; allowed: {allowed}")

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled as its message alone, which is not what this one is made of.
        return type(self), (self.field, self.value, self.allowed)


class MediaError(RequestError):
    """The audio or image that a field names is refused; ``problem`` says why."""

    exit_code = 4

    def __init__(self, field: str, value: object, problem: str, allowed: str) -> None:
        super().__init__(field, value, allowed)
        self.problem = problem
        self.args = (f"{_name(field)}: {shown(value)} {problem}; allowed: {allowed}",)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.problem, self.allowed)


class BundleError(LtxrtError):
    """The bundle is missing, damaged, of another schema version or made for another machine."""

    exit_code = 5


class EngineError(LtxrtError, RuntimeError):
    """A network cannot be loaded or run, or was fed tensors that it does not take."""

    exit_code = 6


class CapacityError(EngineError):
    """A clip is more than this machine's engines or memory serve. Nothing has run; others are served as before."""


class OutputError(LtxrtError, OSError):
    """The result cannot be written (no permission, no such folder, no space left)."""

    exit_code = 7


class VerificationError(LtxrtError):
    """A finished file was read back and is not what it should be."""

    exit_code = 8


class ExportError(LtxrtError):
    """A checkpoint cannot be read, does not fit its architecture, or cannot be exported."""

    exit_code = 9


def shown(value: object, limit: int = 120) -> str:
    """A value as an error message shows it: quoted, on one line, cut at ``limit`` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no int of more than 4300 digits
        text = f"{type(value).__name__} too long to write"
    text = " ".join(line.strip() for line in text.splitlines())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _name(field: str) -> str:
    """A field's name in a message; an unknown field is the caller's text and may hold anything."""
    return field if field.isprintable() and len(field) <= _LONGEST_NAME else shown(field, _LONGEST_NAME)
