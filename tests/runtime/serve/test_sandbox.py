# SPDX-License-Identifier: Apache-2.0
"""Each file in a forked process of its own that may do little; whatever happens to one, the next is read.

The process that forks them is there when it is needed, lost without loss, and gone when its server is.

A file is held where it is nearly read by a target that is a FIFO: who writes to one waits for a reader.
"""

import asyncio
import io
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from PIL import Image

from ltxrt.errors import MediaError
from ltxrt.media import read_audio
from ltxrt.serve import sandbox_link
from ltxrt.serve.sandbox import Sandbox, SandboxLimits
from ltxrt.serve.sandbox_link import SandboxLink

READ = {"samples": 8000, "rate": 16000}
CRASHED = "cannot be read within the limits of this server"


@asynccontextmanager
async def sandbox(**limits):
    opened = Sandbox(SandboxLimits(**limits))
    try:
        yield opened
    finally:
        await opened.close()


def children(parent):
    """Process ids, the dead that nobody has reaped among them."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.add(int(folder.name))
    return found


def there(process):
    return Path(f"/proc/{process}").exists()


async def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    return found


async def held(opened, speech, target):
    """A reading that waits for somebody to read ``target``, and the process that does it."""
    os.mkfifo(target)
    opened.prepare()
    before = children(opened.process_id)
    reading = asyncio.create_task(opened.read("audio", speech, target, "input_audio"))

    def confined():
        new = [each for each in children(opened.process_id) - before if limits_of(each).get("Max open files") == "32"]
        return new[0] if new else None

    return reading, await until(confined)


def limits_of(process):
    try:
        lines = Path(f"/proc/{process}/limits").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {line[:25].strip(): line[26:].split()[0] for line in lines}


def problem_of(reading):
    error = reading.exception()
    assert isinstance(error, MediaError)
    return error.problem


def test_files_at_once_each_have_a_process_of_their_own(tmp_path, speech):
    async def run():
        async with sandbox(at_once=3) as opened:
            readings, processes = zip(*[await held(opened, speech, tmp_path / str(n)) for n in range(3)], strict=True)
            assert children(opened.process_id) == set(processes)
            assert len({os.getpgid(each) for each in processes} - {opened.process_id}) == 3
            late = asyncio.create_task(opened.read("audio", speech, tmp_path / "late", "input_audio"))
            await asyncio.sleep(0.1)
            assert len(children(opened.process_id)) == 3  # no more than may read at once
            written = await asyncio.gather(*(asyncio.to_thread((tmp_path / str(n)).read_bytes) for n in range(3)))
            assert await asyncio.gather(*readings, late) == [READ] * 4
            assert set(written) == {(tmp_path / "late").read_bytes()}
            assert not children(opened.process_id)

    asyncio.run(run())


def test_what_a_file_s_process_may_do(tmp_path, speech, monkeypatch):
    monkeypatch.setenv("LTXRT_API_KEYS", "secret")

    async def run():
        with (tmp_path / "secret").open("wb") as secret, socket.create_server(("127.0.0.1", 0)) as listening:
            # Neither is to be found in there, though other programs that the server starts would inherit them.
            for each in (secret, listening):
                os.set_inheritable(each.fileno(), True)
            async with sandbox(memory_bytes=3 << 30, cpu_seconds=7, output_bytes=123_456) as opened:
                reading, child = await held(opened, speech, tmp_path / "out")
                limits = limits_of(child)
                names = ("Max address space", "Max cpu time", "Max file size", "Max core file size", "Max open files")
                assert [limits[name] for name in names] == [str(3 << 30), "7", "123456", "0", "32"]
                null = os.devnull
                stdin, stdout, stderr, *others = files(child)
                assert stdin == stderr == null
                assert stdout.startswith("socket:")
                assert others in ([], [str(speech)])
                parent = opened.process_id
                assert all(link.startswith(("socket:", "pipe:", "anon_inode:", null)) for link in files(parent))
                for process in (child, parent):
                    assert not set(files(process)) & {str(Path(f"/proc/self/fd/{listening.fileno()}").readlink())}
                assert (os.getpgid(child), os.getpgid(parent)) == (child, parent)
                assert len(list(Path(f"/proc/{parent}/task").iterdir())) == 1  # or a fork would not be whole
                for process in (child, parent):
                    names = environment(process)
                    assert names == {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONPATH"} | (names & {"LC_CTYPE"})
                if unshared():
                    assert network(child) != network(os.getpid())
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
                assert not children(parent)  # whoever goes away leaves no process

    asyncio.run(run())


def files(process):
    """What a process has open, by descriptor."""
    opened = []
    for link in sorted(Path(f"/proc/{process}/fd").iterdir()):
        with suppress(FileNotFoundError):  # that of this very listing
            opened.append(str(link.readlink()))
    return opened


def environment(process):
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return {name.partition(b"=")[0].decode() for name in variables} - {""}


def network(process):
    return Path(f"/proc/{process}/ns/net").readlink()


def unshared():
    """Whether this machine lets everyone go without a network."""
    return subprocess.run(["unshare", "--user", "--net", "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_decoder_that_crashes_takes_nothing_with_it(tmp_path, speech, number):
    async def run():
        async with sandbox() as opened:
            reading, child = await held(opened, speech, tmp_path / "out")
            other, _ = await held(opened, speech, tmp_path / "other")
            parent = opened.process_id
            os.kill(child, number)
            await asyncio.wait([reading], timeout=10)
            assert problem_of(reading) == CRASHED
            assert not there(child)
            await asyncio.to_thread((tmp_path / "other").read_bytes)
            assert await other == READ
            assert opened.process_id == parent

    asyncio.run(run())
    assert not (tmp_path / "out").exists()


def test_a_decoder_that_hangs_is_killed(tmp_path, speech):
    async def run():
        async with sandbox(wall_seconds=1) as opened:
            reading, child = await held(opened, speech, tmp_path / "out")
            await asyncio.wait([reading], timeout=10)
            assert problem_of(reading) == "takes too long to read"
            assert not there(child)
            assert await opened.read("audio", speech, tmp_path / "next", "input_audio") == READ

    asyncio.run(run())
    assert not (tmp_path / "out").exists()


def test_memory_is_bounded(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (7000, 7000)).save(buffer, "PNG")  # 147 MB of RGB
    (tmp_path / "bomb").write_bytes(buffer.getvalue())

    async def run(memory_bytes):
        async with sandbox(memory_bytes=memory_bytes) as opened:
            return await opened.read("image", tmp_path / "bomb", tmp_path / "out", "input_image")

    with pytest.raises(MediaError, match=r"takes too much memory to read|cannot be read within"):
        asyncio.run(run(address_space() + (100 << 20)))
    assert asyncio.run(run(4 << 30)) == {"width": 7000, "height": 7000}


def address_space():
    """Bytes of a process that has the decoders loaded."""
    script = "import ltxrt.serve.sandbox_parent; print(open('/proc/self/statm').read())"
    single = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", script], env=single, check=True, capture_output=True, text=True)
    return int(ran.stdout.split()[0]) * resource.getpagesize()


def test_many_files_leave_nothing(tmp_path, speech):
    async def run():
        before = len(files(os.getpid()))
        async with sandbox() as opened:
            (tmp_path / "hostile").write_bytes(b"RIFF\xff\xff\xff\xffWAVEfmt ")
            await opened.read("audio", speech, tmp_path / "out", "input_audio")
            parent = opened.process_id
            await asyncio.sleep(0.1)  # the server knows of a process's end a moment before all is closed
            idle = len(files(os.getpid())), len(files(parent))
            for _ in range(10):
                sources = (speech, tmp_path / "hostile", tmp_path / "missing", speech)
                reads = [opened.read("audio", each, tmp_path / f"{n}", "input_audio") for n, each in enumerate(sources)]
                outcomes = await asyncio.gather(*reads, return_exceptions=True)
                assert [isinstance(outcome, MediaError) for outcome in outcomes] == [False, True, True, False]
            assert not children(parent)
            await until(lambda: (len(files(os.getpid())), len(files(parent))) == idle)
            assert opened.process_id == parent
        assert not there(parent)
        assert len(files(os.getpid())) == before

    asyncio.run(run())
    assert read_audio(tmp_path / "3").sample_count == 8000


def test_cpu_time_of_a_file_is_its_own(tmp_path, speech):
    """Many files may take more than one may."""

    async def run():
        async with sandbox(cpu_seconds=1) as opened:
            for _ in range(5):
                await opened.read("audio", speech, tmp_path / "out", "input_audio")
            limits = limits_of(opened.process_id)
            hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
            assert limits["Max cpu time"] == ("unlimited" if hard == resource.RLIM_INFINITY else str(hard))

    asyncio.run(run())


# --- the process that forks ---


@asynccontextmanager
async def link(folder):
    opened = SandboxLink(folder)
    try:
        yield opened
    finally:
        await opened.close()


def test_killed_while_it_waits(tmp_path, speech):
    async def run():
        async with sandbox() as opened:
            opened.prepare()
            former = opened.process_id
            opened.prepare()
            assert opened.process_id == former
            os.kill(former, signal.SIGKILL)
            await until(lambda: opened.process_id is None)
            assert not there(former)  # not even as a dead one that nobody has reaped
            assert await opened.read("audio", speech, tmp_path / "out", "input_audio") == READ
            # So late that nobody can have noticed.
            os.kill(opened.process_id, signal.SIGKILL)
            assert await opened.read("audio", speech, tmp_path / "out", "input_audio") == READ

    asyncio.run(run())


def test_killed_while_files_are_read_costs_none_of_them(tmp_path, speech):
    async def run():
        async with sandbox() as opened:
            targets = [tmp_path / "a", tmp_path / "b"]
            readings, processes = zip(*[await held(opened, speech, target) for target in targets], strict=True)
            former = opened.process_id
            os.kill(former, signal.SIGKILL)
            await until(lambda: not any(map(there, (former, *processes))))
            await asyncio.gather(*(asyncio.to_thread(target.read_bytes) for target in targets))
            assert await asyncio.gather(*readings) == [READ] * 2
            assert opened.process_id not in (former, None)

    asyncio.run(run())


def test_a_file_that_always_takes_it_along_is_given_up(tmp_path):
    async def run():
        async with link(tmp_path) as opened:
            opened.start()
            former = opened.process_id
            os.kill(former, signal.SIGSTOP)  # it dies with the order in hand, as does the next one
            asking = asyncio.create_task(opened.ask(b"{}", 20))
            await asyncio.sleep(0)
            os.kill(former, signal.SIGKILL)
            await until(lambda: opened.process_id not in (former, None))
            os.kill(opened.process_id, signal.SIGKILL)
            assert await asking == b""
            await until(lambda: opened.process_id is None)

    asyncio.run(run())


def test_one_that_hangs_is_replaced(tmp_path, speech, monkeypatch):
    monkeypatch.setattr(sandbox_link, "_END_SECONDS", 0.2)

    async def run():
        async with sandbox(wall_seconds=0.5) as opened:
            reading, child = await held(opened, speech, tmp_path / "out")
            former = opened.process_id
            os.kill(former, signal.SIGSTOP)
            await asyncio.wait([reading], timeout=10)
            assert reading.exception().problem == "takes too long to read"
            await until(lambda: not there(child))
            assert opened.process_id is None
            opened.prepare()
            os.kill(opened.process_id, signal.SIGSTOP)  # and one that hangs at the end is not waited for

    asyncio.run(run())


def test_an_order_that_is_none(tmp_path):
    """What a reader does not foresee ends its process alone."""

    async def run():
        async with link(tmp_path) as opened:
            opened.start()
            parent = opened.process_id
            assert await opened.ask(b"nonsense", 20) == b""
            assert opened.process_id == parent
            assert not children(parent)
        opened.start()
        assert opened.process_id is None  # closed is closed
        assert await opened.ask(b"nonsense", 20) == b""

    asyncio.run(run())


def test_a_child_that_talks_too_much_says_nothing(tmp_path, speech, monkeypatch):
    monkeypatch.setattr(sandbox_link, "_LONGEST_ANSWER_BYTES", 10)

    async def run():
        async with sandbox() as opened:
            await opened.read("audio", speech, tmp_path / "out", "input_audio")

    with pytest.raises(Exception, match="cannot be read within"):
        asyncio.run(run())


SERVER = """
import asyncio, sys, time
from pathlib import Path
from ltxrt.serve.sandbox import Sandbox, SandboxLimits

async def run():
    sandbox = Sandbox(SandboxLimits(), Path(sys.argv[1]) / "sandbox")
    sandbox.prepare()
    print(sandbox.process_id, flush=True)
    await sandbox.read("audio", Path(sys.argv[2]), Path(sys.argv[1]) / "out", "input_audio")

asyncio.run(run())
"""


@pytest.mark.parametrize("busy", [True, False])
def test_all_end_with_the_server(tmp_path, speech, busy):
    os.mkfifo(tmp_path / "out")
    command = [sys.executable, "-c", SERVER, str(tmp_path), str(speech)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            parent = int(server.stdout.readline())
            if busy:
                (child,) = asyncio.run(until(lambda: children(parent)))
        finally:
            server.kill()
    asyncio.run(until(lambda: not there(parent)))
    if busy:
        asyncio.run(until(lambda: not there(child)))
