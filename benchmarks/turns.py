# SPDX-License-Identifier: Apache-2.0
"""Processes that take turns, so that a machine that changes its pace changes it for all of them alike.

A process waits on stdin before each of its turns and says on stdout when one is over; its last line is its result.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO

from harness import Measured

__all__ = ["end_turn", "in_turns", "wait_for_turn"]

_OVER = "turn over"


def wait_for_turn() -> None:
    """In a process: wait until it is its turn."""
    sys.stdin.readline()


def end_turn() -> None:
    """In a process: let the others go on."""
    print(_OVER, flush=True)


def in_turns(processes: Mapping[str, Sequence[str]], turns: int) -> dict[str, Measured]:
    """Run Python programs, one turn of each after the other; all but one stand still at any moment.

    Args:
        processes: Arguments of Python, by name.
        turns: How many each has.

    Raises:
        RuntimeError: One failed, or its last line is not a JSON object.
    """
    started = {name: _Turner(arguments) for name, arguments in processes.items()}
    try:
        for _ in range(turns):
            for turner in started.values():
                turner.turn()
        return {name: turner.result() for name, turner in started.items()}
    finally:
        for turner in started.values():
            turner.end()


class _Turner:
    """One process, started with its first turn."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[str] | None = None
        self._wall = 0.0

    def turn(self) -> None:
        begin = time.perf_counter()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, *self._arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        given, said = self._pipes(self._process)
        given.write("\n")
        given.flush()
        while (line := said.readline()) and line.rstrip("\n") != _OVER:
            pass
        self._wall += time.perf_counter() - begin
        if not line:
            raise RuntimeError(f"{' '.join(self._arguments)} ended with {self._process.wait()}")

    def result(self) -> Measured:
        assert self._process is not None  # it has had a turn
        _, said = self._pipes(self._process)
        lines = said.read().splitlines()
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode or not lines:
            raise RuntimeError(f"{' '.join(self._arguments)} ended with {self._process.returncode}")
        return Measured.of(usage, self._wall, json.loads(lines[-1]))

    def end(self) -> None:
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
                self._process.wait()
            for pipe in self._pipes(self._process):
                pipe.close()

    @staticmethod
    def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018  # both are pipes
        return process.stdin, process.stdout
