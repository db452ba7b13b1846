# SPDX-License-Identifier: Apache-2.0
"""Muon for weight matrices, AdamW for the rest, a cosine to zero, and an average of the weights.

Muon (github KellerJordan/Muon): the momentum of a weight matrix is replaced by the nearest orthogonal matrix, so
that every direction learns at the same speed. On these networks it needs about half of AdamW's steps.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Average", "Optimiser"]

_MOMENTUM = 0.95
#: Newton-Schulz coefficients of the reference implementation: fast rather than exact.
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Optimiser:
    """Steps a set of modules.

    Args:
        parameters: Named parameters; tables, embeddings and vectors go to AdamW.
        muon_rate: Peak learning rate of the matrices, as a share of their scale.
        adam_rate: Peak learning rate of the rest.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], muon_rate: float, adam_rate: float) -> None:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in parameters:
            table = any(word in name for word in ("table", "embed_tokens", "registers"))
            (rest if parameter.ndim < 2 or table else matrices).append(parameter)
        self._matrices = matrices
        self._groups = list(_by_shape(matrices).values())
        self._momenta = [torch.zeros_like(matrix) for matrix in matrices]
        self._adam = torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
        self._rates = (muon_rate, adam_rate)
        self._all = [*matrices, *rest]

    def step(self, progress: float, *, clip: float = 1.0) -> float:
        """One update from the gradients that are there, which are cleared; ``progress`` runs from 0 to 1.

        Returns:
            The gradients' norm before clipping; where it is not finite, nothing was changed.
        """
        _average_gradients(self._all)
        scale = min(1.0, progress / 0.02 + 0.02) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))
        norm = nn.utils.clip_grad_norm_(self._all, clip)
        if not norm.isfinite():
            # Seen with a single 256x256 picture: the bf16 weight gradient of a convolution over it is NaN (torch 2.13,
            # oneDNN on a CPU). The encoder gets two at least; losing one step is better than losing all even so.
            for parameter in self._all:
                parameter.grad = None
            return float(norm)
        for group in self._adam.param_groups:
            group["lr"] = self._rates[1] * scale
        self._adam.step()
        with torch.no_grad():
            for group in self._groups:
                self._turn(group, scale)
        for parameter in self._all:
            parameter.grad = None
        return float(norm)

    def _turn(self, indices: list[int], scale: float) -> None:
        """The Muon step of matrices of one shape, all at once."""
        chosen = [index for index in indices if self._matrices[index].grad is not None]
        if not chosen:
            return
        gradients = [gradient for index in chosen if (gradient := self._matrices[index].grad) is not None]
        momenta = [self._momenta[index] for index in chosen]
        for momentum, gradient in zip(momenta, gradients, strict=True):
            momentum.lerp_(gradient, 1 - _MOMENTUM)
        pairs = zip(gradients, momenta, strict=True)
        updates = torch.stack([gradient.lerp(momentum, _MOMENTUM) for gradient, momentum in pairs]).flatten(2)
        rate = self._rates[0] * scale * math.sqrt(max(1.0, updates.shape[1] / updates.shape[2]))
        for index, update in zip(chosen, _orthogonal(updates), strict=True):
            matrix = self._matrices[index]
            matrix.mul_(1 - 0.01 * rate).sub_(update.view_as(matrix), alpha=rate)

    def state(self) -> dict[str, object]:
        """What ``restore`` takes."""
        return {"momenta": self._momenta, "adam": self._adam.state_dict()}

    def restore(self, state: dict[str, object]) -> None:
        """Go on from a saved state."""
        momenta: object = state["momenta"]
        assert isinstance(momenta, list)
        for mine, saved in zip(self._momenta, momenta, strict=True):
            mine.copy_(saved)
        self._adam.load_state_dict(state["adam"])  # pyright: ignore[reportArgumentType]


class Average:
    """An exponential average of parameters, with a decay that grows with the number of steps.

    Args:
        parameters: What to follow.
        decay: Final decay.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.998) -> None:
        self._parameters = list(parameters)
        self.values = [parameter.detach().clone() for parameter in self._parameters]
        self._decay, self._steps = decay, 0

    def update(self) -> None:
        """Take in the parameters as they are now."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        with torch.no_grad():
            for value, parameter in zip(self.values, self._parameters, strict=True):
                value.lerp_(parameter.detach(), 1 - decay)

    def restore(self, values: Iterable[Tensor]) -> None:
        """Go on from a saved average."""
        for mine, saved in zip(self.values, values, strict=True):
            mine.copy_(saved)

    def swap(self) -> None:
        """Exchange the average and the parameters; call it again to undo."""
        with torch.no_grad():
            for value, parameter in zip(self.values, self._parameters, strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(value)
                value.copy_(kept)


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Where several processes train, give all of them the mean gradient."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _by_shape(matrices: list[nn.Parameter]) -> dict[tuple[int, ...], list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault(tuple(matrix.flatten(1).shape), []).append(index)
    return groups


def _orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrices, [count, rows, columns]."""
    a, b, c = _QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
