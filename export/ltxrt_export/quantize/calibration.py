# SPDX-License-Identifier: Apache-2.0
"""The result of a calibration: ranges of activations as a small JSON file that can be reviewed, diffed and reused.

Activations are named by the checkpoint key of the weight that they are multiplied by, which no version of the tracer
changes. Tensors near the limit of FP16 are named as in the graph, since they may be anywhere in it.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ltxrt.errors import ExportError, OutputError, shown
from ltxrt.manifest import LoraEntry, ModelEntry

__all__ = ["FORMAT", "PERCENTILE", "Calibration", "LayerRange", "NetworkRanges", "Origin", "rounded"]

FORMAT = 1
#: Rank of the percentile that is kept beside the largest magnitude.
PERCENTILE = 99.99

_Magnitude = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerRange(_Entry):
    """Magnitudes of the input of one linear layer."""

    amax: _Magnitude
    percentile: _Magnitude


class NetworkRanges(_Entry):
    """Ranges of one network.

    Attributes:
        layers: By checkpoint key of the layer's weight.
        large: Largest magnitude by graph tensor, for tensors within a factor of eight of FP16's limit or beyond it.
    """

    layers: dict[str, LayerRange]
    large: dict[str, _Magnitude]


class Origin(_Entry):
    """What a calibration was made from.

    Attributes:
        model: Checkpoint name.
        checkpoint_sha256: Hash of the checkpoint file.
        semantics: Generation of the modulation rules.
        stage_1_sigmas: Schedule of stage 1.
        stage_2_sigmas: Schedule of stage 2.
        clips: One line a clip: size, frames, sound, image, prompt.
        loras: What was fused into the checkpoint.
    """

    model: str
    checkpoint_sha256: str
    semantics: str
    stage_1_sigmas: tuple[float, ...]
    stage_2_sigmas: tuple[float, ...]
    clips: tuple[str, ...]
    loras: tuple[LoraEntry, ...] = ()


class Calibration(_Entry):
    """All of it.

    Attributes:
        format: Version of this file.
        made_from: What it was made from.
        percentile: Rank of the percentiles.
        networks: Ranges by network name.
    """

    format: Literal[1] = FORMAT
    made_from: Origin
    percentile: float = PERCENTILE
    networks: dict[str, NetworkRanges]

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read a calibration.

        Raises:
            ExportError: It cannot be read, or is not one.
        """
        try:
            return cls.model_validate(json.loads(path.read_text("utf-8")))
        except OSError as error:
            raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
        except ValidationError as error:
            finding = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in finding["loc"]) or "the file"
            raise ExportError(f"{path}: not a calibration: {where}: {finding['msg']}") from None
        except (ValueError, RecursionError) as error:
            raise ExportError(f"{path}: not JSON: {error}") from error

    def save(self, path: Path) -> None:
        """Write it, whole or not at all; the same ranges give the same bytes.

        Raises:
            OutputError: It cannot be written.
        """
        partial = path.with_name(f"{path.name}.partial")
        text = json.dumps(self.model_dump(mode="json"), indent=1) + "\n"
        try:
            partial.write_text(text, "utf-8")
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error

    def check_model(self, model: ModelEntry, *, other_loras: bool = False) -> None:
        """Refuse a calibration of another checkpoint, of other modulation rules, or with other LoRAs.

        A LoRA moves ranges, mostly by little. A range that is too small clips what exceeds it, so that whoever takes a
        calibration made with other LoRAs, or with none, has to say so.

        Args:
            model: What is about to be quantised.
            other_loras: Take it even so.

        Raises:
            ExportError: It is one.
        """
        made, wanted = self.made_from, (model.checkpoint_sha256, model.semantics)
        if (made.checkpoint_sha256, made.semantics) != wanted:
            raise ExportError(
                f"the calibration was made from {made.model} {made.checkpoint_sha256[:12]} by rules {made.semantics},"
                f" this is {model.name} {model.checkpoint_sha256[:12]} by rules {model.semantics}: calibrate again"
            )
        if not other_loras and _fused(made.loras) != _fused(model.loras):
            raise ExportError(
                f"the calibration was made with {_names(made.loras)}, this model has {_names(model.loras)}: calibrate"
                " again, or give --other-loras where the change is small"
            )

    def ranges(self, network: str, keys: Iterable[str], kind: Literal["amax", "percentile"]) -> dict[str, float]:
        """Range of the input of each layer, by weight key.

        Raises:
            ExportError: A layer is not in the calibration.
        """
        layers: Mapping[str, LayerRange] = self.networks[network].layers if network in self.networks else {}
        keys = list(keys)
        missing = [key for key in keys if key not in layers]
        if missing:
            raise ExportError(
                f"the calibration of {shown(network)} lacks {len(missing)} layers ({missing[0]}): calibrate again"
            )
        return {key: getattr(layers[key], kind) for key in keys}


def _fused(loras: Iterable[LoraEntry]) -> list[tuple[str, float]]:
    """What counts of LoRAs: their contents and scales, in any order; one of scale 0 changes nothing."""
    return sorted((lora.sha256, lora.scale) for lora in loras if lora.scale)


def _names(loras: Iterable[LoraEntry]) -> str:
    named = [f"{lora.name} x {lora.scale:g} ({lora.sha256[:12]})" for lora in loras]
    return f"LoRA {', '.join(named)}" if named else "no LoRA"


def rounded(value: float) -> float:
    """Four significant digits, rounded up so that a range still covers what was measured."""
    if value == 0.0:
        return 0.0
    result = float(f"{value:.3e}")
    return result if result >= value else float(f"{value * 1.0005:.3e}")
