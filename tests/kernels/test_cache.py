# SPDX-License-Identifier: Apache-2.0
"""The cache compiles once, gives back what it compiled, and never a part of it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ltxrt_kernels.cache import CubinCache, is_whole
from ltxrt_kernels.euler_step import EulerStep
from ltxrt_kernels.head_gate import HeadGate
from ltxrt_kernels.nvrtc import Compiled, CompilerError, compile_program
from ltxrt_kernels.program import CompilerIdentity, program

PROBLEM = EulerStep(tokens=7)


def elf(payload: bytes) -> bytes:
    """The least that is an ELF file: a header, a payload, and a table of one section."""
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    header[0x28:0x30] = (64 + len(payload)).to_bytes(8, "little")
    header[0x3A:0x3C] = (64).to_bytes(2, "little")
    header[0x3C:0x3E] = (1).to_bytes(2, "little")
    return bytes(header) + payload + bytes(64)


class Compiler:
    """Counts what it is asked for."""

    def __init__(self, version: str = "1") -> None:
        self.version = version
        self.asked: list[str] = []

    def __call__(self, wanted):
        self.asked.append(f"{wanted.entry} {wanted.architecture}")
        return Compiled(elf(wanted.key(self.identity()).encode()), None)

    def identity(self) -> CompilerIdentity:
        return CompilerIdentity(self.version, "headers")


def cache(folder: Path, compiler: Compiler) -> CubinCache:
    return CubinCache(folder, compiler.identity, compiler)


def test_compiles_once(tmp_path):
    compiler = Compiler()
    first = cache(tmp_path / "new", compiler).cubin(PROBLEM, "sm_90a")
    assert cache(tmp_path / "new", compiler).cubin(PROBLEM, "sm_90a") == first
    assert cache(tmp_path / "new", compiler).cubin(EulerStep(tokens=8), "sm_90a") == first
    assert compiler.asked == ["euler_step sm_90a"]


def test_another_kernel_architecture_or_compiler_is_compiled_anew(tmp_path):
    compiler = Compiler()
    results = {
        cache(tmp_path, compiler).cubin(PROBLEM, "sm_90a"),
        cache(tmp_path, compiler).cubin(PROBLEM, "sm_80"),
        cache(tmp_path, compiler).cubin(HeadGate(tokens=1, heads=1, head_width=8), "sm_80"),
        cache(tmp_path, Compiler("2")).cubin(PROBLEM, "sm_90a"),
    }
    assert len(results) == len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda _: b"", lambda whole: b"X" + whole[1:]])
def test_a_damaged_file_is_compiled_anew(tmp_path, damage):
    compiler = Compiler()
    whole = cache(tmp_path, compiler).cubin(PROBLEM, "sm_90a")
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(whole))
    assert cache(tmp_path, compiler).cubin(PROBLEM, "sm_90a") == whole
    assert path.read_bytes() == whole
    assert len(compiler.asked) == 2


def test_nothing_is_left_of_a_failed_write(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache(tmp_path, Compiler()).cubin(PROBLEM, "sm_90a")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_where_it_does_not_compile(tmp_path):
    def refuses(wanted):
        raise CompilerError("no")

    with pytest.raises(CompilerError):
        CubinCache(tmp_path / "new", Compiler().identity, refuses).cubin(PROBLEM, "sm_90a")
    assert not (tmp_path / "new").exists()


def test_many_at_once(tmp_path):
    compiler = Compiler()
    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(lambda _: cache(tmp_path, compiler).cubin(PROBLEM, "sm_90a"), range(32)))
    assert len(results) == 1
    (path,) = tmp_path.iterdir()
    assert {path.read_bytes()} == results


def test_name_tells_what_it_is(tmp_path):
    compiler = Compiler()
    wanted = program(PROBLEM, "sm_89")
    key = wanted.key(compiler.identity())
    assert cache(tmp_path, compiler).path(wanted).name == f"euler_step-sm_89-{key[:32]}.cubin"


def test_real_cubins_are_whole_to_the_last_byte(tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc")
    code = CubinCache(tmp_path).cubin(PROBLEM, "sm_90a")
    assert is_whole(code)
    assert not is_whole(code[: len(code) // 2])
    assert code == compile_program(program(PROBLEM, "sm_90a")).code
    assert next(tmp_path.iterdir()).read_bytes() == code
