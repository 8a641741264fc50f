"""A run that is interrupted and resumed against a run that never stopped, bit for bit."""

import multiprocessing
import warnings
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from toy import ToyData, ToyModule

from callbacks import FileBoundaryReset, StreamStateCheckpoint


class Trace(pl.Callback):
    """Loss of every training batch and of every validation run, by global step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses[trainer.global_step] = outputs["loss"].item()


class Crashed(Exception):
    pass


class SaveAndCrash(pl.callbacks.Checkpoint):
    """Save a checkpoint after a step, as ModelCheckpoint does, and lose the process."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Crashed


def make_trainer(
    tmp_path: Path, max_steps: int, callbacks: list[pl.Callback], **options
) -> pl.Trainer:
    defaults = {
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(
        default_root_dir=tmp_path,
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FileBoundaryReset(), StreamStateCheckpoint(), *callbacks],
        **{**defaults, **options},
    )


def train(tmp_path: Path, stops: list[int], *, workers: int = 0, tbptt: int = 1, **options):
    """Train to the last of `stops`, crashing and resuming at each of the others."""
    trace, checkpoint, module = Trace(), None, None
    for number, stop in enumerate(stops):
        torch.manual_seed(0 if number == 0 else 1000 + number)
        module = ToyModule()
        data = ToyData(batch_size=3, tbptt=tbptt, num_workers=workers, seed=2)
        last = stop == stops[-1]
        path = tmp_path / f"{number}.ckpt"
        crash = [] if last else [SaveAndCrash(stop, path)]
        trainer = make_trainer(tmp_path, stops[-1], [trace, *crash], **options)
        with nullcontext() if last else pytest.raises(Crashed):
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        assert trainer.global_step == stop
        checkpoint = path
    return module, trace.losses


def assert_same(first, second) -> None:
    (module_a, losses_a), (module_b, losses_b) = first, second
    assert losses_a == losses_b
    for (name, a), b in zip(
        module_a.state_dict().items(), module_b.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    state_a, state_b = module_a.streams.state_dict(), module_b.streams.state_dict()
    assert torch.equal(state_a["slots"]["toy"]["dw"], state_b["slots"]["toy"]["dw"])
    assert {k: v for k, v in state_a.items() if k != "slots"} == {
        k: v for k, v in state_b.items() if k != "slots"
    }


STEPS = 17  # an epoch has 8 batches (tbptt 1): two epoch boundaries


@pytest.mark.quick("2")
@pytest.mark.parametrize("tbptt", [1, 2])
def test_stopped_twice_at_any_step_equals_never_stopped(tmp_path: Path, tbptt: int) -> None:
    whole = train(tmp_path, [STEPS], tbptt=tbptt)
    for first in range(1, STEPS - 1):
        second = min(STEPS - 1, first + 3)
        assert_same(train(tmp_path, [first, second, STEPS], tbptt=tbptt), whole)


@pytest.mark.slow
def test_stopped_with_two_workers_equals_never_stopped_with_none(tmp_path: Path) -> None:
    whole = train(tmp_path, [STEPS])
    assert_same(train(tmp_path, [5, 8, STEPS], workers=2), whole)


def test_workers_live_through_the_run_and_end_with_it(tmp_path: Path) -> None:
    class Workers(pl.Callback):
        """Processes that are alive at the end of every validation run."""

        def __init__(self) -> None:
            self.seen: set[int] = set()

        def on_validation_end(self, trainer, pl_module) -> None:
            self.seen |= {child.pid for child in multiprocessing.active_children()}

    workers = Workers()
    options = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = make_trainer(tmp_path, 8, [workers], **options)
    trainer.fit(ToyModule(), ToyData(batch_size=3, num_workers=1))
    assert len(workers.seen) == 2, "one for training, one for validation"
    assert not workers.seen & {child.pid for child in multiprocessing.active_children()}


def test_power_without_the_stream_state_resuming_differs(tmp_path: Path, monkeypatch) -> None:
    whole = train(tmp_path, [STEPS])
    monkeypatch.setattr(
        StreamStateCheckpoint,
        "on_train_start",
        lambda self, trainer, module: module.streams.restart("train"),
    )
    with pytest.raises(AssertionError):
        assert_same(train(tmp_path, [5, STEPS]), whole)


def test_checkpoints_by_model_checkpoint_inside_an_epoch_resume_exactly(tmp_path: Path) -> None:
    whole = train(tmp_path, [STEPS])
    saver = pl.callbacks.ModelCheckpoint(
        tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    torch.manual_seed(0)
    data = {"batch_size": 3, "seed": 2}
    trainer = make_trainer(tmp_path, STEPS, [Trace(), saver])
    trainer.fit(ToyModule(), ToyData(**data))
    for step in (3, 8, 9, 16):
        trace = Trace()
        torch.manual_seed(99)
        module = ToyModule()
        resumed = make_trainer(tmp_path, STEPS, [trace])
        resumed.fit(module, ToyData(**data), ckpt_path=tmp_path / "saved" / f"step={step}.ckpt")
        expected = {number: loss for number, loss in whole[1].items() if number > step}
        assert_same((module, trace.losses), (whole[0], expected))


@pytest.mark.parametrize("interval", [1, 3])
def test_validation_in_the_middle_leaves_training_bit_identical(
    tmp_path: Path, interval: int
) -> None:
    whole = train(tmp_path, [STEPS])
    validated = train(
        tmp_path,
        [STEPS],
        limit_val_batches=2,
        num_sanity_val_steps=2,
        val_check_interval=interval,
        check_val_every_n_epoch=None,
    )
    assert_same(validated, whole)


def test_validation_and_resuming_together(tmp_path: Path) -> None:
    whole = train(tmp_path, [STEPS])
    options = {
        "limit_val_batches": 2,
        "num_sanity_val_steps": 2,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    }
    assert_same(train(tmp_path, [5, 11, STEPS], **options), whole)


def test_validation_loss_is_the_same_in_every_run(tmp_path: Path) -> None:
    data, module = ToyData(batch_size=3), ToyModule()
    trainer = make_trainer(tmp_path, 1, [], limit_val_batches=1.0)
    first = trainer.validate(module, data, verbose=False)
    torch.manual_seed(123)
    assert first == trainer.validate(module, data, verbose=False)


def test_another_world_size_starts_streams_afresh_and_warns(tmp_path: Path) -> None:
    train(tmp_path, [3, 4])
    checkpoint = torch.load(tmp_path / "0.ckpt", weights_only=True)
    checkpoint["streams"] = checkpoint["streams"] * 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    trainer = make_trainer(tmp_path, 5, [])
    with pytest.warns(UserWarning, match="streams of 2 processes and this run has 1"):
        trainer.fit(ToyModule(), ToyData(batch_size=3, seed=2), ckpt_path=tmp_path / "two.ckpt")
    assert trainer.global_step == 5


def test_gradient_accumulation_carries_state_across_its_batches(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, _ = train(tmp_path, [6], accumulate_grad_batches=2)
    assert sum(module.streams.counts("train")) == 33  # 12 batches, 3 rows, idle
