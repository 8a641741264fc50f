"""TTT token by token: the readable definition that the fast backends are tested against.

Test-time training (Sun et al. 2024, arXiv:2407.04620, section 2) makes the hidden state of a
sequence layer the weights of a small *fast model* ``f``. Every token is one example of a
regression task: predict, from its key, its value minus its key,

    l_j = 1/2 || LN(f(k_j)) - (v_j - k_j) ||^2

and the weights go down the gradient of that loss while the sequence is read. Gradients are always
taken at the weights with which the current mini-batch started, so that all tokens of a mini-batch
can be processed in parallel. This file does not do that: it holds explicit weights, adds one
gradient at a time, and computes each output with explicitly updated weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Weights = tuple[Tensor, ...]
State = TypeVar("State", bound=tuple[Tensor, ...])


@dataclass(frozen=True)
class FastModel(ABC):
    """What TTT-Linear and TTT-MLP share; a subclass says how it predicts and how one token pulls.

    Args:
        norm_weight: gamma of the LayerNorm on the prediction, ``[H, D]``.
        norm_bias: beta of that LayerNorm, ``[H, D]``.
        eps: added to the variance in that LayerNorm.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    eps: float

    @abstractmethod
    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """The prediction ``z = f(x)`` before the LayerNorm; x and z are ``[H, 1, D]``."""

    @abstractmethod
    def token_gradient(self, weights: Weights, k: Tensor, v: Tensor) -> Weights:
        """``dl/dweights`` of one token, one tensor for each weight; k and v are ``[H, 1, D]``."""

    def normalise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``zh = (z - mean) / std`` and std over D, with the biased variance."""
        centred = z - z.mean(-1, keepdim=True)
        std = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return centred / std, std

    def layer_norm(self, z: Tensor) -> Tensor:
        """``LN(z) = gamma zh + beta``."""
        return self.norm_weight.unsqueeze(1) * self.normalise(z)[0] + self.norm_bias.unsqueeze(1)

    def output_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """``G = dl/dz`` of ``l = 1/2 ||LN(z) - target||^2``, both steps' backward in one formula.

        With ``g = (LN(z) - target) gamma``: ``G = (D g - sum(g) - zh sum(g zh)) / (D std)``.
        """
        normalised, std = self.normalise(z)
        size = z.shape[-1]
        g = (self.layer_norm(z) - target) * self.norm_weight.unsqueeze(1)
        along = (g * normalised).sum(-1, keepdim=True)
        return (size * g - g.sum(-1, keepdim=True) - normalised * along) / (size * std)

    def step(self, weights: Weights, gradient: Weights, factor: Tensor | float) -> Weights:
        """``W - factor * gradient`` for every weight."""
        return tuple(w - factor * g for w, g in zip(weights, gradient, strict=True))

    def read(self, weights: Weights, q: Tensor) -> Tensor:
        """The output ``o = q + LN(f(q))`` of one token, ``[H, 1, D]``."""
        return q + self.layer_norm(self.forward(weights, q))


class Token(NamedTuple):
    """One unmasked token of a row: q, k, v ``[H, 1, D]``, eta ``[H, 1, 1]`` (0: may not write)."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    position: int
    document: int | None


class Learner:
    """The fast weights of one row while its tokens go by, kept as a change from the initial ones.

    Args:
        model: the fast model.
        initial: the learned initial weights of this row.
        token_eta: tau of each position in a mini-batch, ``[m]``; None (not causal) stands for 1.
    """

    def __init__(self, model: FastModel, initial: Weights, token_eta: Tensor | None) -> None:
        self.model, self.initial, self.token_eta = model, initial, token_eta
        self.delta: Weights
        self.gradient: Weights
        self.pending: list[tuple[Tensor, Tensor, Tensor]]
        self.restart()

    def restart(self) -> None:
        """The state of a row that has seen nothing."""
        self.delta = tuple(torch.zeros_like(weight) for weight in self.initial)
        self.tokens_seen, self.document = 0, 0
        self._open_mini_batch()

    def enter(self, document: int | None) -> None:
        """Restart if the next token belongs to another document than the last one did."""
        if document is None:
            return
        if self.tokens_seen > 0 and document != self.document:
            self.restart()
        self.document = document

    def write(self, k: Tensor, v: Tensor, eta: Tensor) -> None:
        """Add ``eta_j dl_j/dW``, taken at the weights with which the mini-batch started."""
        new = self.model.token_gradient(self._apply(self.delta), k, v)
        self.gradient = tuple(g + eta * n for g, n in zip(self.gradient, new, strict=True))
        self.pending.append((k, v, eta))

    def read(self, q: Tensor) -> Tensor:
        """The output for q at ``W - tau_i sum_{j<=i} eta_j dl_j/dW``, i the last token written."""
        return self.model.read(self._apply(self._stepped()), q)

    def read_start(self, q: Tensor) -> Tensor:
        """The output for q at the weights with which the mini-batch started."""
        return self.model.read(self._apply(self.delta), q)

    def close(self) -> None:
        """End the mini-batch: its last step becomes the state with which the next one starts."""
        self.delta = self._stepped()
        self._open_mini_batch()

    def _open_mini_batch(self) -> None:
        self.pending = []
        self.gradient = tuple(torch.zeros_like(weight) for weight in self.initial)

    def _stepped(self) -> Weights:
        if not self.pending:
            return self.delta
        tau = 1.0 if self.token_eta is None else self.token_eta[len(self.pending) - 1]
        return self.model.step(self.delta, self.gradient, tau)

    def _apply(self, delta: Weights) -> Weights:
        return tuple(weight + d for weight, d in zip(self.initial, delta, strict=True))


def causal_outputs(
    learner: Learner, tokens: Sequence[Token], size: int | None
) -> dict[int, Tensor]:
    """Position -> output; each token writes, then reads what it and its predecessors wrote."""
    outputs = {}
    for token in tokens:
        learner.enter(token.document)
        learner.write(token.k, token.v, token.eta)
        learner.tokens_seen += 1
        outputs[token.position] = learner.read(token.q)
        if len(learner.pending) == size:
            learner.close()
    return outputs


def non_causal_outputs(
    learner: Learner, tokens: Sequence[Token], size: int | None
) -> dict[int, Tensor]:
    """Position -> output; all tokens of a mini-batch write, then all of them read."""
    outputs = {}
    for group in mini_batches(tokens, size):
        learner.enter(group[0].document)
        for token in group:
            learner.write(token.k, token.v, token.eta)
            learner.tokens_seen += 1
        learner.close()
        for token in group:
            outputs[token.position] = learner.read(token.q)
    return outputs


def mini_batches(tokens: Sequence[Token], size: int | None) -> Iterator[list[Token]]:
    """Runs of at most ``size`` tokens (None: any number) of one document."""
    group: list[Token] = []
    for token in tokens:
        if group and (len(group) == size or token.document != group[0].document):
            yield group
            group = []
        group.append(token)
    if group:
        yield group


def naive_ttt(
    model: FastModel,
    initial: Weights,
    state_class: Callable[..., State],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    *,
    mini_batch_size: int | None,
    causal: bool,
    token_eta: Tensor | None,
    mask: Tensor | None,
    write_mask: Tensor | None,
    document_ids: Tensor | None,
    state: Any | None,
    flush: bool,
) -> tuple[Tensor, State]:
    """Read a batch row by row; all but the first three arguments are those of the operators.

    Args:
        model: the fast model, with its LayerNorm.
        initial: the learned initial weights, each ``[H, ...]`` or ``[B, H, ...]``.
        state_class: the NamedTuple that holds the model's state.

    Returns:
        Outputs ``[B, T, H, D]`` in the dtype of q, and the next state.
    """
    output_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, eta = (x.to(dtype) for x in (q, k, v, eta))
    if write_mask is not None:
        eta = torch.where(write_mask.unsqueeze(-1), eta, 0.0)
    tau = _row_factors(mini_batch_size, token_eta, q) if causal else None
    run = causal_outputs if causal else non_causal_outputs
    outputs, learners = [], []
    with torch.autocast(q.device.type, enabled=False):
        for row in range(q.shape[0]):
            own = tuple((w[row] if w.dim() == 4 else w).to(dtype) for w in initial)
            learner = Learner(model, own, tau)
            if state is not None:
                resume(learner, state, row)
            tokens = _row_tokens(q, k, v, eta, mask, document_ids, row)
            outputs.append(_in_order(run(learner, tokens, mini_batch_size), q[row]))
            if flush:
                learner.close()
            learners.append(learner)
    o = torch.stack(outputs).to(output_dtype)
    return o, pack(learners, state_class, (mini_batch_size or 0) if causal else 0, k)


def _row_factors(size: int | None, token_eta: Tensor | None, like: Tensor) -> Tensor:
    """tau of each position in a mini-batch, by default ``1/(i+1)``, ``[m]``."""
    if token_eta is not None:
        return token_eta
    assert size is not None, "causal TTT needs a mini-batch size"
    return 1.0 / torch.arange(1, size + 1, dtype=like.dtype, device=like.device)


def _row_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mask: Tensor | None,
    document_ids: Tensor | None,
    row: int,
) -> list[Token]:
    """The unmasked tokens of a row."""
    length = q.shape[1]
    keep = [True] * length if mask is None else mask[row].tolist()
    documents = [None] * length if document_ids is None else document_ids[row].tolist()
    q, k, v = (x[row].unsqueeze(2) for x in (q, k, v))
    eta = eta[row].unsqueeze(-1).unsqueeze(-1)
    return [Token(q[t], k[t], v[t], eta[t], t, documents[t]) for t in range(length) if keep[t]]


def _in_order(outputs: dict[int, Tensor], like: Tensor) -> Tensor:
    """Outputs of a row as one tensor, zero where a token was masked, ``[T, H, D]``."""
    masked = torch.zeros_like(like[0])
    return torch.stack(
        [outputs[t].squeeze(1) if t in outputs else masked for t in range(len(like))]
    )


def resume(learner: Learner, state: Any, row: int) -> None:
    """Continue from a carried state; the gradients of its open mini-batch are taken again."""
    learner.delta = tuple(delta[row] for delta in state[: len(learner.initial)])
    for t in range(int(state.pending_count[row])):
        k, v, eta = state.pending_k[row, t], state.pending_v[row, t], state.pending_eta[row, t]
        learner.write(k.unsqueeze(1), v.unsqueeze(1), eta.view(-1, 1, 1))
    learner.tokens_seen = int(state.tokens_seen[row])
    learner.document = int(state.document_id[row])


def pack(
    learners: Sequence[Learner], state_class: Callable[..., State], size: int, like: Tensor
) -> State:
    """Stack the rows into a state; unused slots of the open mini-batch are zero."""
    heads, head_size = like.shape[2:]

    def slots(field: int, *shape: int) -> Tensor:
        rows = []
        for learner in learners:
            filled = [entry[field].reshape(1, *shape) for entry in learner.pending]
            rows.append(torch.cat([*filled, like.new_zeros(size - len(filled), *shape)]))
        return torch.stack(rows)

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=like.device)

    return state_class(
        *(torch.stack(deltas) for deltas in zip(*(x.delta for x in learners), strict=True)),
        slots(0, heads, head_size),
        slots(1, heads, head_size),
        slots(2, heads),
        integers([len(learner.pending) for learner in learners]),
        integers([learner.tokens_seen for learner in learners]),
        integers([learner.document for learner in learners]),
    )
