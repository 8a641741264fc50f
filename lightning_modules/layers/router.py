"""What routers share: probabilities, top-k, and the losses that keep the load balanced.

A router gives every token a distribution over n choices (adapters, chapters of a bank):
`logits = x W^T + b`, `p = softmax(logits)`. All functions are causal, as they treat every token
by itself; the losses are means over the tokens of a call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.ops.ttt_eager import autocast_device

INIT_STD = 0.02


def init_router(router: nn.Linear) -> None:
    """Weights from N(0, 0.02), bias 0: nearly uniform probabilities at the start.

    Exact zeros would be uniform, but every token would tie, and a top-k would send all of them to
    the first k choices, so that the others could not learn.
    """
    nn.init.normal_(router.weight, std=INIT_STD)
    if router.bias is not None:
        nn.init.zeros_(router.bias)


def router_logits(x: Tensor, router: nn.Linear) -> Tensor:
    """`x W^T + b` in float32 at least, also under autocast.

    In bfloat16 close logits would tie, and a softmax over many choices would lose its small terms
    (arXiv:2101.03961, section 2.4).

    Args:
        x: `[..., hidden]`.
        router: maps hidden to n.

    Returns:
        `[..., n]`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if router.bias is None else router.bias.to(dtype)
    with torch.autocast(autocast_device(x.device), enabled=False):
        return F.linear(x.to(dtype), router.weight.to(dtype), bias)


def top_k(scores: Tensor, k: int) -> Tensor:
    """The k best choices of every token, best first; of equal ones the lowest index is better.

    The maximum is taken k times: for small k that is several times faster than a stable sort, and
    `torch.topk` promises nothing about equal scores.

    Args:
        scores: logits or probabilities, finite, `[..., n]`.
        k: 1 to n.

    Returns:
        int64 `[..., k]`.
    """
    left, choices = scores.detach().clone(), []
    for _ in range(k):
        choices.append(left.argmax(-1, keepdim=True))
        left.scatter_(-1, choices[-1], -torch.inf)
    return torch.cat(choices, dim=-1)


def log_weights(logits: Tensor, choices: Tensor, renormalize: bool) -> Tensor:
    """Logarithms of the weights of what was chosen.

    Args:
        logits: `[..., n]`.
        choices: int64 `[..., k]`.
        renormalize: weights sum to 1 over the choices, with k = 1 exactly, without gradient;
            otherwise they are probabilities.

    Returns:
        `[..., k]`.
    """
    chosen = logits.gather(-1, choices)
    among = chosen if renormalize else logits
    return chosen - among.logsumexp(-1, keepdim=True)


def top_k_weights(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest probabilities of every token; the others become 0.

    They are not renormalised (as in the Switch Transformer): the weight of a choice then tells
    how sure the router is, its gradient reaches the router also for k = 1, and k = n is exactly
    the dense mixture. Of equal probabilities the one with the lowest index counts as larger.

    Args:
        probabilities: `[..., n]`.
        k: 1 to n.

    Returns:
        Weights `[..., n]` and what is selected, bool `[..., n]` with k true.
    """
    selected = torch.zeros_like(probabilities, dtype=torch.bool)
    selected = selected.scatter(-1, top_k(probabilities, k), True)
    return probabilities * selected, selected


def balance_loss(
    probabilities: Tensor, selected: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """`n * sum_i f_i P_i`, 1 when balanced (arXiv:2101.03961, equations 4 to 6).

    `P_i` is the mean probability of choice i, and `f_i` its share of the load, which has no
    gradient. This is the load balancing loss of Mixtral in transformers, divided by k.

    Args:
        probabilities: `[..., n]`.
        selected: choices of every token, bool `[..., n]`; None for a dense mixture, whose load
            is `f = P`.
        mask: tokens that count, bool `[...]`.

    Returns:
        A scalar; 0 if no token counts.
    """
    mean = masked_mean(probabilities, mask)
    load = mean if selected is None else masked_mean(selected.to(mean.dtype), mask)
    return balance_of(load_share(load), mean)


def load_share(load: Tensor) -> Tensor:
    """Share of every choice in the load `[n]`, without gradient; 0 where there is no load."""
    load = load.detach()
    return load / load.sum().clamp(min=torch.finfo(load.dtype).tiny)


def balance_of(share: Tensor, mean: Tensor) -> Tensor:
    """`n * sum_i f_i P_i` of shares of the load `[n]` and mean probabilities `[n]`."""
    return mean.shape[-1] * (share * mean).sum()


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `logsumexp(logits)^2`: keeps the logits small (arXiv:2202.08906, equation 5).

    Args:
        logits: `[..., n]`.
        mask: tokens that count, bool `[...]`.

    Returns:
        A scalar; 0 if no token counts.
    """
    return masked_mean(logits.logsumexp(-1, keepdim=True).square(), mask).squeeze(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """`-sum_i p_i log p_i` of every token in nats, `[...]`: 0 when sure, log n when uniform."""
    return torch.special.entr(probabilities).sum(-1)


def masked_mean(values: Tensor, mask: Tensor | None = None, dim: int | None = None) -> Tensor:
    """Mean over tokens.

    Args:
        values: `[..., n]`.
        mask: tokens that count, bool `[...]`; None counts all.
        dim: token dimension over which the mean is taken; None takes all of them.

    Returns:
        `[n]`, or `[..., n]` without `dim`; 0 where no token counts.
    """
    dims = tuple(range(values.dim() - 1)) if dim is None else (dim,)
    if mask is None:
        return values.mean(dims)
    counted = torch.where(mask.unsqueeze(-1), values, 0.0).sum(dims)
    return counted / mask.unsqueeze(-1).sum(dims).clamp(min=1)


def counted_tokens(mask: Tensor | None, live: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Tokens that count in a loss, bool `[B, T]`: real ones, of rows that have a file.

    Args:
        mask: real tokens, bool `[B, T]`; None: all.
        live: rows that have a file, bool `[B]`; None: all.
        tokens: `[B, T, ...]`.

    Returns:
        None if all count.
    """
    if live is None:
        return mask
    rows = live.unsqueeze(-1).expand(tokens.shape[:2])
    return rows if mask is None else rows & mask
