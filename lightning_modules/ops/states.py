"""States that the ops take and return, so that a sequence can be read in pieces.

**All zeros means fresh**: a row whose tensors are all zero stands for the learned initial weights
before any token, so that resetting a row is multiplying it by zero.

Symbols: `B` rows, `H` heads, `D` head size, `F` hidden size of the MLP, `m` the mini-batch size of
a causal call (0 if not causal: its end closes the last mini-batch, nothing is pending).
Floating tensors are float32, or float64 if the inputs are.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.grid import integers_on


@dataclass(frozen=True)
class TokensRead:
    """What the host knows of the rows of a state, so that planning a call need not ask the device.

    An object of its own, because compiled code passes it on without looking inside: numbers would
    be compiled in.

    Attributes:
        rows: unmasked tokens that each row has read since its document began.
    """

    rows: tuple[int, ...]
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def on(self, device: torch.device) -> Tensor:
        """The numbers on a device, int64 `[B]`: copied there by the first layer that asks."""
        if device not in self._copies:
            self._copies[device] = integers_on(self.rows, device)
        return self._copies[device]


class TTTLinearState(NamedTuple):
    """What TTT-Linear carries from one call to the next.

    Attributes:
        dw: change of the weight since the document began, `W = w + dw`, at the start of the open
            mini-batch, `[B, H, D, D]`.
        db: change of the bias, `b = b0 + db`, `[B, H, 1, D]`.
        pending_k: keys of the open mini-batch, zero from `pending_count` on, `[B, m, H, D]`.
        pending_v: values of the open mini-batch, `[B, m, H, D]`.
        pending_eta: step sizes of the open mini-batch (0 where a token does not write),
            `[B, m, H]`.
        pending_count: tokens in the open mini-batch, `0 <= count < m` (int64, `[B]`).
        tokens_seen: unmasked tokens of the current document, pending ones included (int64, `[B]`);
            0 means that no document has begun.
        document_id: id of the current document, without meaning where `tokens_seen` is 0
            (int64, `[B]`).
    """

    dw: Tensor
    db: Tensor
    pending_k: Tensor
    pending_v: Tensor
    pending_eta: Tensor
    pending_count: Tensor
    tokens_seen: Tensor
    document_id: Tensor


class TTTMLPState(NamedTuple):
    """What TTT-MLP carries from one call to the next.

    Attributes:
        dw1: change of the first weight since the document began, `[B, H, D, F]`.
        db1: change of the first bias, `[B, H, 1, F]`.
        dw2: change of the second weight, `[B, H, F, D]`.
        db2: change of the second bias, `[B, H, 1, D]`.
        pending_k: as in `TTTLinearState`.
        pending_v: as in `TTTLinearState`.
        pending_eta: as in `TTTLinearState`.
        pending_count: as in `TTTLinearState`.
        tokens_seen: as in `TTTLinearState`.
        document_id: as in `TTTLinearState`.
    """

    dw1: Tensor
    db1: Tensor
    dw2: Tensor
    db2: Tensor
    pending_k: Tensor
    pending_v: Tensor
    pending_eta: Tensor
    pending_count: Tensor
    tokens_seen: Tensor
    document_id: Tensor


class TTTLoRAState(NamedTuple):
    """What TTT-as-LoRA carries from one call to the next.

    With a group of G adapters there is an axis of them: after the rows in `dw` and `db`
    (`[B, G, d, d]`), after the slots in what is pending (`[B, m, G, d]`).

    Attributes:
        dw: change of the weight since the document began, `W = w_base + dw`, at the start of the
            open mini-batch, `[B, d, d]`.
        db: change of the bias, `[B, d]`.
        pending_k: keys of the open mini-batch, zero from `pending_count` on, `[B, m, d]`.
        pending_v: its values, `[B, m, d]`.
        pending_eta: its step sizes, `[B, m]`.
        pending_count: as in `TTTLinearState`.
        tokens_seen: as in `TTTLinearState`.
        document_id: as in `TTTLinearState`.
    """

    dw: Tensor
    db: Tensor
    pending_k: Tensor
    pending_v: Tensor
    pending_eta: Tensor
    pending_count: Tensor
    tokens_seen: Tensor
    document_id: Tensor


class LaCTState(NamedTuple):
    """What LaCT carries from one call to the next.

    Unlike the states above it holds the weights themselves, not their change: their rows are
    rescaled after every update. A row with `tokens_seen` 0 is fresh, whatever else it holds, and
    all of it is zero. Fields that the options do not need have a size of 0 in place of r (of C for
    `pending_momentum`). Symbols: `r` blocks, `F` hidden size, `C` the chunk size, `L` what a
    learning rate has per token and head: `[3]`, or `[3, D]` per channel.

    Attributes:
        w0: first weight in use, `[B, r, H, F, D]`.
        w1: second weight, `[B, r, H, D, F]`.
        w2: weight of the product, `[B, r, H, F, D]`.
        main_w0: weight before its rows are rescaled (pre-norm only); so are `main_w1`, `main_w2`.
        momentum_w0: momentum buffer (with momentum only); so are `momentum_w1`, `momentum_w2`.
        norm_w0: norms of the rows when the document began, `[B, r, H, F, 1]`.
        norm_w1: `[B, r, H, D, 1]`.
        norm_w2: `[B, r, H, F, 1]`.
        pending_k: keys of the open chunk, zero from `pending_count` on, `[B, C, H, D]`.
        pending_v: its values, `[B, C, H, D]`.
        pending_lr: its learning rates, `[B, C, H, *L]`.
        pending_momentum: its momentum coefficients, `[B, C, H]`.
        pending_count: tokens in the open chunk, 1 to C: a full chunk is written when the next
            token arrives (int64, `[B]`).
        updates: chunks of the document that were written (int64, `[B]`).
        tokens_seen: as in `TTTLinearState`.
        document_id: as in `TTTLinearState`.
    """

    w0: Tensor
    w1: Tensor
    w2: Tensor
    main_w0: Tensor
    main_w1: Tensor
    main_w2: Tensor
    momentum_w0: Tensor
    momentum_w1: Tensor
    momentum_w2: Tensor
    norm_w0: Tensor
    norm_w1: Tensor
    norm_w2: Tensor
    pending_k: Tensor
    pending_v: Tensor
    pending_lr: Tensor
    pending_momentum: Tensor
    pending_count: Tensor
    updates: Tensor
    tokens_seen: Tensor
    document_id: Tensor


class InPlaceState(NamedTuple):
    """What In-Place TTT carries from one call to the next.

    What an open chunk will add is a sum over its tokens, so that the sum stands for all of them.

    Attributes:
        dw: S, what full chunks of the document have added to the weight, `[B, D, F]`.
        pending_dw: what the tokens of the open chunk add when it is full, not clipped,
            `[B, D, F]`.
        pending_count: tokens in the open chunk, `0 <= count < C` (int64, `[B]`).
        tokens_seen: as in `TTTLinearState`.
        document_id: as in `TTTLinearState`.
    """

    dw: Tensor
    pending_dw: Tensor
    pending_count: Tensor
    tokens_seen: Tensor
    document_id: Tensor
