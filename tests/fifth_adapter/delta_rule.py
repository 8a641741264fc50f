"""A fifth adapter, from outside of the library: DeltaNet's fast weights beside attention.

Equations (1) and (3) of Yang et al., "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length" (arXiv:2406.06484). `docs/new_adapter.md` goes through this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, rms_norm, silu

from lightning_modules.adapters import BaseAttentionAdapter, register_attention_adapter
from lightning_modules.adapters.base import gated, publish_gates
from lightning_modules.layers.gates import BranchGate
from lightning_modules.ops.grid import Progress, document_starts
from lightning_modules.streams import FastState

CHUNK = 64
"""Tokens that are solved for at once; the result does not depend on it."""


# --- 1. the maths: a pure function, state in and state out ---


class DeltaState(NamedTuple):
    """What the delta rule carries from one call to the next; all zeros mean fresh.

    Attributes:
        memory: S, float32 at least, `[B, H, D, D]`.
        tokens_seen: unmasked tokens of the current document, int64 `[B]`.
        document_id: its id, int64 `[B]`.
    """

    memory: Tensor
    tokens_seen: Tensor
    document_id: Tensor


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: DeltaState | None = None,
) -> tuple[Tensor, DeltaState]:
    """Every token corrects what the memory answers to its key, then asks with its query.

        S_t = S_{t-1} + beta_t k_t (v_t - k_t^T S_{t-1}),    o_t = q_t^T S_t

    Inside a chunk the corrections u_t = beta_t (v_t - k_t^T S_{t-1}) solve a triangular system:
    `(I + tril(beta K K^T, -1)) U = beta (V - K S)`, then `O = Q S + tril(Q K^T) U` and
    `S <- S + K^T U`.

    Args:
        q: queries, `[B, T, H, D]`.
        k: keys, likewise.
        v: values, likewise.
        beta: step sizes, `[B, T, H]`; 0 for a token that does not write.
        mask: real tokens, bool `[B, T]`; the others write nothing, and their output is 0.
        document_ids: int64 `[B, T]`; another id than before starts with S = 0.
        state: where the rows go on; None: fresh.

    Returns:
        `o [B, T, H, D]` in the dtype of q, and the next state.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, time, heads, size = q.shape
    valid = q.new_ones((batch, time), dtype=torch.bool) if mask is None else mask
    segment, progress = _segments(valid, document_ids, state)
    rate = (beta * valid.unsqueeze(-1)).to(dtype)
    memory = q.new_zeros((batch, heads, size, size), dtype=dtype) if state is None else state.memory
    held = torch.zeros_like(segment[:, 0])  # the document that the memory is of
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        tokens = [_chunks(x.to(dtype)) for x in (q, k, v, rate.unsqueeze(-1))]
        for part, *chunk in zip(_chunks(segment), *tokens, strict=True):
            o, memory = _take(*chunk, part, memory, held)
            held = part[:, -1]
            outputs.append(o)
    o = torch.cat(outputs, dim=2)[:, :, :time].transpose(1, 2)
    o = torch.where(valid[..., None, None], o, 0).to(q.dtype)
    return o, DeltaState(memory, progress.tokens_seen, progress.document_id)


def _segments(
    valid: Tensor, document_ids: Tensor | None, state: DeltaState | None
) -> tuple[Tensor, Progress]:
    """Number of the document of each token, 0 for the one that goes on, and the next progress."""
    zeros = torch.zeros_like(valid[:, 0], dtype=torch.int64)
    before = Progress(zeros, *(state[1:] if state is not None else (zeros, zeros)))
    starts, progress = document_starts(valid, valid.cumsum(1) - 1, document_ids, before)
    return starts.cumsum(1), progress


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """`[B, H, C, .]` of each chunk (of numbers per token: `[B, C]`); the last one is filled up."""
    short = -x.shape[1] % CHUNK
    if x.dim() == 2:  # tokens that fill up belong to the last document
        return torch.cat([x, x[:, -1:].expand(-1, short)], dim=1).split(CHUNK, dim=1)
    return pad(x, (0, 0, 0, 0, 0, short)).transpose(1, 2).split(CHUNK, dim=2)


def _take(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, segment: Tensor, memory: Tensor, held: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of a chunk `[B, H, C, D]`, and the memory after it."""
    same = (segment.unsqueeze(2) == segment.unsqueeze(1)).unsqueeze(1)
    here = (segment == held.unsqueeze(1))[:, None, :, None]
    last = segment[:, -1:]
    system = (beta * (k @ k.mT) * same).tril(-1)  # the diagonal of ones is implied
    wrong = beta * (v - here * (k @ memory))
    u = torch.linalg.solve_triangular(system, wrong, upper=False, unitriangular=True)
    o = here * (q @ memory) + (q @ k.mT * same).tril() @ u
    kept = (held.unsqueeze(1) == last)[:, None, None]
    own = (segment == last)[:, None, :, None]
    return o, kept * memory + k.mT @ (own * u)


# --- 2. the adapter: options, and what it adds to attention ---


@dataclass(frozen=True)
class DeltaRuleConfig:
    """Size of the memory, and how it begins.

    Args:
        num_heads: H, memories side by side; divides the hidden size.
        alpha_init: the branch is scaled by `tanh(alpha)` per channel; 0 starts as the base model.
    """

    num_heads: int = 4
    alpha_init: float = 0.1

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"num_heads={self.num_heads} must be at least 1")


@register_attention_adapter("delta_rule", DeltaRuleConfig)
class DeltaRuleAdapter(BaseAttentionAdapter):
    """`gate_attn * attn + tanh(alpha) * W_o norm(delta_rule(q, k, v, beta))`.

    q, k, v are linear maps of the input of attention behind SiLU, q and k of length 1, and beta a
    sigmoid of one per head (section 2.2; without the short convolution).

    Args:
        base_attention: attention with `config.hidden_size`.
        config: size and beginning.

    Raises:
        ValueError: heads that do not divide the hidden size.
    """

    def __init__(self, base_attention: nn.Module, config: DeltaRuleConfig) -> None:
        super().__init__(base_attention)
        hidden = base_attention.config.hidden_size
        if hidden % config.num_heads:
            raise ValueError(f"num_heads={config.num_heads} must divide the hidden size, {hidden}")
        self.adapter_config = config
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.beta = nn.Linear(hidden, config.num_heads)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate = BranchGate("tanh", hidden, alpha_init=config.alpha_init)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear maps as torch has them, and the gate at its beginning."""
        for module in (self.qkv, self.beta, self.out, self.gate):
            module.reset_parameters()

    @property
    def carries_state(self) -> bool:
        """It is causal: decoding must go on from its memory."""
        return True

    def parameter_group(self, name: str) -> str:
        """`gate`, `fast` for the step sizes, or `adapter`."""
        return {"gate": "gate", "beta": "fast"}.get(name.split(".")[0], "adapter")

    def merge_obstacle(self) -> str:
        """It is no fixed linear map."""
        return "its memory depends on what it has read: no fixed weights compute the same"

    def delta(
        self,
        attn_output: Tensor,
        hidden_states: Tensor,
        *,
        gate_attn: Tensor | None = None,
        residual: Tensor | None = None,
        fast_state: FastState | None = None,
        write_mask: Tensor | None = None,
        write_weight: Tensor | None = None,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        **context: Any,
    ) -> Tensor:
        """The gated branch, `[B, T, hidden]`; arguments as in `BaseAttentionAdapter.adapt`.

        Args:
            attn_output: `[B, T, hidden]`, not read.
            hidden_states: input of attention, `[B, T, hidden]`.
            gate_attn: gate of attention, for the monitors.
            residual: residual stream, likewise.
            fast_state: handle on the carried state; None starts fresh and keeps nothing.
            write_mask: tokens that write, bool `[B, T]`.
            write_weight: factor of what a token writes, `[B, T]`.
            mask: real tokens, bool `[B, T]`.
            document_ids: int64 `[B, T]`.
            **context: of no use here.
        """
        heads = (self.adapter_config.num_heads, -1)
        q, k, v = (x.unflatten(-1, heads) for x in silu(self.qkv(hidden_states)).chunk(3, dim=-1))
        beta = self.beta(hidden_states).sigmoid()
        for factor in (write_mask, write_weight):
            beta = beta if factor is None else beta * factor.unsqueeze(-1)
        if fast_state is not None and not fast_state.adapt:
            beta = torch.zeros_like(beta)
        state = None if fast_state is None else fast_state.read(self.own_slot(), DeltaState)
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        o, state = delta_rule(q, k, v, beta, mask=mask, document_ids=document_ids, state=state)
        branch = self.out(rms_norm(o, o.shape[-1:]).flatten(2).to(hidden_states.dtype))
        gate = self.gate(branch)
        added = gated(branch, gate)
        if fast_state is not None:
            fast_state.write(self.own_slot(), state)
            if fast_state.listens("gate"):
                gates = {"gate_attn": gate_attn, "gate_delta_rule": gate}
                branches = {"attn": gated(attn_output, gate_attn), "delta_rule": added}
                publish_gates(fast_state, self.slot, gates, branches, residual)
        return added
