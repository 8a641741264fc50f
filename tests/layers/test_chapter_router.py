"""ChapterRouter against a loop over tokens, and its invariances: causal, streaming, packing."""

from __future__ import annotations

import pytest
import torch
from router_cases import (
    BLOCK,
    CARRYING,
    CAUSAL,
    B,
    Batch,
    D,
    T,
    assert_same,
    batch,
    fresh_like,
    make_router,
    naive_inputs,
    per_token,
    run,
)
from spy import SyncSpy
from torch import Tensor

from lightning_modules.layers.chapter_router import ChapterRouter
from lightning_modules.layers.memory_options import RouterConfig
from lightning_modules.layers.pooling import RouterState
from lightning_modules.streams import reset_rows

KINDS = ("plain", "masked", "documents", "both")
ALL = (*CAUSAL, "sequence")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ALL)
def test_routing_equals_a_loop_over_tokens_with_gradients(strategy: str, kind: str) -> None:
    router, given = make_router(strategy), batch(kind)
    given.x.requires_grad_()
    routing = run(router, given)
    logits = router.router(naive_inputs(router, given))
    choices = logits.sort(-1, descending=True).indices[..., :2]
    weights = logits.gather(-1, choices).log_softmax(-1)
    found = per_token(routing, T)
    assert_same(found, (choices + 1, weights), given.real)
    cotangent = torch.randn(weights.shape, generator=torch.Generator().manual_seed(5))
    cotangent = cotangent * given.real.unsqueeze(-1)
    leaves = [given.x, *router.parameters()]
    gradients = [
        torch.autograd.grad((value * cotangent).sum(), leaves, materialize_grads=True)
        for value in (found[1], weights)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", CAUSAL)
def test_reading_in_two_pieces_cut_anywhere_equals_one_pass(strategy: str, kind: str) -> None:
    router, given = make_router(strategy), batch(kind)
    whole = run(router, given)
    for cut in range(1, T):
        first = run(router, given.part(0, cut))
        second = run(router, given.part(cut), first.state)
        pieces = zip(per_token(first, cut), per_token(second, T - cut), strict=True)
        assert_same([torch.cat(p, 1) for p in pieces], per_token(whole, T), given.real)
        _assert_same_state(second.state, whole.state)


def _assert_same_state(state: RouterState | None, expected: RouterState | None) -> None:
    assert (state is None) == (expected is None)
    if state is not None and expected is not None:
        torch.testing.assert_close(tuple(state), tuple(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", CAUSAL)
def test_reading_token_by_token_equals_one_pass(strategy: str, kind: str) -> None:
    router, given = make_router(strategy), batch(kind)
    state, parts = None, []
    for t in range(T):
        routing = run(router, given.part(t, t + 1), state)
        state = routing.state
        parts.append(per_token(routing, 1))
    whole = run(router, given)
    found = [torch.cat(values, 1) for values in zip(*parts, strict=True)]
    assert_same(found, per_token(whole, T), given.real)
    _assert_same_state(state, whole.state)


def test_a_sequence_read_in_pieces_is_routed_by_what_was_read_so_far() -> None:
    router, given = make_router("sequence"), batch()
    first = run(router, given.part(0, 9))
    second = run(router, given.part(9), first.state)
    assert_same(per_token(second, T - 9), per_token(run(router, given), T - 9))
    assert not torch.equal(first.chapters, second.chapters)


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_earlier_decisions_do_not_change_a_bit_with_a_later_token(strategy: str, kind: str) -> None:
    router, given = make_router(strategy), batch(kind)
    before = per_token(run(router, given), T)
    changed = 0
    for t in range(T):
        x = given.x.clone()
        x[:, t] += 10
        after = per_token(run(router, given._replace(x=x)), T)
        same = [torch.equal(a[:, :t], b[:, :t]) for a, b in zip(after, before, strict=True)]
        changed += not all(same)
    # Routing by the whole sequence is not causal: the test sees it.
    assert changed == 0 if strategy != "sequence" else changed > T // 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ALL)
def test_a_row_alone_is_routed_as_in_a_batch(strategy: str, kind: str) -> None:
    router, given = make_router(strategy), batch(kind)
    together = run(router, given)
    for row in range(B):
        alone = run(router, given.rows(row))
        expected = [value[row : row + 1] for value in per_token(together, T)]
        assert_same(per_token(alone, T), expected, given.real[row : row + 1])


@pytest.mark.parametrize("strategy", ALL)
def test_what_masked_tokens_hold_does_not_matter(strategy: str) -> None:
    router, given = make_router(strategy), batch("both")
    other = given._replace(
        x=torch.where(given.real.unsqueeze(-1), given.x, 1e6),
        documents=torch.where(given.real, given.documents, 77),
    )
    expected, found = run(router, given), run(router, other)
    assert_same(per_token(found, T), per_token(expected, T), given.real)
    _assert_same_state(found.state, expected.state)


@pytest.mark.parametrize("padding", [1, 3, 4, 6])
@pytest.mark.parametrize("strategy", ALL)
def test_padding_on_the_left_changes_nothing(strategy: str, padding: int) -> None:
    router, given = make_router(strategy), batch()
    mask = torch.ones(B, padding + T, dtype=torch.bool)
    mask[:, :padding] = False
    filler = torch.full((B, padding, D), 5.0, dtype=torch.float64)
    prompt = torch.cat([torch.ones(B, padding, dtype=torch.bool), given.prompt], 1)
    padded = Batch(torch.cat([filler, given.x], 1), mask, None, prompt)
    expected, found = run(router, given), run(router, padded)
    after = [value[:, padding:] for value in per_token(found, padding + T)]
    assert_same(after, per_token(expected, T))
    _assert_same_state(found.state, expected.state)
    further = batch("plain", 1)
    states = (expected.state, found.state)
    decoded = [per_token(run(router, further._replace(prompt=None), s), 1) for s in states]
    assert_same(*decoded)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("strategy", ALL)
def test_packed_documents_are_routed_as_separate_ones(strategy: str, aligned: bool) -> None:
    lengths = (8, 4, 3) if aligned else (5, 4, 6)
    router, given = make_router(strategy), batch("plain").rows(0)
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).unsqueeze(0)
    packed = per_token(run(router, given._replace(documents=ids)), T)
    separate = [per_token(run(router, part), part.x.shape[1]) for part in _cut(given, lengths)]
    found = [torch.cat(values, 1) for values in zip(*separate, strict=True)]
    if strategy == "block" and not aligned:  # the grid is the row's: another mean
        assert not torch.equal(found[1], packed[1])
    else:
        assert_same(found, packed)
    if strategy == "block" and aligned:
        promised = run(router, given._replace(documents=ids), document_alignment=2 * BLOCK)
        assert promised.block_size == BLOCK
        assert_same(per_token(promised, T), packed)


def _cut(given: Batch, lengths: tuple[int, ...]) -> list[Batch]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [given.part(end - n, end) for n, end in zip(lengths, ends, strict=True)]


@pytest.mark.parametrize("strategy", CARRYING)
def test_a_row_of_zeros_in_the_state_is_fresh(strategy: str) -> None:
    router, given = make_router(strategy), batch("both")
    state = run(router, given).state
    slots = reset_rows({"slot": state._asdict()}, torch.tensor([True, False, True, False]))
    mixed = run(router, given, RouterState(**slots["slot"]))
    fresh, carried = run(router, given), run(router, given, state)
    for row in range(B):
        expected = per_token(fresh if row in (0, 2) else carried, T)
        expected, found = ([v[row] for v in pair] for pair in (expected, per_token(mixed, T)))
        assert_same(found, expected, given.real[row])
    assert_same(per_token(run(router, given, fresh_like(state)), T), per_token(fresh, T))
    assert not torch.equal(fresh.log_weights, carried.log_weights)


@pytest.mark.parametrize("strategy", CARRYING)
def test_a_document_goes_on_where_its_id_does_and_another_starts_afresh(strategy: str) -> None:
    router, given = make_router(strategy), batch("plain")
    ids = torch.full((B, T), 3)
    state = run(router, given._replace(documents=ids)).state
    assert state.document_id.tolist() == [3] * B
    ids = torch.tensor([3, 4, 3, 4]).unsqueeze(1).expand(B, T)
    found = per_token(run(router, given._replace(documents=ids), state), T)
    same = per_token(run(router, given, state), T)
    assert_same([v[::2] for v in found], [v[::2] for v in same])
    if strategy != "block":  # whose grid goes on
        fresh = per_token(run(router, given), T)
        assert_same([v[1::2] for v in found], [v[1::2] for v in fresh])
    assert not torch.equal(found[1][1], same[1][1])


def test_decisions_per_block_and_per_token_are_the_same() -> None:
    router, given = make_router("block"), batch()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 9:], mask[2, 5:7] = False, False
    for tokens in (None, mask):
        call = given._replace(mask=tokens)
        blocks = run(router, call, document_alignment=BLOCK)
        single = run(router, call, fresh_like(blocks.state))
        assert (blocks.block_size, single.block_size) == (BLOCK, 1)
        assert blocks.chapters.shape == (B, -(-T // BLOCK), 2)
        assert_same(per_token(blocks, T), per_token(single, T), call.real)
        _assert_same_state(blocks.state, single.state)


def test_decisions_are_per_block_as_far_as_the_host_knows_that_they_can_be() -> None:
    router, given = make_router("block"), batch("documents")
    state, plain = run(router, given).state, given._replace(documents=None)
    masked = given._replace(mask=given.real)
    assert run(router, plain).block_size == BLOCK
    for call, carried in ((given, None), (masked, None), (plain, state), (given, state)):
        assert run(router, call, carried).block_size == 1
        assert run(router, call, carried, document_alignment=6).block_size == 1
        assert run(router, call, carried, document_alignment=2 * BLOCK).block_size == BLOCK


def test_blocks_go_on_by_the_promise_that_calls_begin_with_one() -> None:
    router, given = make_router("block"), batch("plain", 4 * BLOCK)
    whole = run(router, given)
    first = run(router, given.part(0, 2 * BLOCK), document_alignment=BLOCK)
    second = run(router, given.part(2 * BLOCK), first.state, document_alignment=BLOCK)
    assert second.block_size == BLOCK
    chapters = torch.cat([first.chapters, second.chapters], 1)
    weights = torch.cat([first.log_weights, second.log_weights], 1)
    assert_same((chapters, weights), (whole.chapters, whole.log_weights))
    _assert_same_state(second.state, whole.state)


def test_a_prompt_is_frozen_for_its_answer_and_goes_on_in_the_next_turn() -> None:
    router, given = make_router("prompt"), batch("plain", length=9).rows(0)
    prompt = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 1, 0]], dtype=torch.bool)
    logits = run(router, given._replace(prompt=prompt)).logits[0]
    # A product of a batch may be summed in another order than that of a vector: not bit for bit.
    empty = router.router(router.default_vector)  # no prompt yet
    torch.testing.assert_close(logits[0], empty, rtol=0, atol=1e-14)
    for t in (4, 5, 6):
        torch.testing.assert_close(logits[t], logits[3], rtol=0, atol=1e-14)
    assert (logits[7] - logits[6]).abs().max() > 1e-2
    torch.testing.assert_close(logits[8], router.router(given.x[0, [1, 2, 3, 7]].mean(0)))


def test_in_generation_a_call_of_one_token_is_an_answer_unless_there_is_no_prompt() -> None:
    router, given = make_router("prompt"), batch("plain")._replace(prompt=None)
    first = run(router, given)
    answer = run(router, given.part(3, 4), first.state)
    assert_same(per_token(answer, 1), [v[:, -1:] for v in per_token(first, T)])
    state = RouterState(*(v.index_fill(0, torch.tensor([2]), 0) for v in first.state))
    logits = run(router, given.part(3, 4), state).logits[:, 0]
    torch.testing.assert_close(logits[2], router.router(given.x[2, 3]))
    torch.testing.assert_close(logits[1], first.logits[1, -1])
    other = given.part(3, 4)._replace(documents=torch.ones(B, 1, dtype=torch.int64))
    logits = run(router, other, first.state).logits[:, 0]
    torch.testing.assert_close(logits, router.router(given.x[:, 3]))
    turn = run(router, given.part(3, 5), first.state).logits[:, -1]
    both = torch.cat([given.x, given.x[:, 3:5]], 1).mean(1)
    torch.testing.assert_close(turn, router.router(both))


@pytest.mark.parametrize("n", [3, 65])
def test_ties_go_to_the_chapters_with_the_lowest_numbers(n: int) -> None:
    router = make_router("token", num_chapters=n + 1)
    with torch.no_grad():
        router.router.weight.zero_()
        router.router.bias.zero_()[-1] = 1.0
    assert (run(router, batch()).chapters == torch.tensor([n, 1])).all()


@pytest.mark.parametrize("strategy", ALL)
def test_evaluation_equals_training_and_nothing_is_kept(strategy: str) -> None:
    router, given = make_router(strategy), batch("both")
    kept = {name: value.clone() for name, value in router.state_dict().items()}
    found = [per_token(run(router.train(mode), given), T) for mode in (True, False)]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert all(torch.equal(value, kept[name]) for name, value in router.state_dict().items())
    assert set(router.state_dict()) == set(dict(router.named_parameters()))


@pytest.mark.parametrize("strategy", ALL)
def test_low_precision_is_routed_in_float32(strategy: str) -> None:
    given = batch("both")
    given = given._replace(x=given.x.bfloat16())
    router = make_router(strategy).float()
    expected = run(router, given._replace(x=given.x.float()))
    with torch.autocast("cpu", torch.bfloat16):
        found = run(router, given)
    assert found.logits.dtype == found.log_weights.dtype == torch.float32
    assert found.state is None or found.state.total.dtype == torch.float32
    # Only the order of float32 sums may differ.
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    low = run(router.bfloat16(), given)
    assert low.logits.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ALL)
def test_nothing_waits_for_the_device(strategy: str, kind: str) -> None:
    options = {"balance_coefficient": 1.0, "load_coefficient": 1.0, "z_coefficient": 1.0}
    router, given = make_router(strategy, **options), batch(kind)
    state = run(router, given).state
    with SyncSpy() as spy:
        for alignment in (None, BLOCK):
            routing = run(router, given, state, document_alignment=alignment)
            losses = routing.losses(router.config, given.mask)
            routing.statistics(given.mask)
            (routing.log_weights.sum() + sum(losses.values())).backward()
    assert not spy.events


@pytest.mark.quick("token")
@pytest.mark.parametrize("strategy", ["block", "token"])
def test_the_router_compiles_to_one_graph(strategy: str) -> None:
    router, given = make_router(strategy), batch()

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        routing = router(x)
        return routing.chapters, routing.log_weights

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(compiled(given.x), call(given.x))


def test_a_state_of_other_rows_or_options_is_refused() -> None:
    router, given = make_router("rolling"), batch()
    state = run(router, given).state
    with pytest.raises(ValueError, match="holds 4 rows, but the batch has 1.*select the rows"):
        run(router, given.rows(0), state)
    with pytest.raises(ValueError, match="holds 4 recent places.*rolling needs 2.*state=None"):
        run(make_router("rolling", window=3), given, state)
    with pytest.raises(ValueError, match="strategy=block needs 1"):
        run(make_router("block"), given, state)


def test_parameters_are_those_that_the_strategy_needs() -> None:
    for strategy in ALL:
        config = RouterConfig(5, 2, strategy, shared=1, allow_non_causal=True)
        router = ChapterRouter(D, config)
        learned = {"default_vector"} if strategy in ("block", "prompt") else set()
        assert set(dict(router.named_parameters())) == {"router.weight", "router.bias"} | learned
        assert router.router.weight.shape == (4, D)
        assert not router.router.bias.any() and router.router.weight.any()
