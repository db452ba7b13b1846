# SPDX-License-Identifier: Apache-2.0
"""The text encoder: Gemma 3, feature extractor and both connectors in one graph, prompt tokens to contexts.

It runs on the n real tokens alone, without padding and without a mask, and is still exact: Gemma's RoPE is
relative, its window never bites at this length, and the connectors replace every padded position by a register
at its absolute index anyway. Numerics: Lightricks/LTX-2 packages/ltx-core/src/ltx_core/text_encoders/gemma/
{feature_extractor,embeddings_connector,embeddings_processor}.py; transformers models/gemma3/modeling_gemma3.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Gemma3TextModel

from ltxrt.errors import ExportError
from ltxrt_export.weights import TensorRef

from .attention import gated_attention, rms_norm, rotate_split, split_heads
from .spec import Axis, NetworkSpec, Port

__all__ = ["GemmaStates", "TextEncoder", "spec"]

_FEATURE_EPS = 1e-6


class GemmaStates(nn.Module):
    """All hidden states of Gemma 3's language tower, unpadded and causal."""

    def __init__(self, model: Gemma3TextModel) -> None:
        super().__init__()
        self.embed_tokens = model.embed_tokens
        self.layers: Any = model.layers
        self.norm = model.norm
        self.config: Any = model.config
        for kind in sorted(set(self.config.layer_types)):
            frequencies = getattr(model.rotary_emb, f"{kind}_inv_freq")
            self.register_buffer(f"{kind}_frequencies", frequencies, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[1, n] token ids to [1, n, hidden, layers + 1]; the last state is the one after the final norm."""
        config, weight = self.config, self.embed_tokens.weight
        # Rounded to bf16 as in the published runs (62.0, not 61.97, at width 3840).
        scale = float(torch.tensor(math.sqrt(config.hidden_size)).to(torch.bfloat16))
        x = F.embedding(input_ids, weight) * scale
        positions = torch.arange(input_ids.shape[1], dtype=torch.float32).reshape(1, 1, -1, 1)
        ropes = {}
        for kind in sorted(set(config.layer_types)):
            angles = positions * getattr(self, f"{kind}_frequencies")
            ropes[kind] = (angles.cos(), angles.sin())
        states = [x]
        for index, layer in enumerate(self.layers):
            attended = self._attend(
                layer.self_attn, self._norm(layer.input_layernorm, x), ropes[config.layer_types[index]]
            )
            x = x + self._norm(layer.post_attention_layernorm, attended)
            expanded = layer.mlp(self._norm(layer.pre_feedforward_layernorm, x))
            x = x + self._norm(layer.post_feedforward_layernorm, expanded)
            states.append(x)
        states[-1] = self._norm(self.norm, x)
        return torch.stack(states, dim=-1)

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        """Gemma's RMSNorm: fp32, scale 1 + weight."""
        return rms_norm(x.float(), 1.0 + norm.weight.float(), self.config.rms_norm_eps).to(x.dtype)

    def _attend(self, attention: Any, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        config = self.config
        query = split_heads(attention.q_proj(x), config.num_attention_heads)
        key = split_heads(attention.k_proj(x), config.num_key_value_heads)
        value = split_heads(attention.v_proj(x), config.num_key_value_heads)
        query = rotate_split(self._norm(attention.q_norm, query), rope)
        key = rotate_split(self._norm(attention.k_norm, key), rope)
        scale = config.query_pre_attn_scalar**-0.5
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return attention.o_proj(out.transpose(1, 2).flatten(2))


class TextEncoder(nn.Module):
    """Token ids to the two text contexts."""

    def __init__(self, text_model: Gemma3TextModel, connectors: LTX2TextConnectors, context_tokens: int) -> None:
        super().__init__()
        self.text_model = GemmaStates(text_model)
        self.connectors: Any = connectors
        self.context_tokens = context_tokens
        for name, connector in (("video", connectors.video_connector), ("audio", connectors.audio_connector)):
            # Under a fake mode these values are fake too: ``constants`` gives the real ones by name.
            cos, sin = connector.rope(1, context_tokens, "cpu")
            self.register_buffer(f"{name}_cos", cos, persistent=False)
            self.register_buffer(f"{name}_sin", sin, persistent=False)
            self.register_buffer(f"{name}_ones", torch.ones(connector.inner_dim), persistent=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[1, n] int64, BOS first, to ([1, context, video width], [1, context, audio width])."""
        states = self.text_model(input_ids)
        mean_square = states.pow(2).mean(dim=2, keepdim=True)
        # Channel-major, layer-minor.
        features = (states * torch.rsqrt(mean_square + _FEATURE_EPS)).flatten(2)
        config, connectors = self.connectors.config, self.connectors
        video = connectors.video_text_proj_in(features * math.sqrt(config.video_hidden_dim / config.caption_channels))
        audio = connectors.audio_text_proj_in(features * math.sqrt(config.audio_hidden_dim / config.caption_channels))
        return self._connect(connectors.video_connector, video, "video"), self._connect(
            connectors.audio_connector, audio, "audio"
        )

    def _connect(self, connector: Any, tokens: Tensor, name: str) -> Tensor:
        registers = connector.learnable_registers
        tiled = registers.repeat(self.context_tokens // registers.shape[0], 1).unsqueeze(0)
        x = torch.cat([tokens, tiled[:, tokens.shape[1] :]], dim=1)
        ones, rope = (
            getattr(self, f"{name}_ones"),
            (getattr(self, f"{name}_cos"), getattr(self, f"{name}_sin")),
        )
        for block in connector.transformer_blocks:
            x = x + gated_attention(block.attn1, rms_norm(x, ones, block.norm1.eps), query_rope=rope)
            x = x + block.ff(rms_norm(x, ones, block.norm2.eps))
        return rms_norm(x, ones, connector.norm_out.eps)


def spec(
    text_model: Gemma3TextModel,
    connectors: LTX2TextConnectors,
    weights: tuple[Mapping[str, TensorRef], Mapping[str, TensorRef]],
    context_tokens: int,
) -> NetworkSpec:
    """The text encoder of a Gemma folder and a checkpoint's connectors.

    Args:
        text_model: Language tower.
        connectors: Feature extractor and connectors.
        weights: Stored tensors of ``text_model`` and of ``connectors``.
        context_tokens: Length of the contexts; the registers divide it.

    Raises:
        ExportError: The sliding window is shorter than a context, so that leaving it out would not be exact.
    """
    config: Any = connectors.config
    window = text_model.config.sliding_window
    if window is not None and window < context_tokens:
        raise ExportError(
            f"text_config.sliding_window = {window} is not supported; supported: at least {context_tokens}, the context"
        )
    gemma, connector = weights
    return NetworkSpec(
        name="text_encoder",
        module=TextEncoder(text_model, connectors, context_tokens),
        inputs=(Port("input_ids", "int64", (1, "n")),),
        outputs=(
            Port("video_context", "float32", (1, context_tokens, int(config.video_hidden_dim))),
            Port("audio_context", "float32", (1, context_tokens, int(config.audio_hidden_dim))),
        ),
        # The tracer wants room for at least two registers; the graph serves a full context as well.
        axes={"n": Axis(1, context_tokens, 10, traced_maximum=context_tokens - 2)},
        weights={
            **{f"text_model.{name}": ref for name, ref in gemma.items()},
            **{f"connectors.{name}": ref for name, ref in connector.items()},
        },
        constants=_constants(text_model, connectors, context_tokens),
    )


def _constants(
    text_model: Gemma3TextModel, connectors: LTX2TextConnectors, context_tokens: int
) -> dict[str, NDArray[Any]]:
    """Real values of the computed buffers, from the configurations alone."""
    constants: dict[str, NDArray[Any]] = {}
    gemma: Any = text_model.config
    for kind in sorted(set(gemma.layer_types)):
        rope: Mapping[str, Any] = gemma.rope_parameters[kind]
        exponents = np.arange(0, gemma.head_dim, 2, dtype=np.float32) / np.float32(gemma.head_dim)
        frequencies = (1.0 / np.float32(rope["rope_theta"]) ** exponents).astype(np.float32)
        factor = np.float32(rope["factor"] if rope["rope_type"] == "linear" else 1.0)
        constants[f"text_model.{kind}_frequencies"] = frequencies / factor
    for name, connector in (("video", connectors.video_connector), ("audio", connectors.audio_connector)):
        rope_module = connector.rope
        count = connector.inner_dim // 2
        grid = (rope_module.theta ** np.linspace(0.0, 1.0, count) * np.pi / 2.0).astype(np.float32)
        position = np.arange(context_tokens, dtype=np.float32) / np.float32(rope_module.base_seq_len)
        angles = (position[:, None] * np.float32(2.0) - np.float32(1.0)) * grid
        heads = angles.reshape(context_tokens, connector.num_attention_heads, -1).swapaxes(0, 1)[None]
        constants[f"{name}_cos"], constants[f"{name}_sin"] = np.cos(heads), np.sin(heads)
        constants[f"{name}_ones"] = np.ones(connector.inner_dim, np.float32)
    return constants
