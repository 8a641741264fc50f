"""EMA equals the recursion written by hand, and resumes exactly from adapter-only checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toy_streams import ToyModule, fit, same, toy_batches

from callbacks import EMA, StreamStateCheckpoint

DECAY = 0.8


class AdapterOnly(ToyModule):
    """Layer 0 is the frozen base; checkpoints hold everything else, and one tied weight twice."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.layers[0].requires_grad_(False)
        self.tied = nn.Module()
        self.tied.weight = self.layers[1].weight
        self.strict_loading = False

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith("layers.0.")}


class Recorder(pl.Callback):
    """The weights after every optimizer step, for the recursion by hand."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def by_hand(weights: list[Tensor]) -> Tensor:
    average = weights[0].clone()
    for weight in weights[1:]:
        average = DECAY * average + (1 - DECAY) * weight
    return average


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_after_training_the_module_has_the_average_of_a_hand_written_recursion(
    tmp_path: Path,
) -> None:
    module, recorder = AdapterOnly(), Recorder()
    fit(module, toy_batches(6), tmp_path, [recorder, EMA(decay=DECAY)])
    for name, value in parameters(module).items():
        expected = by_hand([weights[name] for weights in recorder.weights])
        assert torch.allclose(value, expected, rtol=1e-6, atol=1e-7), name
        if name.startswith("layers.0."):
            assert torch.equal(value, recorder.weights[0][name])
        else:
            assert not torch.allclose(value, recorder.weights[-1][name], rtol=1e-4), name


def test_averages_of_bf16_weights_move_by_steps_below_the_bf16_resolution() -> None:
    from callbacks.ema import _Averages

    module = nn.Linear(1, 1, bias=False).bfloat16()
    averages = _Averages(module, decay=0.999)
    for value in (1.0, 1.0078125):  # neighbours in bfloat16
        module.weight.data.fill_(value)
        averages.update_parameters(module)
    assert averages.values["weight"].item() == pytest.approx(1 + 0.001 * 0.0078125, abs=1e-7)


def train(
    folder: Path, steps: int, resume: Path | None = None, callback: type = EMA
) -> tuple[ToyModule, list[dict[str, Tensor]]]:
    """Train up to `steps`, with a checkpoint after step 3; returns the weights after each step."""
    module, recorder = AdapterOnly(), Recorder()
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    fit(
        module,
        toy_batches(6)[3:] if resume else toy_batches(6),
        folder,
        [recorder, callback(decay=DECAY), StreamStateCheckpoint(), checkpoint],
        ckpt_path=str(resume) if resume else None,
        enable_checkpointing=True,
        max_steps=steps,
        max_epochs=None,
    )
    return module, recorder.weights


def test_resume_from_an_adapter_only_checkpoint_equals_never_having_stopped(
    tmp_path: Path,
) -> None:
    whole, weights = train(tmp_path / "whole", 6)
    train(tmp_path / "first", 3)
    resumed, weights_after = train(tmp_path / "rest", 6, tmp_path / "first" / "step=3.ckpt")
    for after, expected in zip(weights_after, weights[3:], strict=True):
        assert all(torch.equal(after[name], value) for name, value in expected.items())
    for name, value in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], value), name


def test_lightnings_own_average_fails_on_that_resume(tmp_path: Path) -> None:
    train(tmp_path / "first", 3, callback=EMAWeightAveraging)
    with pytest.raises(RuntimeError, match="Missing key"):
        train(tmp_path / "rest", 6, tmp_path / "first" / "step=3.ckpt", EMAWeightAveraging)


def test_checkpoint_holds_the_modules_keys_with_averaged_values(tmp_path: Path) -> None:
    module, weights = train(tmp_path, 3)
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(module.state_dict())
    for name in ("layers.1.weight", "tied.weight"):
        expected = by_hand([step["layers.1.weight"] for step in weights])
        assert torch.allclose(checkpoint["state_dict"][name], expected, rtol=1e-6)
    assert torch.equal(checkpoint["current_model_state"]["alpha"], weights[-1]["alpha"])


def test_checkpoint_written_after_training_still_has_the_trained_weights(tmp_path: Path) -> None:
    module, recorder = AdapterOnly(), Recorder()
    trainer = fit(module, toy_batches(3), tmp_path, [recorder, EMA(decay=DECAY)])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    current = checkpoint["current_model_state"]
    assert all(torch.equal(value, recorder.weights[-1][name]) for name, value in current.items())
    expected = by_hand([step["alpha"] for step in recorder.weights])
    assert torch.allclose(checkpoint["state_dict"]["alpha"], expected, rtol=1e-6)


class Watcher(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(pl_module.alpha.detach().clone())


class Validated(ToyModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for chunk in batch:
            self.streams.begin(chunk)

    def val_dataloader(self) -> Any:
        return DataLoader(toy_batches(1), batch_size=None, collate_fn=same)


def test_validation_sees_the_average_and_training_goes_on_with_the_weights(
    tmp_path: Path,
) -> None:
    runs = {}
    for name, callbacks in {"with": [EMA(decay=DECAY)], "without": []}.items():
        torch.manual_seed(0)
        module, recorder, watcher = Validated(), Recorder(), Watcher()
        fit(
            module, toy_batches(4), tmp_path / name, [recorder, watcher, *callbacks],
            val_check_interval=2, num_sanity_val_steps=1,
        )  # fmt: skip
        runs[name] = (recorder.weights, watcher.seen)
    for mine, plain in zip(runs["with"][0], runs["without"][0], strict=True):
        assert torch.equal(mine["alpha"], plain["alpha"])
    alphas = [weights["alpha"] for weights in runs["with"][0]]
    _, after_two, after_four = runs["with"][1]
    assert torch.allclose(after_two, by_hand(alphas[:2]), rtol=1e-6)
    assert torch.allclose(after_four, by_hand(alphas), rtol=1e-6)


def test_buffers_are_left_alone(tmp_path: Path) -> None:
    module = AdapterOnly()
    fit(module, toy_batches(4), tmp_path, [EMA(decay=DECAY)])
    assert module.seen.item() == 4


def test_swapped_nests_and_puts_the_weights_back(tmp_path: Path) -> None:
    class Swap(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            before = parameters(pl_module)
            with ema.swapped(), ema.swapped():
                self.inside = parameters(pl_module)
            self.unchanged = all(
                torch.equal(value, before[name]) for name, value in parameters(pl_module).items()
            )
            self.differs = not torch.equal(self.inside["alpha"], before["alpha"])

    ema, swap = EMA(decay=DECAY), Swap()
    fit(AdapterOnly(), toy_batches(3), tmp_path, [ema, swap])
    assert swap.unchanged
    assert swap.differs


def test_sharded_strategies_are_an_error_that_names_the_fix() -> None:
    class Sharded:
        strategy = ModelParallelStrategy()

    with pytest.raises(ValueError, match="strategy: ddp"):
        EMA().setup(Sharded(), ToyModule(), "fit")


def test_decay_of_one_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"decay=1\.0"):
        EMA(decay=1.0)
