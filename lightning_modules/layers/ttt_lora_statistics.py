"""What TTT-as-LoRA tells the monitors about its fast weights and its inner objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_modules.layers.ttt_lora import Inputs, TTTLoRACell, loss_norm
from lightning_modules.layers.weight_change import change_statistics
from lightning_modules.ops import TTTLoRAState
from lightning_modules.ops.ttt_lora import inner_loss

if TYPE_CHECKING:
    from lightning_modules.streams import FastState


def publish_statistics(
    cells: Sequence[TTTLoRACell],
    fast_state: FastState,
    slot: str,
    inputs: Inputs,
    mask: Tensor | None,
    document_ids: Tensor | None,
    states: tuple[TTTLoRAState | None, TTTLoRAState],
) -> None:
    """Publish the topics that a monitor listens to: `fast_weight` and `inner_loss`.

    Args:
        cells: of a group of G.
        fast_state: where to publish.
        slot: of the group.
        inputs: of the call.
        mask: tokens that exist, `[B, T]`; None: all.
        document_ids: `[B, T]`; None: one document.
        states: before the call (None: fresh) and after it.
    """
    weights, losses = fast_state.listens("fast_weight"), fast_state.listens("inner_loss")
    if not (weights or losses):  # no_grad alone would be felt in every call
        return
    with torch.no_grad():
        rows = inputs.projected.shape[:2]
        exists = inputs.projected.new_ones(rows, dtype=torch.bool) if mask is None else mask
        if weights:
            _publish_weights(cells, fast_state, slot, inputs, exists, states[1])
        if losses:
            values = _losses(cells, inputs, exists, document_ids, *states)
            fast_state.publish("inner_loss", slot, **values)


def _publish_weights(
    cells: Sequence[TTTLoRACell],
    fast_state: FastState,
    slot: str,
    inputs: Inputs,
    exists: Tensor,
    after: TTTLoRAState,
) -> None:
    """How far the fast weights have come."""
    weight = torch.stack([cell.w_base for cell in cells]).flatten(1).to(after.dw.dtype)
    fast_state.publish(
        "fast_weight",
        slot,
        eta=inputs.eta * exists.unsqueeze(-1),
        **change_statistics(weight, after.dw.flatten(2)),
    )


def _losses(
    cells: Sequence[TTTLoRACell],
    inputs: Inputs,
    exists: Tensor,
    document_ids: Tensor | None,
    before: TTTLoRAState | None,
    after: TTTLoRAState,
) -> dict[str, Tensor]:
    """The inner objective before the call and after it, of each row's last document.

    Only the weights of that one are in the state.
    """
    if document_ids is not None:
        exists = exists & (document_ids == after.document_id.unsqueeze(1))
    values = {"after": _mean_loss(cells, inputs, after, exists)}
    if before is not None and document_ids is not None:
        goes_on = before.document_id == after.document_id
        before = before._replace(
            dw=before.dw * goes_on.view(-1, 1, 1, 1), db=before.db * goes_on.view(-1, 1, 1)
        )
    values["before"] = _mean_loss(cells, inputs, before, exists)
    return values


def _mean_loss(
    cells: Sequence[TTTLoRACell], inputs: Inputs, state: TTTLoRAState | None, exists: Tensor
) -> Tensor:
    """Mean inner objective of the call's tokens at the weights of a state, `[B, G]`."""
    w, b = (torch.stack([getattr(cell, n) for cell in cells]) for n in ("w_base", "b_base"))
    if state is not None:
        w, b = w.to(state.dw.dtype) + state.dw, b.to(state.db.dtype) + state.db
    losses = inner_loss(inputs.k, inputs.v, w, b, loss=cells[0].options.loss, **loss_norm(cells))
    total = torch.where(exists.unsqueeze(-1), losses, 0.0).sum(1)
    return total / exists.sum(1).clamp(min=1).unsqueeze(-1)
