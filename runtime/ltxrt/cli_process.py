# SPDX-License-Identifier: Apache-2.0
"""From a typer app to a well-behaved process: errors on one line, exit codes, signals, a stdout that may go away.

``ltxrt`` and ``ltxrt-export`` share it. An app's flags ``--json`` and ``--debug`` are looked up in the arguments
themselves, because a command line that does not parse has no parsed ones.
"""

import errno
import json
import os
import signal
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, NoReturn

import typer
from typer.main import get_command

from .cli_report import error_json
from .errors import LtxrtError, OutputError, shown

__all__ = ["Stopped", "emit", "main_app", "resumable", "run_app"]


class Stopped(SystemExit):
    """A signal asks the run to end; ``code`` is 128 + its number, as shells report it. ``left`` is for people."""

    left = "nothing is left behind"


def main_app(app: typer.Typer, name: str) -> NoReturn:
    """Be the program ``name``: run the process's command line and exit."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs of a script ignore some
            signal.signal(number, _stop)
    if "--debug" not in sys.argv:
        sys.excepthook = partial(_internal_error, name)
    sys.exit(run_app(app, name, sys.argv[1:]))


def run_app(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors of ltxrt's own become one line on stderr."""
    try:
        # Not app(...) itself, which would put typer's own hook in the place of ours.
        code = get_command(app).main(list(arguments), prog_name=name, standalone_mode=False)
    except LtxrtError as error:
        return _failed(error, str(error), error.exit_code, arguments)
    except typer.TyperException as error:
        return _failed(error, f"{error.format_message()} (see {name} --help)", error.exit_code, arguments)
    except Stopped as stop:
        code = int(str(stop.code))
        return _failed(stop, f"stopped by {signal.Signals(code - 128).name}, {stop.left}", code, arguments)
    return code if isinstance(code, int) else 0


@contextmanager
def resumable(left: str) -> Generator[None]:
    """For what keeps its work: a signal's message says ``left`` instead of that nothing is left behind."""
    try:
        yield
    except Stopped as stop:
        stop.left = left
        raise


def emit(result: dict[str, Any] | Iterable[str]) -> None:
    """Write the result to stdout, a dict as JSON and lines as they are; file names as the bytes that they are.

    Raises:
        OutputError: stdout cannot be written.
        typer.Exit: Its reader is gone; exit code 1, without a word.
    """
    text = json.dumps(result, indent=2) if isinstance(result, dict) else "\n".join(result)
    try:
        typer.echo(os.fsencode(text))
    except OSError as error:
        # What is still buffered would fail once more, with a traceback, when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            raise typer.Exit(1) from error
        raise OutputError(f"standard output: cannot be written ({error.strerror})") from error


def _failed(error: BaseException, message: str, code: int, arguments: Sequence[str]) -> int:
    line = " ".join(message.split())
    typer.echo(f"error: {line}", err=True)
    if "--json" in arguments:
        with suppress(OutputError, typer.Exit):  # the line has been said
            emit(error_json(error, line, code))
    return code


def _internal_error(name: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What ``sys.excepthook`` shows for an exception that nobody foresaw; the exit code is 1."""
    message = f"internal error: {shown(error)} ({name} --debug ... shows where; please report it)"
    _failed(error, message, 1, sys.argv[1:])


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(128 + number)
