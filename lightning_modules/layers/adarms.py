"""Adaptive RMSNorm (adaRMS) of pi0.5: scale, shift and gate come from a condition vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.ops.ttt_eager import autocast_device


class Modulation(nn.Module):
    """Affine map of a condition vector, zero at initialisation: `cond weight^T + bias`.

    Not an `nn.Linear`, because transformers' `init_weights` draws every `nn.Linear` anew and would
    undo the zeros.

    Args:
        cond_size: size C of the condition vector.
        size: size W of the result.
    """

    def __init__(self, cond_size: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, cond_size))
        self.bias = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, cond: Tensor, num_tokens: int, segments: Tensor | None = None) -> Tensor:
        """Modulation of each token.

        Args:
            cond: `[B, C]` for all tokens, `[B, T, C]` per token, or `[B, S, C]` with `segments`.
            num_tokens: T, for the check of shapes.
            segments: row of `cond` that each token uses, int64 `[T]`. The map is computed on the
                S rows, not on the T tokens.

        Returns:
            `[B, 1, W]` or `[B, T, W]`, float32 (float64 for a float64 condition), autocast off.

        Raises:
            ValueError: the condition fits neither the tokens nor the segments.
        """
        self._check(cond, num_tokens, segments)
        dtype = torch.promote_types(cond.dtype, torch.float32)
        with torch.autocast(autocast_device(cond.device), enabled=False):
            rows = F.linear(cond.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        if segments is not None:
            return rows.index_select(1, segments)
        return rows.unsqueeze(1) if rows.dim() == 2 else rows

    def _check(self, cond: Tensor, num_tokens: int, segments: Tensor | None) -> None:
        if cond.shape[-1] != self.weight.shape[1] or cond.dim() not in (2, 3):
            raise ValueError(
                f"cond is {tuple(cond.shape)}; expected [B, {self.weight.shape[1]}] or "
                f"[B, T, {self.weight.shape[1]}] (cond_size)"
            )
        if segments is not None and (cond.dim() != 3 or segments.shape != (num_tokens,)):
            raise ValueError(
                f"segments {tuple(segments.shape)} with cond {tuple(cond.shape)} for {num_tokens} "
                "tokens; expected segments [T] and cond [B, S, C]"
            )
        if segments is None and cond.dim() == 3 and cond.shape[1] not in (1, num_tokens):
            raise ValueError(
                f"cond has {cond.shape[1]} rows for {num_tokens} tokens; pass segments [T] to say "
                "which row each token uses"
            )

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"cond_size={self.weight.shape[1]}, size={self.weight.shape[0]}"


class AdaRmsNorm(nn.Module):
    """RMSNorm whose scale, shift and gate may depend on a condition vector (pi0.5).

    `n = x / sqrt(mean(x^2) + eps)`, computed in float32 (float64 for float64 input).

    - plain (`cond_size` None): `n * (1 + weight)`, no gate;
    - adaptive: `[scale, shift, gate] = chunk(cond dense.weight^T + dense.bias, 3)`,
      `n * (1 + scale) + shift`, and the gate is returned for `gated_residual`.

    The weights start at zero, so that a fresh norm only normalises; a fresh gate closes its
    branch. The class is also imported as `AdaRMSNorm`; its own name avoids "RMSNorm", because
    transformers' `init_weights` overwrites `weight` of every class with that in its name.

    Args:
        hidden_size: size D of the normalised dimension.
        cond_size: size C of the condition vector; None for the plain norm.
        eps: added to the mean square.
    """

    def __init__(self, hidden_size: int, cond_size: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.hidden_size, self.cond_size, self.eps = hidden_size, cond_size, eps
        if cond_size is None:
            self.weight = nn.Parameter(torch.empty(hidden_size))
        else:
            self.dense = Modulation(cond_size, 3 * hidden_size)
        self.reset_parameters()

    @classmethod
    def retrofit(
        cls, plain_weight: Tensor, cond_size: int | None = None, eps: float = 1e-6
    ) -> AdaRmsNorm:
        """A norm that computes what a plain one with weight `[D]` does, whatever the condition.

        Adaptive: `dense.weight = 0`, `dense.bias = [plain_weight, 0, 1]` (scale, shift, gate).
        """
        norm = cls(plain_weight.shape[0], cond_size, eps)
        norm.to(device=plain_weight.device, dtype=plain_weight.dtype)
        with torch.no_grad():
            if cond_size is None:
                norm.weight.copy_(plain_weight)
            else:
                scale, shift, gate = norm.dense.bias.chunk(3)
                scale.copy_(plain_weight)
                shift.zero_()
                gate.fill_(1.0)
        return norm

    def reset_parameters(self) -> None:
        """Zero weight, or zero modulation."""
        if self.cond_size is None:
            nn.init.zeros_(self.weight)
        else:
            self.dense.reset_parameters()

    def forward(
        self, x: Tensor, cond: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Normalise.

        Args:
            x: `[B, T, D]`.
            cond: `[B, C]`, per token `[B, T, C]`, or `[B, S, C]` with `segments`.
            segments: row of `cond` that each token uses, int64 `[T]`.

        Returns:
            The normalised input `[B, T, D]`, and the gate `[B, 1, D]` or `[B, T, D]` (None if
            plain), both in the dtype of x.

        Raises:
            ValueError: an adaptive norm without condition, or a plain one with one.
        """
        self._check(cond)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(autocast_device(x.device), enabled=False):
            normed = x.to(dtype)
            normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
            if cond is None:
                return (normed * (1.0 + self.weight.to(dtype))).to(x.dtype), None
            modulation = self.dense(cond.to(dtype), x.shape[-2], segments)
            scale, shift, gate = modulation.chunk(3, dim=-1)
            return (normed * (1.0 + scale) + shift).to(x.dtype), gate.to(x.dtype)

    def _check(self, cond: Tensor | None) -> None:
        if cond is None and self.cond_size is not None:
            raise ValueError("this norm is adaptive: pass cond (adarms_cond in a decoder layer)")
        if cond is not None and self.cond_size is None:
            raise ValueError("this norm is plain and would ignore cond: build it with cond_size")

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{self.hidden_size}, cond_size={self.cond_size}, eps={self.eps}"


AdaRMSNorm = AdaRmsNorm
"""The usual spelling, for imports; see the class for why it has another name."""


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """`x + y * gate`, or `x + y` without a gate; x, y `[B, T, D]`, gate broadcastable to them."""
    return x + y if gate is None else x + y * gate
