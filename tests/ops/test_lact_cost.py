"""What LaCT's torch backend costs: operations, memory, compilations."""

from typing import Any

import pytest
import torch
from lact_cases import Case, make_case
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import softplus
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.ops import triton_backend
from lightning_modules.ops.lact import lact

SIZES: dict[str, Any] = {"batch": 3, "heads": 2, "size": 4, "hidden": 6}
MATRIX = 4 * 6
"""D F, for a token and head."""


def flops(case: Case, **options: Any) -> tuple[int, int]:
    """Of the forward and the backward pass."""
    leaves = {name: x.clone().requires_grad_() for name, x in case.tensors.items()}
    with FlopCounterMode(display=False) as forward:
        o, _ = case.with_tensors(**leaves).run("torch", **options)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("time", [3, 4, 8, 11, 12])
def test_operations_are_those_of_the_equations(time: int, blocks: int) -> None:
    """24 r - 6 in a chunk that is written, 6 r in the last, times D F; backward twice that."""
    case = make_case(time=time, chunk_size=4, blocks=blocks, residual=True, **SIZES)
    written = (time - 1) // 4 * 4
    tokens = (24 * blocks - 6) * written + 6 * blocks * (time - written)
    assert flops(case) == (6 * tokens * MATRIX, 2 * 6 * tokens * MATRIX)


def test_muon_adds_ninety_cubes_for_each_head_and_chunk() -> None:
    options = {"chunk_size": 4, **SIZES, "hidden": 4}
    plain, muon = (flops(make_case(time=12, muon=x, **options)) for x in (False, True))
    assert muon[0] - plain[0] == 2 * 6 * 90 * 4**3
    assert muon[1] - plain[1] == 2 * (muon[0] - plain[0])


def test_operations_of_a_stream_are_those_of_its_tokens() -> None:
    """A carried state, all rows alike: in steps of a chunk, each call writes one."""
    case = make_case(time=16, chunk_size=4, **SIZES)
    _, state = case.tokens(slice(0, 8)).run("torch")
    call = case.tokens(slice(8, 12)).with_state(state)
    assert flops(call)[0] == 6 * 18 * 4 * MATRIX
    # and if a row begins another file, which writes nothing, but is in step
    one_fresh = state._replace(tokens_seen=state.tokens_seen * torch.tensor([0, 1, 1]))
    assert flops(call.with_state(one_fresh))[0] == 6 * 18 * 4 * MATRIX


def test_documents_shorter_than_a_chunk_are_only_read() -> None:
    ids = torch.tensor([0] * 3 + [1] * 4 + [2] * 5).unsqueeze(0)
    case = make_case(time=12, chunk_size=4, **{**SIZES, "batch": 1}, document_ids=ids)
    assert flops(case)[0] == 2 * (6 * 12 + 12 * 4) * MATRIX  # the last one has a fifth token
    short = make_case(time=12, chunk_size=8, **{**SIZES, "batch": 1}, document_ids=ids)
    assert flops(short)[0] == 2 * 6 * 12 * MATRIX


def test_reading_without_adapting_writes_nothing() -> None:
    assert flops(make_case(time=12, chunk_size=4, **SIZES, adapt=False))[0] == 6 * 6 * 12 * MATRIX


@pytest.mark.parametrize("prefill", [5, 37, 801])
@pytest.mark.parametrize("rows", ["alike", "different"])
def test_operations_of_a_token_do_not_depend_on_the_past(rows: str, prefill: int) -> None:
    case = make_case(time=prefill + 1, chunk_size=16, **SIZES)
    mask = torch.ones(3, prefill, dtype=torch.bool)
    mask[1, :2] = rows == "alike"
    _, state = case.tokens(slice(0, prefill)).run("torch", mask=mask)
    assert flops(case.tokens(slice(prefill, None)).with_state(state))[0] == 6 * 6 * MATRIX


def saved_bytes(case: Case, **options: Any) -> int:
    """Of the tensors that the backward pass needs, each storage once."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = {name: x.clone().requires_grad_() for name, x in case.tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        _held = case.with_tensors(**leaves).run("torch", **options)
    own = {x.untyped_storage().data_ptr() for x in leaves.values()}
    return sum(size for pointer, size in storages.items() if pointer not in own)


def test_recomputing_keeps_weights_alone() -> None:
    case = make_case(time=2048, chunk_size=512, dtype=torch.float32)
    kept, recomputed = saved_bytes(case), saved_bytes(case, recompute=True)
    hidden = 2 * 2048 * 2 * 6 * 4
    assert kept > 6 * hidden
    assert recomputed < hidden / 10


class Layer(nn.Module):
    """As much of a layer as a compiler needs to see."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.rates = nn.Linear(8, 24), nn.Linear(8, 6)
        self.weights = nn.ParameterList([torch.randn(1, 2, 4, 4) for _ in range(3)])
        self.output = nn.Linear(8, 8)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        q, k, v = self.tokens(x).unflatten(-1, (6, 4)).chunk(3, 2)
        lr = softplus(self.rates(x)).unflatten(-1, (2, 3))
        o, state = lact(q, k, v, lr, *self.weights, chunk_size=4, state=state)
        return self.output(o.flatten(2)), state


@pytest.mark.slow
def test_compiled_layer_is_compiled_at_most_once_more_for_all_lengths() -> None:
    torch._dynamo.reset()
    counter, layer = CompileCounter(), Layer()
    compiled = torch.compile(layer, backend=counter)
    counts = []
    for time in (8, 12, 13, 7, 40, 41):
        x = torch.randn(2, time, 8)
        o, state = compiled(x)
        o.sum().backward()
        counts.append(counter.frame_count)
        assert torch.allclose(o, layer(x)[0], atol=1e-6)
    assert counts[0] == 2  # what comes before the op and what comes after it
    assert counts[1:] == [counts[1]] * 5  # with the second length, once for any

    o, state = compiled(torch.randn(2, 8, 8), state)
    with_state = counter.frame_count
    for time in (12, 7, 40):
        _, state = compiled(torch.randn(2, time, 8), state)
    assert counter.frame_count == with_state
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_takes_the_backend_that_it_would_take_uncompiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU that is the kernels; the check of devices is not traced."""
    asked = []

    def unable(device: str, dtype: torch.dtype, in_graphs: bool = False) -> str | None:
        asked.append(torch.compiler.is_compiling())
        return f"q is on {device}"

    monkeypatch.setattr(triton_backend, "unable", unable)
    torch._dynamo.reset()
    torch.compile(Layer(), backend="eager")(torch.randn(2, 12, 8))
    torch._dynamo.reset()
    assert asked == [False]
