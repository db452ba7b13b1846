# SPDX-License-Identifier: Apache-2.0
"""A pipeline for the page's tests: pictures that change, and a stop after the first fragment where the prompt asks.

``gate=NAME`` goes on after the first fragment only when the server's data folder holds ``NAME.gate``; ``steps=N``
reports so many denoise steps, 50 ms apart, before anything else. The first fragment holds 32 frames, about as
many as the tiny model's.
"""

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from ltxrt.manifest import StreamEntry
from ltxrt.result import Progress
from ltxrt.testing import FakeEngine, fake_engines, fake_pipeline

_FIRST_LATENTS = 5
_LONGEST_WAIT_SECONDS = 60


class _Moving(FakeEngine):
    """Every frame of another grey."""

    def run(self, feeds):
        outputs = super().run(feeds)
        frames = outputs["frames"]
        count, rows, _ = frames.shape
        frames[:, : rows * 2 // 3] = (60 + 4 * np.arange(count, dtype=np.uint8))[:, None, None]
        return outputs


class _Store:
    def __init__(self, store):
        self.backend = store.backend

    def engines(self, preset):
        fake = fake_engines()
        plain = fake.video_decoder
        moving = _Moving(plain.name, plain.inputs, plain.outputs, plain.derived, plain.value)
        return replace(fake, video_decoder=moving)


class _Gated:
    def __init__(self, data):
        plain = fake_pipeline()
        manifest = plain.bundle.manifest
        stream = StreamEntry(states=(), first_chunk_latents=_FIRST_LATENTS)
        model = manifest.model.model_copy(update={"stream": stream})
        bundle = replace(plain.bundle, manifest=manifest.model_copy(update={"model": model}))
        self._pipeline = replace(plain, bundle=bundle, store=_Store(plain.store))
        self.bundle, self.generate, self._data = bundle, self._pipeline.generate, data

    def events(self, request):
        inner = self._pipeline.events(request)
        return self._run(inner, dict(re.findall(r"(\w+)=(\w+)", request.prompt)))

    def _run(self, inner, words):
        steps = int(words.get("steps", 0))
        for step in range(steps):
            yield Progress("denoise_1", step, steps)
            time.sleep(0.05)
        gate = self._data / f"{words['gate']}.gate" if "gate" in words else None
        for event in inner:
            yield event
            if gate and isinstance(event, Progress) and event.stage == "decode":
                end = time.monotonic() + _LONGEST_WAIT_SECONDS
                while not gate.exists() and time.monotonic() < end:
                    time.sleep(0.02)


def gated(options):
    return _Gated(Path(options.data))
