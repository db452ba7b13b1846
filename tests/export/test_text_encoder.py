# SPDX-License-Identifier: Apache-2.0
"""The text encoder on the real tokens alone against Gemma and the connectors on the padded context."""

import copy
import math
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ltxrt.errors import ExportError
from ltxrt_export import architecture, keys, published
from ltxrt_export.networks import text_encoder
from ltxrt_export.networks.spec import NetworkSpec
from ltxrt_export.onnx_export import check_graph, export_model
from ltxrt_export.parity import relative_error
from ltxrt_export.tiny.config import checkpoint_config, gemma_config
from ltxrt_export.tiny.weights import random_tensor
from ltxrt_export.weights import TensorFile

VOCABULARY, CONTEXT = 64, 256
COUNTS = (1, 2, 17, CONTEXT)


def filled(module: nn.Module, key_map: keys.KeyMap) -> Any:
    """``module`` with random weights."""
    state = {
        name: torch.from_numpy(random_tensor(key_map.stored(name), tuple(value.shape), 0))
        for name, value in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def small_gemma(**changes: Any) -> dict[str, Any]:
    """Three layers of the tiny Gemma, sliding and full; ``changes`` to its text config."""
    config = gemma_config(VOCABULARY)
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config["text_config"] |= {"num_hidden_layers": len(layers), "layer_types": layers, **changes}
    return config


def both(config: dict[str, Any]) -> tuple[Any, Any]:
    """Gemma and the connectors for it, random."""
    checkpoint = checkpoint_config()
    checkpoint["transformer"] |= {"connector_num_layers": 1, "caption_channels": config["text_config"]["hidden_size"]}
    return (
        filled(architecture.text_model(config), keys.gemma_keys()),
        filled(architecture.connectors(checkpoint, config), keys.key_map("connectors")),
    )


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return both(small_gemma())


def tokens(count: int) -> Tensor:
    """[1, count] ids, the beginning of a text first."""
    ids = torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(count))
    ids[:, 0] = 2
    return ids


def reference(models: tuple[Any, Any], ids: Tensor) -> tuple[Tensor, Tensor]:
    """As published: padded on the left to the whole context, and masked."""
    text_model, connectors = models
    padding = (CONTEXT - ids.shape[1], 0)
    padded, mask = (nn.functional.pad(value, padding) for value in (ids, torch.ones_like(ids)))
    with torch.no_grad():
        states = text_model(
            input_ids=padded, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        video, audio, _ = connectors(torch.stack(states, dim=-1).flatten(2), mask)
    return video, audio


def check(found: Any, models: tuple[Any, Any], count: int) -> None:
    for one, other in zip(found, reference(models, tokens(count)), strict=True):
        assert relative_error(np.asarray(one), other.numpy()) < 2e-6


@pytest.mark.parametrize("count", COUNTS)
def test_unpadded_equals_padded_and_masked(models: tuple[Any, Any], count: int) -> None:
    network = text_encoder.TextEncoder(*models, CONTEXT).eval()
    with torch.no_grad():
        check(network(tokens(count)), models, count)


def test_tokens_are_seen_and_order_counts(models: tuple[Any, Any]) -> None:
    network = text_encoder.TextEncoder(*models, CONTEXT).eval()
    ids = tokens(17)
    with torch.no_grad():
        first, swapped = network(ids)[0], network(ids.flip(1))[0]
    assert relative_error(swapped.numpy(), first.numpy()) > 1e-2
    assert relative_error(first[:, 200:].numpy(), first[:, 100:156].numpy()) > 1e-2  # registers have positions


@pytest.fixture(scope="module")
def spec(models: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> NetworkSpec:
    """The network, its weights stored under their module names in two files."""
    folder = tmp_path_factory.mktemp("text")
    refs = []
    for name, model in zip(("gemma", "connectors"), models, strict=True):
        path = folder / f"{name}.safetensors"
        save_file({f"{name}.{key}": value for key, value in model.state_dict().items()}, path)
        stored = TensorFile.open(path).tensors
        refs.append({key.removeprefix(f"{name}."): ref for key, ref in stored.items()})
    return text_encoder.spec(*models, (refs[0], refs[1]), CONTEXT)


@pytest.fixture(scope="module")
def session(spec: NetworkSpec) -> ort.InferenceSession:
    path = next(iter(spec.weights.values())).path.with_name("text_encoder.onnx")
    onnx.save_model(export_model(spec), path)
    check_graph("text_encoder", path)
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("count", COUNTS)
def test_onnx_runtime_equals_the_classes(models: tuple[Any, Any], session: ort.InferenceSession, count: int) -> None:
    check(session.run(None, {"input_ids": tokens(count).numpy()}), models, count)


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are computed, not stored, but for the one of transformers that the network replaces."""
    others = {*module.state_dict(), "text_model.embed_tokens.embed_scale"}
    return {name: value for name, value in module.named_buffers() if name not in others}


def test_constants_are_the_buffers(spec: NetworkSpec) -> None:
    expected = buffers(spec.module)
    assert set(spec.constants) == set(expected)
    for name, value in spec.constants.items():
        assert value.dtype == np.float32
        assert value.shape == tuple(expected[name].shape)
        np.testing.assert_allclose(value, expected[name].numpy(), rtol=0, atol=1.2e-7, err_msg=name)


def test_constants_of_the_published_model() -> None:
    """The angles reach 15,708 rad there: one bit of a frequency is a thousandth of a cosine."""
    context = 1024
    config = published.checkpoint_config()
    config["transformer"]["connector_num_layers"] = 1
    gemma = published.gemma_config()
    with torch.device("meta"):
        connectors = architecture.connectors(config, gemma)
    # Small in everything but what the buffers are made of.
    gemma["text_config"] |= {"num_hidden_layers": 6, "intermediate_size": 8, "vocab_size": 8, "hidden_size": 64}
    text_model = architecture.text_model(gemma)
    network = text_encoder.TextEncoder(text_model, connectors, context)
    constants = text_encoder.spec(text_model, connectors, ({}, {}), context).constants
    expected = buffers(network)
    assert constants["video_cos"].shape == (1, 32, context, 64)
    for name in ("video_cos", "video_sin", "audio_cos", "audio_sin"):
        np.testing.assert_allclose(constants[name], expected[name].numpy(), rtol=0, atol=2e-7, err_msg=name)
    for kind in ("full_attention", "sliding_attention"):
        name = f"text_model.{kind}_frequencies"
        np.testing.assert_allclose(constants[name], expected[name].numpy(), rtol=2e-7, err_msg=name)
    assert constants["text_model.full_attention_frequencies"][0] == np.float32(1 / 8)


def test_spec_is_the_same_on_fake_tensors(spec: NetworkSpec, models: tuple[Any, Any]) -> None:
    config = small_gemma()
    checkpoint = checkpoint_config()
    checkpoint["transformer"]["connector_num_layers"] = 1
    with FakeTensorMode():
        fake = text_encoder.spec(
            architecture.text_model(config), architecture.connectors(checkpoint, config), ({}, {}), CONTEXT
        )
    assert (fake.inputs, fake.outputs, fake.axes) == (spec.inputs, spec.outputs, spec.axes)
    assert set(fake.constants) == set(spec.constants)
    for name, value in spec.constants.items():
        np.testing.assert_array_equal(fake.constants[name], value)


#: 9.798 rounds to 9.8125 in bf16; the published width, 3840, has 61.968 and 62.
UNEVEN = 96


def test_embeddings_are_scaled_by_the_bf16_root_of_the_width() -> None:
    models = both(small_gemma(hidden_size=UNEVEN))
    scale = torch.tensor(math.sqrt(UNEVEN)).bfloat16().float()
    assert abs(scale / math.sqrt(UNEVEN) - 1) > 1e-3
    network = text_encoder.TextEncoder(*models, CONTEXT).eval()
    with torch.no_grad():
        states = network.text_model(tokens(5))
    assert torch.equal(states[..., 0], models[0].embed_tokens.weight[tokens(5)] * scale)
    # transformers has the rounded factor where it runs in bf16, as the published runs do, but not in fp32.
    rounded = copy.deepcopy(models[0])
    rounded.embed_tokens.embed_scale.copy_(scale)
    assert torch.equal(rounded.embed_tokens(tokens(5)), states[..., 0])
    in_bf16 = copy.deepcopy(models[0]).bfloat16().embed_tokens
    ones = torch.ones_like(in_bf16.weight)
    in_bf16.load_state_dict({"weight": ones})
    assert (in_bf16(tokens(5)) == scale).all()
    with torch.no_grad():
        check(network(tokens(17)), (rounded, models[1]), 17)


def test_a_window_shorter_than_the_context_is_refused(models: tuple[Any, Any]) -> None:
    short = architecture.text_model(small_gemma(sliding_window=CONTEXT - 1))
    with pytest.raises(
        ExportError, match=r"^text_config\.sliding_window = 255 is not supported; supported: at least 256"
    ):
        text_encoder.spec(short, models[1], ({}, {}), CONTEXT)
    exact = architecture.text_model(small_gemma(sliding_window=CONTEXT))
    assert text_encoder.spec(exact, models[1], ({}, {}), CONTEXT).name == "text_encoder"


def test_ports_of_the_published_model() -> None:
    gemma = published.gemma_config()
    with torch.device("meta"):
        spec = text_encoder.spec(
            architecture.text_model(gemma),
            architecture.connectors(published.checkpoint_config(), gemma),
            ({}, {}),
            1024,
        )
    assert [(port.name, port.dtype, port.shape) for port in (*spec.inputs, *spec.outputs)] == [
        ("input_ids", "int64", (1, "n")),
        ("video_context", "float32", (1, 1024, 4096)),
        ("audio_context", "float32", (1, 1024, 2048)),
    ]
    assert (spec.axes["n"].minimum, spec.axes["n"].maximum) == (1, 1024)
