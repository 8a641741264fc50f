"""Memories that runs save and attach, against files that are read by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lact_module_cases import make_data, make_module, make_trainer
from torch import Tensor
from toy import LENGTHS, D, ToyData, ToyModule, ToyState

from callbacks import FileBoundaryReset, StreamMemoryFiles
from datamodules.sampler import ChunkRequest
from lightning_modules.stream_memory import StreamMemory, list_memories
from lightning_modules.streams import FastState

FILES = [f"stream_{number}.safetensors" for number in range(len(LENGTHS))]


class Reader(ToyModule):
    """Adds `x^T x` of every chunk to its state; keeps with which state each chunk began."""

    def __init__(self, persistent: bool = True) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.streams.persistent = persistent
        self.began: dict[tuple[int, int], Tensor] = {}

    def chunk_loss(self, chunk: Any, fast_state: Any, generator: Any) -> Tensor:
        state = fast_state.read("toy", ToyState)
        dw = torch.zeros(len(chunk["x"]), D, D) if state is None else state.dw
        places = zip(chunk["plan"].stream_id, chunk["plan"].chunk_index, strict=True)
        self.began |= {place: dw[row].clone() for row, place in enumerate(places)}
        fast_state.write("toy", ToyState(dw + learned(chunk["x"])))
        return (self.target(chunk["x"]) - chunk["y"]).square().mean() + self.weight.sum() ** 2

    def predict_chunk(self, chunk: Any, fast_state: Any, generator: Any) -> dict[str, Tensor]:
        self.chunk_loss(chunk, fast_state, generator)
        return {"file": chunk["stream_id"]}


def learned(x: Tensor) -> Tensor:
    return x.transpose(-1, -2) @ x


def of_file(number: int, chunks: int | None = None) -> Tensor:
    """What there is to learn of a file's first chunks."""
    dataset = ToyData().build_dataset("test")
    total = torch.zeros(D, D)
    for index in range(LENGTHS[number] if chunks is None else chunks):
        total = total + learned(dataset[ChunkRequest(number, index, index == 0, idle=False)]["x"])
    return total


def run(how: str, module: Reader, *callbacks: pl.Callback, **options: Any) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[FileBoundaryReset(), *callbacks], **options,
    )  # fmt: skip
    data = ToyData(batch_size=3, tbptt=2 if how == "fit" else 1)
    more = {"predict": {"return_predictions": False}, "fit": {}}.get(how, {"verbose": False})
    getattr(trainer, how)(module, data, **more)


# Saving


@pytest.mark.parametrize("how", ["validate", "test", "predict"])
def test_every_file_that_was_read_leaves_its_memory(how: str, tmp_path: Path) -> None:
    module = Reader()
    run(how, module, StreamMemoryFiles(str(tmp_path), name="toys"))
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    for number, length in enumerate(LENGTHS):
        memory = StreamMemory.load(tmp_path / FILES[number], model=module)
        assert (memory.stream_id, memory.chunk_index, memory.name) == (number, length - 1, "toys")
        torch.testing.assert_close(memory.slots["toy"]["dw"], of_file(number)[None])
    assert module.streams.finished == []


def test_a_loop_that_is_cut_short_leaves_memories_up_to_there(tmp_path: Path) -> None:
    run("test", Reader(), StreamMemoryFiles(str(tmp_path)), limit_test_batches=2)
    found = {file.stream_id: file.chunk_index for file in list_memories(tmp_path)}
    assert found == {0: 1, 1: 0, 2: 1, 3: 0}
    memory = StreamMemory.load(tmp_path / FILES[2])
    torch.testing.assert_close(memory.slots["toy"]["dw"], of_file(2, chunks=2)[None])


def test_fit_saves_nothing_unless_asked_and_then_what_was_trained(tmp_path: Path) -> None:
    run("fit", Reader(), StreamMemoryFiles(str(tmp_path / "none")), max_epochs=1)
    assert not (tmp_path / "none").exists()
    module, files = Reader(), StreamMemoryFiles(str(tmp_path / "all"), stages=("train",))
    run("fit", module, files, max_epochs=2)
    memories = list_memories(tmp_path / "all")
    assert [m.stream_id for m in memories] == list(range(len(LENGTHS)))
    assert len({m.fingerprint for m in memories}) > 1, "weights moved from file to file"
    longest = StreamMemory.load(tmp_path / "all" / FILES[4])
    torch.testing.assert_close(longest.slots["toy"]["dw"], of_file(4)[None])


def test_memories_of_training_are_not_those_of_the_validation_in_between(tmp_path: Path) -> None:
    files = StreamMemoryFiles(str(tmp_path), stages=("train",))
    run("fit", Reader(), files, max_epochs=1, limit_train_batches=1, num_sanity_val_steps=1)
    # Two chunks in each of three rows; validation read all of the eight files.
    assert 3 <= len(list_memories(tmp_path)) <= 6


def test_memories_that_are_there_stop_a_run_before_it_reads(tmp_path: Path) -> None:
    run("test", Reader(), StreamMemoryFiles(str(tmp_path)), limit_test_batches=1)
    module = Reader()
    with pytest.raises(FileExistsError, match=r"stream_0.safetensors .*overwrite: true"):
        run("test", module, StreamMemoryFiles(str(tmp_path)))
    assert module.began == {}
    run("test", module, StreamMemoryFiles(str(tmp_path), overwrite=True))
    assert {m.stream_id: m.chunk_index + 1 for m in list_memories(tmp_path)} == dict(
        enumerate(LENGTHS)
    )


def test_streams_that_carry_nothing_have_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no memory to save.*fast_state: reset"):
        run("test", Reader(persistent=False), StreamMemoryFiles(str(tmp_path / "m")))


# Attaching


def test_every_file_begins_with_what_is_attached_and_the_next_loop_does_not(tmp_path: Path) -> None:
    module = Reader()
    run("test", module, StreamMemoryFiles(str(tmp_path)))
    assert not module.began[(2, 0)].any() and not module.began[(7, 0)].any()
    saved = tmp_path / "on"
    run("test", module, StreamMemoryFiles(str(saved), attach=str(tmp_path / FILES[4])))
    attached = StreamMemory.load(tmp_path / FILES[4]).slots["toy"]["dw"][0]
    for number in range(len(LENGTHS)):
        assert torch.equal(module.began[(number, 0)], attached)
    torch.testing.assert_close(module.began[(2, 2)], of_file(4) + of_file(2, chunks=2))
    both = StreamMemory.load(saved / FILES[2]).slots["toy"]["dw"][0]
    torch.testing.assert_close(both, of_file(4) + of_file(2))
    run("test", module)
    assert not module.began[(2, 0)].any()


def test_reset_begins_every_chunk_with_what_is_attached(tmp_path: Path) -> None:
    run("test", Reader(), StreamMemoryFiles(str(tmp_path)))
    module = Reader(persistent=False)
    run("test", module, StreamMemoryFiles(attach=str(tmp_path / FILES[4])))
    attached = StreamMemory.load(tmp_path / FILES[4]).slots["toy"]["dw"][0]
    assert all(torch.equal(dw, attached) for dw in module.began.values())


def test_another_model_is_refused_before_anything_is_read_or_written(tmp_path: Path) -> None:
    run("test", Reader(), StreamMemoryFiles(str(tmp_path)))
    other, saved = Reader(), tmp_path / "new"
    with torch.no_grad():
        other.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"stream 4 belongs to other weights than this Reader has"):
        run("test", other, StreamMemoryFiles(str(saved), attach=str(tmp_path / FILES[4])))
    assert other.began == {} and not saved.exists() and other.streams.finished == []


def test_validation_inside_a_fit_is_left_alone(tmp_path: Path) -> None:
    run("test", Reader(), StreamMemoryFiles(str(tmp_path)))
    module, saved = Reader(), tmp_path / "new"
    files = StreamMemoryFiles(str(saved), attach=str(tmp_path / FILES[4]))
    run("fit", module, files, max_steps=2, val_check_interval=1, num_sanity_val_steps=1)
    assert not saved.exists() and not module.began[(0, 0)].any()


def test_other_stages_are_left_alone(tmp_path: Path) -> None:
    run("test", Reader(), StreamMemoryFiles(str(tmp_path / "m"), stages=("predict",)))
    assert not (tmp_path / "m").exists()


def test_a_run_that_fails_leaves_nothing_attached_and_nobody_listening(tmp_path: Path) -> None:
    run("test", Reader(), StreamMemoryFiles(str(tmp_path)))
    module = Reader()
    module.test_step = lambda batch, batch_idx: 1 / 0
    files = StreamMemoryFiles(str(tmp_path / "new"), attach=str(tmp_path / FILES[4]))
    with pytest.raises(ZeroDivisionError):
        run("test", module, files)
    assert module.streams.finished == []
    del module.test_step
    run("test", module)
    assert not module.began[(0, 0)].any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "give save .* or attach"),
        ({"save": "m", "stages": ("fit",)}, ValueError, "unknown stage 'fit'; choose of train"),
    ],
)
def test_wrong_options_name_the_fix(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        StreamMemoryFiles(**options)


def test_a_missing_file_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no memory"):
        run("test", Reader(), StreamMemoryFiles(attach=str(tmp_path / "none.safetensors")))


# A language model


def test_loss_with_an_attached_text_equals_one_pass_over_every_file_after_it(
    tmp_path: Path,
) -> None:
    def evaluate(*callbacks: Any, **options: Any) -> float:
        trainer = make_trainer(tmp_path, 1, *callbacks, limit_val_batches=1.0)
        data = make_data(tmp_path, **options)
        return trainer.validate(make_module(), data, verbose=False)[0]["val/loss"]

    plain = evaluate(StreamMemoryFiles(str(tmp_path / "memories")))
    files = list_memories(tmp_path / "memories")
    assert len(files) >= 3 and all(file.error is None and file.slots == 4 for file in files)
    attached = evaluate(StreamMemoryFiles(attach=str(files[0].path)))
    by_hand = loss_by_hand(tmp_path, StreamMemory.load(files[0].path))
    assert attached == pytest.approx(by_hand, rel=1e-5)
    assert attached != pytest.approx(plain, rel=1e-4), "it must matter"
    with pytest.raises(ValueError, match="rows are packed"):
        evaluate(StreamMemoryFiles(attach=str(files[0].path)), mode="packed", chunk_length=64)


@torch.no_grad()
def loss_by_hand(folder: Path, memory: StreamMemory) -> float:
    """Mean loss over the validation files, each read in one pass after what the memory has read."""
    data, module = make_data(folder), make_module()
    data.prepare_data()
    data.setup("validate")
    module.build(data.features)
    memory.check(module.eval())
    losses = []
    for number in data._split[1]:
        ids = torch.from_numpy(data.store.document(number).astype("int64"))
        logits = module.model(ids[None, :-1], fast_state=FastState(memory.rows(1))).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    return torch.cat(losses).mean().item()
