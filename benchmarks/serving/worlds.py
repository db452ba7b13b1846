# SPDX-License-Identifier: Apache-2.0
"""Pipelines that the benchmark's workers open: fake networks, real media, as many steps as the prompt asks."""

import re
import time
from collections.abc import Iterator
from typing import Any

from ltxrt.request import Request
from ltxrt.result import Progress
from ltxrt.testing import fake_pipeline

__all__ = ["FACTORY", "Scripted", "scripted"]

#: As the server wants it.
FACTORY = "serving.worlds:scripted"


class Scripted:
    """A fake pipeline that takes its time: a prompt with ``steps=N pause=SECONDS`` waits that often that long."""

    def __init__(self) -> None:
        pipeline = fake_pipeline()
        self._pipeline = pipeline
        self.bundle, self.generate = pipeline.bundle, pipeline.generate

    def events(self, request: Request) -> Iterator[Any]:
        """See ``Pipeline.events``; the request is checked at once."""
        return self._run(self._pipeline.events(request), request.prompt)

    def _run(self, inner: Iterator[Any], prompt: str) -> Iterator[Any]:
        words = dict(re.findall(r"(\w+)=([\d.]+)", prompt))
        steps = int(words.get("steps", 0))
        for step in range(steps):
            yield Progress("denoise_1", step, steps)
            time.sleep(float(words.get("pause", 0.02)))
        yield from inner


def scripted(options: object) -> Scripted:
    """The factory."""
    return Scripted()
