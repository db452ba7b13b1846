# SPDX-License-Identifier: Apache-2.0
"""The server's end of the sandbox: starts the process that forks, gives it orders, and sees to it that they end."""

import asyncio
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

__all__ = ["SandboxLink"]

_TRIES = 2  # a file must not be refused because the process that forks was killed
_LONGEST_ANSWER_BYTES = 4096
_END_SECONDS = 5.0


class SandboxLink:
    """Keeps one ``sandbox_parent`` process and talks to it. For one event loop.

    Args:
        folder: Where it starts; empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    @property
    def process_id(self) -> int | None:
        """Of the process that forks, while there is one."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process that forks, where none lives."""
        if self._closed or self._lives():
            return
        self._remove()
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        # PYTHONPATH alone is kept, without which an unusual installation would not be found. Libraries that start
        # threads on import would be forked without them.
        path = str(Path(__file__).parents[2])
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
        with ExitStack() as unused, its:
            unused.callback(ours.close)
            self._process = subprocess.Popen(
                (sys.executable, "-P", "-m", "ltxrt.serve.sandbox_parent"),
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd=self._folder,
                process_group=0,  # out of Ctrl-C's reach
            )
            unused.pop_all()
        self._control = ours
        # It says nothing; what is to be read is its end, which is seen to now so that no dead process lies about.
        asyncio.get_running_loop().add_reader(ours, self._remove)

    async def ask(self, order: bytes, wall_seconds: float) -> bytes:
        """Have an order carried out in a process of its own, which is gone when this returns or raises.

        Returns:
            What that process said; nothing where it ended without a word.

        Raises:
            TimeoutError: It took longer than ``wall_seconds``.
        """
        for _ in range(_TRIES):
            self.start()
            process = self._process
            said = await self._asked(order, wall_seconds)
            if said or (process is self._process and self._lives()):
                return said
        return b""

    async def close(self) -> None:
        """End the process that forks, and with it all that it has forked."""
        self._closed = True
        self._hang_up()  # it takes the hint, and reaps what it has forked before it goes
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, _END_SECONDS)
        self._remove()

    async def _asked(self, order: bytes, wall_seconds: float) -> bytes:
        ours, its = socket.socketpair()
        with ours:
            ours.setblocking(False)
            with its:
                if self._control is not None:
                    try:
                        socket.send_fds(self._control, [order], [its.fileno()])
                    except OSError:  # it died just now, or takes no more orders
                        self._remove()
            try:
                async with asyncio.timeout(wall_seconds):
                    return await _until_end(ours)
            finally:
                await self._ended(ours)

    async def _ended(self, channel: socket.socket) -> None:
        """Wait until an order's process is gone; it is killed if it is not."""
        channel.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(_END_SECONDS):
                while await asyncio.get_running_loop().sock_recv(channel, _LONGEST_ANSWER_BYTES):
                    pass
        except TimeoutError:  # the one that should have killed it hangs; with it goes all that it has forked
            self._remove()

    def _lives(self) -> bool:
        if self._control is None:
            return False
        try:
            self._control.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # the end: it never says anything

    def _remove(self) -> None:
        """Kill the process that forks, if there is one, and forget it."""
        self._hang_up()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _hang_up(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None


async def _until_end(channel: socket.socket) -> bytes:
    said = b""
    while part := await asyncio.get_running_loop().sock_recv(channel, _LONGEST_ANSWER_BYTES):
        said += part
        if len(said) > _LONGEST_ANSWER_BYTES:  # none of our answers
            return b""
    return said
