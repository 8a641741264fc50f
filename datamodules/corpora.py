"""The documents of a source: which corpus reads them."""

from __future__ import annotations

from datamodules.dataset_documents import DatasetCorpus
from datamodules.documents import Corpus, FileCorpus, TextSource, find_files, stdlib_files


def open_corpus(source: TextSource) -> Corpus:
    """The documents of a source; nothing is read yet.

    Raises:
        FileNotFoundError: the path does not exist, or matches no file.
        ImportError: `datasets` is not installed.
        ValueError: a dataset has no such split or column.
    """
    if source.kind == "datasets":
        return DatasetCorpus(source)
    if source.kind == "stdlib":
        return FileCorpus(stdlib_files(), source.strict)
    assert source.path is not None
    return FileCorpus(find_files(source.path), source.strict)
