# SPDX-License-Identifier: Apache-2.0
"""The safetensors table: right about bytes, and one ExportError for whatever is damaged."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ltxrt.errors import ExportError
from ltxrt_export.weights import TensorFile

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array([1.5], np.float16),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(7, np.int64),
}


def raw(header: Any, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.safetensors"
    save_file(ARRAYS, file, metadata={"k": "v"})
    return file


def test_refs_point_at_the_bytes(path: Path) -> None:
    file, content = TensorFile.open(path), path.read_bytes()
    assert file.metadata == {"k": "v"}
    assert set(file.tensors) == set(ARRAYS)
    for key, array in ARRAYS.items():
        ref = file.tensors[key]
        assert (ref.path, ref.key, ref.shape, ref.nbytes) == (path, key, array.shape, array.nbytes)
        assert content[ref.offset : ref.offset + ref.nbytes] == array.tobytes()


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no\.safetensors: cannot be read: No such file") as error:
        TensorFile.open(tmp_path / "no.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [1, 4, 40])
def test_truncated(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ExportError, match="truncated"):
        TensorFile.open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"<!doctype html><html>", "a web page"),
        (b"GGUF\x03\x00\x00\x00" + bytes(99), "a GGUF file"),
        (b"PK\x03\x04" + b"\xff" * 99, "a zip or PyTorch file"),
        (b"1234", "not a safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{}", "header length 1152921504606846976"),
        (raw(b"{}x"), "is not JSON"),
        (raw(b"\xff\xfe"), "is not JSON"),
        (raw(b"[1]"), "is not a JSON object"),
        (raw(b"[" * 100_000), "is not JSON"),
        (raw({"__metadata__": {"k": 1}}), "__metadata__"),
        (raw({"t": 3}), "t has a damaged header entry"),
        (raw({"t": {"dtype": "F32", "shape": [1]}}), "t has a damaged header entry"),
        (raw({"t": entry([-1], 0, 4)}, b"1234"), "t has a damaged header entry"),
        (raw({"t": entry([True], 0, 4)}, b"1234"), "t has a damaged header entry"),
        (raw({"t": entry([1], 0, 4, "F4")}, b"1234"), "t has dtype 'F4'; known"),
        (raw({"t": entry([1], 0, 8)}, b"12345678"), r"t takes 8 bytes where F32\[1\] needs 4"),
        (raw({"t": entry([1], 4, 8)}, b"12345678"), "t lies at byte"),
        (raw({"t": entry([1], 0, 4), "u": entry([1], 0, 4)}, b"1234"), "u lies at byte"),
        (raw({"t": entry([1], 0, 4)}, b"12345"), "1 bytes too long"),
    ],
)
def test_damaged(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=message):
        TensorFile.open(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(data=st.data())
def test_a_flipped_header_byte_never_escapes_as_another_error(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    length = 8 + struct.unpack("<Q", content[:8])[0]
    index = data.draw(st.integers(0, length - 1))
    content[index] ^= data.draw(st.integers(1, 255))
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    try:
        file = TensorFile.open(damaged)
    except ExportError:
        return
    # What still opens (a changed name, a changed dtype of the same width) stays inside the file.
    assert all(ref.offset + ref.nbytes <= len(content) for ref in file.tensors.values())
