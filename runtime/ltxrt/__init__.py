# SPDX-License-Identifier: Apache-2.0
"""LTX-2.3 audio-to-video: sound, prompt and first frame in, lip-synced MP4 out.

Names are loaded when they are first used, so that ``import ltxrt`` costs nothing and ``ltxrt --help`` little.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle
    from .errors import (
        BundleError,
        CapacityError,
        EngineError,
        ExportError,
        LtxrtError,
        MediaError,
        OutputError,
        RequestError,
        VerificationError,
    )
    from .pipeline import Pipeline
    from .preset import Preset
    from .request import Request
    from .result import Fragment, Progress, Result

    __version__: str

__all__ = [
    "Bundle",
    "BundleError",
    "CapacityError",
    "EngineError",
    "ExportError",
    "Fragment",
    "LtxrtError",
    "MediaError",
    "OutputError",
    "Pipeline",
    "Preset",
    "Progress",
    "Request",
    "RequestError",
    "Result",
    "VerificationError",
    "__version__",
]

_HOMES = {
    "Bundle": "bundle",
    "Fragment": "result",
    "Pipeline": "pipeline",
    "Preset": "preset",
    "Progress": "result",
    "Request": "request",
    "Result": "result",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        value = import_module("importlib.metadata").version("ltxrt")
    else:
        value = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
