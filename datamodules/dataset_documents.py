"""Rows of a Hugging Face dataset as documents."""

from __future__ import annotations

from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from datamodules.documents import EMPTY, Document, Skipped, TextSource
from datamodules.splits import unit_hash

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class DatasetCorpus:
    """Rows of a dataset, in its order; a row belongs to a split by a hash of its text.

    Args:
        source: path, subset, split and column.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: there is no such dataset.
        ValueError: it has no such split or column.
    """

    def __init__(self, source: TextSource) -> None:
        self.strict = source.strict
        self.column = source.column
        assert source.path is not None
        rows = load_rows(source.path, source.subset, source.split)
        if source.column not in rows.column_names:
            raise ValueError(
                f"{source.path} has no column {source.column!r}; it has "
                f"{', '.join(rows.column_names)}: set column"
            )
        self.rows = rows.select_columns([source.column])
        self.key: str = f"datasets:{self.rows._fingerprint}:{source.strict}"
        self.content_hash = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Document | Skipped]:
        """Texts one by one.

        Raises:
            ValueError: with `strict`, at a row that is not text.
        """
        number = 0
        for batch in self.rows.iter(batch_size=1000):
            for text in batch[self.column]:
                yield self._document(f"row {number}", text)
                number += 1

    def _document(self, name: str, text: Any) -> Document | Skipped:
        if isinstance(text, str):
            content = text.encode("utf-8")
            return Document(name, content, unit_hash(content)) if content else Skipped(name, EMPTY)
        reason = f"{type(text).__name__}, not text"
        if self.strict:
            raise ValueError(
                f"{name}: {self.column} is {reason}; set strict: false to skip such rows"
            )
        return Skipped(name, reason)


def load_rows(name: str, subset: str | None, split: str) -> Any:
    """The wanted split of a saved dataset, of data files, or of a dataset on the hub.

    Args:
        name: a folder of `save_to_disk`, a data file or glob, or a name on the hub.
        subset: configuration of a dataset on the hub.
        split: which part.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: there is no such dataset.
        ValueError: it has no such split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("kind: datasets needs the package: pip install datasets") from error
    path = Path(name).expanduser()
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.Dataset):
            return loaded
        if split not in loaded:
            raise ValueError(f"{name} has no split {split!r} but {', '.join(loaded)}: set split")
        return loaded[split]
    if path.suffix in LOADERS:
        files = sorted(glob(str(path), recursive=True))
        if not files:
            raise FileNotFoundError(f"{name} does not exist; name data files or a dataset")
        return datasets.load_dataset(LOADERS[path.suffix], data_files=files, split="train")
    try:
        return datasets.load_dataset(name, subset, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"no dataset {name!r}, neither here nor on the hub: name a folder of "
            "save_to_disk, a .json, .jsonl, .csv or .parquet file, or a dataset on the hub"
        ) from error
