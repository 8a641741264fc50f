"""Two processes of Lightning's DDP, each with its streams, are one process that reads them all."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from process_cases import (
    CLIP,
    TRAINER,
    BothRanks,
    accumulated,
    adapted,
    assert_equal_to_one,
    assert_resumed,
    join_processes,
    make_double,
    one_process,
    prepared,
    run,
    saved,
    stop,
)
from two_processes import in_two_processes
from variant_cases import VARIANTS, every_variant

import lightning_modules.base as base
from callbacks import EMA, StreamStateCheckpoint

pytestmark = pytest.mark.slow

DATA = {"tbptt": 2}
"""The last of five steps ends an epoch: rank 1 has run out of files, rank 0 has not."""

AFRESH = "every stream starts afresh"


class Wrapped(pl.Callback):
    """Remembers the options of DDP."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.broadcasts = trainer.strategy.model.will_sync_module_buffers()


def in_process(rank: int, folder: Path) -> None:
    options = {**TRAINER, **join_processes(rank)}

    def keep(name: str, result: dict[str, Any]) -> None:
        torch.save(result, folder / f"{name}_{rank}.pt")

    for name, variant in VARIANTS.items():
        data, path = variant.data, folder / f"{name}.ckpt"
        keep(name, run(make_double(name), data(folder / name, **DATA), folder, **options))
        stop(make_double(name), data(folder / name, **DATA), folder, path, **options)
        again = run(
            make_double(name), data(folder / name, **DATA), folder, ckpt_path=path, **options
        )
        keep(f"{name}_again", again)
    keep("ema", averaged(folder, folder / "ema.ckpt", options))
    for name, change in WRONG.items():
        keep(name, change(folder, options))
    keep("from_one", from_one(folder, options))
    keep("accumulated", accumulated(folder, **options))


def averaged(folder: Path, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """EMA of adapters alone: a run, and the run that was stopped and resumed."""
    data, wrapped = VARIANTS["ttt_lora"].data, Wrapped()
    model = str(folder / "qwen3")

    def make(callback: pl.Callback, **kw: Any) -> dict[str, Any]:
        return run(
            adapted(model),
            data(folder / "ttt_lora", **DATA),
            folder,
            EMA(decay=0.5),
            callback,
            **kw,
        )

    whole = make(wrapped, **options)
    stop(adapted(model), data(folder / "ttt_lora", **DATA), folder, path, EMA(decay=0.5), **options)
    again = make(Wrapped(), ckpt_path=path, **options)
    return {"whole": whole, "again": again, "broadcasts": wrapped.broadcasts}


def mean_of_means(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Every process takes the mean over its own labels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            base, "over_processes", lambda losses, targets: (losses, losses.detach().mean())
        )
        return run(
            make_double("lact"), VARIANTS["lact"].data(folder / "lact", **DATA), folder, **options
        )


def states_of_rank_0(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Both processes resume with what the first one has learned."""
    start = StreamStateCheckpoint.on_train_start

    def wrong(self: Any, trainer: Any, module: Any) -> None:
        for part in self._restored:
            for name in ("slots", "tokens_read"):  # slots alone: LaCT sees that rows have read less
                part["streams"][name] = self._restored[0]["streams"][name]
        start(self, trainer, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamStateCheckpoint, "on_train_start", wrong)
        module, data = make_double("lact"), VARIANTS["lact"].data(folder / "lact", **DATA)
        return run(module, data, folder, ckpt_path=folder / "lact.ckpt", **options)


WRONG = {"mean_of_means": mean_of_means, "states_of_rank_0": states_of_rank_0}


def from_one(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of one process, resumed in two."""
    module, data = make_double("lact"), VARIANTS["lact"].data(folder / "lact", **DATA)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(module, data, folder, ckpt_path=folder / "one.ckpt", **options)
    return {**result, "warned": any(AFRESH in str(w.message) for w in caught)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepared(tmp_path_factory.mktemp("ddp"))
    data = BothRanks(VARIANTS["lact"].data(folder / "lact", **DATA))
    stop(make_double("lact"), data, folder, folder / "one.ckpt", **TRAINER)
    in_two_processes(in_process, folder)
    return folder


@every_variant
def test_two_processes_are_one(name: str, folder: Path) -> None:
    """Losses, gradients, clipped gradients, weights, fast states, metrics of validation."""
    parts, one = saved(folder, name), one_process(name, folder / name, **DATA)
    assert_equal_to_one(parts, one)
    norms = [torch.cat([g.flatten() for g in step.values()]).norm() for step in one["clipped"]]
    assert all(norm < 1.001 * CLIP for norm in norms)
    for part in parts:
        for mine, other in zip(part["metrics"], one["metrics"], strict=True):
            assert mine == pytest.approx(other, rel=1e-6)  # metrics are added up in float32
    assert any(key.startswith("val/") for key in one["metrics"][-1])
    if name in ("lact", "ttt_lora", "in_place"):  # nothing else is in their loss
        assert parts[1]["losses"][-1] == 0 < parts[0]["losses"][-1], "rank 1 is not idle"


@every_variant
def test_resumed_in_two_processes_is_never_stopped(name: str, folder: Path) -> None:
    """In the middle of files, bit for bit."""
    for part, never_stopped in zip(
        saved(folder, f"{name}_again"), saved(folder, name), strict=True
    ):
        assert_resumed(part, never_stopped)
        assert never_stopped["streams"]["slots"]


def test_averaged_adapters_in_two_processes_are_the_same_and_resumed_exactly(folder: Path) -> None:
    first, second = saved(folder, "ema")
    for name, value in first["whole"]["weights"].items():
        assert torch.equal(value, second["whole"]["weights"][name]), name
    for part in (first, second):
        assert_resumed(part["again"], part["whole"])
    checkpoint = torch.load(folder / "ema.ckpt", weights_only=True)
    assert all("ttt_lora" in name for name in checkpoint["state_dict"])
    averages = checkpoint["averaging_state"]["values"]
    assert averages and averages.keys() == checkpoint["current_model_state"].keys()
    differ = [n for n, v in averages.items() if not v.equal(checkpoint["current_model_state"][n])]
    assert differ, "power: the averages are the weights"


def test_buffers_are_not_broadcast_in_every_step(folder: Path) -> None:
    assert [part["broadcasts"] for part in saved(folder, "ema")] == [False, False]


def test_processes_draw_noise_of_their_own(folder: Path) -> None:
    first, second = (part["seed"] for part in saved(folder, "action_expert"))
    assert first != second


def test_two_processes_resume_one_with_fresh_streams_and_a_warning(folder: Path) -> None:
    checkpoint = torch.load(folder / "one.ckpt", weights_only=True)
    for part in saved(folder, "from_one"):
        assert part["warned"]
        for name, value in checkpoint["state_dict"].items():
            assert torch.equal(part["start"][name], value)


def test_one_process_resumes_two_with_fresh_streams_and_a_warning(folder: Path) -> None:
    module, data = make_double("lact"), VARIANTS["lact"].data(folder / "lact", **DATA)
    with pytest.warns(UserWarning, match=AFRESH):
        result = run(module, data, folder, ckpt_path=folder / "lact.ckpt", **TRAINER)
    checkpoint = torch.load(folder / "lact.ckpt", weights_only=True)
    assert len(checkpoint["streams"]) == 2
    assert all(torch.equal(result["start"][n], v) for n, v in checkpoint["state_dict"].items())


def test_power_the_mean_of_both_means_is_another_loss(folder: Path) -> None:
    with pytest.raises(AssertionError):
        assert_equal_to_one(
            saved(folder, "mean_of_means"), one_process("lact", folder / "lact", **DATA)
        )


def test_power_with_the_states_of_rank_0_rank_1_is_not_resumed(folder: Path) -> None:
    first, second = saved(folder, "states_of_rank_0")
    whole = saved(folder, "lact")
    with pytest.raises(AssertionError):
        assert_resumed(second, whole[1])
    with pytest.raises(AssertionError):
        assert_resumed(first, whole[0])  # the gradients of both are averaged


def test_resumed_between_two_batches_of_a_step_is_never_stopped(folder: Path) -> None:
    for part in saved(folder, "accumulated"):
        assert_resumed(part["again"], part["whole"])
