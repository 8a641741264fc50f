"""Every token of every document, once, in order; nothing of one document in another."""

import time
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from text_cases import BagModule, documents_of, make_data, pairs, places_of_streams, write_documents

from callbacks import FileBoundaryReset, StreamStateCheckpoint
from datamodules import TextStreamDataModule
from datamodules.sampler import IDLE, ChunkRequest
from datamodules.text_chunks import NO_LABEL
from datamodules.tokenization import TokenizerConfig

BPE = TokenizerConfig("bpe", vocab_size=280)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "corpus")


def names_of(data: TextStreamDataModule) -> tuple[set[str], set[str]]:
    training, validation = ({data.store.names[i] for i in part} for part in data._split)
    return training, validation


# --- streams ---


@pytest.mark.parametrize("tokenizer", [None, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize(
    ("length", "rows", "tbptt"), [(1, 2, 1), (7, 3, 2), (16, 1, 1), (16, 20, 3)]
)
def test_chunks_of_a_stream_are_its_document_and_every_token_is_predicted_once(
    folder: Path, tokenizer: TokenizerConfig | None, length: int, rows: int, tbptt: int
) -> None:
    data = make_data(
        folder, tokenizer=tokenizer, chunk_length=length, batch_size=rows, tbptt=tbptt,
        val_fraction=0.3,
    )  # fmt: skip
    found = []
    for stage, documents in zip(("train", "val"), data._split, strict=True):
        places = places_of_streams(getattr(data, f"{stage}_dataloader")())
        assert len(places) == len(documents) > 0
        for stream, document in enumerate(documents):
            assert places[stream] == pairs(data.store.document(document))
        found += documents.tolist()
    assert sorted(found) == list(range(14))


def test_labels_are_shifted_across_chunks_and_a_shift_in_the_model_would_lose_them(
    folder: Path,
) -> None:
    data = make_data(folder, chunk_length=8, val_fraction=0.0)
    dataset = data.build_dataset("train")
    lost = 0
    for batch in data.train_dataloader():
        inputs, labels = batch[0]["input_ids"], batch[0]["labels"]
        inside = labels[:, :-1] != NO_LABEL
        within = inputs[:, 1:].eq(labels[:, :-1]) | ~batch[0]["mask"][:, 1:]
        assert bool(within[inside].all())
        lost += int((labels[:, -1] != NO_LABEL).sum())
    assert lost == sum(int(n) // 8 for n in data.store.lengths - 1) > 0
    assert dataset.num_labels == int((data.store.lengths - 1).sum())


def test_padding_and_idle_rows_count_nowhere(folder: Path) -> None:
    for mode in ("stream", "packed"):
        data = make_data(folder, mode=mode)
        idle = data.build_dataset("train")[IDLE]
        assert idle["input_ids"].tolist() == [258] * 16 and idle["labels"].tolist() == [-100] * 16
        assert not idle["mask"].any() and idle["mask"].dtype == torch.bool
        assert {tuple(value.shape) for value in idle.values()} == {(16,)}
    document = int(data._split[0][0])
    name, length = data.store.names[document], int(data.store.lengths[document])
    last = make_data(folder).build_dataset("train")[
        ChunkRequest(0, (length - 2) // 16, False, False)
    ]
    real = (length - 1) % 16
    assert 0 < real < 16 and last["mask"].tolist() == [True] * real + [False] * (16 - real), name
    assert last["input_ids"][real:].eq(258).all() and last["labels"][real:].eq(NO_LABEL).all()
    assert last["labels"][real - 1] == 257


# --- packed ---


def packed_rows(data: TextStreamDataModule) -> list[dict[str, torch.Tensor]]:
    dataset = data.build_dataset("train")
    return [dataset[ChunkRequest(row, 0, True, False)] for row in range(len(dataset.lengths))]


@pytest.mark.parametrize("tokenizer", [None, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("length", [1, 9, 64, 5000])
def test_packed_rows_are_the_documents_one_behind_the_other(
    folder: Path, tokenizer: TokenizerConfig | None, length: int
) -> None:
    data = make_data(folder, tokenizer=tokenizer, chunk_length=length, mode="packed")
    rows = packed_rows(data)
    expected = [pair for d in data._split[0] for pair in pairs(data.store.document(d))]
    masks = torch.cat([row["mask"] for row in rows])
    assert masks[: len(expected)].all() and not masks[len(expected) :].any()
    found = torch.stack([torch.cat([row[k] for row in rows]) for k in ("input_ids", "labels")])
    assert list(map(tuple, found[:, masks].T.tolist())) == expected
    assert len(rows) == -(-len(expected) // length)


def test_an_id_is_one_document_in_one_row_and_pads_begin_none(folder: Path) -> None:
    data = make_data(folder, chunk_length=32, mode="packed")
    dataset, rows = data.build_dataset("train"), packed_rows(data)
    lengths = (data.store.lengths - 1)[data._split[0]]
    document = np.repeat(np.arange(len(lengths)), lengths)
    seen: set[int] = set()
    for number, row in enumerate(rows):
        ids, real = row["document_ids"].tolist(), int(row["mask"].sum())
        assert ids == sorted(ids) and not seen & set(ids)
        seen |= set(ids)
        parts = document[number * 32 : number * 32 + real]
        same = np.asarray(ids[1:real]) == np.asarray(ids[: real - 1])
        assert (same == (parts[1:] == parts[:-1])).all()
        assert set(ids[real:]) <= {ids[real - 1]}
        # Inside a document the label is the next input; at its end it is the next one nowhere.
        inputs, labels = row["input_ids"], row["labels"]
        assert inputs[1:real][same].equal(labels[: real - 1][same])
        ends = labels[: real - 1][~same]
        assert ends.eq(257).all() and inputs[1:real][~same].eq(256).all()
    assert seen == set(range(len(seen))) and real < 32, "the last row has padding"
    assert len(dataset.lengths) == len(rows) and set(dataset.lengths) == {1}


def test_packed_batches_read_every_row_once(folder: Path) -> None:
    data = make_data(folder, chunk_length=32, mode="packed", batch_size=4)
    batches = [batch[0] for batch in data.train_dataloader()]
    assert all(chunk["is_first"].all() for chunk in batches)
    ids = torch.cat([c["document_ids"][c["mask"].any(1)] for c in batches])
    assert sorted(ids.flatten().tolist()) == sorted(
        i for row in packed_rows(data) for i in row["document_ids"].tolist()
    )


# --- order and resuming ---


def contents(batches: Any) -> list[Any]:
    names = ("input_ids", "labels", "stream_id", "chunk_index", "is_first")
    return [[[chunk[name].tolist() for name in names] for chunk in batch] for batch in batches]


@pytest.mark.parametrize("mode", ["stream", "packed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_at_the_exact_batch(folder: Path, mode: str, workers: int) -> None:
    def loader(workers: int) -> Any:
        data = make_data(folder, mode=mode, num_workers=workers, seed=3, chunk_length=8)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        return loader

    expected = contents(loader(0))
    first = loader(workers)
    batches = iter(first)
    seen = contents([next(batches) for _ in range(len(expected) // 2)])
    second = loader(workers)
    second.load_state_dict(first.state_dict())
    assert seen + contents(second) == expected


class Losses(pl.Callback):
    def __init__(self, stop: int | None, path: Path) -> None:
        self.stop, self.path, self.values = stop, path, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values[trainer.global_step] = outputs["loss"].item()
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def train(folder: Path, path: Path, stop: int | None, resume: bool, workers: int) -> dict:
    torch.manual_seed(0)
    losses = Losses(stop, path)
    trainer = pl.Trainer(
        default_root_dir=path.parent, max_steps=30, max_epochs=-1, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        limit_val_batches=0, callbacks=[FileBoundaryReset(), StreamStateCheckpoint(), losses],
    )  # fmt: skip
    data = make_data(folder, chunk_length=8, tbptt=2, num_workers=workers)
    model = BagModule(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer.fit(model, datamodule=data, ckpt_path=path if resume else None, weights_only=True)
    return losses.values


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_training_that_stops_inside_a_document_equals_training_that_does_not(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    whole = train(folder, tmp_path / "whole.ckpt", None, False, 0)
    assert len(whole) == 30
    halves = train(folder, tmp_path / "half.ckpt", 11, False, workers)
    halves |= train(folder, tmp_path / "half.ckpt", None, True, workers)
    assert halves == whole


# --- splits and choices ---


def test_splits_are_disjoint_and_stay_when_files_are_added_or_the_seed_changes(
    folder: Path,
) -> None:
    training, validation = names_of(make_data(folder, val_fraction=0.3))
    assert not training & validation and len(training | validation) == 14 and validation
    assert names_of(make_data(folder, val_fraction=0.3, seed=7)) == (training, validation)
    write_documents(folder, 40, seed=1)
    (folder / "0-first.txt").write_text("a new first document of twenty characters")
    more_training, more_validation = names_of(make_data(folder, val_fraction=0.3))
    assert training < more_training and validation < more_validation


def test_test_and_predict_read_the_validation_documents(folder: Path) -> None:
    data = make_data(folder, val_fraction=0.3)
    expected = contents(data.val_dataloader())
    assert contents(data.test_dataloader()) == contents(data.predict_dataloader()) == expected
    assert make_data(folder, val_fraction=0.0).val_dataloader() == []


def test_short_documents_are_left_out_and_counted(folder: Path) -> None:
    everything = make_data(folder)
    lengths = everything.store.lengths
    data = make_data(folder, min_tokens=40, val_fraction=0.6)
    used = np.concatenate(data._split)
    assert sorted(used) == np.flatnonzero(lengths >= 40).tolist()
    assert data.provenance["too_short"] == int((lengths < 40).sum()) > 0
    assert everything.provenance["too_short"] == 0
    assert names_of(data)[1] < names_of(make_data(folder, val_fraction=0.6))[1]
    with pytest.raises(ValueError, match=r"no training document.*min_tokens=9999.*longest, .*txt"):
        make_data(folder, min_tokens=9999)
    longest = int(lengths.max())
    with pytest.raises(ValueError, match=r"no validation document .*another val_fraction"):
        make_data(folder, min_tokens=longest, val_fraction=0.1)


def test_a_chunk_longer_than_every_document_names_the_longest(folder: Path) -> None:
    store = make_data(folder).store
    longest = int(store.lengths.max())
    name = store.names[int(store.lengths.argmax())]
    message = f"chunk_length={longest} is longer.*the longest, {name}, has {longest} tokens.*packed"
    with pytest.raises(ValueError, match=message):
        make_data(folder, chunk_length=longest)
    make_data(folder, chunk_length=longest - 1)
    make_data(folder, chunk_length=longest, mode="packed")


def test_skipped_files_are_reported_in_every_run_and_strict_refuses_them(folder: Path) -> None:
    (folder / "image.png").write_bytes(b"\x89PNG")
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 of 15 documents were skipped: image.png \(not"):
            data = make_data(folder)
    assert data.provenance["skipped"] == 1
    with pytest.raises(ValueError, match=r"image.png is not UTF-8 at byte 0.*strict: false"):
        make_data(folder, source={"strict": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "rows"}, "choose stream or packed"),
        ({"chunk_length": 0}, "chunk_length=0"),
        ({"min_tokens": 1}, "min_tokens=1 must be at least 2"),
        ({"mode": "packed", "tbptt": 2}, "use mode: stream, or tbptt: 1"),
        ({"packing_alignment": 2}, "packing_alignment=2 is of mode: packed, but mode is stream"),
        ({"mode": "packed", "packing_alignment": 0}, "packing_alignment=0 must be at least 1"),
        ({"mode": "packed", "packing_alignment": 3}, "chunk_length=16 must be .*=3: choose 18"),
        ({"mode": "packed", "packing_alignment": 32}, "chunk_length=16 must be .*=32: choose 32"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"val_fraction": 0.999}, "leaves none of the 14 documents"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_data(folder, **options)


def test_features_and_provenance_describe_the_data(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(folder, tokenizer=BPE)
    assert data.features == {
        "vocab_size": 280, "bos_id": 0, "eos_id": 1, "pad_id": 2, "chunk_length": 16, "tbptt": 1,
        "mode": "stream", "packing_alignment": 1, "tokenizer": "bpe",
    }  # fmt: skip
    assert make_data(folder).features["vocab_size"] == 259
    facts = data.provenance
    assert facts["documents"] == 14 == facts["train_documents"] + facts["val_documents"]
    assert facts["bytes"] == sum(path.stat().st_size for path in folder.rglob("*.txt"))
    assert facts["tokens"] == sum(map(len, documents_of(data.store).values()))
    assert f"content_hash {facts['content_hash']}" in capsys.readouterr().out


def test_rows_of_a_dataset_are_read_as_documents(tmp_path: Path) -> None:
    texts = [f"number {n} " * (n + 1) for n in range(8)]
    datasets.Dataset.from_dict({"text": [*texts, None]}).save_to_disk(tmp_path / "set")
    source = {"kind": "datasets", "path": str(tmp_path / "set")}
    with pytest.warns(UserWarning, match="1 of 9 documents were skipped: row 8 .NoneType"):
        data = make_data(tmp_path / "set", source=source, tokenizer=BPE, val_fraction=0.3)
    found = [data.tokenizer.decode(tokens) for tokens in documents_of(data.store).values()]
    assert found == texts
    assert data.provenance["source"] == "set" and len(data.provenance["content_hash"]) == 64


CONFIG = """
model:
  class_path: BagModule
  init_args: {{optimizer: {{class_path: SGD, init_args: {{lr: 0.1}}}}}}
data:
  class_path: TextStreamDataModule
  init_args:
    source: {{kind: files, path: {path}}}
    tokenizer: {{kind: bpe, vocab_size: 300}}
    chunk_length: 8
    batch_size: 2
    tbptt: 2
trainer: {{limit_val_batches: 1}}
"""


def test_the_command_line_trains_on_texts(fit, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.yaml").write_text(CONFIG.format(path=folder))
    result = fit("--config", "text.yaml", "--data.source.strict", "true")
    assert result.code == 0, result.err
    assert "source corpus, python_version" in result.out
    assert len([path for path in (tmp_path / "data").iterdir() if path.is_dir()]) == 1
    options = yaml.safe_load(fit("--config", "text.yaml", "--print_config").out)["data"][
        "init_args"
    ]
    assert options["tokenizer"] == {"kind": "bpe", "vocab_size": 300, "name": None}
    refused = fit("--config", "text.yaml", "--data.chunk_length", "4000")
    assert refused.code == 1 and "chunk_length=4000 is longer" in refused.last_line


@pytest.mark.slow
def test_the_whole_standard_library_within_a_minute(tmp_path: Path) -> None:
    started = time.perf_counter()
    data = TextStreamDataModule(chunk_length=1024, batch_size=8, cache=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    facts = data.provenance
    assert 500 < facts["documents"] < 1000 and facts["skipped"] == 0
    assert 8e6 < facts["bytes"] < 20e6
    assert facts["tokens"] == facts["bytes"] + 2 * facts["documents"]
    again = TextStreamDataModule(chunk_length=1024, batch_size=8, cache=str(tmp_path))
    again.prepare_data()
    assert again.provenance == facts
    places = places_of_streams(data.val_dataloader())
    for stream, document in enumerate(data._split[1]):
        assert places[stream] == pairs(data.store.document(document))
    labels = sum(int((c["labels"] != NO_LABEL).sum()) for b in data.train_dataloader() for c in b)
    assert labels == data.build_dataset("train").num_labels
    assert time.perf_counter() - started < 60
