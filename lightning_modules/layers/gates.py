"""Gate of a branch that is added beside attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.layers.adarms import Modulation

GateKind = Literal["none", "tanh", "adarms", "adarms_tanh"]
GATE_KINDS = ("none", "tanh", "adarms", "adarms_tanh")


class BranchGate(nn.Module):
    """Gate per channel: static `tanh(alpha)`, conditional, their product, or none (1).

    - `none`: no gate;
    - `tanh`: `tanh(alpha)`, `[hidden]`;
    - `adarms`: a linear map of the condition, exactly 0 at initialisation, `[B, 1 or T, hidden]`;
    - `adarms_tanh`: the product of both.

    Args:
        kind: which of them.
        hidden_size: number of channels.
        cond_size: size of the condition vector from which this module computes the conditional
            gate itself; None where the gate comes from an adaptive norm (or is not conditional).
        alpha_init: initial alpha; 0 closes the gate.
    """

    def __init__(
        self,
        kind: GateKind,
        hidden_size: int,
        cond_size: int | None = None,
        alpha_init: float = 0.1,
    ) -> None:
        super().__init__()
        self.kind, self.alpha_init = kind, alpha_init
        self.conditional = kind in ("adarms", "adarms_tanh")
        if kind in ("tanh", "adarms_tanh"):
            self.alpha = nn.Parameter(torch.empty(hidden_size))
        if self.conditional and cond_size is not None:
            self.dense = Modulation(cond_size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """`alpha = alpha_init`, and a conditional gate of 0."""
        if hasattr(self, "alpha"):
            nn.init.constant_(self.alpha, self.alpha_init)
        if hasattr(self, "dense"):
            self.dense.reset_parameters()

    def static(self) -> Tensor | None:
        """`tanh(alpha)`, `[hidden]`, or None."""
        return torch.tanh(self.alpha) if hasattr(self, "alpha") else None

    def forward(
        self,
        branch: Tensor,
        cond: Tensor | None = None,
        segments: Tensor | None = None,
        norm_gate: Tensor | None = None,
    ) -> Tensor | None:
        """The gate, in the dtype of the branch.

        Args:
            branch: what is gated, `[B, T, hidden]`.
            cond: condition, as in `AdaRMSNorm`.
            segments: as in `AdaRMSNorm`.
            norm_gate: gate of the adaptive norm in front of the branch, which takes the place of
                a map of its own.

        Returns:
            Broadcastable to `[B, T, hidden]`; None for `none`.

        Raises:
            ValueError: a conditional gate without condition.
        """
        gate = self.static()
        if self.conditional:
            conditional = norm_gate if norm_gate is not None else self._from(branch, cond, segments)
            gate = conditional if gate is None else gate * conditional
        return None if gate is None else gate.to(branch.dtype)

    def _from(self, branch: Tensor, cond: Tensor | None, segments: Tensor | None) -> Tensor:
        if cond is None:
            raise ValueError(f"gate {self.kind!r} needs the condition: pass adarms_cond")
        return self.dense(cond, branch.shape[1], segments)

    def extra_repr(self) -> str:
        """Kind, for `print(model)`."""
        return self.kind
