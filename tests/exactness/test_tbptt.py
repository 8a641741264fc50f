"""A step over k chunks against numerical derivatives, and what it may keep in memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from variant_cases import every_variant
from window_cases import (
    SavedBytes,
    make_window_case,
    recompute_layers,
    step,
    use_float64,
    window_loss,
)

from lightning_modules import streams
from lightning_modules.base import AdapterModule, Chunk

pytestmark = pytest.mark.slow

WARM_UP = 2
"""Chunks that are read and committed before the window."""

EPSILON = 1e-6
"""Half of a numerical derivative's step; rounding leaves about 1e-9 of a loss of 5."""

CLOSE = {"rtol": 1e-6, "atol": 1e-8}


@pytest.fixture(autouse=True)
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    use_float64(monkeypatch)


def warmed_up(
    name: str, folder: Path, k: int, warm_up: int = WARM_UP
) -> tuple[AdapterModule, list[Chunk]]:
    """A variant that has read and committed some chunks, and its next k."""
    module, chunks = make_window_case(name, folder, warm_up + k)
    for chunk in chunks[:warm_up]:
        step(module, [chunk])
    return module, chunks[warm_up:]


def along(module: AdapterModule, gradients: dict[str, Tensor], direction: list[Tensor]) -> Tensor:
    """Derivative of the loss in a direction of all parameters."""
    pairs = zip(module.named_parameters(), direction, strict=True)
    return sum((gradients[n] * d).sum() for (n, _), d in pairs if n in gradients)


@torch.no_grad()
def numerical(module: AdapterModule, loss: Callable[[], Tensor], direction: list[Tensor]) -> Tensor:
    """The same by differences of losses; the start of the window stays as it is."""
    losses = []
    for scale in (EPSILON, -2 * EPSILON):
        for parameter, way in zip(module.parameters(), direction, strict=True):
            parameter.add_(way, alpha=scale)
        losses.append(loss())
    for parameter, way in zip(module.parameters(), direction, strict=True):
        parameter.add_(way, alpha=EPSILON)
    return (losses[0] - losses[1]) / (2 * EPSILON)


def directions(module: AdapterModule, count: int = 2) -> list[list[Tensor]]:
    """Random ones of all parameters, of length 1."""
    generator = torch.Generator().manual_seed(5)
    sizes = [p.numel() for p in module.parameters()]
    ways = F.normalize(torch.randn(count, sum(sizes), generator=generator, dtype=torch.float64))
    return [
        [part.view_as(p) for part, p in zip(way.split(sizes), module.parameters(), strict=True)]
        for way in ways
    ]


@every_variant
@pytest.mark.parametrize("k", [1, 2, 3])
def test_gradients_of_a_step_are_numerical_derivatives_of_its_window(
    k: int, name: str, tmp_path: Path
) -> None:
    """LaCT begins a file: what it carries is values, through which the learned initial weights get
    their gradient as if they had been added (straight through), which is no derivative of them."""
    module, window = warmed_up(name, tmp_path, k, 0 if name == "lact" else WARM_UP)
    start = copy.deepcopy(module.streams.state_dict())
    gradients = step(module, window)

    def loss() -> Tensor:
        module.streams.load_state_dict(start)
        with torch.enable_grad():  # without, routers leave their losses out
            return window_loss(module, window).detach()

    for direction in directions(module):
        expected = numerical(module, loss, direction)
        torch.testing.assert_close(along(module, gradients, direction), expected, **CLOSE)


@every_variant
def test_power_steps_of_one_chunk_are_not_the_derivative_of_two(name: str, tmp_path: Path) -> None:
    """What every chunk teaches by itself lacks what the second says of the first one's writing."""
    module, window = warmed_up(name, tmp_path, 2)
    start = copy.deepcopy(module.streams.state_dict())
    together = step(module, window)
    module.streams.load_state_dict(start)
    module.zero_grad()
    torch.manual_seed(0)
    for chunk in window:
        module.streams.begin_step("train")
        module.training_step([chunk], 0).backward()
        module.streams.commit()
    alone = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    different = [n for n in together if not torch.allclose(together[n], alone[n], rtol=1e-6)]
    assert different
    direction = directions(module, 1)[0]
    expected = along(module, together, direction)
    assert not torch.isclose(along(module, alone, direction), expected, rtol=1e-4)


@every_variant
@pytest.mark.parametrize("k", [2, 3])
def test_recomputed_layers_change_no_bit_of_the_gradients(
    k: int, name: str, tmp_path: Path
) -> None:
    found, calls = [], []
    for recompute in (False, True):
        module, window = warmed_up(name, tmp_path, k)
        if recompute:
            recompute_layers(module)
        layers = getattr(module.model, "model", module.model).layers
        layers[0].mlp.register_forward_pre_hook(lambda *_, key=recompute: calls.append(key))
        found.append(step(module, window))
    assert [calls.count(key) for key in (False, True)] == [k, 2 * k], "layers are not recomputed"
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][n]) for n, value in found[0].items())


def tensors() -> list[Tensor]:
    """All that are alive in the process."""
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), Tensor)]


def graphs() -> list[Tensor]:
    """Tensors anywhere in the process that hold on to a graph; whoever keeps them, frees none."""
    return [tensor for tensor in tensors() if tensor.grad_fn is not None]


@every_variant
def test_a_committed_step_leaves_no_graph_behind(name: str, tmp_path: Path) -> None:
    module, window = warmed_up(name, tmp_path, 2)
    before = graphs()
    loss = window_loss(module, window)
    loss.backward()
    del loss
    assert len(graphs()) > len(before), "an open step holds its state"
    module.streams.commit()
    assert len(graphs()) == len(before)
    slots = module.streams.slots("train")
    values = [value for fields in slots.values() for value in fields.values()]
    assert values and not any(value.requires_grad or value.grad_fn for value in values)


def endless(chunk: Chunk, index: int) -> Chunk:
    """A whole chunk of files that never end, with the tokens of another."""
    rows = len(chunk["stream_id"])
    whole = {"mask": torch.ones_like(chunk["mask"])} if "mask" in chunk else {}
    fields = {
        key: value for key, value in chunk.items() if key not in ("plan", "padded", "token_counts")
    }
    return {
        **fields,
        **whole,
        "stream_id": torch.arange(rows),
        "chunk_index": torch.full((rows,), index),
        "is_first": torch.full((rows,), index == 0),
    }


def keep_reading(name: str, folder: Path, k: int, steps: int) -> tuple[list[int], list[int]]:
    """Bytes that autograd keeps in every step, and how many tensors live after a third and all."""
    module, (chunk,) = make_window_case(name, folder, 1)
    kept, alive = [], []
    for number in range(steps):
        with SavedBytes(module) as saved:
            loss = window_loss(module, [endless(chunk, number * k + j) for j in range(k)])
        loss.backward()
        del loss
        module.streams.commit()
        kept.append(saved.total)
        if number in (steps // 3, steps - 1):
            alive.append(len(tensors()))
    return kept, alive


@every_variant
def test_memory_grows_with_k_and_not_with_steps(name: str, tmp_path: Path) -> None:
    """Mini-batches of 5 and 7 tokens stand elsewhere in every chunk, and again after 5 and 7."""
    one, alive = keep_reading(name, tmp_path, 1, 21)
    assert alive[1] <= alive[0]  # what other tests have left in the process may go
    assert max(one[11:]) <= max(one[1:11])
    two, four = (max(keep_reading(name, tmp_path, k, 8)[0]) for k in (2, 4))
    assert 1.6 < two / max(one) < 2.4
    assert 1.6 < four / two < 2.4


def test_power_a_state_that_is_not_cut_keeps_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a commit that leaves the graph."""
    module, window = warmed_up("ttt_lora", tmp_path, 2)
    monkeypatch.setattr(streams, "map_fields", lambda slots, function: dict(slots))
    before = graphs()
    loss = window_loss(module, window)
    module.streams.commit()
    del loss
    assert len(graphs()) > len(before)
