# SPDX-License-Identifier: Apache-2.0
"""The process that has imported the decoders, so that each file's process need not: it forks one for every order.

Started by ``SandboxLink`` with an empty environment in an empty folder; stdin is a socket of packets, each an order of
our own making and one end of the channel for its answer. It opens no file of a caller's, reads no answer and has one
thread, so that what is forked is whole. Channels tell both sides of the end: when the server closes its half for
writing, the order's process is killed; when that process is gone and reaped, the server reads the channel's end. When
stdin ends, the server is gone, and so is everything here.
"""

import ctypes
import gc
import os
import resource
import signal
import socket
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector
from typing import NoReturn

from .sandbox_child import carry_out, load_readers

__all__ = ["Forks", "main"]

_LONGEST_ORDER_BYTES = 64 << 10
_OPEN_FILES = 1024  # a channel for every file that is read; known, so that a child can close them all
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Fork for every order on stdin, until it ends."""
    # A service manager's SIGTERM reaches every process of a service; the server alone decides when this one ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    files = min(_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    load_readers()
    gc.freeze()  # what no child's collection touches stays one copy for all
    Forks(socket.socket(fileno=0)).run()


class Forks:
    """The children, by their channels.

    Args:
        control: Where orders come from.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._channels: dict[int, socket.socket] = {}
        self._selector = DefaultSelector()
        self._selector.register(control, EVENT_READ)
        self._deaths, noted = os.pipe()
        os.set_blocking(noted, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # without a handler there is no note
        signal.set_wakeup_fd(noted, warn_on_full_buffer=False)
        self._selector.register(self._deaths, EVENT_READ)

    def run(self) -> None:
        """Serve until the server is gone, then end what is left."""
        serving = True
        while serving:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    serving = self._take_order()
                elif key.fileobj == self._deaths:
                    os.read(self._deaths, 4096)
                    self._reap()
                elif key.data in self._channels:  # the server wants no answer (any more)
                    self._selector.unregister(key.fileobj)
                    _kill(key.data)
        for process in tuple(self._channels):
            self._bury(process)

    def _take_order(self) -> bool:
        order, files, _, _ = socket.recv_fds(self._control, _LONGEST_ORDER_BYTES, 1)
        if not order:
            return False
        for file in files:  # one, or none where this process has no room for more
            channel = socket.socket(fileno=file)
            try:
                self._fork(order, channel)
            except OSError:  # no more processes; the server reads the end of the channel
                channel.close()
        return True

    def _fork(self, order: bytes, channel: socket.socket) -> None:
        parent = os.getpid()
        process = os.fork()
        if not process:
            _be_child(order, channel, parent)
        with suppress(OSError):  # the child does the same; whoever is first
            os.setpgid(process, process)
        self._channels[process] = channel
        self._selector.register(channel, EVENT_READ, process)

    def _reap(self) -> None:
        for process in tuple(self._channels):
            # Looked at and left: until the child is reaped, its number and its group's can be nobody else's.
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                self._bury(process)

    def _bury(self, process: int) -> None:
        _kill(process)
        os.waitpid(process, 0)
        channel = self._channels.pop(process)
        with suppress(KeyError):  # the server wanted its end
            self._selector.unregister(channel)
        with suppress(OSError), channel:
            channel.shutdown(socket.SHUT_RDWR)  # also where a process that got away holds it open


def _kill(process: int) -> None:
    """Kill a child that has not been reaped, and its group."""
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def _be_child(order: bytes, channel: socket.socket, parent: int) -> NoReturn:
    """Answer an order on stdout, with no other file open, and end."""
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(channel.fileno(), 1)
        os.closerange(3, _OPEN_FILES)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() == parent:
            os.write(1, carry_out(order))
    finally:
        # Whatever was raised: nothing of the parent's is run or cleaned up here.
        os._exit(0)


if __name__ == "__main__":
    main()
