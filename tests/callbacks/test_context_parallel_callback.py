"""ContextParallel: what it refuses, and the part of a chunk that a process reads."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from variant_cases import VARIANTS, make_trainer

from callbacks import ContextParallel
from lightning_modules.token_shares import own_chunk


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ttt_lora", "method=ttt_lora learns token by token in one process"),
        ("memory_bank", "MemoryBankModule needs all tokens of a row"),
        ("action_expert", "ActionExpertModule cannot"),
    ],
)
def test_modules_that_need_whole_rows_are_refused(name: str, message: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    trainer = make_trainer(tmp_path, 1, ContextParallel(1))
    with pytest.raises(ValueError, match=message):
        trainer.fit(variant.module(), variant.data(tmp_path))


def test_a_number_of_processes_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1, ContextParallel(2))
    with pytest.raises(ValueError, match="needs a multiple of 2 processes, but there are 1"):
        trainer.fit(VARIANTS["lact"].module(), VARIANTS["lact"].data(tmp_path))


def test_parts_are_the_chunk_with_its_labels_and_places() -> None:
    ids = torch.arange(12).view(2, 6)
    chunk = {"input_ids": ids, "labels": ids + 1, "chunk_index": torch.tensor([0, 2])}
    position = torch.arange(6) + 6 * chunk["chunk_index"].unsqueeze(1)
    groups = [SimpleNamespace(size=lambda: 3, rank=lambda r=r: r) for r in range(3)]
    parts = [own_chunk(chunk, position, group) for group in groups]
    for name, whole in {"input_ids": ids, "labels": ids + 1, "position": position}.items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), whole)
    assert parts[1]["place"].tolist() == [[2, 3], [2, 3]]
    assert all(part["chunk_index"] is chunk["chunk_index"] for part in parts)
    four = SimpleNamespace(size=lambda: 4, rank=lambda: 0)
    with pytest.raises(ValueError, match="chunks of 6 tokens cannot be shared by 4 processes"):
        own_chunk(chunk, position, four)
