"""Chapter attention token by token: the readable definition that the fast backend is tested with.

What a token reads is a sum over softmaxes, each over the rows of some chapters, whose logits are
`scale q k^T` plus a bias for the chapter: joint mixing has one softmax over all chapters with the
logarithms of their weights as biases, a mixture one softmax for each chapter times its weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout as zero_some

from lightning_modules.ops.ttt_eager import autocast_device


class Softmax(NamedTuple):
    """One softmax: its chapters, a bias for each, `[n]`, and the weight of what it reads."""

    chapters: list[int]
    biases: Tensor
    weight: Tensor


def naive_chapter_attention(
    q: Tensor,
    mem_k: Tensor,
    mem_v: Tensor,
    chapters: Tensor | None,
    log_weights: Tensor | None,
    *,
    block_size: int,
    shared: int,
    shared_mode: str,
    mixing: str,
    scale: float | None,
    dropout: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Chapter attention, token by token; arguments and results of `ops.chapter_attention`.

    Everything is computed in float32 at least, whatever autocast says.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, time, heads, size = q.shape
    scale = size**-0.5 if scale is None else scale
    outputs, logsumexps = [], []
    with torch.autocast(autocast_device(q.device), enabled=False):
        # key head g belongs to the query heads g G to (g + 1) G - 1
        k, v = (x.to(dtype).repeat_interleave(heads // x.shape[2], 2) for x in (mem_k, mem_v))
        zeros = k.new_zeros(len(k))
        for row in range(batch):
            for t in range(time):
                if chapters is None:
                    softmaxes = [Softmax(list(range(len(k))), zeros, zeros.new_ones(()))]
                else:
                    block = t // block_size
                    chosen = chapters[row, block].tolist()
                    logs = zeros[: len(chosen)]
                    if log_weights is not None:
                        logs = log_weights[row, block].to(dtype)
                    softmaxes = plan(chosen, logs, shared, shared_mode, mixing)
                read_by = [read(scale * q[row, t].to(dtype), k, v, x, dropout) for x in softmaxes]
                parts = [x.weight * o for x, (o, _) in zip(softmaxes, read_by, strict=True)]
                outputs.append(torch.stack(parts).sum(0))
                logsumexps.append(read_by[0][1])
    o = torch.stack(outputs).view(q.shape).to(q.dtype)
    return (o, torch.stack(logsumexps).view(q.shape[:3])) if return_lse else o


def plan(
    chosen: list[int], log_weights: Tensor, shared: int, shared_mode: str, mixing: str
) -> list[Softmax]:
    """The softmaxes of a token that has chosen these chapters with these weights, `[k]`."""
    common, one = list(range(shared)), log_weights.new_ones(())
    no_bias = log_weights.new_zeros(shared)
    if mixing == "joint":
        return [Softmax(common + chosen, torch.cat([no_bias, log_weights]), one)]
    no_bias_of_one = log_weights.new_zeros(1)
    softmaxes = [
        Softmax([c], no_bias_of_one, weight)
        for c, weight in zip(chosen, log_weights.exp(), strict=True)
    ]
    if shared_mode == "per_chapter":
        return softmaxes + [Softmax([c], no_bias_of_one, one) for c in common]
    return softmaxes + ([Softmax(common, no_bias, one)] if common else [])


def read(
    q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, dropout: float
) -> tuple[Tensor, Tensor]:
    """What a query `[H, D]`, scaled, reads in one softmax, `[H, D]`, and its lse, `[H]`."""
    logits = torch.einsum("hd,crhd->hcr", q, k[softmax.chapters]) + softmax.biases.unsqueeze(-1)
    lse = logits.flatten(1).logsumexp(-1)
    weights = zero_some((logits - lse.view(-1, 1, 1)).exp(), dropout)
    return torch.einsum("hcr,crhd->hd", weights, v[softmax.chapters]), lse
