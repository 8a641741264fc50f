"""States that the TTT ops take and return, so that a sequence can be read in pieces.

**All zeros means fresh**: a row whose tensors are all zero stands for the learned initial weights
before any token, so that resetting a row is multiplying it by zero.

Symbols: `B` rows, `H` heads, `D` head size, `F` hidden size of the MLP, `m` the mini-batch size of
a causal call (0 if not causal: its end closes the last mini-batch, nothing is pending).
Floating tensors are float32, or float64 if the inputs are.
"""

from typing import NamedTuple

from torch import Tensor


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
