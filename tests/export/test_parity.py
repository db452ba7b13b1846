# SPDX-License-Identifier: Apache-2.0
"""The parity check passes what is right and names what is wrong: planted wrong weights in the shipped networks."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxrt.bundle import Bundle
from ltxrt.errors import ExportError
from ltxrt.manifest import NETWORK_NAMES
from ltxrt_export.exporter import Sources
from ltxrt_export.networks.spec import NetworkSpec
from ltxrt_export.parity import LIMIT, ParityRow, check_network, relative_error
from ltxrt_export.references import REFERENCES
from ltxrt_export.weights import TensorFile

Specs = Mapping[str, NetworkSpec]


def copied(network: str, folder: Path) -> Path:
    """The graph of a shipped network and its weight files in ``folder``."""
    bundle = Bundle.open()
    entry = bundle.network("high", network)
    for name in (entry.file, *entry.weights):
        shutil.copyfile(bundle.file(name), folder / Path(name).name)
    return folder / Path(entry.file).name


def plant(file: Path, key: str, values: int) -> None:
    """Negate the first ``values`` bf16 values of a stored tensor."""
    ref = TensorFile.open(file).tensors[key]
    assert ref.dtype == "BF16"
    data = bytearray(file.read_bytes())
    for index in range(values):
        data[ref.offset + 2 * index + 1] ^= 0x80
    file.write_bytes(data)


def test_right_weights_pass(shipped_sources: Sources, shipped_specs: Specs, tmp_path: Path) -> None:
    rows = list(check_network(shipped_sources, shipped_specs["upsampler"], copied("upsampler", tmp_path)))
    assert [dict(row.sizes) for row in rows] == [{"f": 2, "h": 2, "w": 1}, {"f": 5, "h": 3, "w": 7}]
    assert all(row.passed and 0 < row.error < LIMIT == row.limit for row in rows)
    assert {(row.network, row.output, row.unit) for row in rows} == {("upsampler", "upsampled", "(relative L2)")}


@pytest.mark.parametrize(
    ("network", "output", "sizes", "file", "key"),
    [
        ("upsampler", "upsampled", "{'f': 2, 'h': 2, 'w': 1}", "ltx-2.3-tiny-upscaler", "final_conv.weight"),
        (
            "denoiser",
            "latent_next",
            "{'f': 2, 'h': 1, 'w': 1, 'Na': 1}",
            "ltx-2.3-tiny",
            "model.diffusion_model.transformer_blocks.3.attn1.to_out.0.weight",
        ),
        ("text_encoder", "audio_context", "{'n': 1}", "model", "language_model.model.layers.4.mlp.up_proj.weight"),
    ],
)
def test_a_wrong_weight_is_caught_and_named(
    shipped_sources: Sources,
    shipped_specs: Specs,
    tmp_path: Path,
    network: str,
    output: str,
    sizes: str,
    file: str,
    key: str,
) -> None:
    path = copied(network, tmp_path)
    plant(tmp_path / f"{file}.safetensors", key, 64)
    with pytest.raises(ExportError) as caught:
        list(check_network(shipped_sources, shipped_specs[network], path))
    outputs = "|".join(port.name for port in shipped_specs[network].outputs)
    found = re.fullmatch(
        rf"{network}: ({outputs}) at {re.escape(sizes)} is off by (\S+) \(relative L2\), the limit is 0\.0001",
        str(caught.value),
    )
    assert found is not None, str(caught.value)
    assert float(found[2]) > LIMIT


def test_wrong_pictures_are_given_in_levels(shipped_sources: Sources, shipped_specs: Specs, tmp_path: Path) -> None:
    path = copied("video_decoder", tmp_path)
    plant(tmp_path / "ltx-2.3-tiny.safetensors", "vae.decoder.conv_out.conv.weight", 64)
    with pytest.raises(
        ExportError,
        match=r"^video_decoder: frames at .* is off by \S+ levels \(mean absolute\), the limit is 0\.01$",
    ):
        list(check_network(shipped_sources, shipped_specs["video_decoder"], path))


def test_every_network_has_a_reference_at_two_other_sizes(shipped_sources: Sources, shipped_specs: Specs) -> None:
    assert set(REFERENCES) == set(NETWORK_NAMES) == set(shipped_specs)
    for name, spec in shipped_specs.items():
        reference = REFERENCES[name](shipped_sources, spec)
        assert len(reference.sizes) >= 2
        for sizes in reference.sizes:
            assert any(spec.axes[symbol].example != size for symbol, size in sizes.items())
            assert all(spec.axes[symbol].minimum <= size <= spec.axes[symbol].maximum for symbol, size in sizes.items())


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9),
    factor=st.floats(0.0, 0.5),
)
def test_relative_error_is_the_relative_norm(values: list[float], factor: float) -> None:
    expected = np.array(values, np.float64)
    if np.linalg.norm(expected) < 1e-20:
        return
    assert relative_error(expected, expected) == 0
    assert relative_error(expected * (1 + factor), expected) == pytest.approx(factor, rel=1e-6, abs=1e-12)
    # Single precision would overflow in the square.
    assert np.isfinite(relative_error(expected.astype(np.float32), -expected.astype(np.float32)))


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([], [], 0.0),
        ([3.0, 4.0], [0.0, 0.0], 5e30),
        ([0.0, 0.0], [3.0, 4.0], 1.0),
        ([float("nan"), 1.0], [1.0, 1.0], float("inf")),
        ([float("inf"), 1.0], [float("inf"), 1.0], float("inf")),
        ([1.0, 1.0], [1.0, 1.0, 1.0], float("inf")),
        ([[1.0, 1.0]], [1.0, 1.0], float("inf")),
        ([2.0], [1.0, 1.0], float("inf")),
    ],
)
def test_relative_error_at_the_edges(found: list[float], expected: list[float], error: float) -> None:
    assert relative_error(np.array(found, np.float32), np.array(expected, np.float32)) == pytest.approx(error)


@pytest.mark.parametrize(
    ("error", "passed"),
    [(0.0, True), (LIMIT, True), (LIMIT * 1.001, False), (float("inf"), False), (float("nan"), False)],
)
def test_only_what_is_within_the_limit_passes(error: float, passed: bool) -> None:
    assert ParityRow("network", "output", {}, error, LIMIT, "").passed is passed


def test_an_expectation_that_is_not_finite_never_passes() -> None:
    for value in ("nan", "inf"):
        error = relative_error(np.ones(2, np.float32), np.array([1.0, float(value)], np.float32))
        assert not ParityRow("network", "output", {}, error, LIMIT, "").passed
