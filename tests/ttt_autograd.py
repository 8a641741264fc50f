"""The TTT ops with every inner gradient taken by torch.autograd: shares no code with the ops."""

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from ttt_cases import LAYERS, Case

Weights = list[Tensor]


class Slots(NamedTuple):
    """Tokens in the order of their slots: k, v `[H, n, D]`, eta `[H, n]`."""

    k: Tensor
    v: Tensor
    eta: Tensor

    def join(self, other: "Slots") -> "Slots":
        return Slots(*(torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)))

    def cut(self, start: int, stop: int) -> "Slots":
        return Slots(*(x[:, start:stop] for x in self))

    def at(self, positions: list[int]) -> "Slots":
        return Slots(*(x[:, positions] for x in self))

    def __len__(self) -> int:
        return self.eta.shape[1]


class RowReference:
    """One row of the op; the definition is `loss` and `weights_after`."""

    def __init__(self, case: Case, row: int, options: dict[str, Any]) -> None:
        weights = [case.tensors[name] for name in LAYERS[case.layer].weights]
        self.initial = [w[row] if w.dim() == 4 else w for w in weights]
        self.norm = case.tensors["norm_weight"][:, None], case.tensors["norm_bias"][:, None]
        self.eps = options.get("eps", 1e-6)
        self.causal, self.size = options["causal"], options["mini_batch_size"]
        self.tau = case.tensors.get("token_eta")
        q, k = case.tensors["q"][row].transpose(0, 1), case.tensors["k"][row].transpose(0, 1)
        v, eta = case.tensors["v"][row].transpose(0, 1), case.tensors["eta"][row].transpose(0, 1)
        if options.get("write_mask") is not None:
            eta = eta * options["write_mask"][row]
        self.queries, self.slots = q, Slots(k, v, eta)
        self.outputs = [torch.zeros_like(q[:, 0])] * q.shape[1]
        self.seen, self.document = 0, 0
        self.forget()
        if case.state is not None:
            self.resume(case.state, row)

    def forget(self) -> None:
        self.start, self.pending, self.seen = list(self.initial), self.slots.cut(0, 0), 0

    def resume(self, state: Any, row: int) -> None:
        deltas = [x[row] for x in state[: len(self.initial)]]
        self.start = [w + d for w, d in zip(self.initial, deltas, strict=True)]
        count = int(state.pending_count[row])
        carried = (state.pending_k, state.pending_v, state.pending_eta)
        self.pending = Slots(*(x[row, :count].transpose(0, 1) for x in carried))
        self.seen, self.document = int(state.tokens_seen[row]), int(state.document_id[row])

    def predict(self, weights: Weights, x: Tensor) -> Tensor:
        if len(weights) == 2:
            z = x @ weights[0] + weights[1]
        else:
            z = gelu(x @ weights[0] + weights[1], approximate="tanh") @ weights[2] + weights[3]
        return layer_norm(z, z.shape[-1:], eps=self.eps) * self.norm[0] + self.norm[1]

    def loss(self, weights: Weights, slots: Slots) -> Tensor:
        """Sum over tokens of `eta_j / 2 ||LN(f(k_j)) - (v_j - k_j)||^2`."""
        error = self.predict(weights, slots.k) - (slots.v - slots.k)
        return (0.5 * slots.eta * error.square().sum(-1)).sum()

    def weights_after(self, slots: Slots) -> Weights:
        """One gradient step on the tokens of a mini-batch so far, from its starting weights."""
        gradients = torch.autograd.grad(self.loss(self.start, slots), self.start, create_graph=True)
        tau = self.tau[len(slots) - 1] if self.causal else 1.0
        return [w - tau * g for w, g in zip(self.start, gradients, strict=True)]

    def read_run(self, positions: list[int]) -> None:
        """Tokens of one document, after those that wait: mini-batch by mini-batch."""
        waiting = len(self.pending)
        slots, self.pending = self.pending.join(self.slots.at(positions)), self.slots.cut(0, 0)
        size = self.size or len(slots)
        for begin in range(0, len(slots), size):
            part = slots.cut(begin, begin + size)
            end = self.weights_after(part)
            for i in range(max(waiting - begin, 0), len(part)):
                t = positions[begin + i - waiting]
                weights = self.weights_after(part.cut(0, i + 1)) if self.causal else end
                q = self.queries[:, t : t + 1]
                self.outputs[t] = (q + self.predict(weights, q))[:, 0]
            if len(part) == size or not self.causal:
                self.start = end
            else:
                self.pending = part

    def state(self) -> list[Tensor]:
        """The fields of the op's state, without the batch dimension."""
        room = self.size if self.causal else 0
        missing = room - len(self.pending)
        padded = [
            torch.cat([x.transpose(0, 1), x.new_zeros(missing, *x.shape[:1], *x.shape[2:])])
            for x in self.pending
        ]
        deltas = [w - w0 for w, w0 in zip(self.start, self.initial, strict=True)]
        integers = [torch.tensor(n) for n in (len(self.pending), self.seen, self.document)]
        return [*deltas, *padded, *integers]


def _row(case: Case, row: int, options: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    reference = RowReference(case, row, options)
    mask, documents = options.get("mask"), options.get("document_ids")
    positions = [t for t in range(len(reference.outputs)) if mask is None or mask[row, t]]
    unnamed = reference.document
    for document, run in groupby(
        positions, lambda t: unnamed if documents is None else documents[row, t].item()
    ):
        if reference.seen and document != reference.document:
            reference.forget()
        at = list(run)
        reference.document, reference.seen = document, reference.seen + len(at)
        reference.read_run(at)
    if options.get("flush") and len(reference.pending):
        reference.start = reference.weights_after(reference.pending)
        reference.pending = reference.pending.cut(0, 0)
    return torch.stack(reference.outputs), reference.state()


def autograd_ttt(case: Case, **overrides: Any) -> tuple[Tensor, Any]:
    """The op of `case`, row by row; leaves of the case must require gradients."""
    options = {**case.options, **overrides}
    rows = [_row(case, row, options) for row in range(case.tensors["q"].shape[0])]
    o = torch.stack([output for output, _ in rows])
    fields = zip(*(state for _, state in rows), strict=True)
    return o, LAYERS[case.layer].state(*(torch.stack(field) for field in fields))
