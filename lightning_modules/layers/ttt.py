"""TTT layer: a memory whose weights take gradient steps while it reads (arXiv:2407.04620)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.layers.rope import mini_batch_positions, rotate_interleaved
from lightning_modules.layers.ttt_statistics import TOPICS, InnerProblem, publish_statistics
from lightning_modules.ops import TTTLinearState, TTTMLPState, ttt_linear, ttt_mlp

if TYPE_CHECKING:
    from lightning_modules.streams import FastState

TTTState = TTTLinearState | TTTMLPState
INIT_STD = 0.02
DEFAULT_BASE_LR = {"linear": 1.0, "mlp": 0.1}


@dataclass(frozen=True)
class TTTConfig:
    """What a TTT layer computes.

    Args:
        kind: fast model, `linear` (one matrix per head) or `mlp` (two, four times as wide inside).
        num_heads: H; hidden_size / H is the head size D.
        base_lr: inner learning rate at its upper end, `eta_j = base_lr sigmoid(x_j w + c) / D`.
            None: 1.0 for `linear`, 0.1 for `mlp`.
        causal: True reads a sequence token by token in effect, with rotary positions. False lets
            all tokens of a mini-batch write before any of them reads.
        mini_batch_size: m, tokens per inner step. None: the whole call is one (not if causal).
            Without `causal`, eta is also divided by m.
        qk_l2norm: normalise queries and keys to length 1 per head.
        target_norm: LayerNorm the inner target `v - k` with the fast model's own scale and shift.
        eta_over_length: divide eta by the number of writing tokens of the document in the call,
            so that the step does not grow with length (not if causal, nor with mini-batches).
        use_gate: multiply the output by `gelu(g_proj x)` before `o_proj`.
        eps: added to the variance in the LayerNorms.
    """

    kind: Literal["linear", "mlp"] = "linear"
    num_heads: int = 8
    base_lr: float | None = None
    causal: bool = False
    mini_batch_size: int | None = None
    qk_l2norm: bool = False
    target_norm: bool = False
    eta_over_length: bool = False
    use_gate: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.kind not in DEFAULT_BASE_LR:
            raise ValueError(f"kind={self.kind!r} is unknown: choose 'linear' or 'mlp'")
        if self.num_heads < 1:
            raise ValueError(f"num_heads={self.num_heads} must be at least 1")
        if self.base_lr is not None and self.base_lr <= 0:
            raise ValueError(f"base_lr={self.base_lr} must be positive; None takes the default")
        if self.mini_batch_size is not None and self.mini_batch_size < 1:
            raise ValueError(f"mini_batch_size={self.mini_batch_size} must be at least 1, or None")
        if self.causal and self.mini_batch_size is None:
            raise ValueError("causal=True needs mini_batch_size, e.g. 16")
        if self.eta_over_length and self.mini_batch_size is not None:
            raise ValueError(
                "eta_over_length=True needs the whole call to be one mini-batch: set "
                "mini_batch_size=None, or leave eta_over_length out (mini-batches bound the step)"
            )

    @property
    def inner_lr(self) -> float:
        """`base_lr`, or the default of the kind."""
        return DEFAULT_BASE_LR[self.kind] if self.base_lr is None else self.base_lr


class TTTLayer(nn.Module):
    """Projections around `ops.ttt_linear` or `ops.ttt_mlp`.

    `q, k, v = x W_q, x W_k, x W_v` split into heads; the op takes the inner steps on
    `l_j = 1/2 ||LN(f(k_j; W)) - (v_j - k_j)||^2` (section 2.3) from the learned initial weights
    and returns `o_j = q_j + LN(f(q_j; W'))`; the heads are merged, normalised (`post_norm`) and
    projected (`o_proj`). The learned step (section 2.7) is `eta_j = base_lr sigmoid(x_j w + c) / D`
    and, if causal, the row factor is `max(1/(i+1) + learnable_token_idx_i, 0)`.

    Args:
        hidden_size: size of the input and of the output.
        config: what is computed.
    """

    def __init__(self, hidden_size: int, config: TTTConfig) -> None:
        super().__init__()
        heads, head_size = config.num_heads, _head_size(hidden_size, config)
        self.hidden_size, self.config = hidden_size, config
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden_size, hidden_size, bias=False))
        if config.use_gate:
            self.g_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        inner = 4 * head_size if config.kind == "mlp" else head_size
        self.W1 = nn.Parameter(torch.empty(heads, head_size, inner))
        self.b1 = nn.Parameter(torch.empty(heads, 1, inner))
        if config.kind == "mlp":
            self.W2 = nn.Parameter(torch.empty(heads, inner, head_size))
            self.b2 = nn.Parameter(torch.empty(heads, 1, head_size))
        self.ttt_norm_weight = nn.Parameter(torch.empty(heads, head_size))
        self.ttt_norm_bias = nn.Parameter(torch.empty(heads, head_size))
        self.learnable_ttt_lr_weight = nn.Parameter(torch.empty(heads, 1, hidden_size))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.empty(heads, 1))
        if config.causal:
            self.learnable_token_idx = nn.Parameter(torch.empty(config.mini_batch_size))
        self.post_norm = nn.LayerNorm(hidden_size, eps=config.eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices from N(0, 0.02), biases and `learnable_token_idx` 0, norms the identity."""
        for name, parameter in self.named_parameters():
            if name in ("ttt_norm_weight", "post_norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias") or name in ("b1", "b2", "learnable_token_idx"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=INIT_STD)

    @property
    def state_class(self) -> type[TTTState]:
        """NamedTuple of this layer's state."""
        return TTTMLPState if self.config.kind == "mlp" else TTTLinearState

    @property
    def fast_weights(self) -> tuple[Tensor, ...]:
        """Learned initial fast weights, `(W1, b1)` or `(W1, b1, W2, b2)`."""
        if self.config.kind == "mlp":
            return self.W1, self.b1, self.W2, self.b2
        return self.W1, self.b1

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        write_mask: Tensor | None = None,
        write_weight: Tensor | None = None,
        document_ids: Tensor | None = None,
        state: Any | None = None,
        fast_state: FastState | None = None,
        slot: str = "ttt",
        flush: bool = False,
    ) -> tuple[Tensor, Any]:
        """Read a chunk, and learn from it.

        Args:
            x: `[B, T, hidden]`.
            mask: real tokens, bool `[B, T]`; the others write nothing and give 0.
            write_mask: tokens that may write, bool `[B, T]`; the others only read.
            write_weight: factor of every token's inner step, `[B, T]`, e.g. of a router; 0 only
                reads.
            document_ids: int64 `[B, T]`; every document starts from the initial weights.
            state: result of the call before; None starts fresh.
            fast_state: says whether to adapt and which statistics to publish. It is neither read
                nor written here.
            slot: name under which statistics are published.
            flush: close an open mini-batch at the end of the call (the end of a sequence).

        Returns:
            Output `[B, T, hidden]` and the next state.
        """
        if fast_state is not None and not fast_state.adapt:
            write_mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        if write_weight is not None:
            allowed = write_weight > 0
            write_mask = allowed if write_mask is None else write_mask & allowed
        q, k, v = self._heads(x, mask, document_ids, state)
        eta = self._eta(x, mask, write_mask, document_ids)
        if write_weight is not None:
            eta = eta * write_weight.unsqueeze(-1)
        o, next_state = self.op(
            q,
            k,
            v,
            eta,
            self.ttt_norm_weight,
            self.ttt_norm_bias,
            *self.fast_weights,
            mini_batch_size=self.config.mini_batch_size,
            causal=self.config.causal,
            token_eta=self._token_eta(),
            eps=self.config.eps,
            mask=mask,
            write_mask=write_mask,
            document_ids=document_ids,
            state=state,
            flush=flush,
        )
        if fast_state is not None and any(map(fast_state.listens, TOPICS)):
            writes = _writing_tokens(x, mask, write_mask)
            problem = InnerProblem(k, v, eta, writes, document_ids)
            publish_statistics(self, fast_state, slot, problem, state, next_state)
        return self._output(o, x, mask), next_state

    @property
    def op(self) -> Callable[..., tuple[Tensor, Any]]:
        """The inner learner, `ops.ttt_linear` or `ops.ttt_mlp`; override it to change the loss."""
        return ttt_mlp if self.config.kind == "mlp" else ttt_linear

    def _heads(
        self, x: Tensor, mask: Tensor | None, document_ids: Tensor | None, state: Any | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the inner problem, `[B, T, H, D]`."""
        shape = (*x.shape[:2], self.config.num_heads, -1)
        q, k, v = (proj(x).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_l2norm:
            q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
        if self.config.causal:
            positions = mini_batch_positions(
                x, self.config.mini_batch_size, mask, document_ids, state
            )
            q, k = rotate_interleaved(q, positions), rotate_interleaved(k, positions)
        if self.config.target_norm:
            v = k + self._norm(v - k)
        return q, k, v

    def _norm(self, z: Tensor) -> Tensor:
        """`LN(z)` per head, with the scale and shift of the fast model."""
        normed = F.layer_norm(z, z.shape[-1:], eps=self.config.eps)
        return (normed * self.ttt_norm_weight + self.ttt_norm_bias).to(z.dtype)

    def _eta(
        self,
        x: Tensor,
        mask: Tensor | None,
        write_mask: Tensor | None,
        document_ids: Tensor | None,
    ) -> Tensor:
        """Step size of every token and head, `[B, T, H]`, at least float32."""
        weight, bias = (
            self.learnable_ttt_lr_weight.squeeze(1),
            self.learnable_ttt_lr_bias.squeeze(1),
        )
        logits = F.linear(x, weight, bias)
        logits = logits.to(torch.promote_types(x.dtype, torch.float32))
        head_size = self.hidden_size // self.config.num_heads
        eta = torch.sigmoid(logits) * (self.config.inner_lr / head_size)
        if self.config.eta_over_length:
            writes = _writing_tokens(x, mask, write_mask)
            return eta / _document_counts(writes, document_ids).clamp(min=1).unsqueeze(-1)
        if self.config.mini_batch_size is not None and not self.config.causal:
            return eta / self.config.mini_batch_size
        return eta

    def _token_eta(self) -> Tensor | None:
        """Row factor `max(1/(i+1) + learnable_i, 0)`, `[m]`; None if not causal."""
        if not self.config.causal:
            return None
        learned = self.learnable_token_idx
        learned = learned.to(torch.promote_types(learned.dtype, torch.float32))
        position = torch.arange(1, learned.shape[0] + 1, device=learned.device, dtype=learned.dtype)
        return (1.0 / position + learned).clamp(min=0)

    def _output(self, o: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Merge the heads, normalise, gate and project."""
        o = self.post_norm(o.flatten(2))
        if self.config.use_gate:
            o = o * F.gelu(self.g_proj(x), approximate="tanh")
        out = self.o_proj(o)
        return out if mask is None else out.masked_fill(~mask.unsqueeze(-1), 0)

    def extra_repr(self) -> str:
        """Configuration, for `print(model)`."""
        return f"{self.hidden_size}, {self.config}"


def _head_size(hidden_size: int, config: TTTConfig) -> int:
    """D = hidden_size / H, checked."""
    if hidden_size % config.num_heads:
        fits = [n for n in range(1, hidden_size + 1) if hidden_size % n == 0]
        raise ValueError(
            f"hidden_size={hidden_size} is not divisible by num_heads={config.num_heads}: "
            f"set num_heads to one of {fits}"
        )
    head_size = hidden_size // config.num_heads
    if config.causal and head_size % 2:
        raise ValueError(
            f"head size {head_size} is odd, but rotary positions turn pairs: choose num_heads so "
            f"that {hidden_size} / num_heads is even, or causal=False"
        )
    return head_size


def _writing_tokens(x: Tensor, mask: Tensor | None, write_mask: Tensor | None) -> Tensor:
    """Tokens that change the fast weights, bool `[B, T]`."""
    masks = [allowed for allowed in (mask, write_mask) if allowed is not None]
    if not masks:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return masks[0] if len(masks) == 1 else masks[0] & masks[1]


def _document_counts(writes: Tensor, document_ids: Tensor | None) -> Tensor:
    """Writing tokens of each token's document within the call, int64 `[B, T]` or `[B, 1]`."""
    if document_ids is None:
        return writes.sum(1, keepdim=True)
    same = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)
    return (same & writes.unsqueeze(1)).sum(2)
