"""A run that is interrupted anywhere and resumed is the run that never stopped, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from variant_cases import STEPS, assert_same, every_variant, train

from callbacks import EMA, StreamStateCheckpoint

pytestmark = pytest.mark.slow

VALIDATED = {
    "limit_val_batches": 2,
    "num_sanity_val_steps": 1,
    "val_check_interval": 2,
    "check_val_every_n_epoch": None,
}
"""Options of a trainer that validates every two steps."""

WAYS: dict[str, dict[str, Any]] = {
    "tbptt": {"data": {"tbptt": 2}},
    "accumulated": {"accumulate_grad_batches": 2, "steps": 5},
    "bf16": {"precision": "bf16-mixed"},
    "validated": VALIDATED,
    "averaged": {"callbacks": lambda: [EMA(decay=0.5)]},
    "limited": {"limit_train_batches": 2},
    "clipped": {"gradient_clip_val": 0.1},
}
"""What a run may do otherwise, as options of `train`."""


@every_variant
def test_stopped_twice_equals_never_stopped(name: str, tmp_path: Path) -> None:
    whole = train(name, tmp_path)
    for first in range(1, STEPS - 1):
        stops = (first, min(STEPS - 1, first + 3))
        assert_same(train(name, tmp_path, stops=stops), whole)


@every_variant
@pytest.mark.parametrize("way", WAYS)
def test_stopped_twice_equals_never_stopped_however_it_trains(
    way: str, name: str, tmp_path: Path
) -> None:
    whole = train(name, tmp_path, **WAYS[way])
    assert_same(train(name, tmp_path, stops=(3, 4), **WAYS[way]), whole)


@every_variant
def test_stopped_with_two_workers_equals_never_stopped_with_none(name: str, tmp_path: Path) -> None:
    whole = train(name, tmp_path)
    assert_same(train(name, tmp_path, stops=(4, 5), data={"num_workers": 2}), whole)


@every_variant
def test_power_without_the_streams_a_resumed_run_is_another(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "memory_bank":
        pytest.skip("its bank is learned: what a stream carries is only the router's block")
    whole = train(name, tmp_path)
    monkeypatch.setattr(
        StreamStateCheckpoint,
        "on_train_start",
        lambda self, trainer, module: module.streams.restart("train"),
    )
    with pytest.raises(AssertionError):
        assert_same(train(name, tmp_path, stops=(4,)), whole)


@every_variant
def test_validation_in_the_middle_changes_nothing(name: str, tmp_path: Path) -> None:
    assert_same(train(name, tmp_path, **VALIDATED), train(name, tmp_path))


@every_variant
def test_fast_weights_stay_in_float32_in_mixed_precision(name: str, tmp_path: Path) -> None:
    module, _ = train(name, tmp_path, precision="bf16-mixed", steps=3)
    slots = module.streams.state_dict()["slots"]
    floats = {
        value.dtype
        for slot, fields in slots.items()
        for value in fields.values()
        if value.is_floating_point() and not slot.endswith(".window")  # keys of an attention
    }
    assert floats == {torch.float32}
