"""TensorBoard says what a run is, what its curves mean, and how it ended."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status
from torch.utils.data import DataLoader
from toy_streams import ToyModule, fit, read_tensorboard, same, scalar, toy_batches
from variant_cases import CHUNK, train

import callbacks.run_summary
from callbacks import FastWeightMonitor, FileBoundaryReset, GateMonitor, RunSummary, Throughput
from callbacks.run_page import state_sizes
from callbacks.run_settings import settings
from callbacks.tags import FAMILIES, describe, family_of, layout
from lightning_modules.base import ParameterGroup


def text(folder: Path, tag: str) -> str:
    events = read_tensorboard(folder).Tensors(f"{tag}/text_summary")
    return events[-1].tensor_proto.string_val[0].decode()


def charts(folder: Path) -> dict[str, list[str]]:
    """Title -> regexes of the newest layout."""
    event = read_tensorboard(folder).Tensors("custom_scalars__config__")[-1]
    parsed = Layout()
    parsed.ParseFromString(event.tensor_proto.string_val[0])
    return {
        chart.title: list(chart.multiline.tag)
        for category in parsed.category
        for chart in category.chart
    }


def session(folder: Path) -> tuple[dict[str, Any], int | None]:
    """Hyperparameters and status (None: not ended) as the HPARAMS tab reads them."""
    contents = read_tensorboard(folder / "final").PluginTagToContent("hparams")
    assert metadata.EXPERIMENT_TAG not in contents  # else the first run's columns count for all
    start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    values = {
        name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()
    }
    end = contents.get(metadata.SESSION_END_INFO_TAG)
    return values, end and metadata.parse_session_end_info_plugin_data(end).status


class StopAt(pl.Callback):
    """Raises behind a step."""

    def __init__(self, step: int, error: type[BaseException]) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error("the reason")


MONITORS = (GateMonitor, FastWeightMonitor, Throughput)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    callbacks = [*(monitor(2) for monitor in MONITORS), RunSummary()]
    fit(ToyModule(), toy_batches(5), folder, callbacks, log_every_n_steps=2)
    return folder


def test_every_chart_shows_a_written_curve_and_every_written_family_with_a_title_is_charted(
    toy_run: Path,
) -> None:
    written = read_tensorboard(toy_run).Tags()["scalars"]
    shown = {
        tag
        for regexes in charts(toy_run).values()
        for regex in regexes
        for tag in written
        if re.match(regex, tag)
    }
    for title, regexes in charts(toy_run).items():
        assert any(re.match(regex, tag) for regex in regexes for tag in written), title
    assert shown == {tag for tag in written if (f := family_of(tag)) is not None and f.title}
    together = charts(toy_run)["inner loss before and after the update"]
    assert together == ["fast_weight/inner_loss_before/", "fast_weight/inner_loss_after/"]
    assert charts(toy_run)["ttt: mean of each layer"] == ["gate/ttt/mean/"]


def test_every_tag_of_the_monitors_has_a_meaning_beside_its_curve(toy_run: Path) -> None:
    events = read_tensorboard(toy_run)
    written = set(events.Tags()["scalars"]) - {"train/loss", "epoch"}
    for tag in written:
        assert describe(tag), tag
        shown = events.SummaryMetadata(tag)
        assert shown.summary_description == describe(tag)
        assert shown.data_class == DATA_CLASS_SCALAR  # else the data server drops it
    assert len(written) > 50
    page = text(toy_run, "run/tags")
    assert "`gate/<gate>/mean/<layer>`" in page and "`chapter_router" not in page


def test_families_do_not_hide_each_other() -> None:
    """A tag made of a family's own name belongs to that family, not to one before it."""
    for family in FAMILIES:
        assert family_of(re.sub(r"<(\w+)>", r"\1", family.name)) is family


def test_runs_that_wrote_different_curves_have_the_same_chart() -> None:
    """TensorBoard merges charts that are equal, and shows the others one beside the other."""
    early, late = (layout(["train/loss", *more]) for more in ([], ["val/loss"]))
    assert early == late
    assert early["loss and learning rate"]["loss"] == ("Multiline", ["train/loss$", "val/loss$"])


def test_a_margin_chart_needs_all_three_curves() -> None:
    rate = [f"closed_loop/success{end}" for end in ("", "_low", "_high")]
    assert layout(rate)["closed loop"] == {"success rate with its 95 % interval": ("Margin", rate)}
    assert layout(rate[:2]) == {}


def test_final_metrics_of_a_run_that_ended_are_its_last_values(toy_run: Path) -> None:
    last, final = read_tensorboard(toy_run), read_tensorboard(toy_run / "final")
    assert set(final.Tags()["scalars"]) == {"final/train_loss", "final/samples_per_sec"}
    speed = scalar(last, "throughput/samples_per_sec")[5]
    assert scalar(final, "final/samples_per_sec") == {5: speed}
    assert session(toy_run)[1] == Status.Value("STATUS_SUCCESS")
    with pytest.raises(KeyError):
        text(toy_run, "run/stopped")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_was_interrupted_has_metrics_status_and_reason(
    tmp_path: Path, error: type[BaseException]
) -> None:
    callbacks = [Throughput(2), RunSummary(), StopAt(3, error)]
    with pytest.raises((ValueError, SystemExit)):
        fit(ToyModule(), toy_batches(5), tmp_path, callbacks)
    assert scalar(read_tensorboard(tmp_path / "final"), "final/samples_per_sec").keys() == {3}
    assert session(tmp_path)[1] == Status.Value("STATUS_FAILURE")
    assert text(tmp_path, "run/stopped") == f"Stopped at step 3. {error.__name__}: the reason"


def test_an_error_in_the_first_step_leaves_the_options_and_the_reason(tmp_path: Path) -> None:
    module = ToyModule()
    module.training_step = lambda *_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        fit(module, toy_batches(1), tmp_path, [RunSummary()])
    assert "ZeroDivisionError" in text(tmp_path, "run/stopped")
    assert session(tmp_path)[0]["model.lr"] == 0.05


def test_without_tensorboard_nothing_is_kept_read_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("settings", "run_page", "layout", "FinalRun", "_logged"):
        monkeypatch.setattr(callbacks.run_summary, name, pytest.fail)
    trainer = pl.Trainer(
        accelerator="cpu", logger=CSVLogger(tmp_path, name="", version=""), max_epochs=1,
        callbacks=[Throughput(2), FileBoundaryReset(), RunSummary()], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(ToyModule(), DataLoader(toy_batches(3), batch_size=None, collate_fn=same))
    assert "throughput/samples_per_sec" in (tmp_path / "metrics.csv").read_text()
    assert not (tmp_path / "final").exists()


def test_bytes_per_stream_by_hand() -> None:
    layer = {"dw": torch.zeros(3, 2, 4), "seen": torch.zeros(3, dtype=torch.int64)}
    empty = {"dw": torch.zeros(3, 0)}
    sizes = state_sizes({"layers.0.attn": layer, "layers.11.attn": layer, "layers.0.mlp": empty})
    assert sizes == {"layers.*.attn": (2, 2 * (2 * 4 * 4 + 8)), "layers.*.mlp": (1, 0)}


def test_page_and_options_of_a_real_module_without_the_command_line(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    groups = {"fast": ParameterGroup(lr_scale=0.5), "base": ParameterGroup(frozen=True)}
    module, _ = train(
        "ttt_lora", tmp_path, steps=2, module={"groups": groups}, data={"tbptt": 2},
        callbacks=lambda: [RunSummary(), LearningRateMonitor()],
        logger=logger, log_every_n_steps=1,
    )  # fmt: skip
    page = text(tmp_path, "run/summary")
    assert "| variant | TTTLoRAModule |" in page and "| method | ttt_lora |" in page
    counts = Counter[str]()
    for name, parameter in module.named_parameters():
        counts[module.parameter_group(name)] += parameter.numel()
    assert f"| base | {counts['base']:,} | 0 |" in page
    assert f"| fast | {counts['fast']:,} | {counts['fast']:,} |" in page
    size = sum(n for _, n in state_sizes(module.streams.slots("train")).values())
    assert size > 0 and f"**{size:,}**" in page
    assert f"| tokens or action steps per step and process | {2 * 3 * CHUNK} |" in page
    options, _ = session(tmp_path)
    assert options["model.ttt_lora.inner_dim"] == 4 and options["data.batch_size"] == 3
    assert options["model.groups.base.frozen"] == "true"
    assert options["lr.fast"] == pytest.approx(0.5e-2) and "lr.base" not in options
    assert options["trainer.max_steps"] == 2


def test_a_module_that_keeps_nothing_says_so(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    train("lact", tmp_path, steps=1, module={"fast_state": "reset"},
          callbacks=lambda: [RunSummary()], logger=logger)  # fmt: skip
    assert "Nothing is carried from chunk to chunk." in text(tmp_path, "run/summary")


class Validates(ToyModule):
    """Its validation losses are these, one after the other."""

    losses = (3.0, 1.0, 2.0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", torch.tensor(self.losses[self.trainer.current_epoch]))


def test_best_and_last_validation_loss_of_all_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    def run(folder: Path, epochs: int, ckpt_path: str | None = None) -> dict[str, float]:
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=epochs, enable_progress_bar=False,
            logger=TensorBoardLogger(folder, name="", version=""), enable_model_summary=False,
            callbacks=[FileBoundaryReset(), RunSummary()], log_every_n_steps=1,
        )  # fmt: skip
        loaders = [DataLoader(toy_batches(1), batch_size=None, collate_fn=same) for _ in range(2)]
        trainer.fit(Validates(), *loaders, ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / "last.ckpt")
        final = read_tensorboard(folder / "final")
        return {tag: next(iter(scalar(final, tag).values())) for tag in final.Tags()["scalars"]}

    first = run(tmp_path / "first", 2)
    assert (first["final/val_loss"], first["final/best_val_loss"]) == (1.0, 1.0)
    rest = run(tmp_path / "rest", 3, str(tmp_path / "first" / "last.ckpt"))
    assert (rest["final/val_loss"], rest["final/best_val_loss"]) == (2.0, 1.0)


def test_the_command_line_adds_it_and_its_options_have_the_configs_names(
    fit: Any, tmp_path: Path
) -> None:
    result = fit(
        "--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(tmp_path),
        "--trainer.logger.name", "run", "--trainer.logger.version", "one",
    )  # fmt: skip
    assert result.code == 0, result.err
    options, status = session(tmp_path / "run" / "one")
    assert status == Status.Value("STATUS_SUCCESS")
    expected = {
        "seed_everything": 0.0, "model": "CaseModule", "model.horizon": 4.0,
        "model.expert.memory.size": 2.0, "model.optimizer": "AdamW", "model.optimizer.lr": 1e-3,
        "model.groups.gate.lr_scale": 2.0, "data": "CaseData", "data.batch_size": 2.0,
        "trainer.max_steps": 2.0, "lr.base": 1e-3,
    }  # fmt: skip
    assert {name: options[name] for name in expected} == expected
    assert "| variant | CaseModule |" in text(tmp_path / "run" / "one", "run/summary")


def test_every_family_stands_in_the_table_of_the_docs() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    rows = [line for line in docs.splitlines() if line.startswith("| `")]
    for family in FAMILIES:
        head, *rest = re.sub(r"_?<(position|index)>", "", family.name).split("/")
        key = next((part for part in reversed(rest) if "<" not in part), family.name)
        key = key.replace("lr/<group>", "lr/GROUP")
        assert any(f"`{head}/" in row and key in row for row in rows), family.name


def test_settings_need_no_datamodule(tmp_path: Path) -> None:
    trainer = fit(ToyModule(depth=2), toy_batches(1), tmp_path, [])
    found = settings(trainer, trainer.lightning_module)
    assert found["model"] == "ToyModule" and found["model.lr"] == 0.05
    assert not any(name.startswith("data") for name in found)
