"""What `ops.ttt_lora` costs: waits for the device, launches, memory, compiled graphs."""

import pytest
import torch
from spy import OperationCount, SyncSpy
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from ttt_cases import random_flags
from ttt_lora_cases import FORMS, LoRACase, carried_state, case_of

every_form = pytest.mark.parametrize("form", FORMS)


def leaves_of(case: LoRACase) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_() for name, x in case.tensors.items()}


def operations(case: LoRACase, backward: bool) -> int:
    leaves = leaves_of(case)
    with OperationCount() as forward_pass:
        o, _ = case.with_tensors(**leaves).run("torch")
    with OperationCount() as backward_pass:
        o.sum().backward()
    return backward_pass.calls if backward else forward_pass.calls


@every_form
@pytest.mark.parametrize("features", [(), ("mask",), ("state",), ("mask", "state")])
def test_call_without_documents_never_waits(features: tuple[str, ...], form: str) -> None:
    case = case_of(form, 13, group=2)
    case = random_flags(case, 1, "mask") if "mask" in features else case
    case = carried_state(case, 2) if "state" in features else case
    with SyncSpy() as spy:
        case.with_tensors(**leaves_of(case)).run("torch")[0].sum().backward()
    assert spy.events == []


@every_form
def test_documents_wait_once(form: str) -> None:
    case = carried_state(random_flags(case_of(form, 13), 1, "mask", "document_ids"), 2)
    with SyncSpy() as spy:
        case.run("torch")
    assert [name for _, name in spy.events if name == "tolist"] == ["tolist"]


@every_form
def test_shapes_need_no_data(form: str) -> None:
    case = carried_state(random_flags(case_of(form, 13, group=2), 1, "mask"), 2)
    tensors = {name: x.to("meta").requires_grad_() for name, x in case.tensors.items()}
    meta = case.with_tensors(**tensors).with_options(mask=case.options["mask"].to("meta"))
    meta = meta.with_state(type(case.state)(*(x.to("meta") for x in case.state)))
    o, state = meta.run("torch")
    o.sum().backward()
    assert o.shape == (2, 13, 2, 4)
    assert [x.shape for x in state] == [x.shape for x in case.state]
    assert all(x.grad is not None and x.grad.shape == x.shape for x in tensors.values())


@pytest.mark.parametrize("mode", ["A", "B"])
@pytest.mark.parametrize(
    "times, forward, backward",
    [
        # 2 and 7 mini-batches, in turn: two operations each, and three backward
        ((8, 28), 5 * 2, 5 * 3),
        # 16 and 64, in blocks: 4 steps of 4 blocks, and 8 of 8
        ((64, 256), 2 * 8 - 2 * 4, 2 * 8 - 2 * 4),
    ],
    ids=["few", "many"],
)
def test_more_plain_mini_batches_cost_two_or_three_operations_each_or_their_root(
    times: tuple[int, int], forward: int, backward: int, mode: str
) -> None:
    def more(backward: bool) -> int:
        short, long = (case_of(f"{mode}_plain", time, group=2) for time in times)
        return operations(long, backward) - operations(short, backward)

    assert more(False) == forward
    assert more(True) == backward


@every_form
def test_group_costs_no_more_operations_than_one_adapter(form: str) -> None:
    def count(group: int) -> tuple[int, int]:
        case = case_of(form, 16, group=group)
        return operations(case, False), operations(case, True)

    assert count(7) == count(2)


@every_form
def test_scan_keeps_one_change_for_each_mini_batch(form: str) -> None:
    time, size, m = 256, 16, 8
    case = case_of(form, time, size=size, mini_batch_size=m, batch=1, dtype=torch.float32)
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = leaves_of(case)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        kept = case.with_tensors(**leaves).run("torch")
    changes = 4 * (time // m + 1) * (size + 1) * size
    tokens = 4 * time * (size + 1)
    assert kept[0].shape == (1, time, size)
    # keys, scaled keys, queries, errors, targets, ...: at most nine tensors of tokens
    assert sum(storages.values()) <= changes + 11 * tokens


@every_form
@pytest.mark.parametrize("group", [None, 1, 2])
@pytest.mark.parametrize("features", [(), ("mask",), ("state",)])
def test_state_keeps_nothing_else_alive(
    features: tuple[str, ...], group: int | None, form: str
) -> None:
    case = case_of(form, 66, group=group, batch=1)
    case = random_flags(case, 1, "mask") if "mask" in features else case
    case = carried_state(case, 2) if "state" in features else case
    for name, x in case.run("torch")[1]._asdict().items():
        # dw and db are parts of one tensor
        assert x.untyped_storage().nbytes() <= 5 * x.nbytes, name


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("features", [(), ("mask", "state")])
def test_compiles_to_one_graph(features: tuple[str, ...], form: str) -> None:
    case = case_of(form, 9, group=2)
    if features:
        case = carried_state(random_flags(case, 1, "mask"), 2)
    torch._dynamo.reset()
    counter, names = CompileCounter(), list(case.tensors)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        call = case.with_tensors(**dict(zip(names, values, strict=True)))
        o, state = call.run("torch")
        return o, state.dw

    results = []
    for function in (run, torch.compile(run, backend=counter, fullgraph=True)):
        leaves = list(leaves_of(case).values())
        found = function(*leaves)
        sum(x.sum() for x in found).backward()
        results.append([*found, *(x.grad for x in leaves)])
    assert counter.frame_count == 1
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    torch._dynamo.reset()
