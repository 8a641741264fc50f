"""LaCT by matrix products over whole chunks."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from lightning_modules.ops.lact.block import read
from lightning_modules.ops.lact.carry import begin, end
from lightning_modules.ops.lact.layout import Step
from lightning_modules.ops.lact.memory import (
    Memory,
    Rule,
    Write,
    choose,
    learned_memory,
    written,
)
from lightning_modules.ops.lact.plan import plan
from lightning_modules.ops.states import LaCTState, TokensRead
from lightning_modules.ops.ttt_eager import autocast_device


def eager_lact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    chunk_size: int,
    momentum: Tensor | None,
    muon: bool,
    muon_dtype: torch.dtype,
    prenorm: bool,
    residual: bool,
    greedy: bool,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: LaCTState | None,
    tokens_read: TokensRead | None,
    adapt: bool,
    recompute: bool,
    group: ProcessGroup | None,
) -> tuple[Tensor, LaCTState]:
    """LaCT by matrix products; arguments and results are those of `ops.lact`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    rule = Rule(chunk_size, muon, muon_dtype, prenorm, residual, greedy, group)
    tokens = [k, v, lr.flatten(3)] + ([] if momentum is None else [momentum.unsqueeze(-1)])
    with torch.autocast(autocast_device(q.device), enabled=False):
        layout = plan(q, chunk_size, mask, document_ids, state, tokens_read, adapt, group)
        learned = learned_memory((w0, w1, w2), dtype, momentum is not None, prenorm)
        memory, held = begin(state, layout, learned, len(tokens))
        steps = layout.steps(q, tokens, held)
        parts = []
        for step in steps:
            arguments = (memory, learned, step, rule)
            if recompute and torch.is_grad_enabled():
                memory, part = checkpoint(
                    _take, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                memory, part = _take(*arguments)
            parts.append(part)
        o = layout.join(parts)
        new = end(memory, learned, layout, tokens, held, lr.shape[3:], blank=mask is not None)
    return o, new


def _take(memory: Memory, learned: Memory, step: Step, rule: Rule) -> tuple[Memory, Tensor]:
    """The memory after a step, and what the step reads, `[H, B, m, D]` in the dtype of q."""
    if step.restart is not None:
        memory = choose(step.restart, learned, memory)
    dtype = memory.weights[0].dtype
    if step.tokens is not None:
        after = written(memory, Write(*(_dense(x, dtype) for x in step.tokens)), rule)
        memory = after if step.rows is None else choose(step.rows, after, memory)
    o = read(memory.weights, _dense(step.q, dtype), rule.residual)
    return memory, o.to(step.q.dtype)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of that dtype by at most one copy."""
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()
