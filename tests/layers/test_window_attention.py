"""Window attention against a double loop over queries and keys, whole and in pieces."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.layers import window_attention as module
from lightning_modules.layers.window_attention import (
    WindowPlan,
    WindowState,
    plan_window,
    window_attention,
)

ROWS, LENGTH, HEADS, SIZE = 3, 23, 2, 4
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
"""float64 sums in another order."""
SPLITS = [[LENGTH], [1] * LENGTH, [7, 9, 7], [1, 21, 1]]


def _tokens(seed: int = 0, length: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, length, HEADS, SIZE)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def _mask() -> Tensor:
    """Holes, padding on the left and on the right, and a row of padding only."""
    mask = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[0, -3:], mask[1, :4], mask[2] = False, False, False
    mask[0, 5:14] = False
    return mask


def _documents() -> Tensor:
    lengths = ([10, 3, 10], [LENGTH], [1, 22])
    return torch.stack(
        [torch.repeat_interleave(torch.arange(len(n)) + 4, torch.tensor(n)) for n in lengths]
    )


CALLS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "mask": {"mask": _mask()},
    "documents": {"document_ids": _documents()},
    "both": {"mask": _mask(), "document_ids": _documents()},
}


def double_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """The definition, one query after the other."""
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = [
                j
                for j in range(t + 1)
                if (mask is None or mask[row, j])
                and (document_ids is None or document_ids[row, j] == document_ids[row, t])
            ]
            if mask is not None and not mask[row, t]:
                continue
            seen = seen if window is None else seen[-window:]
            for head in range(q.shape[2]):
                scores = k[row, seen, head] @ q[row, t, head] / q.shape[3] ** 0.5
                out[row, t, head] = scores.softmax(0) @ v[row, seen, head]
    return out


def _read(
    tokens: list[Tensor], window: int | None, sizes: list[int], **call: Tensor
) -> tuple[Tensor, WindowState]:
    """The sequence in pieces, every piece with the state that the one before returned."""
    out, state, start = [], None, 0
    for size in sizes:
        part = slice(start, start + size)
        start += size
        own = {name: value[:, part] for name, value in call.items()}
        q, k, v = (x[:, part] for x in tokens)
        plan = plan_window(q, window, state=state, **own)
        o, state = window_attention(q, k, v, plan, state)
        out.append(o)
    assert state is not None
    return torch.cat(out, dim=1), state


@pytest.mark.quick("None-*", "2-*", "5-both-*")
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("window", [None, 1, 2, 5, LENGTH, 100])
def test_pieces_of_any_size_equal_the_double_loop(
    window: int | None, call: str, sizes: list[int]
) -> None:
    expected = double_loop(*_tokens(), window, **CALLS[call])
    actual, _ = _read(_tokens(), window, sizes, **CALLS[call])
    torch.testing.assert_close(actual, expected, **TIGHT)


@pytest.mark.parametrize("call", CALLS)
def test_blocks_of_queries_equal_the_double_loop(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    for window in (None, 3, 6):
        for sizes in ([LENGTH], [9, 14]):
            expected = double_loop(*_tokens(), window, **CALLS[call])
            actual, _ = _read(_tokens(), window, sizes, **CALLS[call])
            torch.testing.assert_close(actual, expected, **TIGHT)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("window", [None, 5])
def test_gradients_through_the_carried_window_equal_those_of_the_double_loop(
    window: int | None, call: str
) -> None:
    weight = torch.randn(ROWS, LENGTH, HEADS, SIZE, dtype=torch.float64)
    found = []
    for read in (
        lambda *tokens: double_loop(*tokens, window, **CALLS[call]),
        lambda *tokens: _read(list(tokens), window, [7, 9, 7], **CALLS[call])[0],
    ):
        tokens = [x.requires_grad_() for x in _tokens()]
        found.append(torch.autograd.grad((read(*tokens) * weight).sum(), tokens))
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, **TIGHT)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("window", [1, 5, 100])
def test_state_of_pieces_equals_that_of_one_pass_and_has_constant_size(
    window: int, call: str
) -> None:
    _, expected = _read(_tokens(), window, [LENGTH], **CALLS[call])
    for sizes in SPLITS[1:]:
        _, state = _read(_tokens(), window, sizes, **CALLS[call])
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
    assert state.keys.shape == (ROWS, window - 1, HEADS, SIZE)


def test_state_holds_the_last_real_tokens_of_the_last_document_newest_last() -> None:
    q, k, v = _tokens()
    mask, ids = _mask(), _documents()
    _, state = _read([q, k, v], 5, [LENGTH], mask=mask, document_ids=ids)
    for row in range(ROWS):
        real = [t for t in range(LENGTH) if mask[row, t]]
        last = [t for t in real if ids[row, t] == ids[row, real[-1]]]
        assert state.tokens_seen[row] == len(last)
        kept = last[-4:]
        assert not state.keys[row, : 4 - len(kept)].any()
        if kept:
            assert state.document_id[row] == ids[row, kept[-1]]
            assert torch.equal(state.keys[row, 4 - len(kept) :], k[row, kept])
            assert torch.equal(state.values[row, 4 - len(kept) :], v[row, kept])


def test_a_state_of_zeros_is_fresh() -> None:
    q, k, v = _tokens()
    _, state = _read(_tokens(1), 5, [LENGTH], document_ids=_documents())
    zeros = WindowState(*(torch.zeros_like(value) for value in state))
    for call in CALLS.values():
        fresh, after = window_attention(q, k, v, plan_window(q, 5, **call))
        plan = plan_window(q, 5, state=zeros, **call)
        reset, state = window_attention(q, k, v, plan, zeros)
        torch.testing.assert_close(reset, fresh, **TIGHT)
        torch.testing.assert_close(state, after, rtol=0, atol=0)


def test_reading_in_one_call_after_a_document_went_on_equals_the_double_loop() -> None:
    tokens, ids = _tokens(), torch.full((ROWS, LENGTH), 7)
    ids[0, 12:], ids[1, 9:] = 8, 3  # the cut at 12 is a document's end in row 0 only
    expected = double_loop(*tokens, 5, document_ids=ids)
    actual, _ = _read(tokens, 5, [12, 11], document_ids=ids)
    torch.testing.assert_close(actual, expected, **TIGHT)


@pytest.mark.parametrize("window", [None, 5])
def test_positions_count_the_real_tokens_of_a_document(window: int | None) -> None:
    mask, ids, state, start = _mask(), _documents(), None, 0
    counted: dict[tuple[int, int], int] = {}
    for size in (7, 9, 7):
        part = slice(start, start + size)
        x = torch.zeros(ROWS, size, HEADS, SIZE)
        plan = plan_window(x, window, mask=mask[:, part], document_ids=ids[:, part], state=state)
        _, state = window_attention(x, x, x, plan, state)
        for row in range(ROWS):
            for t in range(size):
                if mask[row, start + t]:
                    key = (row, int(ids[row, start + t]))
                    assert plan.positions[row, t] == counted.get(key, 0)
                    counted[key] = counted.get(key, 0) + 1
        start += size


def _without_order(plan: WindowPlan) -> WindowPlan:
    return plan._replace(order=None, rank=None)


WRONG: dict[str, Callable[[WindowPlan], WindowPlan]] = {
    "masked tokens take places": _without_order,
    "a longer window": lambda plan: plan._replace(first=(plan.first - 1).clamp(min=0)),
    "a shorter window": lambda plan: plan._replace(first=plan.first + 1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_variant_is_not_the_double_loop(wrong: str) -> None:
    q, k, v = _tokens()
    call = CALLS["both"]
    plan = WRONG[wrong](plan_window(q, 5, **call))
    out, _ = window_attention(q, k, v, plan)
    expected = double_loop(q, k, v, 5, **call)
    assert not torch.allclose(out[call["mask"]], expected[call["mask"]], rtol=1e-3, atol=1e-3)


def test_time_and_memory_grow_with_the_window_not_with_the_length() -> None:
    pairs: dict[int, int] = {}

    def count(length: int) -> None:
        pairs[length] = 0
        q, k, v = (torch.zeros(1, length, 1, 2) for _ in range(3))
        plan = plan_window(q, 64, mask=torch.ones(1, length, dtype=torch.bool))
        attention = module.F.scaled_dot_product_attention

        def counting(q: Tensor, k: Tensor, *args: Any, **options: Any) -> Tensor:
            pairs[length] += q.shape[2] * k.shape[2]
            return attention(q, k, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.F, "scaled_dot_product_attention", counting)
            window_attention(q, k, v, plan)

    count(1024)
    count(4096)
    assert pairs[4096] < 4.2 * pairs[1024] and pairs[4096] < 4096 * 4096 / 8


def test_bfloat16_state_continues_in_the_dtype_of_the_call() -> None:
    q, k, v = (x.bfloat16() for x in _tokens())
    _, state = window_attention(q, k, v, plan_window(q, 5))
    assert state.keys.dtype == torch.bfloat16
    q, k, v = (x.float() for x in _tokens())
    out, state = window_attention(q, k, v, plan_window(q, 5, state=state), state)
    assert out.dtype == state.keys.dtype == torch.float32


def test_without_a_window_a_state_shrinks_when_its_rows_have_started_afresh() -> None:
    q, k, v = _tokens()
    _, long = window_attention(q, k, v, plan_window(q, None))
    fresh = WindowState(*(torch.zeros_like(field) for field in long))
    expected, once = window_attention(q, k, v, plan_window(q, None))
    out, again = window_attention(q, k, v, plan_window(q, None, state=fresh), fresh)
    torch.testing.assert_close(out, expected, **TIGHT)
    assert again.keys.shape == once.keys.shape
    # One row goes on, so that its tokens stay.
    kept = WindowState(*(torch.cat([a[:1], b[1:]]) for a, b in zip(long, fresh, strict=True)))
    _, after = window_attention(q, k, v, plan_window(q, None, state=kept), kept)
    assert after.keys.shape[1] == 2 * LENGTH


def test_a_state_of_another_window_or_other_rows_is_an_error() -> None:
    q, k, v = _tokens()
    _, state = window_attention(q, k, v, plan_window(q, 5))
    with pytest.raises(ValueError, match="holds 4 tokens, but window_size=6 carries 5"):
        plan_window(q, 6, state=state)
    with pytest.raises(ValueError, match="holds 3 rows, but the batch has 2"):
        plan_window(q[:2], 5, state=state)
