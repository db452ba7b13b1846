# SPDX-License-Identifier: Apache-2.0
"""Streamed FP8 weights: torch's bytes, published scales, one tensor in memory, cut off at any byte and finished."""

import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

from ltxrt.errors import ExportError, OutputError
from ltxrt_export.quantize import fp8_weights
from ltxrt_export.quantize.fp8_weights import Fp8Pair, Fp8Request, stored_scales, write_fp8
from ltxrt_export.weights import TensorFile, TensorRef

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read(ref: TensorRef) -> torch.Tensor:
    data = np.fromfile(ref.path, np.uint8, ref.nbytes, offset=ref.offset)
    kind = {"F8_E4M3": torch.float8_e4m3fn, **TORCH}[ref.dtype]
    return torch.from_numpy(data).view(kind).reshape(ref.shape)


def requests(path: Path, scale: str = "F16") -> list[Fp8Request]:
    return [Fp8Request(ref, scale) for key, ref in TensorFile.open(path).tensors.items() if key.endswith(".weight")]


def converted(folder: Path, weights: dict[str, torch.Tensor], scale: str = "F16") -> dict[str, Fp8Pair]:
    save_file(weights, folder / "model.safetensors")
    return write_fp8(folder / "out", "net", requests(folder / "model.safetensors", scale))


@pytest.mark.parametrize("scale", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_bytes_are_those_of_torch(tmp_path: Path, scale: str, stored: str) -> None:
    torch.manual_seed(1)
    weight = (torch.randn(48, 80) * torch.logspace(-6, 1, 48)[:, None]).to(TORCH[stored])
    pair = converted(tmp_path, {"a.weight": weight}, scale)["a.weight"]
    smallest = torch.finfo(TORCH[scale]).tiny
    scales = (weight.float().abs().amax(1) / 448).clamp(min=smallest).to(TORCH[scale])
    expected = (weight.float() / scales.float()[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(read(pair.scale), scales)
    assert torch.equal(read(pair.weight).view(torch.uint8), expected.T.contiguous().view(torch.uint8))


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.floats(-(2**100), 2**100, width=32))
)
def test_every_weight_comes_back_within_half_a_step(values: np.ndarray) -> None:
    ref = TensorRef(Path("unused"), "w", "F32", values.shape, 0, values.nbytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_weights, "_chunks", lambda _: iter([(0, values)]))
        turned, scale = fp8_weights.convert(Fp8Request(ref, "F32"))
    back = turned.astype(np.float32).T * scale[:, None]
    # Four significant bits; below 2^-6 of the scale, steps of 2^-9.
    assert (np.abs(back - values) <= np.maximum(np.abs(values) / 16, scale[:, None] * 2.0**-10) * 1.0001).all()
    # Where the scale is at its floor the peak is no multiple of 448 steps, and may round up like any other value.
    free = scale > np.finfo(np.float32).tiny
    assert (np.abs(back).max(axis=1) <= np.abs(values).max(axis=1) * 1.0001)[free].all()


def test_a_channel_of_zeros_stays_zero(tmp_path: Path) -> None:
    pair = converted(tmp_path, {"a.weight": torch.zeros(4, 16, dtype=torch.bfloat16)})["a.weight"]
    assert (read(pair.scale).float() > 0).all()
    assert not read(pair.weight).view(torch.uint8).any()


def test_an_input_major_weight_is_scaled_by_its_columns(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(16, 32)}, tmp_path / "model.safetensors")
    ref = TensorFile.open(tmp_path / "model.safetensors").tensors["a.weight"]
    pair = write_fp8(tmp_path, "net", [Fp8Request(ref, "F32", transposed=False)])["a.weight"]
    assert pair.weight.shape == (16, 32)
    assert pair.scale.shape == (32,)
    weight = read(ref)
    back = read(pair.weight).float() * read(pair.scale)
    assert torch.norm(back - weight) < 0.04 * torch.norm(weight)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_broken_weight_is_named_and_leaves_nothing(tmp_path: Path, value: float) -> None:
    weight = torch.ones(4, 16)
    weight[2, 3] = value
    with pytest.raises(ExportError, match=r"b\.weight holds infinities or NaN"):
        converted(tmp_path, {"a.weight": torch.ones(4, 16), "b.weight": weight})
    assert list((tmp_path / "out").iterdir()) == []


def published(folder: Path, **extra: torch.Tensor) -> TensorFile:
    """A small file in the layout of the published FP8 checkpoints."""
    torch.manual_seed(2)
    weight = torch.randn(32, 48)
    scale = weight.abs().max() / 448
    tensors = {
        "a.weight": (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn),
        "a.weight_scale": scale.reshape(()),
        "a.input_scale": torch.tensor(0.025),
        "a.bias": torch.zeros(32, dtype=torch.bfloat16),
        "b.weight": weight.bfloat16(),
        **extra,
    }
    save_file({name: value for name, value in tensors.items() if value.numel()}, folder / "fp8.safetensors")
    return TensorFile.open(folder / "fp8.safetensors")


def test_published_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    file = published(tmp_path)
    scales = stored_scales(file)
    assert set(scales) == {"a.weight"}
    assert scales["a.weight"].activation == pytest.approx(0.025)
    pair = write_fp8(tmp_path, "net", [Fp8Request(file.tensors["a.weight"], "F16", stored=scales["a.weight"])])[
        "a.weight"
    ]
    stored = read(file.tensors["a.weight"])
    assert torch.equal(read(pair.weight).view(torch.uint8), stored.T.contiguous().view(torch.uint8))
    assert pair.scale.shape == ()
    assert read(pair.scale) == read(scales["a.weight"].weight).half()


def test_one_published_scale_a_row(tmp_path: Path) -> None:
    file = published(tmp_path, **{"a.weight_scale": torch.linspace(0.1, 1, 32).reshape(32, 1)})
    request = Fp8Request(file.tensors["a.weight"], "F32", stored=stored_scales(file)["a.weight"])
    pair = write_fp8(tmp_path, "net", [request])["a.weight"]
    assert torch.equal(read(pair.scale), torch.linspace(0.1, 1, 32))


def test_a_placeholder_of_one_is_no_input_scale(tmp_path: Path) -> None:
    file = published(tmp_path, **{"a.input_scale": torch.tensor(1.0)})
    assert stored_scales(file)["a.weight"].activation is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.weight_scale", torch.empty(0), "E4M3 without a.weight_scale"),
        ("a.weight_scale", torch.ones(7), r"one scale, or one a row"),
        ("a.input_scale", torch.tensor(0.0), "allowed: one number above 0"),
        ("a.input_scale", torch.tensor([0.1, 0.2]), "allowed: one number above 0"),
    ],
)
def test_scales_outside_the_convention_are_refused(
    tmp_path: Path, name: str, value: torch.Tensor, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        stored_scales(published(tmp_path, **{name: value}))


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, bytes]:
    """A model of three weights, and its finished file's bytes."""
    torch.manual_seed(3)
    save_file({f"{n}.weight": torch.randn(24, 40).bfloat16() for n in "abc"}, tmp_path / "model.safetensors")
    pairs = write_fp8(tmp_path / "whole", "net", requests(tmp_path / "model.safetensors"))
    return tmp_path, pairs["a.weight"].weight.path.read_bytes()


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0, 1))
def test_cut_off_anywhere_it_is_finished_to_the_same_bytes(
    share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    torch.manual_seed(3)
    save_file({f"{n}.weight": torch.randn(24, 40).bfloat16() for n in "abc"}, folder / "model.safetensors")
    wanted = requests(folder / "model.safetensors")
    path = write_fp8(folder, "net", wanted)["a.weight"].weight.path
    whole = path.read_bytes()
    path.unlink()
    path.with_name(f"{path.name}.partial").write_bytes(whole[: int(share * len(whole))])
    assert write_fp8(folder, "net", wanted)["a.weight"].weight.path.read_bytes() == whole
    assert sorted(p.name for p in folder.iterdir()) == sorted(["model.safetensors", path.name])


def test_only_what_is_missing_is_converted_again(three: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, whole = three
    wanted = requests(folder / "model.safetensors")
    name = next((folder / "whole").iterdir()).name
    (folder / "out").mkdir()
    # The last weight is cut, the one before it is not trusted.
    (folder / "out" / f"{name}.partial").write_bytes(whole[:-1])
    done: list[str] = []
    convert = fp8_weights.convert
    monkeypatch.setattr(fp8_weights, "convert", lambda r: done.append(r.source.key) or convert(r))
    write_fp8(folder / "out", "net", wanted)
    assert done == ["b.weight", "c.weight"]
    write_fp8(folder / "out", "net", wanted)
    assert done == ["b.weight", "c.weight"]


def test_a_partial_file_of_something_else_is_not_continued(three: tuple[Path, bytes]) -> None:
    folder, whole = three
    name = next((folder / "whole").iterdir()).name
    (folder / "out").mkdir()
    (folder / "out" / f"{name}.partial").write_bytes(b"\xff" * len(whole))
    write_fp8(folder / "out", "net", requests(folder / "model.safetensors"))
    assert (folder / "out" / name).read_bytes() == whole


def test_other_weights_of_the_same_header_make_another_file(three: tuple[Path, bytes]) -> None:
    folder, _ = three
    torch.manual_seed(4)
    save_file({f"{n}.weight": torch.randn(24, 40).bfloat16() for n in "abc"}, folder / "model.safetensors")
    write_fp8(folder / "whole", "net", requests(folder / "model.safetensors"))
    assert len(list((folder / "whole").iterdir())) == 2


def test_two_processes_do_not_write_one_file(three: tuple[Path, bytes]) -> None:
    folder, _ = three
    name = next((folder / "whole").iterdir()).name
    (folder / "out").mkdir()
    with fp8_weights._exclusive(folder / "out" / f"{name}.partial"), pytest.raises(ExportError, match="another export"):
        write_fp8(folder / "out", "net", requests(folder / "model.safetensors"))


def test_a_full_disk_is_told_in_advance(three: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = three
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OutputError, match=r"needs \d+ bytes more, .* has 10 free"):
        write_fp8(folder / "out", "net", requests(folder / "model.safetensors"))


def test_a_folder_that_cannot_be_made_is_told(three: tuple[Path, bytes]) -> None:
    folder, _ = three
    with pytest.raises(OutputError, match="cannot be written"):
        write_fp8(folder / "model.safetensors" / "out", "net", requests(folder / "model.safetensors"))


def test_memory_is_one_tensor(tmp_path: Path) -> None:
    """Eight weights of 8 MB in bf16: 4 MB each in FP8, two copies while one is written, and chunks of fp32."""
    weight = np.ones((2048, 2048), ml_dtypes.bfloat16)
    header = {f"{n}.weight": torch.from_numpy(weight.view(np.int16)).view(torch.bfloat16).clone() for n in range(8)}
    save_file(header, tmp_path / "model.safetensors")
    wanted = requests(tmp_path / "model.safetensors")
    del header
    tracemalloc.start()
    write_fp8(tmp_path / "out", "net", wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
