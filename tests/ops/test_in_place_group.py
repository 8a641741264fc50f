"""In-Place TTT whose rows are shared by processes, against one process that has all tokens."""

from pathlib import Path

import pytest
import torch
from in_place_cases import FORMS, TOKENS, carried_state, make_case, random_flags
from shared_cases import TOLERANCE, distance, own_tokens, part, read_calls, weighted
from two_processes import in_processes

CHUNK, BATCH = 3, 3
LENGTHS = {2: [22, 2, 10], 3: [21, 3, 9]}
"""Tokens of the calls, by the number of processes: chunks end anywhere, and parts of one token
are shorter than a chunk."""

FLAGS: tuple[tuple[str, ...], ...] = ((), ("mask",), ("mask", "document_ids"))


def share_rows(rank: int, folder: Path, world: int) -> None:
    """What a process does."""
    group, lengths = torch.distributed.group.WORLD, LENGTHS[world]
    for form, options in FORMS.items():
        for flags in FLAGS:
            case = make_case(time=sum(lengths), chunk_size=CHUNK, batch=BATCH, **options)
            case = random_flags(case, 3, *flags) if flags else case
            case = carried_state(case, 4) if form == "clipped_chunks" else case
            case = weighted(case, case.tensors["v"])
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


def share_bfloat16(rank: int, folder: Path) -> None:
    """What a process does: parts that are long enough for products of bfloat16 numbers."""
    group = torch.distributed.group.WORLD
    case = make_case(time=140, chunk_size=5, dtype=torch.bfloat16, clip=2.0)
    expected, state = case.run("torch")
    own = slice(70 * rank, 70 * (rank + 1))
    cut = case.with_tensors(**{name: case.tensors[name][:, own] for name in TOKENS})
    actual, after = cut.run("torch", group=group)
    assert after.dw.dtype == torch.float32
    # the first is rounded to bfloat16; S is read in two parts, each rounded to it
    for ours, theirs in ((actual, expected[:, own]), (after.dw, state.dw)):
        assert (ours - theirs).float().norm() < 0.01 * theirs.float().norm()


@pytest.mark.slow
def test_processes_share_rows_of_bfloat16(tmp_path: Path) -> None:
    in_processes(2, share_bfloat16, tmp_path)
