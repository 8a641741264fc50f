"""ProductKeyMemory against all n^2 products, one by one; invariances, sizes, dtypes, errors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bank_cases import SizeSpy, normal
from spy import SyncSpy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.layers.memory_bank import MemoryBank
from lightning_modules.layers.product_keys import ProductKeyConfig, ProductKeyMemory

HIDDEN, LENGTH = 10, 6
SIZES: dict[str, dict[str, Any]] = {
    "default": {},
    "one_head": {"num_heads": 1},
    "top_1": {"top_k": 1},
    "all_sub_keys": {"top_k": 5, "num_keys": 5},
    "wide_values": {"value_width": 7},
}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
"""float64 sums of at most a hundred terms in another order."""


class Alone(ProductKeyMemory):
    """With its bank inside, so that both move and train together."""

    def __init__(self, hidden_size: int, config: ProductKeyConfig) -> None:
        super().__init__(hidden_size, config, config.make_bank(hidden_size))
        self.owned = self.bank


def _config(**options: Any) -> ProductKeyConfig:
    return ProductKeyConfig(
        **{"num_keys": 9, "num_heads": 3, "top_k": 4, "key_width": 6, **options}
    )


def _memory(size: str = "default") -> ProductKeyMemory:
    """In float64, with an output that is not zero and rows as large as the other weights."""
    torch.manual_seed(0)
    memory = Alone(HIDDEN, _config(**SIZES[size])).double()
    nn.init.normal_(memory.output.weight, std=0.5)
    nn.init.normal_(memory.bank.weight)
    nn.init.normal_(memory.keys)
    return memory


def _x(batch: int = 2) -> Tensor:
    return normal(batch, LENGTH, HIDDEN)


def _all_scores(memory: ProductKeyMemory, x: Tensor) -> Tensor:
    """`s(i, j)` of every pair, `[B, T, H, n^2]`, from n^2 keys that are written out."""
    heads, n = memory.config.num_heads, memory.config.num_keys
    queries = F.linear(x, memory.query.weight).unflatten(-1, (heads, -1))
    first, second = memory.keys
    keys = [torch.cat([first[:, i], second[:, j]], -1) for i in range(n) for j in range(n)]
    return torch.einsum("bthc,rhc->bthr", queries, torch.stack(keys))


def _dense(memory: ProductKeyMemory, x: Tensor, k: int | None = None) -> Tensor:
    """The layer, with a softmax over all n^2 scores of which the others are -inf."""
    scores = _all_scores(memory, x)
    lowest = scores.sort(-1, descending=True).values[..., (k or memory.config.top_k) - 1]
    weights = scores.masked_fill(scores < lowest.unsqueeze(-1), -torch.inf).softmax(-1)
    read = (weights @ memory.bank.weight).sum(2)
    return F.linear(read * F.silu(F.linear(x, memory.gate.weight)), memory.output.weight)


@pytest.mark.parametrize("size", SIZES)
def test_selected_rows_are_the_best_of_all_products(size: str) -> None:
    memory, x = _memory(size), _x()
    rows, weights = memory.select(x)
    best, expected = _all_scores(memory, x).sort(-1, descending=True)
    k = memory.config.top_k
    assert torch.equal(rows, expected[..., :k])
    torch.testing.assert_close(weights, best[..., :k].softmax(-1), **CLOSE)


@pytest.mark.parametrize("size", SIZES)
def test_output_and_every_gradient_equal_those_of_the_dense_layer(size: str) -> None:
    memory, found = _memory(size), []
    for layer in (memory, lambda x: _dense(memory, x)):
        x = _x().requires_grad_()
        out = layer(x)
        loss = (out * normal(*out.shape, seed=7)).sum()
        wanted = [x, *memory.parameters()]
        found.append([out, *torch.autograd.grad(loss, wanted, materialize_grads=True)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)


def test_wrong_variants_are_not_the_dense_layer() -> None:
    memory, x = _memory(), _x()
    out = memory(x)
    assert not torch.allclose(_dense(memory, x, k=5), out, rtol=1e-3)
    with torch.no_grad():
        memory.keys.copy_(memory.keys.flip(0))  # the halves meet the other table
    assert not torch.allclose(_dense(memory, x), out, rtol=1e-3)


def test_wrong_variant_that_takes_the_best_of_each_table_in_pairs_misses_the_best() -> None:
    memory, x = _memory(), _x()
    n, k = memory.config.num_keys, memory.config.top_k
    queries = memory.query(x).unflatten(-1, (memory.config.num_heads, 2, -1))
    at = torch.einsum("bthic,ihnc->bthin", queries, memory.keys).topk(k).indices
    in_pairs = (at[..., 0, :] * n + at[..., 1, :]).sort(-1).values
    assert not torch.equal(in_pairs, memory.select(x)[0].sort(-1).values)


def test_gradcheck() -> None:
    memory = _memory()
    x = normal(1, 2, HIDDEN).requires_grad_()
    assert torch.autograd.gradcheck(memory, (x,), fast_mode=True)


def test_a_new_memory_reads_zeros_bit_for_bit_and_learns() -> None:
    memory = Alone(HIDDEN, _config())
    x = _x().float()
    assert torch.equal(memory(x), torch.zeros_like(x))
    optimizer = torch.optim.SGD(memory.parameters(), lr=1.0)
    for _ in range(2):
        memory.zero_grad()
        (memory(x) - x).square().sum().backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in memory.parameters())


def test_parameters_are_drawn_as_documented() -> None:
    torch.manual_seed(0)
    memory = Alone(64, ProductKeyConfig(num_keys=64, key_width=32))
    assert 0.99 < memory.keys.abs().max() * 16**0.5 <= 1
    assert abs(memory.bank.weight.std() / 0.02 - 1) < 0.02
    assert not memory.output.weight.any()


@pytest.mark.parametrize("size", SIZES)
def test_number_of_parameters_is_the_formula(size: str) -> None:
    memory = _memory(size)
    c, width = memory.config, memory.config.value_width or HIDDEN
    expected = HIDDEN * c.num_heads * c.key_width  # queries
    expected += c.num_heads * c.num_keys * c.key_width  # two tables of half the width
    expected += c.num_keys**2 * width + 2 * HIDDEN * width  # rows; gate and output
    assert sum(parameter.numel() for parameter in memory.parameters()) == expected
    assert isinstance(memory.bank, MemoryBank)  # rows are in the group of banks


def test_a_token_stays_bit_identical_whatever_happens_to_the_others() -> None:
    memory, x = _memory(), _x(3)
    with torch.no_grad():
        before = memory(x)
        other = x.clone()
        other[0, 3], other[2] = other[0, 3] + 1, -x[2]
        after = memory(other)
    changed = torch.zeros(3, LENGTH, dtype=torch.bool)
    changed[0, 3], changed[2] = True, True
    assert torch.equal(after[~changed], before[~changed])
    assert (after[changed] - before[changed]).abs().amax(-1).min() > 1e-3


def test_rows_that_nobody_reads_get_a_gradient_of_exactly_zero() -> None:
    memory, x = _memory("top_1"), _x()
    memory(x).sum().backward()
    read = torch.zeros(81, dtype=torch.bool)
    read[memory.select(x)[0].flatten()] = True
    assert torch.equal(memory.bank.weight.grad.any(-1), read) and not read.all()


def test_layers_that_share_a_bank_add_their_gradients() -> None:
    first, second, x = _memory(), _memory("top_1"), _x()
    separate = [torch.autograd.grad(m(x).sum(), m.bank.weight)[0] for m in (first, second)]
    second.attach(first.bank)
    (first(x) + second(x)).sum().backward()
    torch.testing.assert_close(first.bank.weight.grad, sum(separate), **CLOSE)


def test_checkpointing_changes_neither_output_nor_gradients() -> None:
    memory, found = _memory(), []
    for use in (False, True):
        x = _x().requires_grad_()
        out = checkpoint(memory, x, use_reentrant=False) if use else memory(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *memory.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_score_of_all_products_is_made_and_nothing_waits_for_the_device() -> None:
    memory, x = Alone(HIDDEN, _config(num_keys=100)), _x().float()
    with SizeSpy() as spy:
        memory(x).sum().backward()
    rows = 100**2 * HIDDEN  # the gradient of the bank
    assert spy.largest == rows < x.shape[0] * LENGTH * 3 * 100**2
    with SyncSpy() as waits:
        memory(x).sum().backward()
    assert not waits.events


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_any_mixture_of_dtypes_is_read_within_the_error_of_bfloat16(
    autocast: bool, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    # All sub-keys chosen in both tables: rounding changes no selection, so that errors stay small.
    config = _config(num_keys=2, top_k=2, num_heads=1)
    torch.manual_seed(3)
    memory = Alone(HIDDEN, config).double()
    nn.init.normal_(memory.output.weight, std=0.5)
    x = _x().to(torch.bfloat16).double()
    expected = memory(x)
    memory, x = memory.to(dtype), x.to(x_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = memory(x)
        weights = memory.select(x)[1]
    assert out.dtype == x_dtype and weights.dtype == torch.float32
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in memory.parameters())
    assert (out - expected).abs().max() <= 4e-2 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_keys": 0}, "product_keys.num_keys=0 must be at least 1"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"value_width": 0}, "value_width=0 must be at least 1"),
        ({"top_k": 10}, "top_k=10 of num_keys=9: choose at most num_keys"),
        ({"key_width": 5}, "key_width=5 must be even"),
    ],
)
def test_bad_options_name_the_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**options)
