# SPDX-License-Identifier: Apache-2.0
"""Attention, norms and RoPE in the form that exports well, over the parameters of the diffusers classes.

Numerics: Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/transformer/attention.py and rope.py.
"""

from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["Rope", "gated_attention", "rms_norm", "rotate_split", "split_heads"]

#: Cosine and sine tables, each [1, heads, tokens, head width / 2], fp32.
Rope = tuple[torch.Tensor, torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis.

    ``weight`` is always given (ones where the checkpoint has none): without one the exporter emits a scale
    tensor as large as the activation.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[1, tokens, heads * width] to [1, heads, tokens, width]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def rotate_split(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Split-layout rotation of x [1, heads, tokens, width] in fp32, given back in the dtype of x.

    Out of place on purpose: the in-place form of the original exports as scatter operations.
    """
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def gated_attention(
    attention: Any,
    x: torch.Tensor,
    context: torch.Tensor | None = None,
    *,
    query_rope: Rope | None = None,
    key_rope: Rope | None = None,
) -> torch.Tensor:
    """Multi-head attention with whole-width q/k RMSNorm, split RoPE and a per-head output gate.

    Args:
        attention: An ``LTX2Attention``; its gate logits come from the query-side input, factor 2 * sigmoid.
        x: Query-side input, [1, tokens, width].
        context: Key- and value-side input; None for self-attention.
        query_rope: Tables for the queries; None for no rotation.
        key_rope: Tables for the keys; None takes ``query_rope``.
    """
    heads = attention.heads
    context = x if context is None else context
    query = rms_norm(attention.to_q(x), attention.norm_q.weight, attention.norm_q.eps)
    key = rms_norm(attention.to_k(context), attention.norm_k.weight, attention.norm_k.eps)
    query, key, value = (split_heads(t, heads) for t in (query, key, attention.to_v(context)))
    if query_rope is not None:
        query, key = rotate_split(query, query_rope), rotate_split(key, key_rope or query_rope)
    out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    gate = 2.0 * torch.sigmoid(attention.to_gate_logits(x))
    return attention.to_out[0]((out * gate.unsqueeze(-1)).flatten(2))
