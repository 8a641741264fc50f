"""Inputs, calls and gradients of the TTT ops, shared by the tests in tests/ops."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from stream_cases import random_flags as random_flags
from stream_cases import run_in_pieces as run_in_pieces
from torch import Tensor

from lightning_modules.ops import TTTLinearState, TTTMLPState, ttt_linear, ttt_mlp

INPUTS = ("q", "k", "v", "eta", "norm_weight", "norm_bias")
PENDING = ("pending_k", "pending_v", "pending_eta")


class Layer(NamedTuple):
    """One of the two ops and what is particular to it."""

    op: Callable[..., Any]
    state: type
    weights: dict[str, Callable[[int], tuple[int, int]]]
    """Name -> shape for a head size, in the order of the op's arguments."""
    deltas: tuple[str, ...]


LAYERS = {
    "linear": Layer(
        ttt_linear, TTTLinearState, {"w": lambda d: (d, d), "b": lambda d: (1, d)}, ("dw", "db")
    ),
    "mlp": Layer(
        ttt_mlp,
        TTTMLPState,
        {
            "w1": lambda d: (d, 4 * d),
            "b1": lambda d: (1, 4 * d),
            "w2": lambda d: (4 * d, d),
            "b2": lambda d: (1, d),
        },
        ("dw1", "db1", "dw2", "db2"),
    ),
}


@dataclass(frozen=True)
class Case:
    """Arguments of one call: `tensors` are differentiable, `options` are the other keywords."""

    layer: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    state: Any = None

    def run(self, backend: str, **options: Any) -> tuple[Tensor, Any]:
        """Call the op; `options` override those of the case."""
        layer = LAYERS[self.layer]
        names = (*INPUTS, *layer.weights)
        keywords = {"state": self.state, **self.options, **options, "backend": backend}
        if "token_eta" in self.tensors:
            keywords.setdefault("token_eta", self.tensors["token_eta"])
        return layer.op(*(self.tensors[name] for name in names), **keywords)

    def with_tensors(self, **tensors: Tensor) -> "Case":
        """The same call with other tensors."""
        return replace(self, tensors={**self.tensors, **tensors})

    def with_options(self, **options: Any) -> "Case":
        """The same call with other keywords."""
        return replace(self, options={**self.options, **options})

    def with_state(self, state: Any) -> "Case":
        """The same call from another state."""
        return replace(self, state=state)

    def tokens(self, index: Any) -> "Case":
        """The call with only some of the tokens (any index of the time axis)."""
        cut = {name: self.tensors[name][:, index] for name in ("q", "k", "v", "eta")}
        flags = {
            name: value[:, index]
            for name, value in self.options.items()
            if name in ("mask", "write_mask", "document_ids") and value is not None
        }
        return self.with_tensors(**cut).with_options(**flags)

    def rows(self, index: slice) -> "Case":
        """The call with only some of the rows."""
        per_row = {name: self.tensors[name][index] for name in ("q", "k", "v", "eta")}
        for name in LAYERS[self.layer].weights:
            if self.tensors[name].dim() == 4:
                per_row[name] = self.tensors[name][index]
        flags = {
            name: value[index]
            for name, value in self.options.items()
            if name in ("mask", "write_mask", "document_ids") and value is not None
        }
        state = self.state
        if state is not None:
            state = type(state)(*(x[index] for x in state))
        return self.with_tensors(**per_row).with_options(**flags).with_state(state)


def make_case(
    layer: str,
    *,
    time: int,
    mini_batch_size: int | None,
    causal: bool,
    batch: int = 2,
    heads: int = 2,
    size: int = 4,
    per_row: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Random inputs on the scale of a trained layer; causal cases get random positive token_eta."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    lead = (batch, heads) if per_row else (heads,)
    tensors = {name: normal(batch, time, heads, size) for name in ("q", "k", "v")}
    tensors["eta"] = (0.1 + uniform(batch, time, heads)) / size
    tensors["norm_weight"] = 1 + normal(heads, size, scale=0.3)
    tensors["norm_bias"] = normal(heads, size, scale=0.3)
    for name, shape in LAYERS[layer].weights.items():
        tensors[name] = normal(*lead, *shape(size), scale=0.4)
    if causal:
        steps = 1 / torch.arange(1, mini_batch_size + 1, dtype=dtype)
        tensors["token_eta"] = steps + 0.3 * uniform(mini_batch_size)
    return Case(layer, tensors, {"mini_batch_size": mini_batch_size, "causal": causal})


def carried_state(case: Case, seed: int, time: int = 7) -> Case:
    """Start the call from the state after other random tokens, a different number in each row."""
    batch, _, heads, size = case.tensors["q"].shape
    other = make_case(
        case.layer,
        time=time,
        batch=batch,
        heads=heads,
        size=size,
        seed=seed + 1,
        dtype=case.tensors["q"].dtype,
        mini_batch_size=case.options["mini_batch_size"],
        causal=case.options["causal"],
    )
    earlier = {name: other.tensors[name] for name in ("q", "k", "v", "eta")}
    mask = torch.arange(time)[None] >= torch.arange(batch)[:, None]
    before = case.with_tensors(**earlier).with_options(mask=mask, write_mask=None)
    if "document_ids" in case.options:
        first = case.options["document_ids"][:, :1]
        before = before.with_options(document_ids=first.expand(batch, time))
    return case.with_state(before.run("naive", flush=False)[1])


def floating(state: Any) -> dict[str, Tensor]:
    """The real-valued fields of a state."""
    return {name: x for name, x in state._asdict().items() if x.is_floating_point()}


def outputs(o: Tensor, state: Any) -> dict[str, Tensor]:
    """What a call returns, by name."""
    return {"o": o, **state._asdict()}


def differentiate(
    case: Case, run: Callable[..., tuple[Tensor, Any]] | str, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of a call, and gradients of a fixed random weighting of all of them.

    Args:
        run: a backend, or a function of a case and keywords.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.tensors.items()}
    state = case.state
    if state is not None:
        own = {n: x.detach().clone().requires_grad_() for n, x in floating(state).items()}
        state = state._replace(**own)
        leaves.update({f"state/{name}": x for name, x in own.items()})
    tensors = {name: leaves[name] for name in case.tensors}
    call = replace(case, tensors=tensors, state=state)
    o, new = call.run(run, **options) if isinstance(run, str) else run(call, **options)
    generator = torch.Generator().manual_seed(99)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
        for x in (o, *floating(new).values())
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    return {name: x.detach() for name, x in outputs(o, new).items()}, named


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """max|actual - reference| / max|reference|, or the absolute error if the reference is zero."""
    if reference.numel() == 0:
        return 0.0
    scale = reference.abs().max().item()
    return (actual - reference).abs().max().item() / (scale or 1.0)


def assert_same(
    actual: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float, what: str
) -> None:
    """Assert equal names, shapes, dtypes and values; integers exactly, reals up to tolerance."""
    assert actual.keys() == reference.keys()
    for name, expected in reference.items():
        got = actual[name]
        assert got.shape == expected.shape, f"{what} {name}: {got.shape} not {expected.shape}"
        assert got.dtype == expected.dtype, f"{what} {name}: {got.dtype} not {expected.dtype}"
        if tolerance == 0 or not expected.is_floating_point():
            assert torch.equal(got, expected), f"{what} {name}: not equal"
        else:
            assert torch.isfinite(got).all(), f"{what} {name}: not finite"
            error = relative_error(got, expected)
            assert error <= tolerance, f"{what} {name}: error {error:.3g} > {tolerance:.3g}"


def as_function(case: Case, backend: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The call as a function of its real-valued inputs (state included), and those inputs."""
    state = {} if case.state is None else floating(case.state)
    names, fields = list(case.tensors), list(state)
    leaves = [
        x.detach().clone().requires_grad_() for x in (*case.tensors.values(), *state.values())
    ]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        call = case.with_tensors(**dict(zip(names, values[: len(names)], strict=True)))
        if fields:
            new = dict(zip(fields, values[len(names) :], strict=True))
            call = call.with_state(case.state._replace(**new))
        o, after = call.run(backend)
        return o, *(x for x in floating(after).values() if x.numel())

    return function, leaves
