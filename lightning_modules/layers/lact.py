"""LaCT layer: window attention beside a memory that learns in large chunks (arXiv:2505.23884)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_modules.layers.lact_options import LaCTLayerConfig
from lightning_modules.layers.lact_statistics import TOPICS, InnerProblem, publish_statistics
from lightning_modules.layers.reached import reached
from lightning_modules.layers.rope import document_positions, rotary_table, rotate_halves
from lightning_modules.layers.shared_window import (
    SharedWindow,
    plan_shared_window,
    shared_window_attention,
)
from lightning_modules.layers.token_parts import find_parts
from lightning_modules.layers.window_attention import (
    WindowPlan,
    WindowState,
    plan_window,
    window_attention,
)
from lightning_modules.ops import lact
from lightning_modules.ops.states import LaCTState

if TYPE_CHECKING:
    from lightning_modules.streams import FastState

EPS = 1e-5
"""Of the layer's RMSNorms, and of the length by which queries and keys are divided."""

FAST = frozenset({"w0", "w1", "w2", "stacked_mlps", "lr_proj", "momentum_proj"})
"""What of a layer is fast weights at the start of a file, or says how they learn."""


class LaCTLayerState(NamedTuple):
    """What a layer carries: the window of its attention and its memory, None where it has none."""

    window: WindowState | None
    memory: LaCTState | None


class LowRankFastWeight(nn.Module):
    """Initial weight of a fast network, `A B + 0.5 I` per head.

    Args:
        heads: H.
        rows: F.
        columns: D.
        rank: k; A (`w_left`) is `[H, F, k]` and B (`w_right`) `[H, k, D]`.
        gain: A and B are drawn with standard deviations gain / sqrt(k) and gain / sqrt(D).
    """

    def __init__(self, heads: int, rows: int, columns: int, rank: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.w_left = nn.Parameter(torch.empty(heads, rows, rank))
        self.w_right = nn.Parameter(torch.empty(heads, rank, columns))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A and B."""
        nn.init.normal_(self.w_left, std=self.gain / math.sqrt(self.w_left.shape[-1]))
        nn.init.normal_(self.w_right, std=self.gain / math.sqrt(self.w_right.shape[-1]))

    def forward(self) -> Tensor:
        """The weight, `[H, F, D]`."""
        rows, columns = self.w_left.shape[1], self.w_right.shape[2]
        half = 0.5 * torch.eye(rows, columns, dtype=self.w_left.dtype, device=self.w_left.device)
        return self.w_left @ self.w_right + half


class FastNetworks(nn.Module):
    """Learned weights with which one network per head begins, `f(x) = W1 (silu(W0 x) * (W2 x))`.

    W0 and W2 are `[H, F, D]` (dense, or of low rank), W1 is `[H, D, F]`. Entries of dense weights
    are drawn with standard deviation 1 / sqrt(columns).

    Args:
        config: of the layer.
    """

    def __init__(self, config: LaCTLayerConfig) -> None:
        super().__init__()
        self._add_networks(config)
        self.reset_parameters()

    def _add_networks(self, config: LaCTLayerConfig) -> None:
        heads, rank = config.memory.num_lact_heads, config.memory.rank
        for name in ("w0", "w2"):
            if rank is None:
                setattr(self, name, nn.Parameter(torch.empty(heads, config.inner, config.head)))
            else:
                gain = config.memory.fw_init_gain
                weight = LowRankFastWeight(heads, config.inner, config.head, rank, gain)
                setattr(self, name, weight)
        self.w1 = nn.Parameter(torch.empty(heads, config.head, config.inner))

    def reset_parameters(self) -> None:
        """Draw the dense weights; those of low rank draw themselves."""
        for name in ("w0", "w1", "w2"):
            if (weight := self._parameters.get(name)) is not None:
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def initial_weights(self) -> tuple[Tensor, ...]:
        """W0, W1 and W2."""
        weights = (self.w0, self.w1, self.w2)
        return tuple(w() if isinstance(w, nn.Module) else w for w in weights)


class LaCTLayer(FastNetworks):
    """Causal window attention, and a memory that is written once per chunk of tokens.

        attended = attention(q, k, v),    read = RMSNorm(memory(q', k', v'))
        out = W_o (attended + read)

    with q, k, v projected from x, and q', k', v' the same rescaled per channel, through SiLU,
    normalised and rotated. The inner learning rates `softplus(W x + softplus^-1(base_lr))`, the
    momentum `sigmoid(W x)` and the scale of what is read come from x, per token and head.
    Parameters have the names of the published layer; in a stack of r > 1 networks theirs begin
    with `stacked_mlps.<j>`. Without one of the two branches the layer has no parameters of it.

    Args:
        config: options.
    """

    def __init__(self, config: LaCTLayerConfig) -> None:
        nn.Module.__init__(self)
        hidden = config.hidden_size
        self.config = config
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=config.attention.qkv_bias)
        if config.attention.attn_qk_norm:
            self.q_norm = nn.RMSNorm(hidden, eps=EPS)
            self.k_norm = nn.RMSNorm(hidden, eps=EPS)
        if config.remembers:
            self._add_memory(config)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.reset_parameters()

    def _add_memory(self, config: LaCTLayerConfig) -> None:
        hidden, heads = config.hidden_size, config.memory.num_lact_heads
        self.qk_scale = nn.Parameter(torch.empty(hidden, 2))
        self.qk_offset = nn.Parameter(torch.empty(hidden, 2))
        if config.memory.r == 1:
            self._add_networks(config)
        else:
            self.stacked_mlps = nn.ModuleList(FastNetworks(config) for _ in range(config.memory.r))
        self.lr_proj = nn.Linear(hidden, 3 * heads * config.update.lr_dim)
        if config.update.use_momentum:
            self.momentum_proj = nn.Sequential(nn.Linear(hidden, heads), nn.Sigmoid())
        if config.features.learnable_ttt_scale:
            self.ttt_scale_proj = nn.Linear(hidden, heads)
        self.ttt_norm = nn.RMSNorm(config.head, eps=EPS)

    def reset_parameters(self) -> None:
        """Scale 1, offset 0, and the networks drawn; submodules initialise themselves."""
        super().reset_parameters()
        if self.config.remembers:
            nn.init.ones_(self.qk_scale)
            nn.init.zeros_(self.qk_offset)

    @property
    def fast_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Learned weights before the first token: W0, W2 `[r, H, F, D]` and W1 `[r, H, D, F]`."""
        networks = [self] if self.config.memory.r == 1 else list(self.stacked_mlps)
        w0, w1, w2 = zip(*(network.initial_weights() for network in networks), strict=True)
        return torch.stack(w0), torch.stack(w1), torch.stack(w2)

    def plan(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        state: WindowState | None = None,
        group: ProcessGroup | None = None,
    ) -> WindowPlan | SharedWindow | None:
        """What layers that read the same tokens can share; None without attention.

        Arguments are those of `plan_window`, and the processes that share the rows.
        """
        if not self.config.attends:
            return None
        window = self.config.attention.window_size
        flags = {"mask": mask, "document_ids": document_ids, "state": state}
        if group is not None:
            return plan_shared_window(x, window, **flags, group=group)
        return plan_window(x, window, **flags)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        write_mask: Tensor | None = None,
        write_weight: Tensor | None = None,
        state: LaCTLayerState | None = None,
        plan: WindowPlan | SharedWindow | None = None,
        fast_state: FastState | None = None,
        slot: str = "lact",
    ) -> tuple[Tensor, LaCTLayerState]:
        """Read a call, and learn from its full chunks.

        Args:
            x: `[B, T, hidden]`.
            mask: real tokens, bool `[B, T]`; the others write nothing and give 0.
            document_ids: int64 `[B, T]`; every document starts afresh.
            write_mask: tokens that write, bool `[B, T]`; the others take their place in a chunk,
                with learning rates of 0. None: all.
            write_weight: factor of every token's learning rates, `[B, T]`, e.g. of a router.
            state: result of the call before; None starts fresh.
            plan: from `plan`, of the same arguments and `state.window`; None makes one.
            fast_state: says whether to adapt, which statistics to publish, and which processes
                share the rows. It is neither read nor written here.
            slot: name under which statistics are published.

        Returns:
            Output `[B, T, hidden]` and the next state.
        """
        window, memory = (None, None) if state is None else state
        group = None if fast_state is None else fast_state.group
        if plan is None:
            plan = self.plan(x, mask=mask, document_ids=document_ids, state=window, group=group)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.config.attention.attn_qk_norm:
            q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        dtype = torch.promote_types(x.dtype, torch.float32)
        theta = self.config.attention.rope_theta
        if plan is not None:
            positions = plan.positions
        elif group is not None:
            positions = find_parts(x, mask, document_ids, memory, group).positions
        else:
            positions = document_positions(x, mask, document_ids, memory)
        table = rotary_table(positions, self.config.attention_head, theta, dtype)
        branches = []
        if plan is not None:
            attention = [self._attention_heads(i) for i in (q, k, v)]
            attention[:2] = [rotate_halves(i, table) for i in attention[:2]]
            attend = shared_window_attention if group is not None else window_attention
            attended, window = attend(*attention, plan, window)
            branches.append(attended.flatten(2))
        if self.config.remembers:
            rates = self._rates(x, write_mask, write_weight)
            problem = self._inner_problem(x, q, k, v, rates, table, mask, document_ids)
            read, after = self._remember(problem, memory, fast_state)
            read = reached(read, problem.lr, problem.momentum)
            if fast_state is not None and any(map(fast_state.listens, TOPICS)):
                publish_statistics(self, fast_state, slot, problem, memory, after)
            memory = after
            branches.append(self._scaled(read, x).flatten(2))
        return self.o_proj(sum(branches)), LaCTLayerState(window, memory)

    def _attention_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.attention.num_attn_heads, -1))

    def _memory_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.memory.num_lact_heads, -1))

    def _inner_problem(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rates: Tensor,
        table: tuple[Tensor, Tensor],
        mask: Tensor | None,
        document_ids: Tensor | None,
    ) -> InnerProblem:
        """What the memory is given, from q, k, v `[B, T, hidden]`."""
        options = self.config.features
        scale, offset = self.qk_scale.unbind(1), self.qk_offset.unbind(1)
        q, k = (self._memory_heads(i * scale[n] + offset[n]) for n, i in enumerate((q, k)))
        values = self._memory_heads(v)
        if options.qkv_silu:
            q, k = F.silu(q), F.silu(k)
            values = values if options.no_v_silu else F.silu(values)
        q, k = (i / (i.norm(dim=-1, keepdim=True) + EPS) for i in (q, k))
        if not options.ttt_nope:
            # Rotated as the heads of attention are, whatever the heads of the memory.
            q, k = (rotate_halves(self._attention_heads(i.flatten(2)), table) for i in (q, k))
            q, k = (self._memory_heads(i.flatten(2)) for i in (q, k))
        return InnerProblem(
            q=q.to(v.dtype),
            k=k.to(v.dtype),
            v=values,
            lr=rates,
            momentum=self.momentum_proj(x) if self.config.update.use_momentum else None,
            mask=mask,
            document_ids=document_ids,
        )

    def _rates(self, x: Tensor, write_mask: Tensor | None, write_weight: Tensor | None) -> Tensor:
        """Inner learning rates, `[B, T, H, 3]` or `[B, T, H, 3, D]`."""
        lr_dim = self.config.update.lr_dim
        rates = self._memory_heads(self.lr_proj(x)).unflatten(-1, (3, lr_dim))
        rates = rates.to(torch.promote_types(x.dtype, torch.float32))
        rates = F.softplus(rates + math.log(math.expm1(self.config.update.base_lr)))
        for factor in (write_mask, write_weight):
            if factor is not None:
                rates = rates * factor[..., None, None, None]
        return rates if lr_dim > 1 else rates.squeeze(-1)

    def _remember(
        self, problem: InnerProblem, memory: LaCTState | None, fast_state: FastState | None
    ) -> tuple[Tensor, LaCTState]:
        """Run the op with this layer's weights and options."""
        update = self.config.update
        return lact(
            problem.q,
            problem.k,
            problem.v,
            problem.lr,
            *self.fast_weights,
            chunk_size=update.lact_chunk_size,
            momentum=problem.momentum,
            muon=update.use_muon,
            muon_dtype=getattr(torch, update.muon_dtype),
            prenorm=update.ttt_prenorm,
            residual=self.config.memory.residual_ttt,
            greedy=update.greedy,
            mask=problem.mask,
            document_ids=problem.document_ids,
            state=memory,
            tokens_read=None if fast_state is None else fast_state.tokens_read,
            adapt=fast_state is None or fast_state.adapt,
            recompute=update.recompute,
            group=None if fast_state is None else fast_state.group,
        )

    def _scaled(self, read: Tensor, x: Tensor) -> Tensor:
        """What was read `[B, T, H, D]`, normalised and scaled."""
        read = _normed(self.ttt_norm, read)
        if self.config.features.learnable_ttt_scale:
            read = read * F.silu(self.ttt_scale_proj(x)).unsqueeze(-1)
        return read

    def extra_repr(self) -> str:
        """Options, for `print(model)`."""
        return str(self.config)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """The norm in its own dtype (under autocast that of x differs), in the dtype of x."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)
