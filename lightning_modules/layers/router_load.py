"""How a router's decisions spread over its choices, over all processes, and losses of that."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.layers.router import balance_of, load_share


class RouterLoad(NamedTuple):
    """Sums over decisions, from which every loss of a router is computed.

    Attributes:
        chosen: how often each choice was chosen, `[n]`, without gradient.
        probability: sum of the probabilities, `[n]`.
        z: sum of `logsumexp(logits)^2`, `[1]`.
        decisions: how many there were, `[1]`.
    """

    chosen: Tensor
    probability: Tensor
    z: Tensor
    decisions: Tensor

    @classmethod
    def of(cls, logits: Tensor, choices: Tensor, counted: Tensor | None = None) -> RouterLoad:
        """The load of these decisions.

        Args:
            logits: `[..., n]`.
            choices: int64 `[..., k]`, k different ones of 0 to n - 1.
            counted: decisions that count, bool `[...]`; None: all.
        """
        if counted is None:
            counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        dims = tuple(range(logits.dim() - 1))
        chosen = chosen_of(choices, logits.shape[-1]) & counted.unsqueeze(-1)
        probability = torch.where(counted.unsqueeze(-1), logits.softmax(-1), 0.0)
        z = torch.where(counted, logits.logsumexp(-1).square(), 0.0)
        return cls(
            chosen.sum(dims).to(logits.dtype),
            probability.sum(dims),
            z.sum().view(1),
            counted.sum().view(1).to(logits.dtype),
        )

    def over_ranks(self) -> RouterLoad:
        """The sum over all processes, in one transfer; itself in a single process.

        The gradient is such that the average over processes, which data-parallel training takes,
        is the gradient of the loss over the decisions of all of them.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        if torch.distributed.get_world_size() == 1:
            return self
        sizes = [len(value) for value in self]
        return RouterLoad(*_SumOverRanks.apply(torch.cat(self)).split(sizes))

    def balance(self) -> Tensor:
        """`n * sum_i f_i P_i / k`, 1 when balanced: `balance_loss` over all decisions.

        `f_i` counts how often i was chosen per decision (k in sum), `P_i` is its mean probability.
        """
        return balance_of(load_share(self.chosen), self._mean())

    def deviation(self) -> Tensor:
        """`mean_i (c_i / mean(c) - 1)^2`, of the counts c: 0 when even, n - 1 when one has all.

        It is the squared coefficient of variation of the counts (arXiv:1701.06538, equation 11).
        Counts have no gradient, so that a share is moved through the mean probability of its
        choice, straight through: `d(c_i / sum(c)) = dP_i`. As probabilities sum to 1, the gradient
        is exactly twice that of `balance`: what differs is the value, which is a deviation.
        """
        mean = self._mean()
        share = load_share(self.chosen) + (mean - mean.detach())
        none = self.decisions.squeeze(0) == 0
        return torch.where(none, 0.0, (len(share) * share - 1).square().mean())

    def z_loss(self) -> Tensor:
        """Mean of `logsumexp(logits)^2` over all decisions (arXiv:2202.08906, equation 5)."""
        return (self.z / self.decisions.clamp(min=1)).squeeze(0)

    def _mean(self) -> Tensor:
        return self.probability / self.decisions.clamp(min=1)


def chosen_of(choices: Tensor, n: int) -> Tensor:
    """Which of n choices were chosen, bool `[..., n]` from int64 `[..., k]`."""
    chosen = torch.zeros(*choices.shape[:-1], n, dtype=torch.bool, device=choices.device)
    return chosen.scatter(-1, choices, True)


class _SumOverRanks(torch.autograd.Function):
    """Sum over processes that all compute the same loss of it.

    The gradients that they have for it are then the same, and their sum is this process's one
    times the number of processes: the backward pass needs no transfer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.distributed.get_world_size()
