# SPDX-License-Identifier: Apache-2.0
"""From what a caller sent to queued jobs: everything is checked, and every input is a file of ours, before that."""

import shutil
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from starlette.requests import Request as HttpRequest

from ..errors import MediaError
from ..request import MAX_FRAMES, MAX_SEED, NAMED_SIZES, Request, Size
from ..shapes import frame_rate, frames_covering_audio
from .inputs import redacted
from .job import Job, NewJob
from .problems import ProblemError
from .service import Service
from .store import DuplicateKeyError

__all__ = ["Order", "idempotency_key", "submit"]

_AUDIO, _IMAGE = "audio.wav", "image.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One call for clips.

    Attributes:
        owner: The caller.
        fields: Fields of the request, by their native names.
        files: Open files in place of ``input_audio`` and ``input_image``.
        digest: Of everything that the caller sent.
        key: Idempotency key.
        generations: How many clips of the same request.
    """

    owner: str
    fields: dict[str, Any]
    files: Mapping[str, BinaryIO]
    digest: str
    key: str | None = None
    generations: int = 1


def idempotency_key(http: HttpRequest) -> str | None:
    """The caller's key for this request.

    Raises:
        ProblemError: It is not one.
    """
    key = http.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= 255 and key.isprintable()):
        raise ProblemError("bad_request", "Idempotency-Key: 1 to 255 printable characters")
    return key


async def submit(service: Service, order: Order) -> tuple[list[Job], bool]:
    """Queue an order's jobs.

    Returns:
        The jobs, and whether they are new; with an idempotency key that has been used, those of the first call.

    Raises:
        LtxrtError: A field or an input is refused.
        ProblemError: The key was used for another request, or its caller has too many jobs.
        QueueFullError: Too many jobs wait.
        UnavailableError: The server drains.
    """
    if earlier := _earlier(service, order):
        return earlier, False
    service.jobs.check_room(order.generations)
    with _counted(service, order):
        checked = Request(**{**order.fields, **dict.fromkeys(order.files, "a file")})
        room = service.jobs.incoming_folder / uuid.uuid4().hex
        room.mkdir(mode=0o700)
        try:
            await _inputs(service, order, checked, room)
            return _queued(service, order, checked, room), True
        except DuplicateKeyError:
            # The same call came twice at once, and the other was faster.
            return _earlier(service, order), False
        finally:
            shutil.rmtree(room, ignore_errors=True)


@contextmanager
def _counted(service: Service, order: Order) -> Generator[None]:
    """Count an order among its caller's jobs while its inputs come, so that calls at once keep the limit too."""
    owner, coming = order.owner, service.coming
    unfinished = len(service.jobs.store.of_owner(owner, states=("queued", "processing"))) + coming[owner]
    if unfinished + order.generations > service.settings.max_jobs_per_key:
        wait = {"Retry-After": str(service.jobs.seconds_until_free())}
        raise ProblemError("too_many_jobs", f"at most {service.settings.max_jobs_per_key}", headers=wait)
    coming[owner] += order.generations
    try:
        yield
    finally:
        coming[owner] -= order.generations


def _queued(service: Service, order: Order, checked: Request, room: Path) -> list[Job]:
    """Queue an order's jobs: all of them, or none."""
    jobs: list[Job] = []
    try:
        for number in range(order.generations):
            name = str(uuid.uuid4())
            # The last one takes the folder, those before it a copy (links where the file system has them).
            files = room if number == order.generations - 1 else _copied(room, service.jobs.incoming_folder / name)
            job = _new_job(service, order, checked, name, number)
            jobs.append(service.jobs.submit(job, files))
            if service.telemetry is not None:
                service.telemetry.submitted(job.id)
    except BaseException:
        for job in jobs:
            service.jobs.discard(job.id)
        raise
    return jobs


def _earlier(service: Service, order: Order) -> list[Job]:
    if order.key is None:
        return []
    keys = [_key(order, number) for number in range(order.generations)]
    jobs = [job for key in keys if key and (job := service.jobs.store.by_key(order.owner, key))]
    if jobs and jobs[0].payload_hash != order.digest:
        raise ProblemError("idempotency_mismatch", "the key belongs to a request with other fields")
    return jobs


def _key(order: Order, number: int) -> str | None:
    return order.key if order.key is None or number == 0 else f"{order.key}\n{number}"


async def _inputs(service: Service, order: Order, checked: Request, room: Path) -> None:
    """Bring audio and image into the room and refuse what can be known to fail."""
    audio = order.files.get("input_audio", checked.input_audio)
    heard = await service.inputs.read(order.owner, audio, "audio", room / _AUDIO)
    image = order.files.get("input_image", checked.input_image)
    if image is not None:
        await service.inputs.read(order.owner, image, "image", room / _IMAGE)
    rate = frame_rate(checked.frames_per_second)
    frames = checked.num_frames
    if checked.match_audio_length:
        frames = frames_covering_audio(heard["samples"], heard["rate"], rate)
        if frames > MAX_FRAMES:
            problem = f"takes {frames} frames at {float(rate):g} frames a second"
            raise MediaError("input_audio", "audio", problem, f"at most {MAX_FRAMES} frames, or match_audio_length off")
    size = _pixels(checked)
    most = service.settings.max_frames_times_pixels
    if size is not None and frames * size > most:
        raise ProblemError(
            "invalid_params", f"{frames} frames of {size} pixels; allowed: {most} in all", field="resolution"
        )


def _pixels(request: Request) -> int | None:
    """Pixels of a frame; None where the preset's own budget bounds them."""
    if isinstance(request.resolution, Size):
        return request.resolution.width * request.resolution.height
    if request.resolution == "auto":
        return None
    width, height = NAMED_SIZES[request.resolution]
    return width * height


def _new_job(service: Service, order: Order, checked: Request, name: str, number: int) -> NewJob:
    folder = service.jobs.folder(name)
    seed = checked.resolved_seed() if checked.seed is None else (checked.seed + number) % (MAX_SEED + 1)
    has_image = checked.input_image is not None
    request = {
        **checked.model_dump(mode="json"),
        "input_audio": str(folder / _AUDIO),
        "input_image": str(folder / _IMAGE) if has_image else None,
        "seed": seed,
    }
    echo = {
        **checked.model_dump(mode="json"),
        "input_audio": redacted(checked.input_audio),
        "input_image": redacted(checked.input_image) if checked.input_image else None,
        "seed": seed,
    }
    return NewJob(
        id=name,
        owner=order.owner,
        request=request,
        echo=echo,
        model=service.model["id"],
        idempotency_key=_key(order, number),
        payload_hash=order.digest,
    )


def _copied(room: Path, target: Path) -> Path:
    shutil.copytree(room, target, copy_function=_linked)
    return target


def _linked(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
