"""TTT-as-LoRA token by token: the readable definition that the fast backend is tested against.

It holds explicit weights, adds one gradient at a time and reads with explicitly updated weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.ops.states import TTTLoRAState
from lightning_modules.ops.ttt_linear.naive import LinearFastModel
from lightning_modules.ops.ttt_naive import Learner, Weights, pack, resume


@dataclass(frozen=True)
class LNFastModel(LinearFastModel):
    """`f(x) = x W + b`, trained behind a LayerNorm, read without it."""

    def read(self, weights: Weights, q: Tensor) -> Tensor:
        """`q W + b`, `[G, 1, d]`."""
        return self.forward(weights, q)


@dataclass(frozen=True)
class PlainFastModel(LNFastModel):
    """`f(x) = x W + b`, trained as it is read; its norm has no meaning."""

    def output_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """`dl/dz` of `l = 1/2 ||z - target||^2`."""
        return z - target


def naive_ttt_lora(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    w_base: Tensor,
    b_base: Tensor,
    *,
    mini_batch_size: int,
    mode: str,
    norm: tuple[Tensor, Tensor] | None,
    norm_eps: float,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: TTTLoRAState | None,
    adapt: bool,
) -> tuple[Tensor, TTTLoRAState]:
    """TTT-as-LoRA, token by token; arguments as in `eager_ttt_lora`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries, k, v, eta = (x.to(dtype) for x in (q, k, v, eta))
    if not adapt:
        eta = torch.zeros_like(eta)
    initial = (w_base.to(dtype), b_base.to(dtype).unsqueeze(1))
    if norm is None:
        model: LNFastModel = PlainFastModel(b_base, b_base, norm_eps)
    else:
        model = LNFastModel(norm[0].to(dtype), norm[1].to(dtype), norm_eps)
    mean = torch.full((mini_batch_size,), 1 / mini_batch_size, dtype=dtype, device=q.device)
    outputs, learners = [], []
    with torch.autocast(q.device.type, enabled=False):
        for row in range(q.shape[0]):
            learner = Learner(model, initial, mean)
            if state is not None:
                resume(learner, state._replace(db=state.db.unsqueeze(-2)), row)
            keep = [True] * q.shape[1] if mask is None else mask[row].tolist()
            ids = None if document_ids is None else document_ids[row].tolist()
            tokens = (queries[row], k[row], v[row], eta[row])
            outputs.append(_read_row(learner, tokens, keep, ids, mini_batch_size, mode))
            learners.append(learner)
    new: TTTLoRAState = pack(learners, TTTLoRAState, mini_batch_size, k)
    return torch.stack(outputs).to(q.dtype), new._replace(db=new.db.squeeze(-2))


def _read_row(
    learner: Learner,
    tokens: tuple[Tensor, ...],
    keep: list[bool],
    ids: list[int] | None,
    size: int,
    mode: str,
) -> Tensor:
    """The outputs of a row, `[T, G, d]`; a masked token reads, and that is all it does."""
    outputs = []
    for t, (q, k, v, eta) in enumerate(zip(*tokens, strict=True)):
        if keep[t]:
            learner.enter(None if ids is None else ids[t])
        if mode == "A":
            outputs.append(learner.read_start(q.unsqueeze(1)))
        if keep[t]:
            learner.write(k.unsqueeze(1), v.unsqueeze(1), eta.view(-1, 1, 1))
            learner.tokens_seen += 1
        if mode == "B":
            outputs.append(learner.read(q.unsqueeze(1)))
        if len(learner.pending) == size:
            learner.close()
    return torch.stack(outputs).squeeze(2)
