"""Tokenised once, all or nothing, found again by content and settings."""

import multiprocessing
import os
import pickle
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from text_cases import documents_of, make_data, write_documents

from datamodules import token_store
from datamodules.documents import FileCorpus, TextSource, find_files
from datamodules.text_streams import TextStreamDataModule
from datamodules.token_store import TokenStore, store_path, tokenise
from datamodules.tokenization import PretrainedTokenizer, TokenizerConfig

BYTES = TokenizerConfig()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "corpus", 5)


def build(folder: Path, cache: Path) -> Path:
    corpus = FileCorpus(find_files(str(folder)))
    path = store_path(cache, "corpus", corpus, BYTES, 0.1)
    tokenise(path, corpus, BYTES, 0.1)
    return path


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def test_every_document_is_stored_exactly(folder: Path, tmp_path: Path) -> None:
    store = TokenStore(build(folder, tmp_path / "cache"))
    expected = {
        name: [256, *path.read_bytes(), 257] for name, path in find_files(str(folder)).items()
    }
    assert documents_of(store) == expected
    assert store.meta["tokens"] == sum(map(len, expected.values())) == len(store.tokens)
    assert store.meta["bytes"] == store.meta["tokens"] - 2 * len(expected)
    assert store.meta["content_hash"] == FileCorpus(find_files(str(folder))).content_hash


def test_the_same_documents_are_tokenised_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(folder, tmp_path / "cache")
    monkeypatch.setattr(token_store, "AtomicFolder", None)  # writing again would fail
    os.utime(folder / "001.txt")
    assert build(folder, tmp_path / "cache") == path


def test_another_content_name_or_setting_is_another_folder(folder: Path, tmp_path: Path) -> None:
    def path(config: TokenizerConfig = BYTES, val_fraction: float = 0.1) -> str:
        corpus = FileCorpus(find_files(str(folder)))
        return store_path(tmp_path, "corpus", corpus, config, val_fraction).name

    (tmp_path / "tokenizers").mkdir()
    for size in (270, 280):
        trained = PretrainedTokenizer.train(["some text of words " * 5], size)
        trained.save(tmp_path / f"tokenizers/{size}")
    bpe = [TokenizerConfig("bpe", vocab_size=size) for size in (300, 400)]
    own = [
        TokenizerConfig("pretrained", name=str(tmp_path / f"tokenizers/{n}")) for n in (270, 280)
    ]
    found = [path(), path(bpe[0]), path(bpe[1]), path(bpe[0], 0.2), path(own[0]), path(own[1])]
    assert path(val_fraction=0.2) == path(), "bytes do not depend on the split"
    (folder / "001.txt").write_text("changed")
    found.append(path())
    (folder / "001.txt").rename(folder / "renamed.txt")
    found.append(path())
    assert len(set(found)) == len(found)


def test_nothing_to_read_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/image.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to read: 1 of 1.*image.png.*UTF-8"):
        build(tmp_path / "corpus", tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_skipped_files_are_counted_and_empty_ones_are_no_mistake(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "empty.txt").touch()
    meta = TokenStore(build(folder, tmp_path / "cache")).meta
    assert (meta["skipped"], meta["empty"], meta["skip_report"]) == (0, 1, None)
    for number in range(5):
        (folder / f"{number}.bin").write_bytes(b"\xff")
    meta = TokenStore(build(folder, tmp_path / "cache")).meta
    assert (meta["skipped"], meta["empty"], meta["documents"]) == (5, 1, 5)
    assert meta["skip_report"] == (
        "5 of 11 documents were skipped: 0.bin, 1.bin, 2.bin, ... (not UTF-8 at byte 0)"
    )


def test_files_that_change_while_they_are_read_are_noticed(folder: Path, tmp_path: Path) -> None:
    corpus = FileCorpus(find_files(str(folder)))
    path = store_path(tmp_path / "cache", "corpus", corpus, BYTES, 0.1)
    (folder / "001.txt").write_text("changed")
    with pytest.raises(RuntimeError, match="changed while they were read"):
        tokenise(path, corpus, BYTES, 0.1)
    assert folders(tmp_path / "cache") == []


def test_a_damaged_folder_says_to_remove_it(folder: Path, tmp_path: Path) -> None:
    path = build(folder, tmp_path / "cache")
    os.truncate(path / token_store.TOKENS, 10)
    with pytest.raises(ValueError, match="is damaged.*remove the folder"):
        TokenStore(path)


def test_reading_before_preparing_says_what_to_call(folder: Path, tmp_path: Path) -> None:
    source = TextSource("files", str(folder))
    data = TextStreamDataModule(source, chunk_length=8, cache=str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"prepare_data\(\)"):
        data.setup("fit")


def test_a_copy_for_a_worker_carries_the_path_not_the_tokens(folder: Path, tmp_path: Path) -> None:
    data = make_data(folder)
    for mode in ("stream", "packed"):
        data.mode = mode
        dataset = data.build_dataset("train")
        sent = pickle.dumps(dataset)
        assert len(sent) < 2000
        assert isinstance(pickle.loads(sent).store.tokens, np.memmap)


# --- several processes ---


def _prepare(folder: Path, cache: Path, start: threading.Event) -> None:
    start.wait()
    build(folder, cache)


@pytest.mark.slow
def test_processes_that_prepare_at_once_write_one_folder(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    workers = [
        context.Process(target=_prepare, args=(folder, tmp_path / "cache", start)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    (path,) = folders(tmp_path / "cache")
    assert path == build(folder, tmp_path / "cache")
    assert len(documents_of(TokenStore(path))) == 5


def test_the_second_one_waits_for_the_first_ones_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, writing, go_on, calls = (
        token_store._write_documents,
        threading.Event(),
        threading.Event(),
        [],
    )

    def slow(*args):
        calls.append(args)
        writing.set()
        assert go_on.wait(30)
        return write(*args)

    monkeypatch.setattr(token_store, "_write_documents", slow)
    threads = [threading.Thread(target=build, args=(folder, tmp_path / "cache")) for _ in range(2)]
    threads[0].start()
    assert writing.wait(30)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive() and len(calls) == 1
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert len(calls) == 1 and len(folders(tmp_path / "cache")) == 1


def _die_while_writing(folder: Path, cache: Path) -> None:
    write = token_store._write_documents

    def die(*args) -> None:
        write(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    token_store._write_documents = die
    build(folder, cache)


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_looks_complete(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    worker = multiprocessing.get_context("spawn").Process(
        target=_die_while_writing, args=(folder, cache)
    )
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert [path.name.startswith(".text-corpus") for path in folders(cache)] == [True]
    path = build(folder, cache)
    assert folders(cache) == [path], "what the killed process left was removed"
    assert len(documents_of(TokenStore(path))) == 5
