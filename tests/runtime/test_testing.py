# SPDX-License-Identifier: Apache-2.0
"""The fakes have the ports of the real networks, check what they are fed, and remember it."""

import numpy as np
import pytest

from ltxrt.bundle import Bundle
from ltxrt.engine import TensorSpec
from ltxrt.errors import EngineError
from ltxrt.manifest import NETWORK_NAMES
from ltxrt.testing import FakeEngine, fake_engines, fake_pipeline


def doubling():
    return FakeEngine(
        "toy",
        (TensorSpec("x", "float32", (1, "n")),),
        (TensorSpec("y", "int64", (2, "2n", "n")),),
        derived=lambda sizes: {"2n": 2 * sizes["n"]},
        value=7,
    )


def test_a_fake_gives_its_value_in_the_declared_shape_and_dtype():
    outputs = doubling().run({"x": np.zeros((1, 3), np.float32)})
    np.testing.assert_array_equal(outputs["y"], np.full((2, 6, 3), 7, np.int64))
    assert outputs["y"].dtype == np.int64


@pytest.mark.parametrize("method", ["run", "capture"])
def test_a_fake_checks_its_feeds(method):
    with pytest.raises(EngineError, match="toy: x is float64, expected float32"):
        getattr(doubling(), method)({"x": np.zeros((1, 3))})


def test_a_fake_remembers_what_it_was_fed():
    engine, x = doubling(), np.zeros((1, 3), np.float32)
    engine.run({"x": x})
    x[...] = 5
    capture = engine.capture({"x": x})
    x[...] = 9
    capture.replay()
    assert [float(call["x"][0, 0]) for call in engine.calls] == [0, 5]
    assert capture.outputs["y"].shape == (2, 6, 3)


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_the_fakes_have_the_ports_of_the_bundle_that_ships(name):
    real = Bundle.open().network("high", name)
    fake = getattr(fake_engines(), name)
    states = {state.name for state in Bundle.open().manifest.model.stream.states}
    for ports, twins in ((real.inputs, fake.inputs), (real.outputs, fake.outputs)):
        found = {port.name: port.spec() for port in ports if port.name.removeprefix("next_") not in states}
        assert list(found) == [twin.name for twin in twins]
        for twin in twins:
            assert twin.dtype == found[twin.name].dtype
            assert len(twin.shape) == len(found[twin.name].shape)


def test_the_fake_pipeline_has_every_preset():
    pipeline = fake_pipeline()
    for preset in ("low", "medium", "high", "maximum"):
        assert pipeline.store.engines(preset).denoiser.name == "denoiser"
    assert pipeline.tokenizer.encode("a face").input_ids.tolist() == [[1, 0, 0]]
