"""LaCTLayer: the invariances of the design, options by their effect, statistics."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lact_model_cases import CHUNK, VARIANTS, hidden, lact_layer, read_pieces
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_modules.layers.lact import LaCTLayer, LaCTLayerState
from lightning_modules.ops.states import LaCTState
from lightning_modules.streams import FastState

LENGTH = 15
SPLITS = [[1] * LENGTH, [CHUNK] * 3 + [3], [6, 9], [CHUNK - 1, 1, 11], [13, 2]]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
"""float64 sums in another order, through up to three updates and three networks."""


def _flat(state: LaCTLayerState) -> dict[str, Tensor]:
    return {**state.window._asdict(), **state.memory._asdict()}


# Time


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_before_a_changed_token_stay_bit_identical(variant: str) -> None:
    layer, x = lact_layer(variant), hidden()
    with torch.no_grad():
        before, _ = layer(x)
        for t in (0, CHUNK - 1, CHUNK, 9, LENGTH - 1):
            other = x.clone()
            other[:, t] += 1
            after, _ = layer(other)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_reaches_later_chunks_through_the_memory(variant: str) -> None:
    layer, x = lact_layer(variant, window_size=1), hidden()
    with torch.no_grad():
        before, _ = layer(x)
        x[:, 1] += 1
        after, _ = layer(x)
    change = (after - before).abs().amax(dim=(0, 2))
    assert not change[2:CHUNK].any() and (change[CHUNK:] > 1e-4).all()


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_stream_split_anywhere_equals_one_pass(variant: str, sizes: list[int]) -> None:
    layer, x = lact_layer(variant), hidden()
    with torch.no_grad():
        expected, whole = layer(x)
        actual, state = read_pieces(layer, x, sizes)
    torch.testing.assert_close(actual, expected, **CLOSE)
    torch.testing.assert_close(_flat(state), _flat(whole), **CLOSE)


def _gradients(layer: LaCTLayer, out: Tensor, x: Tensor) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    return list(torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_a_stream_equal_those_of_one_pass(variant: str) -> None:
    layer = lact_layer(variant)
    x = hidden().requires_grad_()
    expected = _gradients(layer, layer(x)[0], x)
    actual = _gradients(layer, read_pieces(layer, x, [6, 4, 5])[0], x)
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_wrong_variant_that_drops_a_part_of_the_state_is_not_one_pass() -> None:
    layer, x = lact_layer("low_rank"), hidden()
    with torch.no_grad():
        expected, _ = layer(x)
        _, state = layer(x[:, :10])
        zeroed = (
            state._replace(window=state.window._replace(keys=0 * state.window.keys)),
            state._replace(memory=state.memory._replace(pending_k=0 * state.memory.pending_k)),
            state._replace(memory=state.memory._replace(main_w0=state.memory.w0)),
            state._replace(memory=state.memory._replace(momentum_w1=0 * state.memory.w1)),
            state._replace(window=state.window._replace(tokens_seen=state.window.tokens_seen - 4)),
        )
        for wrong in zeroed:
            out, _ = layer(x[:, 10:], state=wrong)
            assert not torch.allclose(out, expected[:, 10:], rtol=1e-4, atol=1e-4)
        out, _ = layer(x[:, 10:], state=state)
    torch.testing.assert_close(out, expected[:, 10:], **CLOSE)


def test_a_sequence_of_one_chunk_never_writes() -> None:
    layer = lact_layer(window_size=None)
    _, state = layer(hidden(length=CHUNK))
    assert not state.memory.updates.any()
    for weight, learned in zip(state.memory[:3], layer.fast_weights, strict=True):
        torch.testing.assert_close(weight, learned.expand_as(weight), rtol=0, atol=0)


# Rows, documents, padding


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_among_other_rows_stays_bit_identical_and_equals_the_row_alone(variant: str) -> None:
    layer, x = lact_layer(variant), hidden(3)
    with torch.no_grad():
        expected, known = layer(x)
        alone, _ = layer(x[:1])
        x[1:] = hidden(2, seed=9)
        out, state = layer(x)
    assert torch.equal(out[0], expected[0]) and not torch.equal(out[1], expected[1])
    for name, value in _flat(state).items():
        assert torch.equal(value[0], _flat(known)[name][0]), name
    torch.testing.assert_close(alone, expected[:1], **CLOSE)


def _separate(layer: LaCTLayer, x: Tensor, parts: list[tuple[int, int]]) -> Tensor:
    """Output of a row `[1, T, hidden]` whose documents are read by themselves, else 0."""
    out = torch.zeros_like(x)
    for start, end in parts:
        out[:, start:end] = layer(x[:, start:end])[0]
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_documents_read_by_themselves(variant: str) -> None:
    layer, x = lact_layer(variant), hidden()
    ids = torch.tensor([[3] * 6 + [1] * 9, [0] * 1 + [2] * 10 + [4] * 4])
    parts = ([(0, 6), (6, 15)], [(0, 1), (1, 11), (11, 15)])
    with torch.no_grad():
        expected = [_separate(layer, x[r : r + 1], parts[r]) for r in range(2)]
        for sizes in ([LENGTH], [7, 8], [1] * LENGTH):
            actual, _ = read_pieces(layer, x, sizes, document_ids=ids)
            torch.testing.assert_close(actual, torch.cat(expected), **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_anywhere_equals_the_tokens_without_it(variant: str) -> None:
    layer, x = lact_layer(variant), hidden()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :4], mask[1, [3, 7, 8, 14]] = False, False
    with torch.no_grad():
        for sizes in ([LENGTH], [5, 10], [1] * LENGTH):
            out, state = read_pieces(layer, x, sizes, mask=mask)
            for row in range(2):
                real, alone = layer(x[row : row + 1, mask[row]])
                torch.testing.assert_close(out[row : row + 1, mask[row]], real, **CLOSE)
                own = {name: value[row : row + 1] for name, value in _flat(state).items()}
                if layer.config.attention.window_size is not None:
                    torch.testing.assert_close(own, _flat(alone), **CLOSE)
            assert not out[~mask].any()


def test_what_padding_holds_changes_nothing() -> None:
    layer, x = lact_layer(), hidden()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[:, :3], mask[1, 9] = False, False
    with torch.no_grad():
        before, state = layer(x, mask=mask)
        x[~mask] = 1e3
        after, other = layer(x, mask=mask)
    assert torch.equal(after, before)
    torch.testing.assert_close(_flat(other), _flat(state), rtol=0, atol=0)


def test_a_state_of_zeros_is_fresh() -> None:
    layer, x = lact_layer(), hidden()
    with torch.no_grad():
        expected, used = layer(x)
        parts = ([torch.zeros_like(value) for value in part] for part in used)
        zeros = LaCTLayerState(*(type(p)(*z) for p, z in zip(used, parts, strict=True)))
        out, state = layer(x, state=zeros)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(_flat(state), _flat(used), **CLOSE)


# Training


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_beyond_two_chunks(variant: str) -> None:
    layer = lact_layer(variant, window_size=1)
    x = hidden(length=2 * CHUNK + 1).requires_grad_()
    gradients = _gradients(layer, layer(x)[0], x)
    for (name, _), gradient in zip(layer.named_parameters(), gradients[1:], strict=True):
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-7, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_never_mutates_parameters_and_training_equals_evaluation(variant: str) -> None:
    layer, x = lact_layer(variant), hidden()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        expected, _ = layer.train()(x)
        assert torch.equal(layer.eval()(x)[0], expected)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.quick("default", "muon")
@pytest.mark.parametrize("variant", ["default", "muon", "stack3"])
def test_checkpointed_chunks_of_a_stream_and_recomputation_equal_neither(variant: str) -> None:
    x, found = hidden(length=21).requires_grad_(), []
    for use, recompute in ((False, False), (True, False), (False, True), (True, True)):
        layer, state, out = lact_layer(variant, recompute=recompute), None, []
        for part in x.split([7, 6, 8], dim=1):
            if use:
                o, state = checkpoint(layer, part, state=state, use_reentrant=False)
            else:
                o, state = layer(part, state=state)
            out.append(o)
        found.append([torch.cat(out, dim=1), *_gradients(layer, torch.cat(out, dim=1), x)])
    for other in found[1:]:
        for actual, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(actual, expected, **CLOSE)


def test_in_bfloat16_rates_weights_and_state_stay_float32() -> None:
    layer, x = lact_layer().bfloat16(), hidden().bfloat16()
    handle = FastState.transient({"fast_weight"})
    out, state = layer(x, fast_state=handle)
    assert out.dtype == state.window.keys.dtype == torch.bfloat16
    assert state.memory.w0.dtype == torch.float32
    assert handle.published["fast_weight"]["lact"]["eta"].dtype == torch.float32
    full = lact_layer().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, state = full(hidden().float())
    assert state.memory.w0.dtype == torch.float32
    expected, _ = full(hidden().float())
    torch.testing.assert_close(under.float(), expected, rtol=0.1, atol=0.1)


# Options


def test_a_stack_of_one_is_the_plain_layer_whatever_residual_ttt() -> None:
    plain, x = lact_layer(), hidden()
    names = dict(plain.named_parameters())
    assert {"w0", "w1", "w2"} <= names.keys() and "stacked_mlps" not in dict(plain.named_children())
    assert torch.equal(plain(x)[0], lact_layer(residual_ttt=True)(x)[0])


@pytest.mark.parametrize("r", [2, 3])
def test_a_stack_has_the_published_names(r: int) -> None:
    names = {name for name, _ in lact_layer(r=r).named_parameters()}
    assert {f"stacked_mlps.{j}.{w}" for j in range(r) for w in ("w0", "w1", "w2")} <= names
    low = {name for name, _ in lact_layer(r=r, w0_w2_low_rank=2).named_parameters()}
    assert {f"stacked_mlps.{j}.w0.w_left" for j in range(r)} <= low


def test_reset_parameters_draws_the_published_distributions() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"hidden_size": 256, "inter_multi": 2, "num_lact_heads": 2}
    dense = lact_layer(**options).float()
    dense.reset_parameters()
    assert (dense.qk_scale == 1).all() and not dense.qk_offset.any()
    for name, expected in (("w0", 128**-0.5), ("w2", 128**-0.5), ("w1", 256**-0.5)):
        assert abs(dense.get_parameter(name).std() / expected - 1) < 0.05, name
    low = LaCTLayer(lact_layer(**options, w0_w2_low_rank=32).config)
    assert abs(low.w0.w_left.std() / (0.5 * 32**-0.5) - 1) < 0.05
    assert abs(low.w2.w_right.std() / (0.5 * 128**-0.5) - 1) < 0.05
    w0, _, _ = low.initial_weights()
    product = low.w0.w_left @ low.w0.w_right
    torch.testing.assert_close(w0 - product, 0.5 * torch.eye(256, 128).expand(2, -1, -1))


def test_greedy_is_another_layer_only_in_a_stack() -> None:
    x = hidden()
    torch.testing.assert_close(lact_layer(greedy=True)(x)[0], lact_layer()(x)[0], **CLOSE)
    stacked = lact_layer("stack2")(x)[0]
    assert not torch.allclose(lact_layer("stack2", greedy=True)(x)[0], stacked, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_without_adapting_equals_learned_weights_at_moved_positions(variant: str) -> None:
    layer, x = lact_layer(variant), hidden()
    handle = FastState(adapt=False)
    with torch.no_grad():
        out, state = layer(x, fast_state=handle)
        still = lact_layer(variant, lact_chunk_size=100)
        expected, _ = still(x)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert state.window.tokens_seen.tolist() == [LENGTH, LENGTH]
    assert not state.memory.updates.any()


# Statistics


def _score(layer: LaCTLayer, state: LaCTState | None, k: Tensor, v: Tensor, row: int) -> Tensor:
    """Mean of `-<x_r(k), v>` per head, one token and head at a time."""
    learned = layer.fast_weights
    weights = learned if state is None else tuple(w[row] for w in state[:3])
    blocks, total = layer.config.memory.r, torch.zeros(2, dtype=k.dtype)
    for head in range(2):
        for key, value in zip(k[row, :, head], v[row, :, head], strict=True):
            x = key
            for j in range(blocks):
                w0, w1, w2 = (w[j, head] for w in weights)
                y = w1 @ (F.silu(w0 @ x) * (w2 @ x))
                x = x + y if layer.config.memory.residual_ttt and j < blocks - 1 else y
            total[head] -= x @ value
    return total / k.shape[1]


@pytest.mark.parametrize("variant", ["default", "stack3", "low_rank"])
def test_statistics_equal_their_definition(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, problems = lact_layer(variant), []
    monkeypatch.setattr(
        layer,
        "_inner_problem",
        lambda *a: problems.append(LaCTLayer._inner_problem(layer, *a)) or problems[-1],
    )
    with torch.no_grad():
        _, before = layer(hidden(length=10))
        handle = FastState.transient({"fast_weight", "inner_loss"})
        _, after = layer(hidden(seed=4), state=before, fast_state=handle, slot="here")
    published = handle.published["fast_weight"]["here"]
    assert torch.equal(published["eta"], problems[1].lr)
    for head in range(2):
        learned = torch.cat([w[:, head].flatten() for w in layer.fast_weights]).detach()
        torch.testing.assert_close(published["weight_norm"][head], learned.norm())
        for row in range(2):
            used = torch.cat([w[row, :, head].flatten() for w in after.memory[:3]])
            torch.testing.assert_close(published["state_norm"][row, head], (used - learned).norm())
            cosine = used @ learned / used.norm() / learned.norm()
            torch.testing.assert_close(published["cosine"][row, head], cosine)
    losses = handle.published["inner_loss"]["here"]
    for name, state in (("before", before), ("after", after)):
        for row in range(2):
            expected = _score(layer, state.memory, problems[1].k, problems[1].v, row)
            torch.testing.assert_close(losses[name][row], expected.detach())


def test_learning_lowers_the_published_inner_loss() -> None:
    layer = lact_layer("bare")
    handle = FastState.transient({"inner_loss"})
    layer(hidden(length=2 * CHUNK + 1), fast_state=handle)
    losses = handle.published["inner_loss"]["lact"]
    assert (losses["after"] < losses["before"]).all()


def test_statistics_count_real_tokens_of_the_last_document_and_fresh_rows_as_unchanged() -> None:
    layer, x = lact_layer(), hidden()
    ids = torch.tensor([0] * 5 + [1] * 10).expand(2, -1)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1], mask[0, 12] = False, False
    handle, alone = (FastState.transient({"inner_loss", "fast_weight"}) for _ in range(2))
    _, state = layer(hidden(seed=7), document_ids=torch.zeros(2, LENGTH, dtype=torch.long))
    fresh = LaCTLayerState(*(type(p)(*(v * 0 for v in p)) for p in state))
    layer(x, state=fresh, document_ids=ids, mask=mask, fast_state=handle)
    layer(x[:, 5:], mask=mask[:, 5:], fast_state=alone)
    for topic in ("inner_loss", "fast_weight"):
        for name in ("before", "after", "state_norm"):
            if name in handle.published[topic]["lact"]:
                pair = (p.published[topic]["lact"][name] for p in (handle, alone))
                torch.testing.assert_close(*pair, **CLOSE)
    assert not handle.published["fast_weight"]["lact"]["state_norm"][1].any()
    assert not handle.published["fast_weight"]["lact"]["eta"][~mask].any()
    assert not handle.published["inner_loss"]["lact"]["before"][1].any()


@pytest.mark.parametrize("base_lr", [1e-3, 0.7])
def test_inner_learning_rates_begin_at_the_base(base_lr: float) -> None:
    layer, handle = lact_layer(base_lr=base_lr), FastState.transient({"fast_weight"})
    for parameter in layer.lr_proj.parameters():
        torch.nn.init.zeros_(parameter)
    layer(hidden(), fast_state=handle)
    eta = handle.published["fast_weight"]["lact"]["eta"]
    torch.testing.assert_close(eta, torch.full_like(eta, base_lr), **CLOSE)


def test_statistics_cost_nothing_unless_listened_to() -> None:
    handle = FastState.transient()
    lact_layer()(hidden(), fast_state=handle)
    assert handle.published == {}
