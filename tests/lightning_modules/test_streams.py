"""Stream state against full backpropagation over the window, and against never having stopped."""

from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.streams import (
    FastState,
    StreamGapError,
    StreamPlan,
    StreamState,
    merge_rows,
    reset_rows,
    select_rows,
)

B, T, D = 3, 5, 4


class DeltaState(NamedTuple):
    dw: Tensor


class DeltaLayer(nn.Module):
    """y = x (W + S), then one gradient step on 1/2 ||x (W + S) - tanh(x V)||^2."""

    def __init__(self, slot: str) -> None:
        super().__init__()
        self.slot = slot
        self.weight = nn.Parameter(torch.randn(D, D, dtype=torch.float64) * 0.3)
        self.target = nn.Parameter(torch.randn(D, D, dtype=torch.float64) * 0.3)

    def step(self, x: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
        error = x @ (self.weight + dw) - torch.tanh(x @ self.target)
        dw = dw - 0.1 * x.transpose(1, 2) @ error
        return x + torch.tanh(x @ (self.weight + dw)), dw

    def forward(self, x: Tensor, fast_state: FastState) -> Tensor:
        state = fast_state.read(self.slot, DeltaState)
        dw = x.new_zeros(len(x), D, D) if state is None else state.dw
        out, dw = self.step(x, dw)
        fast_state.write(self.slot, DeltaState(dw))
        return out


class Stack(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeltaLayer(f"layers.{i}") for i in range(2))
        self.recompute = recompute

    def forward(self, x: Tensor, fast_state: FastState) -> Tensor:
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, fast_state=fast_state, use_reentrant=False)
            else:
                x = layer(x, fast_state=fast_state)
        return x


def make_chunk(
    index: int, stream: tuple[int, ...] = (7, 8, 9), first: tuple[bool, ...] | None = None
) -> dict:
    first = first or (index == 0,) * len(stream)
    plan = StreamPlan(stream, (index,) * len(stream), first)
    return {
        "x": torch.randn(
            len(stream), T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(index)
        ),
        "stream_id": torch.tensor(stream),
        "chunk_index": torch.tensor(plan.chunk_index),
        "is_first": torch.tensor(first),
        "plan": plan,
    }


def run_step(streams: StreamState, stack: Stack, chunks: list[dict]) -> list[Tensor]:
    streams.begin_step("train")
    return [stack(chunk["x"], streams.begin(chunk)) for chunk in chunks]


def gradients(stack: Stack) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in stack.parameters()]


def window_gradients(stack: Stack, warm_up: list[dict], window: list[dict]) -> list[Tensor]:
    """The oracle: carry the deltas by hand, detach before the window, backpropagate through it."""
    dws = [torch.zeros(B, D, D, dtype=torch.float64) for _ in stack.layers]
    total = torch.zeros((), dtype=torch.float64)
    for number, chunk in enumerate(warm_up + window):
        if number == len(warm_up):
            dws = [dw.detach() for dw in dws]
        x = chunk["x"]
        keep = 1.0 - chunk["is_first"].double()[:, None, None]
        for i, layer in enumerate(stack.layers):
            x, dws[i] = layer.step(x, dws[i] * keep)
        if number >= len(warm_up):
            total = total + (x**2).sum()
    stack.zero_grad()
    total.backward()
    return gradients(stack)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_gradients_over_k_chunks_equal_full_backpropagation(k: int, recompute: bool) -> None:
    torch.manual_seed(0)
    stack, streams = Stack(recompute), StreamState()
    warm_up = [make_chunk(0), make_chunk(1)]
    window = [make_chunk(2 + j) for j in range(k)]
    if k == 3:
        # Row 1 starts another file in the middle of the window.
        window[1] = make_chunk(3, (7, 5, 9), (False, True, False))
        window[2] = make_chunk(4, (7, 5, 9), (False, False, False))
    run_step(streams, stack, warm_up)
    streams.commit()
    outputs = run_step(streams, stack, window)
    stack.zero_grad()
    torch.stack([(out**2).sum() for out in outputs]).sum().backward()
    mine = gradients(stack)
    for actual, expected in zip(mine, window_gradients(stack, warm_up, window), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_checkpointing_changes_no_bit_of_the_gradients_over_three_chunks() -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        stack = Stack(recompute)
        outputs = run_step(StreamState(), stack, [make_chunk(j) for j in range(3)])
        torch.stack([(out**2).sum() for out in outputs]).sum().backward()
        results.append(gradients(stack))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class LooksUpCurrent(DeltaLayer):
    """The wrong design: state looked up on a shared object at the time of the call."""

    current: ClassVar[dict[str, Tensor]] = {}

    def forward(self, x: Tensor, fast_state: FastState) -> Tensor:
        out, self.current[self.slot] = self.step(
            x, self.current.get(self.slot, x.new_zeros(len(x), D, D))
        )
        return out


def test_power_a_current_state_object_fails_under_checkpointing() -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        stack = Stack(recompute)
        LooksUpCurrent.current = {}
        for layer in stack.layers:
            layer.__class__ = LooksUpCurrent
        outputs = run_step(StreamState(), stack, [make_chunk(j) for j in range(3)])
        torch.stack([(out**2).sum() for out in outputs]).sum().backward()
        results.append(gradients(stack))
    assert not all(torch.allclose(a, b) for a, b in zip(*results, strict=True))


def test_commit_cuts_the_graph_and_state_is_neither_parameter_nor_buffer() -> None:
    stack, streams = Stack(), StreamState()
    before = [parameter.clone() for parameter in stack.parameters()]
    run_step(streams, stack, [make_chunk(0)])
    streams.commit()
    for fields in streams.slots("train").values():
        assert not fields["dw"].requires_grad
        assert fields["dw"].abs().sum() > 0
    holder = nn.Module()
    holder.streams = streams
    assert not list(holder.state_dict()) and not list(holder.buffers())
    assert all(torch.equal(a, b) for a, b in zip(before, stack.parameters(), strict=True))


def test_a_reset_row_equals_a_fresh_stream_and_the_others_go_on() -> None:
    stack, streams = Stack(), StreamState()
    run_step(streams, stack, [make_chunk(0)])
    streams.commit()
    carried = run_step(streams, stack, [make_chunk(1)])[0]
    partial = make_chunk(1, (7, 3, 9), (False, True, False))
    mixed = run_step(streams, stack, [partial])[0]
    fresh = run_step(StreamState(), stack, [make_chunk(1, first=(True,) * 3)])[0]
    assert torch.equal(mixed[1], fresh[1])
    assert torch.equal(mixed[[0, 2]], carried[[0, 2]])
    assert not torch.allclose(carried[1], fresh[1]), "the state must matter for this test"


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    stack = Stack()
    together, alone = StreamState(), StreamState()
    for index in range(3):
        out = run_step(together, stack, [make_chunk(index)])[0]
        together.commit()
        chunk = make_chunk(index, (8,))
        chunk["x"] = make_chunk(index)["x"][1:2]
        torch.testing.assert_close(
            run_step(alone, stack, [chunk])[0][0], out[1], rtol=1e-14, atol=1e-14
        )
        alone.commit()


def test_the_same_file_twice_in_a_row_starts_afresh() -> None:
    stack, streams = Stack(), StreamState()
    first = run_step(streams, stack, [make_chunk(0)])[0]
    streams.commit()
    again = run_step(streams, stack, [make_chunk(0)])[0]
    assert torch.equal(first, again)


def test_adapt_false_reads_without_writing() -> None:
    stack, streams = Stack(), StreamState()
    run_step(streams, stack, [make_chunk(0)])
    streams.commit()
    before = streams.slots("train")["layers.0"]["dw"].clone()
    streams.begin_step("train")
    handle = streams.begin(make_chunk(1), adapt=False)
    assert torch.equal(handle.read("layers.0", DeltaState).dw, before)
    stack(make_chunk(1)["x"], handle)
    streams.commit()
    assert torch.equal(streams.slots("train")["layers.0"]["dw"], before)


def test_namespaces_never_touch_each_other() -> None:
    stack, streams = Stack(), StreamState()
    run_step(streams, stack, [make_chunk(0)])
    streams.commit()
    before = streams.slots("train")["layers.0"]["dw"].clone()
    streams.begin_step("validate")
    stack(make_chunk(0, (1, 2))["x"], streams.begin(make_chunk(0, (1, 2))))
    streams.commit()
    assert torch.equal(streams.slots("train")["layers.0"]["dw"], before)
    streams.clear("validate")
    assert streams.slots("validate") == {}
    run_step(streams, stack, [make_chunk(1)])


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (make_chunk(2), "row 0 brings chunk 2 of stream 7 where chunk 1 of stream 7"),
        (make_chunk(0, first=(False,) * 3), "chunk 0 of stream 7"),
        (make_chunk(1, (7, 4, 9)), "row 1 brings chunk 1 of stream 4"),
        (make_chunk(1, (7, 8)), "now has 2 rows instead of 3"),
    ],
)
def test_a_gap_in_a_stream_is_an_error(chunk: dict, message: str) -> None:
    stack, streams = Stack(), StreamState()
    run_step(streams, stack, [make_chunk(0)])
    streams.commit()
    streams.begin_step("train")
    with pytest.raises(StreamGapError, match=message):
        streams.begin(chunk)


def test_a_chunk_that_does_not_say_what_it_reads_is_an_error() -> None:
    chunk = {
        name: value for name, value in make_chunk(0).items() if name not in ("plan", "is_first")
    }
    with pytest.raises(ValueError, match="the chunk has no is_first: beside your tensors"):
        StreamPlan.of(chunk)
    with pytest.raises(TypeError, match=r"not a str: a batch is a list of chunks"):
        StreamPlan.of(next(iter(chunk)))


def test_a_stream_that_begins_in_the_middle_without_state_is_an_error() -> None:
    streams = StreamState()
    streams.begin_step("train")
    with pytest.raises(StreamGapError, match="no state is known"):
        streams.begin(make_chunk(4))


def test_a_gap_inside_a_step_is_an_error_and_without_a_plan_the_tensors_are_read() -> None:
    streams = StreamState()
    streams.begin_step("train")
    streams.begin(make_chunk(0))
    late = make_chunk(2)
    del late["plan"]
    with pytest.raises(StreamGapError, match="chunk 2"):
        streams.begin(late)


def test_a_declared_restart_is_fresh_wherever_the_file_stands() -> None:
    stack, streams = Stack(), StreamState()
    run_step(streams, stack, [make_chunk(0)])
    streams.commit()
    streams.restart("train")
    out = run_step(streams, stack, [make_chunk(5)])[0]
    fresh = run_step(StreamState(), stack, [make_chunk(5, first=(True,) * 3)])[0]
    assert torch.equal(out, fresh)
    streams.commit()
    run_step(streams, stack, [make_chunk(6)])
    streams.commit()
    streams.begin_step("train")
    with pytest.raises(StreamGapError):
        streams.begin(make_chunk(8))


def test_an_uncommitted_step_leaves_no_trace() -> None:
    stack, streams = Stack(), StreamState()
    run_step(streams, stack, [make_chunk(0)])
    streams.commit()
    once = run_step(streams, stack, [make_chunk(1)])[0]
    twice = run_step(streams, stack, [make_chunk(1)])[0]
    assert torch.equal(once, twice)


def test_other_rows_inside_a_step_begin_afresh() -> None:
    stack, streams = Stack(), StreamState()
    run_step(streams, stack, [make_chunk(0)])
    out = stack(make_chunk(0, (4, 5))["x"], streams.begin(make_chunk(0, (4, 5))))
    assert torch.equal(out, run_step(StreamState(), stack, [make_chunk(0, (4, 5))])[0])


def test_begin_without_an_open_step_names_the_callback() -> None:
    with pytest.raises(RuntimeError, match="FileBoundaryReset"):
        StreamState().begin(make_chunk(0))


def test_streams_that_do_not_persist_start_every_chunk_afresh() -> None:
    stack, streams = Stack(), StreamState(persistent=False)
    run_step(streams, stack, [make_chunk(0)])
    streams.commit()
    out = run_step(streams, stack, [make_chunk(1)])[0]
    fresh = run_step(StreamState(), stack, [make_chunk(1, first=(True,) * 3)])[0]
    assert torch.equal(out, fresh)
    assert streams.slots("train") == {}


def test_saved_and_restored_state_continues_bit_for_bit() -> None:
    stack, streams = Stack(), StreamState()
    run_step(streams, stack, [make_chunk(0), make_chunk(1)])
    streams.commit()
    restored = StreamState()
    restored.load_state_dict(streams.state_dict())
    assert torch.equal(
        run_step(streams, stack, [make_chunk(2)])[0], run_step(restored, stack, [make_chunk(2)])[0]
    )
    assert restored.counts("train") == (3, 3)


def test_published_statistics_are_detached_and_kept_per_chunk() -> None:
    streams = StreamState()
    streams.listening.add("gate")
    streams.begin_step("train")
    for index in range(2):
        handle = streams.begin(make_chunk(index))
        assert handle.listens("gate") and not handle.listens("fast_weight")
        handle.publish("gate", "layers.0", gate=torch.ones(2, requires_grad=True) * index)
    values = [chunk["gate"]["layers.0"]["gate"] for chunk in streams.published]
    assert [value.tolist() for value in values] == [[0.0, 0.0], [1.0, 1.0]]
    assert not any(value.requires_grad for value in values)


def test_rows_are_selected_merged_and_reset_by_number() -> None:
    slots = {"a": {"dw": torch.arange(6.0).view(3, 2)}}
    rows = torch.tensor([2, 0])
    picked = select_rows(slots, rows)
    assert picked["a"]["dw"].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    merged = merge_rows(slots, rows, {"a": {"dw": -picked["a"]["dw"]}})
    assert merged["a"]["dw"].tolist() == [[-0.0, -1.0], [2.0, 3.0], [-4.0, -5.0]]
    assert reset_rows(slots, torch.tensor([False, True, False]))["a"]["dw"][1].tolist() == [0, 0]
    assert slots["a"]["dw"].tolist() == torch.arange(6.0).view(3, 2).tolist()


def test_slots_that_appear_later_are_fresh_in_the_rows_that_were_not_there() -> None:
    slots = {"a": {"dw": torch.ones(3, 2)}}
    update = {"a": {"dw": torch.zeros(1, 2)}, "b": {"dw": torch.full((1, 4), 7.0)}}
    merged = merge_rows(slots, torch.tensor([1]), update)
    assert merged["a"]["dw"].tolist() == [[1, 1], [0, 0], [1, 1]]
    assert merged["b"]["dw"].tolist() == [[0] * 4, [7] * 4, [0] * 4]
    first = merge_rows({}, torch.tensor([1]), {"b": update["b"]}, size=3)
    assert first["b"]["dw"].tolist() == merged["b"]["dw"].tolist()
    assert merge_rows(merged, torch.tensor([0]), {"a": {"dw": torch.zeros(1, 2)}})["b"].keys()
