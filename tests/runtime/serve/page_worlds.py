# SPDX-License-Identifier: Apache-2.0
"""A pipeline for the page's tests: pictures that change, and pauses after fragments as the prompt asks.

``hold=SECONDS`` waits after every fragment, ``steps=N`` reports so many denoise steps 50 ms apart before anything else.
"""

import re
import time
from dataclasses import replace

import numpy as np

from ltxrt.result import Fragment, Progress
from ltxrt.testing import FakeEngine, fake_engines, fake_pipeline


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
        self._store, self.backend = store, store.backend

    def engines(self, preset):
        fake = fake_engines()
        plain = fake.video_decoder
        moving = _Moving(plain.name, plain.inputs, plain.outputs, plain.derived, plain.value)
        return replace(fake, video_decoder=moving)


class _Slow:
    def __init__(self):
        plain = fake_pipeline()
        self._pipeline = replace(plain, store=_Store(plain.store))
        self.bundle, self.generate = self._pipeline.bundle, self._pipeline.generate

    def events(self, request):
        inner = self._pipeline.events(request)
        return self._run(inner, dict(re.findall(r"(\w+)=([\d.]+)", request.prompt)))

    def _run(self, inner, words):
        steps = int(words.get("steps", 0))
        for step in range(steps):
            yield Progress("denoise_1", step, steps)
            time.sleep(0.05)
        for event in inner:
            yield event
            if isinstance(event, Fragment):
                time.sleep(float(words.get("hold", 0)))


def slow(options):
    return _Slow()
