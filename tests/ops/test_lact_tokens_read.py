"""LaCT that is told how many tokens the rows of its state have read, and asks no device."""

import pytest
import torch
from lact_cases import Case, make_case, random_flags
from spy import SyncSpy
from ttt_cases import assert_same, differentiate

from lightning_modules.ops.states import TokensRead

SIZE, TIME = 4, 11
READ = {
    "alike": (5, 5, 5),
    "full": (4, 8, 8),
    "apart": (0, 3, 9),
    "fresh": (0, 0, 0),
}
"""Tokens that the rows of a state have read, chunks of 4."""


def with_state(read: tuple[int, ...], seed: int) -> Case:
    """A case whose rows have read so many tokens."""
    before = make_case(time=max(*read, 1), chunk_size=SIZE, batch=len(read), seed=seed)
    counts = torch.tensor(read).unsqueeze(1)
    mask = torch.arange(max(*read, 1)) < counts
    _, state = before.with_options(mask=mask).run("torch")
    case = make_case(time=TIME, chunk_size=SIZE, batch=len(read), seed=seed + 1)
    weights = {name: before.tensors[name] for name in ("w0", "w1", "w2")}
    return case.with_tensors(**weights).with_state(type(state)(*(x.detach() for x in state)))


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("flags", [(), ("mask",)], ids=["plain", "masked"])
@pytest.mark.parametrize("read", READ)
def test_what_the_host_knows_changes_nothing_and_spares_the_wait(
    read: str, flags: tuple[str, ...], adapt: bool
) -> None:
    case = with_state(READ[read], 1)
    case = random_flags(case, 2, *flags) if flags else case
    case = case.with_options(adapt=adapt)
    told = case.with_options(tokens_read=TokensRead(READ[read]))
    for asked, spared in zip(
        differentiate(case, "torch"), differentiate(told, "torch"), strict=True
    ):
        assert_same(spared, asked, 1e-12, read)
    naive, _ = differentiate(case, "naive")
    assert_same(differentiate(told, "torch")[0], naive, 1e-9, read)
    with SyncSpy() as spy:
        told.run("torch")
    assert spy.events == []
    with SyncSpy() as spy:
        case.run("torch")
    assert spy.events, "power"


def test_rows_must_be_those_of_the_call() -> None:
    case = with_state((5, 5, 5), 1)
    with pytest.raises(ValueError, match="tokens_read must be of 3 rows, but is of 2"):
        case.run("torch", tokens_read=TokensRead((5, 5)))


def test_a_wrong_number_of_tokens_is_an_error() -> None:
    case = with_state((5, 5, 5), 1)
    with pytest.raises(RuntimeError, match="tokens_read are not those of the state"):
        case.run("torch", tokens_read=TokensRead((5, 6, 5)))
