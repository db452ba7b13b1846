# SPDX-License-Identifier: Apache-2.0
"""Pipelines that worker processes of the tests open: instant, slow, or deadly, as the prompt asks.

A prompt may hold ``steps=N`` (denoise steps of ``pause=SECONDS`` each), ``until=FILE`` (steps until there is one),
``halfway=FILE`` (the same after the first fragment), ``die`` (the process ends as by a signal), ``raise`` (an error
that nobody foresaw) ``engine`` (an engine's
error) or ``vast`` (more than a GPU holds).
"""

import os
import re
import signal
import time
from pathlib import Path

from ltxrt.errors import CapacityError, EngineError
from ltxrt.result import Fragment, Progress
from ltxrt.testing import fake_pipeline


class _Scripted:
    def __init__(self, pipeline):
        self._pipeline = pipeline
        self.bundle, self.generate = pipeline.bundle, pipeline.generate

    def events(self, request):
        inner = self._pipeline.events(request)
        return self._run(inner, request.prompt)

    def _run(self, inner, prompt):
        words = dict(re.findall(r"(\w+)=([\d.]+)", prompt))
        steps = int(words.get("steps", 0))
        for step in range(steps):
            yield Progress("denoise_1", step, steps)
            time.sleep(float(words.get("pause", 0.05)))
        yield from _waits("until", prompt, "denoise_1")
        if "die" in prompt.split():
            os.kill(os.getpid(), signal.SIGKILL)
        if "raise" in prompt.split():
            raise KeyError("unforeseen")
        if "engine" in prompt.split():
            raise EngineError("denoiser: out of memory")
        if "vast" in prompt.split():
            raise CapacityError("no size of this length fits")
        begun = False
        for event in inner:
            yield event
            if isinstance(event, Fragment) and not begun:
                begun = True
                yield from _waits("halfway", prompt, "decode")


def _waits(word, prompt, stage):
    gate = re.search(rf"{word}=(\S+)", prompt)
    while gate is not None and not Path(gate[1]).exists():
        yield Progress(stage, 0, 1)
        time.sleep(0.05)


def scripted(options):
    return _Scripted(fake_pipeline())


def refuses_to_start(options):
    raise SystemExit("no such model")
