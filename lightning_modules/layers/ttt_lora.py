"""TTT-as-LoRA: the footprint of a LoRA, and in its middle a map that learns while it reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.ops import TTTLoRAState, ttt_lora_cell
from lightning_modules.ops.ttt_lora import Linears

FAST = frozenset({"w_base", "b_base"})
"""Names of the learned initial fast weights."""

RATE = frozenset({"lr_gate", "lr_token"})
"""Names of what the inner step size is learned with."""


@dataclass(frozen=True)
class TTTLoRAOptions:
    """How the map in the middle learns, and how it is read.

    Args:
        mini_batch_size: tokens whose gradients are taken at the same weights: fewer adapt more
            often and cost more steps one after the other.
        mode: `A` reads with the weights of before the mini-batch, `B` also sees the tokens of the
            own mini-batch up to oneself.
        loss: `plain` squared error, or `ln`, behind the output's LayerNorm.
        lr_gate_init: the inner step size starts at sigmoid of it, -2.0 is 0.119.
        rate_per_token: learn the step size of every token from its input, too.
        output_norm: LayerNorm on what is read.
        q_residual: add the query to what is read, behind the norm.
        scaling: factor of the adapter's output.
    """

    mini_batch_size: int = 8
    mode: Literal["A", "B"] = "A"
    loss: Literal["plain", "ln"] = "plain"
    lr_gate_init: float = -2.0
    rate_per_token: bool = False
    output_norm: bool = True
    q_residual: bool = False
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.mini_batch_size < 1:
            raise ValueError(f"mini_batch_size={self.mini_batch_size} must be at least 1")
        if self.mode not in ("A", "B"):
            raise ValueError(
                f"mode={self.mode!r} must be A (read, then update) or B (see the own mini-batch up "
                "to oneself): reading updated weights would be reading the future"
            )
        if self.loss not in ("plain", "ln"):
            raise ValueError(f"loss={self.loss!r} must be plain or ln")
        if self.loss == "ln" and not self.output_norm:
            raise ValueError("loss=ln is behind the output's LayerNorm: set output_norm, or plain")
        if self.scaling == 0:
            raise ValueError("scaling=0 switches the adapter off: nothing would ever be learned")


class TTTLoRACell(nn.Module):
    """All that TTT-as-LoRA trains beside one linear layer.

        k = l2norm(theta_k x),   q = l2norm(theta_q x),   v = theta_v x
        o = q W + b,             y = y_0 + scaling theta_out(LN(o) [+ q])

    where `W = w_base + dW`, `b = b_base + db`, and `dW, db` are state that the tokens write
    (`ops.ttt_lora`) with the step `eta = sigmoid(lr_gate)`, or per token
    `sigmoid(lr_gate + lr_token x)`. `theta_out` starts at zero, so that the layer is its base.

    Parameters: `d (3 in + out) + d^2 + 3 d + 1` with the norm, and `in` more with a rate per token.
    The learner is TTT-Linear (Sun et al., 2024, arXiv:2407.04620, section 2) in the place of LoRA's
    rank.

    Args:
        in_features: inputs of the linear layer.
        out_features: its outputs.
        inner_dim: d.
        options: how it learns.
    """

    def __init__(
        self, in_features: int, out_features: int, inner_dim: int, options: TTTLoRAOptions
    ) -> None:
        super().__init__()
        if inner_dim < 1:
            raise ValueError(f"inner_dim={inner_dim} must be at least 1")
        self.options, self.inner_dim = options, inner_dim
        self.theta_k = nn.Linear(in_features, inner_dim, bias=False)
        self.theta_q = nn.Linear(in_features, inner_dim, bias=False)
        self.theta_v = nn.Linear(in_features, inner_dim, bias=False)
        self.w_base = nn.Parameter(torch.empty(inner_dim, inner_dim))
        self.b_base = nn.Parameter(torch.empty(inner_dim))
        self.norm = nn.LayerNorm(inner_dim) if options.output_norm else None
        self.lr_gate = nn.Parameter(torch.empty(1))
        self.lr_token = nn.Linear(in_features, 1, bias=False) if options.rate_per_token else None
        self.theta_out = nn.Linear(inner_dim, out_features, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections as LoRA's A, a small fast weight, and an output of zero."""
        for theta in (self.theta_k, self.theta_q, self.theta_v):
            nn.init.kaiming_uniform_(theta.weight, a=math.sqrt(5))
        nn.init.normal_(self.w_base, std=0.02)
        nn.init.zeros_(self.b_base)
        nn.init.constant_(self.lr_gate, self.options.lr_gate_init)
        for layer in (self.lr_token, self.theta_out):
            if layer is not None:
                nn.init.zeros_(layer.weight)
        if self.norm is not None:
            self.norm.reset_parameters()

    def output(self, y: Tensor, read: Tensor) -> Tensor:
        """`y + scaling theta_out(read)`.

        Args:
            y: output of the linear layer, `[B, T, out]`.
            read: what was read, `[B, T, d]`, or with columns behind d that are zero.
        """
        weight = self.theta_out.weight.to(y.dtype)
        if read.shape[-1] > self.inner_dim:
            weight = F.pad(weight, (0, read.shape[-1] - self.inner_dim))
        rows = torch.addmm(
            y.flatten(0, 1),
            read.to(y.dtype).flatten(0, 1),
            weight.t(),
            alpha=self.options.scaling,
        )
        return rows.view_as(y)


class Packed(NamedTuple):
    """Weights of a group of G cells as its products and kernels want them.

    Attributes:
        weights: projections, `[P, in]`, in the dtype of the products, as are the outputs.
        outputs: `theta_out` of each cell, `[out, d]`, or with columns behind d that are zero.
        base: w_base and below it b_base, `[G, d + 1, d]`, float32 (float64 if the products are),
            as are the others.
        norm: gamma and beta, `[G, 2, d]`; None: there are no norms.
        eta: step sizes, `[G]`.
    """

    weights: Tensor
    outputs: list[Tensor]
    base: Tensor
    norm: Tensor | None
    eta: Tensor


class Inputs(NamedTuple):
    """What the learners of a group are given.

    Attributes:
        projected: keys, queries and values of all as they are projected, `[B, T, P]`, P the
            multiple of 8 from `3 G d` on.
        eta: step sizes, `[G]`, or `[B, T, G]` with a rate per token.
        size: d.
    """

    projected: Tensor
    eta: Tensor
    size: int

    @property
    def k(self) -> Tensor:
        """Keys, normalised, `[B, T, G, d]`, in float32 (float64 if they are projected in it)."""
        return F.normalize(self._part(0), dim=-1, eps=1e-12)

    @property
    def v(self) -> Tensor:
        """Values, as `k` but not normalised."""
        return self._part(2)

    def _part(self, index: int) -> Tensor:
        inner = self.projected[..., : 3 * self.eta.shape[-1] * self.size]
        part = inner.unflatten(-1, (3, -1, self.size))[:, :, index]
        return part.to(torch.promote_types(part.dtype, torch.float32))


def project(cells: Sequence[TTTLoRACell], x: Tensor, packed: Packed | None = None) -> Inputs:
    """Keys, queries, values and step sizes of G cells, by one matrix product.

    Args:
        cells: of one size and equal options, of linear layers that get the same input.
        x: their input, `[B, T, in]`.
        packed: their weights (`ttt_lora_packed.pack`); None: they are taken as they are.

    Returns:
        Projections in the dtype of the product, step sizes in float32 (float64 if x is).
    """
    size = cells[0].inner_dim
    if packed is not None:
        return Inputs(F.linear(x, packed.weights), packed.eta, size)
    maps = [getattr(cell, name) for name in ("theta_k", "theta_q", "theta_v") for cell in cells]
    rates = [cell.lr_token for cell in cells if cell.lr_token is not None]
    weights = [layer.weight for layer in (*maps, *rates)]
    used = 3 * len(cells) * size + len(rates)
    if used % 8:  # rows of 16 bytes, which a GPU's matrix product reads as such
        weights.append(weights[0].new_zeros(-used % 8, x.shape[-1]))
    projected = F.linear(x, torch.cat(weights).to(x.dtype))
    dtype = torch.promote_types(projected.dtype, torch.float32)
    gate = torch.cat([cell.lr_gate for cell in cells]).to(dtype)
    if rates:
        gate = gate + projected[..., used - len(rates) : used].to(dtype)
    return Inputs(projected, torch.sigmoid(gate), size)


def read_and_learn(
    cells: Sequence[TTTLoRACell],
    inputs: Inputs,
    *,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: TTTLoRAState | None = None,
    adapt: bool = True,
    shared: dict[Any, Any] | None = None,
    packed: Packed | None = None,
    linears: Linears | None = None,
) -> tuple[Any, TTTLoRAState]:
    """Read tokens with the fast weights of G cells, and let the tokens write into them.

    Args:
        cells: as in `project`.
        inputs: of the call.
        mask: tokens that exist, bool `[B, T]`; None: all.
        document_ids: `[B, T]`; None: one document without end.
        state: with an axis of G (`ops.TTTLoRAState`); None: fresh.
        adapt: False reads without writing.
        shared: as in `ops.ttt_lora_cell`.
        packed: as in `project`.
        linears: the linear layers, if they are to be computed, too.

    Returns:
        For `TTTLoRACell.output`, `[B, T, G, d]` (perhaps with zeros behind d), or the outputs of
        `linears`, and the state after the last token.
    """
    options, first = cells[0].options, cells[0].norm
    base, norm = (packed.base, packed.norm) if packed is not None else _stacked(cells)
    return ttt_lora_cell(
        inputs.projected,
        inputs.eta,
        base,
        mini_batch_size=options.mini_batch_size,
        mode=options.mode,
        loss=options.loss,
        norm=norm,
        norm_eps=1e-5 if first is None else first.eps,
        q_residual=options.q_residual,
        mask=mask,
        document_ids=document_ids,
        state=state,
        adapt=adapt,
        shared=shared,
        linears=linears,
    )


def _stacked(cells: Sequence[TTTLoRACell]) -> tuple[Tensor, Tensor | None]:
    """Learned fast weights `[G, d + 1, d]` and norms `[G, 2, d]`, as in `Packed`."""
    norms = [cell.norm for cell in cells if cell.norm is not None]
    base = torch.cat([x for cell in cells for x in (cell.w_base, cell.b_base.unsqueeze(0))])
    norm = torch.cat([x for norm in norms for x in (norm.weight, norm.bias)]) if norms else None
    whole = None if norm is None else norm.view(len(cells), 2, -1)
    return base.unflatten(0, (len(cells), -1)), whole


def loss_norm(cells: Sequence[TTTLoRACell]) -> dict[str, Any]:
    """The norm's arguments of `ops.ttt_lora` and `inner_loss`; none if the loss is plain."""
    norms = [cell.norm for cell in cells if cell.norm is not None]
    if cells[0].options.loss == "plain" or not norms:
        return {}
    scale, shift = (torch.stack([getattr(n, x) for n in norms]) for x in ("weight", "bias"))
    return {"norm_weight": scale, "norm_bias": shift, "norm_eps": norms[0].eps}
