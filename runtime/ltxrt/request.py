# SPDX-License-Identifier: Apache-2.0
"""What a caller may ask for: twelve fields, checked when the object is made.

The same names, defaults and ranges are the command line's flags and the HTTP body's JSON schema
(``Request.model_json_schema()``).
"""

import os
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .errors import RequestError
from .preset import PRESET_NAMES
from .shapes import CANVAS_MULTIPLE

__all__ = ["DEFAULT_NEGATIVE_PROMPT", "MAX_FRAMES", "MAX_SEED", "NAMED_SIZES", "Request", "Size"]

MAX_FRAMES = 481
MAX_SEED = 2**63 - 1
MIN_SIDE, MAX_SIDE = 128, 2048

#: Width and height of the named resolutions.
NAMED_SIZES: dict[str, tuple[int, int]] = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}

DEFAULT_NEGATIVE_PROMPT = (
    "color distortion, overexposure, static, blurry details, subtitles, style, artwork, painting, frame, still, "
    "dim overall tone, worst quality, low quality, JPEG compression artifacts, ugly, mutilated, extra fingers, "
    "poorly drawn hands, poorly drawn face, deformed, disfigured, malformed limbs, fused fingers, motionless frame, "
    "cluttered background, three legs, crowded background, walking backwards"
)

_ALLOWED = {
    "prompt": "text with at least one character that is not a space, at most 10000 characters",
    "input_audio": "the path of an audio file",
    "input_image": "the path of an image file, or nothing",
    "match_audio_length": "true or false",
    "num_frames": f"a whole number from 9 to {MAX_FRAMES}",
    "resolution": (
        f"auto, {', '.join(NAMED_SIZES)}, or WIDTHxHEIGHT with both sides a multiple of {CANVAS_MULTIPLE} "
        f"from {MIN_SIDE} to {MAX_SIDE}"
    ),
    "frames_per_second": "a number from 1 to 60",
    "image_strength": "a number from 0 to 1",
    "generate_audio": "true or false",
    "video_quality": ", ".join(PRESET_NAMES),
    "negative_prompt": "text of at most 10000 characters",
    "seed": f"a whole number from 0 to {MAX_SEED}; -1 or nothing for a random one",
}


def _number(value: Any) -> Any:
    """Any number (NumPy's too), but neither text nor a truth value, which pydantic would read as one."""
    if isinstance(value, bool | str | bytes):
        raise ValueError("not a number")
    return value


def _path(value: Any) -> Any:
    """A path object as the string that it stands for; everything else as it came."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


# Constraints stand before these validators: after one they would not reach the JSON schema.
_NUMBER = BeforeValidator(_number)
Text = Annotated[str, Field(strict=True)]
FilePath = Annotated[str, Field(strict=True, min_length=1), BeforeValidator(_path)]
Switch = Annotated[bool, Field(strict=True)]
Side = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE, multiple_of=CANVAS_MULTIPLE), _NUMBER]


class Size(BaseModel):
    """A free size in pixels; both sides are multiples of 64."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Side
    height: Side


def _written_size(value: Any) -> Any:
    """``"640x384"`` as a size; everything else as it came."""
    match = re.fullmatch(r"(\d{1,5})\s*[xX]\s*(\d{1,5})", value) if isinstance(value, str) else None
    return {"width": int(match[1]), "height": int(match[2])} if match else value


def _random_seed(value: Any) -> Any:
    return None if value == -1 else value


class Request(BaseModel):
    """One clip to make. Immutable; every field is checked at construction.

    Paths may be path objects and numbers any of Python's or NumPy's; text and truth values are never read as
    numbers, nor numbers as truth values. Call the constructor: pydantic's ``model_validate`` gives a refusal
    as its own ``ValidationError``.

    Raises:
        RequestError: A field is missing, unknown or out of range; it names the field, the value and what is allowed.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra={"description": "One clip to make."}
    )

    prompt: Annotated[Text, Field(max_length=10_000, pattern=r"\S", description="What the audio-driven video shows.")]
    input_audio: Annotated[FilePath, Field(description="The audio track that drives generation.")]
    input_image: Annotated[FilePath | None, Field(description="First frame of the video.")] = None
    match_audio_length: Annotated[
        Switch, Field(description="Frames follow from audio duration and frame rate; off: num_frames.")
    ] = True
    num_frames: Annotated[
        int, Field(ge=9, le=MAX_FRAMES, description="Length in frames where match_audio_length is off."), _NUMBER
    ] = 121
    resolution: Annotated[
        Literal["auto", "square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9"]
        | Size,
        BeforeValidator(_written_size),
        Field(description="Final size; auto matches the image's aspect ratio, without an image landscape."),
    ] = "auto"
    frames_per_second: Annotated[float, Field(ge=1, le=60, description="Frame rate."), _NUMBER] = 24.0
    image_strength: Annotated[
        float, Field(ge=0, le=1, description="1 keeps the first frame strictly, lower gives more freedom."), _NUMBER
    ] = 0.7
    generate_audio: Annotated[Switch, Field(description="Off: the MP4 has no audio track.")] = True
    video_quality: Annotated[Literal["low", "medium", "high", "maximum"], Field(description="Quality preset.")] = "high"
    negative_prompt: Annotated[Text, Field(max_length=10_000, description="What to steer away from.")] = (
        DEFAULT_NEGATIVE_PROMPT
    )
    seed: Annotated[
        Annotated[int, Field(ge=0, le=MAX_SEED), _NUMBER] | None,
        BeforeValidator(_random_seed),
        Field(description="For reproducibility; the seed used is always reported."),
    ] = None

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise request_error(error, fields) from None

    @property
    def preset_name(self) -> str:
        """The preset that ``video_quality`` names."""
        return self.video_quality

    def resolved_seed(self) -> int:
        """The seed as given, or a fresh random one."""
        return secrets.randbelow(MAX_SEED + 1) if self.seed is None else self.seed


def request_error(error: ValidationError, fields: Mapping[str, Any]) -> RequestError:
    """The first finding of a pydantic error in ltxrt's words, with the field's value as the caller gave it."""
    field = str(error.errors(include_url=False)[0]["loc"][0])
    if field not in Request.model_fields:
        return RequestError(field, fields[field], f"only the fields {', '.join(Request.model_fields)}")
    return RequestError(field, fields.get(field), _ALLOWED[field])
