"""LaCT whose rows are shared by processes, against one process that has all tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lact_cases import TOKENS, carried_state, make_case, random_flags
from shared_cases import TOLERANCE, distance, own_tokens, part, read_calls, weighted
from two_processes import in_processes

CHUNK, BATCH = 8, 3
LENGTHS = {2: [22, 2, 14], 3: [21, 3, 15]}
"""Tokens of the calls, by the number of processes: chunks, processes and calls end anywhere."""

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"momentum": False},
    "momentum": {"per_channel": True, "hidden": 4},
    "everything": {
        "blocks": 2,
        "residual": True,
        "prenorm": True,
        "muon": True,
        "muon_dtype": torch.float64,
        "recompute": True,
    },
}
FLAGS: tuple[tuple[str, ...], ...] = ((), ("mask",), ("mask", "document_ids"))


def share_rows(rank: int, folder: Path, world: int) -> None:
    """What a process does."""
    group, lengths = torch.distributed.group.WORLD, LENGTHS[world]
    for form, options in FORMS.items():
        for flags in FLAGS:
            case = make_case(time=sum(lengths), chunk_size=CHUNK, batch=BATCH, **options)
            case = random_flags(case, 3, *flags) if flags else case
            if form == "momentum":
                case = carried_state(case, 4)
            case = weighted(case, case.tensors["q"])
            whole = read_calls(case, lengths, slice)
            own = own_tokens(lengths, group)
            shared = read_calls(case, lengths, part(group), group=group)
            assert distance(shared, whole, own, TOKENS) < TOLERANCE, f"{form} {flags}"
            alone = read_calls(case, lengths, part(group))
            assert (alone.o - whole.o[:, own]).abs().max() > 1e-3, "power"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_share_rows_are_one_with_all_tokens(world: int, tmp_path: Path) -> None:
    in_processes(world, share_rows, tmp_path, world)
