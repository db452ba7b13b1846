# SPDX-License-Identifier: Apache-2.0
"""Pixel norm and SiLU in one pass over memory, for training: apart, they cost more than the convolutions."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["fast_norms", "plain_norms"]

_PAIRS = (
    ("norm1", "nonlinearity"),
    ("norm2", "nonlinearity"),
    ("norm_out", "conv_act"),
    ("norm1", "non_linearity"),
    ("norm2", "non_linearity"),
    ("norm_out", "non_linearity"),
)


def fast_norms(module: nn.Module) -> None:
    """Fuse norm and activation in every block of a video or audio VAE; no parameter is touched."""
    for block in list(module.modules()):
        pairs = [pair for pair in _PAIRS if all(isinstance(getattr(block, name, None), nn.Module) for name in pair)]
        if not pairs:
            continue
        plain = {name: getattr(block, name) for pair in pairs for name in pair}
        object.__setattr__(block, "plain_norms", plain)
        for norm, activation in pairs:
            setattr(block, norm, _NormSilu(float(plain[norm].eps)))
            setattr(block, activation, nn.Identity())


def plain_norms(module: nn.Module) -> None:
    """Undo ``fast_norms``."""
    for block in list(module.modules()):
        plain: dict[str, nn.Module] = getattr(block, "plain_norms", {})
        for name, original in plain.items():
            setattr(block, name, original)


def _norm_silu(rows: Tensor, eps: float) -> Tensor:
    wide = rows.float()
    return F.silu(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(rows.dtype)


@cache
def _fused() -> Any:
    """Compiled at the first call: importing the compiler takes seconds and warns."""
    import torch._dynamo

    # The strides of what a matrix is a view of are told apart; past the limit it would fall back to single operations.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(_norm_silu, dynamic=True)


class _NormSilu(nn.Module):
    """Works on [B, C, ...] that is channels last in memory."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1).contiguous()
        # As a matrix, of which only the number of rows varies: other shapes would be compiled one by one.
        result: Tensor = _fused()(rows.reshape(-1, x.shape[1]), self.eps)
        return result.view(rows.shape).movedim(-1, 1)
