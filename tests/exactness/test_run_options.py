"""What a Lightning user turns on and off around a run changes nothing but what it is for."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from variant_cases import VARIANTS, assert_same, every_variant, make_trainer, train

from callbacks import FileBoundaryReset
from lightning_modules.base import AdapterModule

pytestmark = pytest.mark.slow


def trained(name: str, folder: Path) -> tuple[AdapterModule, pl.Trainer]:
    """After three steps, with its trainer."""
    torch.manual_seed(0)
    module, trainer = VARIANTS[name].module(), make_trainer(folder, 3, limit_val_batches=2)
    trainer.fit(module, VARIANTS[name].data(folder))
    return module, trainer


def frozen(module: AdapterModule) -> dict[str, Any]:
    return copy.deepcopy({"weights": module.state_dict(), "streams": module.streams.state_dict()})


def assert_frozen(module: AdapterModule, before: dict[str, Any]) -> None:
    after = frozen(module)
    assert all(torch.equal(v, after["weights"][n]) for n, v in before["weights"].items())
    slots = after["streams"].pop("slots"), before["streams"].pop("slots")
    assert after["streams"] == before["streams"]
    for slot, fields in slots[1].items():
        assert all(torch.equal(v, slots[0][slot][n]) for n, v in fields.items())


@every_variant
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluating_touches_neither_weights_nor_training_streams(
    stage: str, name: str, tmp_path: Path
) -> None:
    module, _ = trained(name, tmp_path)
    before = frozen(module)
    trainer = make_trainer(
        tmp_path, 3, limit_val_batches=2, limit_test_batches=2, limit_predict_batches=2
    )
    first = getattr(trainer, stage)(module, VARIANTS[name].data(tmp_path))
    assert_frozen(module, before)
    again = getattr(trainer, stage)(module, VARIANTS[name].data(tmp_path))
    assert repr(first) == repr(again)  # numbers and tensors: the second time begins anew


@every_variant
def test_one_batch_can_be_overfitted(name: str, tmp_path: Path) -> None:
    _, losses = train(name, tmp_path, steps=12, overfit_batches=1)
    assert losses[max(losses)] < losses[min(losses)]


@every_variant
def test_accumulating_reads_the_same_streams(name: str, tmp_path: Path) -> None:
    """Two batches in a step: the streams advance with each of them, as without accumulation."""
    every, _ = train(name, tmp_path, steps=4)
    half, _ = train(name, tmp_path, steps=2, accumulate_grad_batches=2)
    one, other = every.streams.state_dict(), half.streams.state_dict()
    one.pop("slots"), other.pop("slots")
    assert one == other


@every_variant
def test_compiled_in_place_trains_as_plain(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compiled(self, **{**options, "backend": "eager"}),
    )
    torch._dynamo.reset()
    # Fresh, carried, and carried in other places; TTT-LoRA compiles ten seconds for each.
    whole = train(name, tmp_path, steps=3)
    assert_same(train(name, tmp_path, steps=3, module={"compile_model": True}), whole)
    torch._dynamo.reset()


class Batches(pl.Callback):
    """What every training step reads, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], list[int]]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *args: Any) -> None:
        plan = batch[0]["plan"]
        self.seen.append((list(plan.stream_id), list(plan.chunk_index)))


@every_variant
def test_finding_a_learning_rate_first_changes_nothing_afterwards(
    name: str, tmp_path: Path
) -> None:
    found, read = [], {False: Batches(), True: Batches()}

    def search() -> list[pl.Callback]:
        found.append(
            pl.callbacks.LearningRateFinder(1e-5, 1e-1, num_training_steps=6, update_attr=False)
        )
        return [found[0], read[True]]

    options = {"steps": 4, "limit_val_batches": 2}
    whole = train(name, tmp_path, callbacks=lambda: [read[False]], **options)
    assert_same(train(name, tmp_path, callbacks=search, **options), whole)
    assert read[True].seen == read[False].seen
    results = found[0].optimal_lr.results
    assert len(results["loss"]) == 6 and all(map(math.isfinite, results["loss"]))


def test_power_without_its_callback_a_run_says_what_is_missing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, FileBoundaryReset)]
    with pytest.raises(RuntimeError, match="add callbacks.FileBoundaryReset"):
        trainer.fit(VARIANTS["lact"].module(), VARIANTS["lact"].data(tmp_path))
