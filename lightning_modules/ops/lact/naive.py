"""LaCT token by token: the readable definition that the fast backend is tested against.

Large-chunk test-time training (Zhang et al. 2025, arXiv:2505.23884, section 3) makes the hidden
state of a sequence layer the weights of a stack of SwiGLU networks, here with r blocks:

    x_0 = q or k,    y_j = W1_j (silu(W0_j x_{j-1}) * (W2_j x_{j-1})),    x_j = y_j [+ x_{j-1}]

with the skip in brackets if `residual` and j < r. A token is read as `x_r(q)`. Once its chunk is
full and another token arrives, the weights go up the gradient of `<x_r(k), v>`, summed over the
chunk, each kind of weight with its own rates, and their rows are rescaled. This file holds the
weights of one row, reads one token at a time and adds one token's gradient at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import silu

from lightning_modules.ops.states import LaCTState, TokensRead

Weights = tuple[Tensor, ...]
"""W0 `[r, H, F, D]`, W1 `[r, H, D, F]` and W2 `[r, H, F, D]`, or something of their shapes."""

NORM_EPS = 1e-5
NEWTON_SCHULZ_EPS = 1e-7
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Token(NamedTuple):
    """What a chunk keeps of a token: k, v `[H, D]`, lr `[H, 3]` or `[H, 3, D]`, momentum `[H]`.

    With `[B, T]` in front, those of a batch.
    """

    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None

    def at(self, row: int, t: int) -> Token:
        """One token of a batch."""
        momentum = None if self.momentum is None else self.momentum[row, t]
        return Token(self.k[row, t], self.v[row, t], self.lr[row, t], momentum)


@dataclass(frozen=True)
class Options:
    """The keywords of the op that the loop needs, under the same names; None: no Muon."""

    chunk_size: int
    muon_dtype: torch.dtype | None
    prenorm: bool
    residual: bool
    greedy: bool
    adapt: bool


def row_norms(weights: Weights) -> Weights:
    """Euclidean norm of every row, `[..., 1]`."""
    return tuple(torch.linalg.vector_norm(w, dim=-1, keepdim=True) for w in weights)


def block_inputs(weights: Weights, x: Tensor, residual: bool) -> list[Tensor]:
    """`x_0` to `x_r`, each `[H, D, 1]`."""
    inputs, blocks = [x], len(weights[0])
    for j, (w0, w1, w2) in enumerate(zip(*weights, strict=True), start=1):
        y = w1 @ (silu(w0 @ x) * (w2 @ x))
        x = x + y if residual and j < blocks else y
        inputs.append(x)
    return inputs


def token_gradient(weights: Weights, token: Token, residual: bool) -> Weights:
    """What one token adds to each weight: its rates times the gradient of `<x_r(k), v>`.

    `d_j` is the gradient by `x_j`: `d_r = v`, and every block hands `d_{j-1}` down. Per channel,
    the rates of W0 and W2 scale the channels of the block's input, that of W1 its hidden ones.
    """
    k, d = token.k.unsqueeze(-1), token.v.unsqueeze(-1)
    lr0, lr1, lr2 = token.lr.reshape(len(k), 3, -1, 1).unbind(1)
    inputs, blocks = block_inputs(weights, k, residual), len(weights[0])
    gradients: list[Weights] = []
    for j in range(blocks, 0, -1):
        x, (w0, w1, w2) = inputs[j - 1], (w[j - 1] for w in weights)
        p, h, u = w0 @ x, w2 @ x, w1.mT @ d
        g, s = silu(p), torch.sigmoid(p)
        a = u * h * s * (1 + p * (1 - s))
        gradients.insert(0, (a @ (lr0 * x).mT, d @ (lr1 * g * h).mT, (u * g) @ (lr2 * x).mT))
        below = w0.mT @ a + w2.mT @ (u * g)
        d = below + d if residual and j < blocks else below
    return tuple(torch.stack(kind) for kind in zip(*gradients, strict=True))


def greedy_gradient(weights: Weights, token: Token) -> Weights:
    """The wrong baseline: every block learns `<f_j(k), v>` of raw k and v, as if it stood alone."""
    blocks = zip(*(w.split(1) for w in weights), strict=True)
    alone = [token_gradient(block, token, residual=False) for block in blocks]
    return tuple(torch.cat(kind) for kind in zip(*alone, strict=True))


def newton_schulz(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Muon: five steps towards the orthogonal factor of every matrix `[..., n, m]`, in dtype."""
    x = gradient.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + NEWTON_SCHULZ_EPS)
    for a, b, c in NEWTON_SCHULZ:
        product = x @ x.mT
        x = a * x + (b * product + (c * product) @ product) @ x
    return (x.mT if tall else x).to(gradient.dtype)


class Learner:
    """The fast weights of one row while its tokens go by.

    Args:
        options: of the op.
        learned: the learned weights, with which every document begins.
    """

    def __init__(self, options: Options, learned: Weights) -> None:
        self.options, self.learned = options, learned
        self.restart()

    def restart(self) -> None:
        """The state of a row that has seen nothing."""
        self.weights = self.main = self.learned
        self.norms = row_norms(self.learned)
        self.momentum = tuple(torch.zeros_like(w) for w in self.learned)
        self.pending: list[Token] = []
        self.updates, self.tokens_seen, self.document = 0, 0, 0

    def read(self, q: Tensor, token: Token, document: int | None) -> Tensor:
        """Take the token into the open chunk and return the output for its q, `[H, D]`."""
        if document is not None:
            if self.tokens_seen > 0 and document != self.document:
                self.restart()
            self.document = document
        if len(self.pending) == self.options.chunk_size:
            if self.options.adapt:
                self.write()
            self.pending = []
        self.pending.append(token)
        self.tokens_seen += 1
        return block_inputs(self.weights, q.unsqueeze(-1), self.options.residual)[-1].squeeze(-1)

    def write(self) -> None:
        """Change the weights by the tokens of the open chunk, all at the same old weights."""
        update = self._gradient()
        momenta = [token.momentum for token in self.pending if token.momentum is not None]
        if momenta:
            mean = torch.stack(momenta).mean(0).view(-1, 1, 1)
            pairs = zip(update, self.momentum, strict=True)
            update = self.momentum = tuple(g + mean * old for g, old in pairs)
        if self.options.muon_dtype is not None:
            dtype = self.options.muon_dtype
            update = tuple(newton_schulz(matrix, dtype) for matrix in update)
        self.main = tuple(w + change for w, change in zip(self.main, update, strict=True))
        now = zip(self.main, row_norms(self.main), self.norms, strict=True)
        self.weights = tuple(w / (norm + NORM_EPS) * initial for w, norm, initial in now)
        if not self.options.prenorm:
            self.main = self.weights
        self.updates += 1

    def _gradient(self) -> Weights:
        total = tuple(torch.zeros_like(w) for w in self.weights)
        for token in self.pending:
            if self.options.greedy:
                new = greedy_gradient(self.weights, token)
            else:
                new = token_gradient(self.weights, token, self.options.residual)
            total = tuple(g + n for g, n in zip(total, new, strict=True))
        return total


def naive_lact(
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
    """Read a batch row by row; the arguments are those of `lact`.

    `recompute` saves memory in the fast backend and changes no result.

    Raises:
        ValueError: if there is a group.
    """
    if group is not None:
        raise ValueError("the naive backend has no group: use backend='torch' to share chunks")
    options = Options(chunk_size, muon_dtype if muon else None, prenorm, residual, greedy, adapt)
    dtype = torch.promote_types(q.dtype, torch.float32)
    learned = tuple(w.to(dtype) for w in (w0, w1, w2))
    coefficients = None if momentum is None else momentum.to(dtype)
    tokens = Token(k.to(dtype), v.to(dtype), lr.to(dtype), coefficients)
    outputs, learners = [], []
    with torch.autocast(q.device.type, enabled=False):
        for row in range(q.shape[0]):
            learner = Learner(options, learned)
            if state is not None and int(state.tokens_seen[row]) > 0:
                _resume(learner, state, row)
            o = list(torch.zeros_like(q[row], dtype=dtype))
            for t in range(q.shape[1]):
                if mask is None or mask[row, t]:
                    document = None if document_ids is None else int(document_ids[row, t])
                    o[t] = learner.read(q[row, t].to(dtype), tokens.at(row, t), document)
            outputs.append(torch.stack(o))
            learners.append(learner)
        packed = _pack(learners, tokens)
    return torch.stack(outputs).to(q.dtype), packed


def _resume(learner: Learner, state: LaCTState, row: int) -> None:
    """Continue from a carried state."""

    def attached(values: Sequence[Tensor]) -> Weights:
        """Without a graph of its own, a weight passes its gradient on to the learned one."""
        pairs = zip(values, learner.learned, strict=True)
        return tuple(x[row] if x.requires_grad else x[row] + (w - w.detach()) for x, w in pairs)

    learner.weights = learner.main = attached((state.w0, state.w1, state.w2))
    if learner.options.prenorm:
        learner.main = attached((state.main_w0, state.main_w1, state.main_w2))
    learner.norms = tuple(x[row] for x in (state.norm_w0, state.norm_w1, state.norm_w2))
    coefficients = None
    if state.momentum_w0.numel() > 0:
        buffers = (state.momentum_w0, state.momentum_w1, state.momentum_w2)
        learner.momentum = tuple(buffer[row] for buffer in buffers)
        coefficients = state.pending_momentum
    open_chunk = Token(state.pending_k, state.pending_v, state.pending_lr, coefficients)
    learner.pending = [open_chunk.at(row, t) for t in range(int(state.pending_count[row]))]
    learner.updates = int(state.updates[row])
    learner.tokens_seen = int(state.tokens_seen[row])
    learner.document = int(state.document_id[row])


def _pack(learners: Sequence[Learner], tokens: Token) -> LaCTState:
    """Stack the rows into a state; rows that have seen nothing and unused slots are zero."""
    size, use_momentum = learners[0].options.chunk_size, tokens.momentum is not None

    def rows(name: str, needed: bool = True) -> Weights:
        """The three tensors of this name, without blocks if they are not needed."""
        kept = [
            [x if learner.tokens_seen > 0 else torch.zeros_like(x) for x in getattr(learner, name)]
            for learner in learners
        ]
        return tuple(torch.stack(x)[:, : None if needed else 0] for x in zip(*kept, strict=True))

    def slots(name: str) -> Tensor:
        """This field of the open chunks' tokens."""
        empty = torch.zeros_like(getattr(tokens, name)[0, 0])
        filled = [[getattr(token, name) for token in learner.pending] for learner in learners]
        return torch.stack([torch.stack([*x, *[empty] * (size - len(x))]) for x in filled])

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=tokens.k.device)

    fields = [
        *rows("weights"),
        *rows("main", learners[0].options.prenorm),
        *rows("momentum", use_momentum),
        *rows("norms"),
        *(slots(name) for name in ("k", "v", "lr")),
        slots("momentum") if use_momentum else tokens.k[:, :0, :, 0],
        integers([len(learner.pending) for learner in learners]),
        integers([learner.updates for learner in learners]),
        integers([learner.tokens_seen for learner in learners]),
        integers([learner.document for learner in learners]),
    ]
    return LaCTState(*fields)
