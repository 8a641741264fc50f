"""Statistics of TTTLayer against their definitions, computed here one head at a time."""

import math
from typing import Any

import pytest
import torch
from gemma_cases import randomise
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lightning_modules.layers.ttt import TTTConfig, TTTLayer
from lightning_modules.streams import FastState

HIDDEN, HEADS, SIZE, LENGTH = 16, 2, 8, 7


def _layer(**options: Any) -> TTTLayer:
    torch.manual_seed(0)
    layer = TTTLayer(HIDDEN, TTTConfig(num_heads=HEADS, **options))
    return randomise(layer, 0).double()


def _input(seed: int = 1, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, HIDDEN, generator=generator, dtype=torch.float64)


def _rotate(k: Tensor, position: int) -> Tensor:
    """Rotary positions of one key `[D]`, pair by pair."""
    out = k.clone()
    for i in range(0, SIZE, 2):
        angle = position * 10_000.0 ** (-i / SIZE)
        out[i] = math.cos(angle) * k[i] - math.sin(angle) * k[i + 1]
        out[i + 1] = math.sin(angle) * k[i] + math.cos(angle) * k[i + 1]
    return out


def _objective(
    layer: TTTLayer, x: Tensor, deltas: list[Tensor], row: int, head: int, tokens: list[int]
) -> Tensor:
    """`mean_j 1/2 ||LN(f(k_j)) - (v_j - k_j)||^2` with the weights `W + dW` of one head."""
    weights = [w[head] + d[row, head] for w, d in zip(layer.fast_weights, deltas, strict=True)]
    part = slice(head * SIZE, (head + 1) * SIZE)
    losses = []
    for j in tokens:
        k = (layer.k_proj.weight @ x[row, j])[part]
        v = (layer.v_proj.weight @ x[row, j])[part]
        if layer.config.causal:
            k = _rotate(k, j % layer.config.mini_batch_size)
        z = k @ weights[0] + weights[1][0]
        if len(weights) == 4:
            gelu = torch.nn.functional.gelu(z, approximate="tanh")
            z = gelu @ weights[2] + weights[3][0]
        normed = (z - z.mean()) / (z.var(unbiased=False) + 1e-6).sqrt()
        error = normed * layer.ttt_norm_weight[head] + layer.ttt_norm_bias[head] - (v - k)
        losses.append(0.5 * error.square().sum())
    return torch.stack(losses).mean()


def _check_losses(
    layer: TTTLayer, x: Tensor, states: tuple[Any, Any], tokens: list[int], handle: FastState
) -> None:
    size = len(layer.fast_weights)
    for name, state in zip(("before", "after"), states, strict=True):
        published = handle.published["inner_loss"]["ttt"][name]
        assert published.shape == (2, HEADS)
        for row in range(2):
            for head in range(HEADS):
                expected = _objective(layer, x, state[:size], row, head, tokens)
                torch.testing.assert_close(published[row, head], expected.detach())


VARIANTS: list[dict[str, Any]] = [
    {"base_lr": 0.1},
    {"kind": "mlp", "base_lr": 0.02},
    {"causal": True, "mini_batch_size": 4, "base_lr": 0.1},
    {"kind": "mlp", "causal": True, "mini_batch_size": 3, "base_lr": 0.02},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_inner_loss_equals_the_objective_and_the_update_lowers_it(options: dict[str, Any]) -> None:
    layer, x = _layer(**options), _input()
    handle = FastState.transient({"inner_loss"})
    _, state = layer(x, fast_state=handle)
    fresh = [torch.zeros_like(delta) for delta in state]
    _check_losses(layer, x, (fresh, state), list(range(LENGTH)), handle)
    losses = handle.published["inner_loss"]["ttt"]
    assert (losses["after"] < losses["before"]).all()


def test_inner_loss_of_a_carried_state_starts_where_the_last_call_ended() -> None:
    layer, x = _layer(base_lr=0.1), _input()
    _, state = layer(_input(2))
    handle = FastState.transient({"inner_loss"})
    _, after = layer(x, state=state, fast_state=handle)
    _check_losses(layer, x, (state, after), list(range(LENGTH)), handle)


def test_inner_loss_counts_writing_tokens_only() -> None:
    layer, x = _layer(), _input()
    writes = torch.tensor([1, 0, 1, 0, 0, 0, 1]).bool().expand(2, -1)
    handle = FastState.transient({"inner_loss"})
    _, state = layer(x, write_mask=writes, fast_state=handle)
    fresh = [torch.zeros_like(delta) for delta in state]
    _check_losses(layer, x, (fresh, state), [0, 2, 6], handle)
    handle = FastState.transient({"inner_loss"})
    layer(x, write_mask=torch.zeros_like(writes), fast_state=handle)
    assert torch.equal(handle.published["inner_loss"]["ttt"]["after"], torch.zeros(2, 2).double())


def test_inner_loss_of_packed_documents_is_that_of_the_last_one() -> None:
    layer, x = _layer(), _input()
    _, state = layer(_input(2), document_ids=torch.zeros(2, LENGTH, dtype=torch.long))
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1]).expand(2, -1)
    handle = FastState.transient({"inner_loss"})
    _, after = layer(x, state=state, document_ids=ids, fast_state=handle)
    fresh = [torch.zeros_like(delta) for delta in after]
    _check_losses(layer, x, (fresh, after), [3, 4, 5, 6], handle)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_weight_statistics_equal_their_definition(kind: str) -> None:
    layer, x = _layer(kind=kind), _input()
    handle = FastState.transient({"fast_weight"})
    writes = torch.tensor([1, 1, 1, 1, 0, 0, 1]).bool().expand(2, -1)
    _, state = layer(x, fast_state=handle, slot="here", write_mask=writes)
    published = handle.published["fast_weight"]["here"]
    matrices = [0] if kind == "linear" else [0, 2]
    for head in range(HEADS):
        weight = torch.cat([layer.fast_weights[i][head].flatten() for i in matrices])
        torch.testing.assert_close(published["weight_norm"][head], weight.norm().detach())
        for row in range(2):
            delta = torch.cat([state[i][row, head].flatten() for i in matrices])
            torch.testing.assert_close(published["state_norm"][row, head], delta.norm().detach())
            cosine = (weight + delta) @ weight / (weight + delta).norm() / weight.norm()
            torch.testing.assert_close(published["cosine"][row, head], cosine.detach())
    assert torch.equal(published["eta"] == 0, ~writes.unsqueeze(-1).expand(-1, -1, HEADS))


def test_nothing_is_published_or_computed_unless_a_monitor_listens() -> None:
    layer, handle = _layer(), FastState.transient({"gate"})
    layer(_input(), fast_state=handle)
    assert handle.published == {}


def test_mistake_statistics_that_wait_for_the_device() -> None:
    # Fake tensors have no values: anything like `.item()` raises.
    with FakeTensorMode():
        layer = TTTLayer(HIDDEN, TTTConfig(num_heads=HEADS, causal=True, mini_batch_size=4))
        handle = FastState.transient({"fast_weight", "inner_loss"})
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        _, state = layer(torch.randn(2, LENGTH, HIDDEN), mask=mask)
        layer(torch.randn(2, LENGTH, HIDDEN), state=state, mask=mask, fast_state=handle)
    assert set(handle.published) == {"fast_weight", "inner_loss"}


def test_publishing_does_not_change_the_result_or_keep_a_graph() -> None:
    layer, x = _layer(), _input()
    handle = FastState.transient({"fast_weight", "inner_loss"})
    assert torch.equal(layer(x, fast_state=handle)[0], layer(x)[0])
    for slots in handle.published.values():
        assert not any(value.requires_grad for value in slots["ttt"].values())
