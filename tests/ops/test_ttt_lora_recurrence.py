"""The scan of `ops.ttt_lora` in blocks against step after step, and what it costs."""

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from spy import OperationCount, SyncSpy
from torch import Tensor
from torch.nn.functional import normalize, pad
from ttt_cases import assert_same, differentiate, relative_error
from ttt_lora_cases import carried_state, case_of, make_case, with_everything

from lightning_modules.ops.ttt_lora.recurrence import linear_recurrence
from lightning_modules.ops.ttt_lora.scan import scan

# by its path, since the package has a function of its name
SCAN = sys.modules["lightning_modules.ops.ttt_lora.scan"]
FORMS = ("A_plain", "B_plain")
COUNTS = (1, 2, 3, 5, 8, 9, 10, 16, 17, 31)
GROUP, BATCH, SLOTS, SIZE = 2, 3, 3, 4
Results = dict[str, Tensor]
every_form = pytest.mark.parametrize("form", FORMS)
every_count = pytest.mark.parametrize("count", COUNTS)
restarts = pytest.mark.parametrize("restarts", [False, True], ids=["one document", "documents"])


def use(monkeypatch: pytest.MonkeyPatch, blocks: bool) -> None:
    """Scan in blocks wherever the loss allows it, or nowhere."""
    monkeypatch.setattr(SCAN, "_worth_blocks", lambda keys: blocks)


def random_restart(count: int, batch: int = BATCH) -> Tensor:
    """Documents of every length, also of one mini-batch, `[N, B]`; a row begins with one."""
    restart = torch.rand(count, batch, generator=torch.Generator().manual_seed(count)) < 0.3
    restart[0, 0] = True
    return restart


# --- the recurrence ---


def steps_of(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """T, U and `X_0` of random numbers that neither grow nor vanish in 30 steps."""
    generator = torch.Generator().manual_seed(count)
    shapes = (count, GROUP, BATCH, 5, 5), (count, GROUP, BATCH, 5, 3), (GROUP, BATCH, 5, 3)
    t, u, start = (torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes)
    return t * 5**-0.5, u, start


def step_after_step(t: Tensor, u: Tensor, start: Tensor, restart: Tensor | None) -> Tensor:
    states = [start]
    for n in range(len(t)):
        before = states[-1] if restart is None else states[-1].masked_fill(restart[n], 0)
        states.append(t[n] @ before + u[n])
    return torch.stack(states)


def broadcast(restart: Tensor) -> Tensor:
    return restart[:, None, :, None, None]


@every_count
@restarts
def test_recurrence_is_its_loop(restarts: bool, count: int) -> None:
    steps = steps_of(count)
    restart = broadcast(random_restart(count)) if restarts else None
    copies = [x.clone() for x in steps]
    states = linear_recurrence(*steps, restart)
    expected = step_after_step(*steps, restart)
    assert states.shape == (count + 1, GROUP, BATCH, 5, 3)
    # float64, sums of up to 31 steps in another order
    assert relative_error(states, expected) < 1e-12
    assert all(torch.equal(x, copy) for x, copy in zip(steps, copies, strict=True))


@pytest.mark.parametrize("broken", ["transitions", "inputs", "start"])
def test_what_is_not_finite_ends_at_a_restart_wherever_it_is(broken: str) -> None:
    count = 10
    for first in range(count - 1):
        t, u, start = steps_of(count)
        if broken == "start":
            start[:] = float("inf")
        else:
            (t if broken == "transitions" else u)[first] = float("inf")
        restart = torch.zeros(count, BATCH, dtype=torch.bool)
        restart[first + 1] = True
        states = linear_recurrence(t, u, start, broadcast(restart))
        expected = step_after_step(t, u, start, broadcast(restart))
        assert not expected[first + 1].isfinite().any()
        assert torch.equal(states.isfinite(), expected.isfinite())
        assert relative_error(states[first + 2 :], expected[first + 2 :]) < 1e-12


# --- the scan ---


def scan_inputs(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """keys, scaled, learned, start; scaled is not along the keys, so that `T^T` is not T."""
    generator = torch.Generator().manual_seed(count)
    tokens = (count, GROUP, BATCH, SLOTS)
    shapes = ((*tokens, SIZE + 1), (*tokens, SIZE + 1), (*tokens, SIZE))
    start = (GROUP, BATCH, SIZE + 1, SIZE)
    drawn = (torch.randn(x, generator=generator, dtype=dtype) for x in (*shapes, start))
    return [0.3 * x for x in drawn]


def results(inputs: list[Tensor], restart: Tensor | None) -> Results:
    """States, errors and the gradients of a random weighting of both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = scan(*leaves[:3], torch.zeros_like(leaves[2]), leaves[3], restart, None)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in found]
    loss = sum((x * w.to(x.dtype)).sum() for x, w in zip(found, weights, strict=True))
    names = ("keys", "scaled", "learned", "start")
    gradients = torch.autograd.grad(loss, leaves)
    named = dict(zip(names, gradients, strict=True))
    return {"states": found[0].detach(), "errors": found[1].detach(), **named}


def check_blocks(monkeypatch: pytest.MonkeyPatch, count: int, restart: Tensor | None) -> None:
    found = []
    for blocks in (False, True):
        use(monkeypatch, blocks)
        found.append(results(scan_inputs(count), restart))
    # both are float64; sums are taken in another order
    assert_same(found[1], found[0], 1e-11, "blocks")


@every_count
@restarts
def test_blocks_are_the_mini_batches_in_turn(
    restarts: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_blocks(monkeypatch, count, random_restart(count) if restarts else None)


MISTAKES: dict[str, Callable[..., Tensor]] = {
    "transposed": lambda t, u, start, restart: linear_recurrence(t.mT, u, start, restart),
    "no restart": lambda t, u, start, restart: linear_recurrence(t, u, start),
    "late restart": lambda t, u, start, restart: linear_recurrence(t, u, start, restart.roll(1, 0)),
    "no start": lambda t, u, start, restart: linear_recurrence(t, u, 0 * start, restart),
    "off by one": lambda t, u, start, restart: linear_recurrence(t.roll(1, 0), u, start, restart),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_wrong_recurrence_is_not_the_mini_batches_in_turn(
    backward: bool, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, calls = MISTAKES[mistake], []

    def recurrence(*call: Any) -> Tensor:
        calls.append(call)
        return (wrong if len(calls) == 1 + backward else linear_recurrence)(*call)

    monkeypatch.setattr(SCAN, "linear_recurrence", recurrence)
    restart = random_restart(10)
    restart[0] = False  # else a row's start does not matter
    with pytest.raises(AssertionError, match=r"blocks \w+: error"):
        check_blocks(monkeypatch, 10, restart)
    assert len(calls) == 2


@every_form
@pytest.mark.parametrize("time", [1, 7, 8, 9, 33, 45])
def test_blocks_are_naive_on_odd_sizes(
    time: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, True)
    case = case_of(form, time, batch=3, group=2, seed=time)
    for each in (case, carried_state(case, time), with_everything(case, time)):
        expected, expected_gradients = differentiate(each, "naive")
        actual, gradients = differentiate(each, "torch")
        # both are float64; sums are taken in another order, up to 45 steps deep
        assert_same(actual, expected, 1e-10, "blocks")
        assert_same(gradients, expected_gradients, 1e-9, "gradient of blocks:")


@pytest.mark.parametrize("count", [1, 3, 7])
@restarts
def test_gradients_of_blocks_are_numerical_derivatives(
    restarts: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, True)
    restart = random_restart(count) if restarts else None
    leaves = [x.requires_grad_() for x in scan_inputs(count)]

    def function(keys: Tensor, scaled: Tensor, z: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        return scan(keys, scaled, z, torch.zeros_like(z), start, restart, None)

    # fast mode: one random direction per pair of input and output
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-6)
    for result in range(2):  # the other gets no gradient at all
        assert torch.autograd.gradcheck(
            lambda *x, n=result: function(*x)[n], leaves, fast_mode=True, atol=1e-6
        )
    with pytest.raises(RuntimeError, match=r"ttt_lora has no second derivatives"):
        torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("smallest", [0.0, 0.9], ids=["any step", "great steps"])
def test_float32_over_4096_mini_batches_is_as_close_to_float64_as_the_mini_batches_in_turn(
    smallest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of length 1 and eta below 1, as layers have: T has eigenvalues from -1 to 1."""
    keys, _, learned, start = scan_inputs(4096)
    keys = pad(normalize(keys[..., :-1], dim=-1), (0, 1), value=1.0)
    generator = torch.Generator().manual_seed(1)
    eta = torch.rand(*keys.shape[:-1], 1, generator=generator, dtype=torch.float64)
    eta = smallest + (1 - smallest) * eta
    inputs = [keys, -eta / SLOTS * keys, learned, start]
    use(monkeypatch, False)
    exact = results(inputs, None)

    def errors(blocks: bool) -> Results:
        use(monkeypatch, blocks)
        found = results([x.float() for x in inputs], None)
        return {name: relative_error(x.double(), exact[name]) for name, x in found.items()}

    turns, in_blocks = errors(False), errors(True)
    # A state comes out of products of up to 128 transitions, none longer than 1, rounded to 6e-8
    # each, of which no error grows. Found: up to 3e-7 in turn, and 7e-7.
    assert max(turns.values()) < 1e-6
    assert max(in_blocks.values()) < 2e-6
    assert max(in_blocks.values()) < 6 * max(turns.values())


# --- costs ---


@pytest.mark.parametrize("restarts, each", [(False, 1), (True, 2)])
def test_operations_grow_with_the_root_of_the_number_of_mini_batches(
    restarts: bool, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, True)
    forward, backward, counts = [], [], (16, 64, 256, 1024)
    for count in counts:
        restart = random_restart(count) if restarts else None
        leaves = [x.requires_grad_() for x in scan_inputs(count)]
        with OperationCount() as here:
            found = scan(*leaves[:3], leaves[2] * 0, leaves[3], restart, None)
        forward.append(here.calls)
        with OperationCount() as here:
            (found[0].sum() + found[1].sum()).backward()
        backward.append(here.calls)
    # sqrt(N) blocks of as many: a product for each step and one for each block (masked: two)
    more = [each * 2 * (round(b**0.5) - round(a**0.5)) for a, b in pairwise(counts)]
    assert [b - a for a, b in pairwise(forward)] == more
    assert [b - a for a, b in pairwise(backward)] == more


def test_blocks_are_used_where_they_pay() -> None:
    def used(count: int, rows: int, size: int, device: str = "cpu") -> bool:
        return SCAN._worth_blocks(torch.empty(count, 3, rows, 16, size + 1, device=device))

    assert used(8, 8, 8)
    assert not used(7, 8, 8)
    assert not used(512, 8, 31)
    assert used(512, 8, 31, device="meta")
    assert not used(7, 8, 31, device="meta")


@restarts
def test_blocks_never_wait_for_the_device(restarts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, True)
    restart = random_restart(10) if restarts else None
    leaves = [x.requires_grad_() for x in scan_inputs(10)]
    with SyncSpy() as spy:
        found = scan(*leaves[:3], leaves[2], leaves[3], restart, None)
        (found[0].sum() + found[1].sum()).backward()
    assert spy.events == []


@pytest.mark.slow
def test_blocks_compile_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, True)
    restart = random_restart(5)

    def run(keys: Tensor, scaled: Tensor, z: Tensor, start: Tensor) -> Tensor:
        states, errors = scan(keys, scaled, z, torch.zeros_like(z), start, restart, None)
        return states.sum() + errors.square().sum()

    leaves = [x.requires_grad_() for x in scan_inputs(5)]
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(run(*leaves), leaves)
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert relative_error(x, y) < 1e-12
    torch._dynamo.reset()


def test_a_broken_document_does_not_reach_the_next() -> None:
    case = make_case(time=40, batch=1)
    ids = torch.tensor([0, 1]).repeat_interleave(20).unsqueeze(0)
    case = case.with_options(document_ids=ids)
    values = case.tensors["v"].clone()
    values[:, 5] = float("inf")
    expected, expected_state = case.run("torch")
    o, state = case.with_tensors(v=values).run("torch")
    assert not o[:, 8:20].isfinite().any()
    assert_same({"o": o[:, 20:]}, {"o": expected[:, 20:]}, 1e-12, "the next document:")
    assert_same({"dw": state.dw}, {"dw": expected_state.dw}, 1e-12, "the next document:")
