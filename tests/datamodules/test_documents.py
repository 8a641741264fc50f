"""Which documents are found, in which order, and what is said of those that cannot be used."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from text_cases import write_documents

from datamodules.corpora import open_corpus
from datamodules.dataset_documents import DatasetCorpus
from datamodules.documents import (
    Corpus,
    Document,
    FileCorpus,
    Skipped,
    TextSource,
    find_files,
    stdlib_files,
)

ROOT = Path(__file__).parents[2]


def names(path: Path | str) -> list[str]:
    return list(find_files(str(path)))


def documents(corpus: Corpus) -> list[Document]:
    return [item for item in corpus if isinstance(item, Document)]


def skipped(corpus: Corpus) -> list[Skipped]:
    return [item for item in corpus if isinstance(item, Skipped)]


# --- finding files ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    for name in ("b.txt", "a/c.md", "a/a.txt", ".git/config", "a/.hidden", "a/__pycache__/x.pyc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_a_folder_has_its_visible_files_in_the_order_of_their_names(folder: Path) -> None:
    assert names(folder) == ["a/a.txt", "a/c.md", "b.txt"]
    assert names(f"{folder}/") == names(folder)


def test_globs_are_named_relative_to_their_fixed_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names(folder / "**/*.txt") == ["a/a.txt", "b.txt"]
    assert names(folder / "a/*") == ["a.txt", "c.md"]
    assert names(folder / "b.txt") == ["b.txt"]
    monkeypatch.chdir(folder)
    assert names("*.txt") == ["b.txt"]
    assert TextSource("files", "a/*.txt").name == "a"
    assert TextSource("files", "*.txt").name == TextSource("files", ".").name == "corpus"
    assert TextSource("files", "/").name == "files"


def test_a_folder_whose_name_looks_like_a_glob_is_a_folder(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "data[1]", 3)
    assert len(names(folder)) == 3


def test_links_add_no_second_name_and_no_loop(folder: Path, tmp_path: Path) -> None:
    (folder / "0-link.txt").symlink_to(folder / "b.txt")
    (folder / "a" / "up").symlink_to(folder)
    assert names(folder) == ["a/a.txt", "a/c.md", "b.txt"]
    assert names(folder / "**/*") == ["a/a.txt", "a/c.md", "b.txt"]
    elsewhere = tmp_path / "blobs" / "1234"
    elsewhere.parent.mkdir()
    elsewhere.write_text("content")
    (folder / "model-card.md").symlink_to(elsewhere)
    assert names(folder) == ["a/a.txt", "a/c.md", "b.txt", "model-card.md"]


def test_pipes_are_no_documents(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "pipe")
    assert names(folder) == names(folder / "**/*") == ["a/a.txt", "a/c.md", "b.txt"]


def test_nothing_found_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; name a folder, a file or a glob"):
        find_files(str(tmp_path / "nowhere"))
    for path in (tmp_path, tmp_path / "*.txt", tmp_path / "nowhere/*.txt"):
        with pytest.raises(FileNotFoundError, match=r"has no files.*\*\*/\*.txt"):
            find_files(str(path))


def test_the_standard_library_is_without_tests_packages_and_build_settings() -> None:
    files = stdlib_files()
    assert {"abc.py", "asyncio/events.py", "unittest/mock.py"} <= files.keys()
    folders = {part for name in files for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not [name for name in files if "sysconfigdata" in name or name.startswith("config-")]
    assert all(name.endswith(".py") for name in files)
    assert list(files) == sorted(files)


# --- reading them ---


def test_documents_are_the_bytes_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\xef\xbb\xbf")
    (tmp_path / "b.txt").write_bytes("ü".encode())
    contents = [document.content for document in FileCorpus(find_files(str(tmp_path)))]
    assert contents == [b"one\r\ntwo\n\xef\xbb\xbf", b"\xc3\xbc"]


@pytest.fixture
def broken(folder: Path) -> Path:
    (folder / "latin.txt").write_bytes(b"abc\xe4")
    (folder / "lost.txt").symlink_to(folder / "gone")
    (folder / "nothing.txt").touch()
    return folder


def test_what_cannot_be_used_is_skipped_with_a_reason(broken: Path) -> None:
    corpus = FileCorpus(find_files(str(broken)))
    assert skipped(corpus) == [
        Skipped("latin.txt", "not UTF-8 at byte 3"),
        Skipped("lost.txt", "unreadable: No such file or directory"),
        Skipped("nothing.txt", "empty"),
    ]
    assert [document.name for document in documents(corpus)] == ["a/a.txt", "a/c.md", "b.txt"]


@pytest.mark.parametrize(
    ("name", "reason"), [("latin.txt", "not UTF-8 at byte 3"), ("lost.txt", "unreadable")]
)
def test_strict_names_the_file_and_the_fix(broken: Path, name: str, reason: str) -> None:
    other = {"latin.txt", "lost.txt"} - {name}
    (broken / other.pop()).unlink()
    message = f"{broken / name} is {reason}.*set strict: false"
    with pytest.raises(ValueError, match=message):
        list(FileCorpus(find_files(str(broken)), strict=True))


def test_an_unreadable_folder_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [skip.name for skip in skipped(FileCorpus(find_files(str(folder))))] == ["a"]


def test_the_hash_is_of_names_and_contents_wherever_they_lie(tmp_path: Path) -> None:
    def hash_of(**files: str) -> str | None:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return open_corpus(TextSource("files", str(folder))).key

    assert hash_of(a="1", b="2") == hash_of(b="2", a="1")
    different = [{"a": "1", "b": "2"}, {"a": "1"}, {"a": "1", "b": "3"}, {"a": "1", "c": "2"}]
    different += [{"a": "12", "b": ""}, {"a": "2", "b": "1"}]
    assert len({hash_of(**files) for files in different}) == len(different)


# --- Hugging Face datasets ---

TEXTS = ["first", "zweiter ü", None, "", "fifth"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def saved(path: Path, texts: list, column: str = "text") -> str:
    datasets.Dataset.from_dict({column: texts, "n": list(range(len(texts)))}).save_to_disk(path)
    return str(path)


def test_rows_of_a_saved_dataset_are_documents(tmp_path: Path) -> None:
    corpus = DatasetCorpus(TextSource("datasets", saved(tmp_path / "set", TEXTS)))
    assert len(corpus) == 5
    assert [(d.name, d.content.decode()) for d in documents(corpus)] == [
        ("row 0", "first"), ("row 1", "zweiter ü"), ("row 4", "fifth"),
    ]  # fmt: skip
    assert skipped(corpus) == [Skipped("row 2", "NoneType, not text"), Skipped("row 3", "empty")]
    with pytest.raises(ValueError, match="row 2: text is NoneType, not text; set strict: false"):
        list(DatasetCorpus(TextSource("datasets", str(tmp_path / "set"), strict=True)))


def test_a_row_keeps_its_split_when_others_come_before_it(tmp_path: Path) -> None:
    first = DatasetCorpus(TextSource("datasets", saved(tmp_path / "1", ["a", "b"])))
    second = DatasetCorpus(TextSource("datasets", saved(tmp_path / "2", ["new", "a", "b"])))
    places = {d.content: d.place for d in documents(second)}
    assert [places[d.content] for d in documents(first)] == [d.place for d in documents(first)]


def test_another_content_or_column_is_another_key(tmp_path: Path) -> None:
    keys = {
        DatasetCorpus(TextSource("datasets", saved(tmp_path / "1", ["a", "b"]))).key,
        DatasetCorpus(TextSource("datasets", saved(tmp_path / "2", ["a", "c"]))).key,
        DatasetCorpus(TextSource("datasets", str(tmp_path / "1"), column="n")).key,
    }
    assert len(keys) == 3
    assert DatasetCorpus(TextSource("datasets", str(tmp_path / "1"))).key in keys


def test_data_files_are_read_by_their_ending(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"body": "{name} 1"}}\n{{"body": "{name} 2"}}\n')

    def read(path: str) -> DatasetCorpus:
        return DatasetCorpus(TextSource("datasets", path, column="body"))

    found = documents(read(str(tmp_path / "*.jsonl")))
    assert [d.content for d in found] == [b"a 1", b"a 2", b"b 1", b"b 2"]
    before = read(str(tmp_path / "a.jsonl")).key
    (tmp_path / "a.jsonl").write_text('{"body": "changed"}\n')
    assert read(str(tmp_path / "a.jsonl")).key != before
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(str(tmp_path / "c.jsonl"))


def test_a_split_of_a_saved_dictionary(tmp_path: Path) -> None:
    parts = {"train": ["a"], "extra": ["b"]}
    rows = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "set")
    source = TextSource("datasets", str(tmp_path / "set"), split="extra")
    assert [d.content for d in documents(open_corpus(source))] == [b"b"]
    with pytest.raises(ValueError, match="no split 'test' but train, extra: set split"):
        open_corpus(TextSource("datasets", str(tmp_path / "set"), split="test"))


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column 'text'; it has body, n: set column"):
        open_corpus(TextSource("datasets", saved(tmp_path / "set", ["a"], column="body")))


def test_a_dataset_that_is_nowhere_says_what_can_be_named() -> None:
    with pytest.raises(FileNotFoundError, match="neither here nor on the hub"):
        open_corpus(TextSource("datasets", "nobody/nothing-of-this-name"))


def test_without_the_package_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        open_corpus(TextSource("datasets", str(tmp_path)))


def test_files_are_read_without_datasets_and_pyarrow() -> None:
    code = (
        "import sys; from datamodules.token_store import tokenise;"
        "print({'datasets', 'pyarrow', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "web"}, "choose stdlib, files or datasets"),
        ({"kind": "files"}, "kind: files needs a path"),
        ({"path": "x"}, "set kind: files"),
    ],
)
def test_sources_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextSource(**options)
