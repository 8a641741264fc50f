"""MemoryAttention: zero start, invariances, quantised banks, what it allocates, dtypes, errors."""

from typing import Any

import pytest
import torch
from bank_cases import Chosen, SizeSpy, chosen, drawn_attention, normal, standard_bank
from spy import SyncSpy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.layers.memory_attention import LowRank, MemoryAttention
from lightning_modules.layers.memory_bank import StandardBank, make_bank
from lightning_modules.layers.memory_options import (
    BankConfig,
    MemoryAttentionConfig,
    RouterConfig,
)

HIDDEN, WIDTH, LENGTH, CHAPTERS, PER_CHAPTER = 16, 12, 8, 10, 3
ROWS = CHAPTERS * PER_CHAPTER
LORA_TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1},
    "low_rank": {"rank": 5},
    "low_rank_gqa": {"rank": 5, "num_kv_heads": 2},
    "reduced": {"width": 8, "inner": 8},
}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
"""float64 sums of at most a few hundred terms in another order."""


def _router(**options: Any) -> RouterConfig:
    return RouterConfig(**{"num_chapters": CHAPTERS, "top_k": 2, "strategy": "token", **options})


ROUTERS = {
    "joint": _router(),
    "mixture": _router(mixing="mixture"),
    "joint_shared": _router(shared=2),
    "mixture_shared": _router(mixing="mixture", shared=2),
    "mixture_per_chapter": _router(mixing="mixture", shared=2, shared_mode="per_chapter"),
}


def _bank(width: int = WIDTH) -> StandardBank:
    return standard_bank(normal(ROWS, width, seed=5))


def _x(batch: int = 2) -> Tensor:
    return normal(batch, LENGTH, HIDDEN)


def _gradients(layer: nn.Module, bank: nn.Module, out: Tensor, *leaves: Tensor) -> list[Tensor]:
    weight = normal(*out.shape, seed=7).to(out.dtype)
    wanted = [*leaves, *layer.parameters(), *bank.parameters()]
    return list(torch.autograd.grad((out * weight).sum(), wanted))


# The start


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_layer_reads_zeros_bit_for_bit_and_only_its_output_gets_a_gradient(
    shape: str,
) -> None:
    options = {"num_heads": 4, **SHAPES[shape]}
    width, inner = options.pop("width", WIDTH), options.pop("inner", HIDDEN)
    layer = MemoryAttention(HIDDEN, width, inner, MemoryAttentionConfig(**options)).double()
    bank, routing = _bank(width), chosen(ROUTERS["joint"])
    for out in (layer(_x(), bank), layer(_x(), bank, routing, ROUTERS["joint"])):
        assert torch.equal(out, torch.zeros_like(out))
        layer.zero_grad()
        out.sum().backward()
        moved = {name for name, p in layer.named_parameters() if p.grad.any()}
        assert moved == {"output.up.weight" if "rank" in options else "output.weight"}


@pytest.mark.parametrize("shape", SHAPES)
def test_names_are_no_targets_of_lora(shape: str) -> None:
    names = [name for name, _ in drawn_attention(**SHAPES[shape]).named_modules()]
    parts = {part for name in names for part in name.split(".")}
    assert not parts & LORA_TARGETS and {"query", "key", "value", "output"} <= parts


def test_low_rank_entries_vary_as_those_of_a_linear_map() -> None:
    torch.manual_seed(0)
    x, dense, low = torch.randn(500, 256), nn.Linear(256, 256, bias=False), LowRank(256, 256, 16)
    # Both have variance 1/3; 16 channels of rank vary by chance, by far less than this.
    assert abs(low(x).std() / dense(x).std() - 1) < 0.15


def test_the_layers_of_the_published_model_have_as_many_parameters() -> None:
    config = MemoryAttentionConfig(num_heads=12)
    with torch.device("meta"):
        layer = MemoryAttention(768, 768, 768, config)
    size = sum(parameter.numel() for parameter in layer.parameters())
    # Four layers, each with a norm in front and a router (with bias) over all 4097 chapters.
    assert 4 * (size + 768 + 769 * 4097) == 22_042_628


# Tokens, rows, chapters


@pytest.mark.parametrize("name", [None, *ROUTERS])
def test_a_token_stays_bit_identical_whatever_happens_to_the_others(name: str | None) -> None:
    layer, bank, x = drawn_attention(), _bank(), _x(3)
    router = None if name is None else ROUTERS[name]
    routing = None if router is None else chosen(router, 3)
    with torch.no_grad():
        before = layer(x, bank, routing, router)
        other = x.clone()
        other[0, 3], other[2] = other[0, 3] + 1, 0
        if routing is not None:
            routing.chapters[2] = router.shared + torch.tensor([0, 1])
        after = layer(other, bank, routing, router)
    changed = torch.zeros(3, LENGTH, dtype=torch.bool)
    changed[0, 3], changed[2] = True, True
    assert torch.equal(after[~changed], before[~changed])
    assert (after[changed] - before[changed]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_one_chapter_for_all_rows_equals_reading_without_a_router(shape: str) -> None:
    layer, x = drawn_attention(**SHAPES[shape]), _x()
    bank = _bank(layer.bank_width)
    router = _router(num_chapters=1, top_k=1, renormalize=False)
    routing = Chosen(torch.zeros(2, LENGTH, 1, dtype=torch.int64), torch.zeros(2, LENGTH, 1))
    torch.testing.assert_close(layer(x, bank, routing, router), layer(x, bank), **CLOSE)


@pytest.mark.parametrize("name", ROUTERS)
def test_blocks_equal_tokens_that_choose_what_their_block_chose(name: str) -> None:
    layer, bank, x, router = drawn_attention(), _bank(), _x(), ROUTERS[name]
    blocks = chosen(router, block_size=3)
    tokens = Chosen(*(i.repeat_interleave(3, dim=1)[:, :LENGTH] for i in blocks[:2]))
    out = layer(x, bank, blocks, router)
    torch.testing.assert_close(out, layer(x, bank, tokens, router), **CLOSE)


@pytest.mark.parametrize("name", ROUTERS)
def test_rows_that_nobody_chose_get_a_gradient_of_exactly_zero(name: str) -> None:
    layer, bank, router = drawn_attention(), _bank(), ROUTERS[name]
    layer(_x(), bank, chosen(router), router).sum().backward()
    read = (router.shared + 2 * router.top_k) * PER_CHAPTER
    assert not bank.weight.grad[read:].any()
    assert (bank.weight.grad[:read].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("name", [None, *ROUTERS])
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_and_values_made_before_equal_those_made_in_the_call(
    shape: str, name: str | None
) -> None:
    layer, x = drawn_attention(**SHAPES[shape]), _x()
    bank, router = _bank(layer.bank_width), None if name is None else ROUTERS[name]
    routing = None if router is None else chosen(router)
    projected = layer.project_bank(bank, 1 if router is None else CHAPTERS)
    assert layer.projected_bytes(ROWS) == sum(part.nbytes for part in projected)
    assert layer.projected_bytes(ROWS, torch.bfloat16) == layer.projected_bytes(ROWS) // 4
    expected = layer(x, bank, routing, router)
    nowhere = standard_bank(torch.full((ROWS, layer.bank_width), torch.nan, dtype=x.dtype))
    assert torch.equal(layer(x, nowhere, routing, router, projected=projected), expected)


def test_dropout_acts_on_the_probabilities_in_training_only() -> None:
    plain, layer, bank, x = drawn_attention(), drawn_attention(dropout=0.5), _bank(), _x()
    assert torch.equal(layer.eval()(x, bank), plain(x, bank))
    layer.train()
    draws = torch.stack([layer(x, bank) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    error = (draws.mean(0) - plain(x, bank)).abs() / (draws.std(0) / 400**0.5)
    assert error.max() < 5  # standard errors, of 256 numbers


def test_checkpointing_changes_neither_output_nor_gradients() -> None:
    layer, bank, router = drawn_attention(), _bank(), ROUTERS["joint_shared"]
    routing, found = chosen(router), []
    for use in (False, True):
        x = _x().requires_grad_()
        arguments = (x, bank, routing, router)
        out = checkpoint(layer, *arguments, use_reentrant=False) if use else layer(*arguments)
        found.append([out, *_gradients(layer, bank, out, x)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Quantised banks


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("name", [None, *ROUTERS])
def test_a_quantized_bank_is_read_as_its_rows_in_full_precision(
    name: str | None, block_size: int, bits: int
) -> None:
    layer, bank, x = drawn_attention(num_kv_heads=2), _bank().quantized(bits), _x()
    router = None if name is None else ROUTERS[name]
    routing = None if router is None else chosen(router, block_size=block_size)
    found = []
    for rows in (bank, standard_bank(bank.rows())):
        leaf = x.clone().requires_grad_()
        out = layer(leaf, rows, routing, router)
        found.append([out, *_gradients(layer, nn.Module(), out, leaf)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_routed_read_of_a_quantized_bank_never_computes_the_whole_bank(bits: int) -> None:
    layer, router = drawn_attention(), _router(num_chapters=500, shared=1)
    rows = 500 * PER_CHAPTER
    bank, routing, x = StandardBank(rows, WIDTH).double().quantized(bits), chosen(router), _x()
    with torch.no_grad(), SizeSpy() as spy:
        layer(x, bank, routing, router)
    assert spy.largest < rows * WIDTH / 4  # at most 5 of 500 chapters, gathered for 16 tokens
    with torch.no_grad(), SizeSpy() as spy:  # the spy sees it
        layer(x, standard_bank(bank.rows()), routing, router)
    assert spy.largest >= rows * WIDTH


# Cost


def _largest(layer: MemoryAttention, bank: nn.Module, batch: int) -> int:
    router = _router(num_chapters=256)
    routing = chosen(router, batch, block_size=LENGTH)
    with SizeSpy() as spy:
        layer(_x(batch), bank, routing, router).sum().backward()
    return spy.largest


def test_nothing_in_a_training_step_is_as_large_as_a_bank_per_row_of_the_batch() -> None:
    layer, bank = drawn_attention(), standard_bank(normal(256 * PER_CHAPTER, WIDTH))
    bank_size = 256 * PER_CHAPTER * max(HIDDEN, WIDTH)
    assert bank_size <= _largest(layer, bank, 2) <= _largest(layer, bank, 8) < 2 * bank_size


def test_wrong_variant_that_projects_the_bank_per_row_is_that_large() -> None:
    layer, x, rows = drawn_attention(), _x(8), normal(256 * PER_CHAPTER, WIDTH)
    with SizeSpy() as spy:
        layer.project(rows.requires_grad_().expand(len(x), -1, -1))[0].sum().backward()
    assert spy.largest >= 8 * rows.numel()


@pytest.mark.parametrize("name", [None, *ROUTERS])
def test_a_training_step_never_waits_for_the_device(name: str | None) -> None:
    layer, bank = drawn_attention(), make_bank(BankConfig(ROWS, width=WIDTH, bits=8), HIDDEN)
    router = None if name is None else ROUTERS[name]
    routing = None if router is None else chosen(router)
    with SyncSpy() as spy:
        layer(_x(), bank.double(), routing, router).sum().backward()
    assert not spy.events
    if router is not None:  # finding the chapters in use does, as the documentation says
        with SyncSpy() as spy:
            layer(_x(), bank.quantized(8), routing, router)
        assert spy.events


# Dtypes


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", [None, "joint_shared", "mixture_shared"])
def test_any_mixture_of_dtypes_is_read_within_the_error_of_bfloat16(
    name: str | None,
    autocast: bool,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    bank_dtype: torch.dtype | None,
) -> None:
    layer, x = drawn_attention(), _x()
    bank = _bank() if bank_dtype else _bank().quantized(8)  # None: quantised
    router = None if name is None else ROUTERS[name]
    routing = None if router is None else chosen(router)
    expected = layer(x, bank, routing, router)
    layer, x, bank = layer.to(dtype), x.to(x_dtype), bank.to(bank_dtype or torch.float32)
    routing = None if routing is None else routing._replace(log_weights=routing[1].float())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x, bank, routing, router)
    assert out.dtype == x_dtype
    # Oracles allow 2e-2 for outputs; here weights, bank and input are all rounded before.
    assert (out - expected).abs().max() <= 4e-2 * expected.abs().max()
    for gradient in _gradients(layer, bank, out):
        assert gradient.isfinite().all() and gradient.any()


def test_keys_cached_under_another_dtype_are_read() -> None:
    layer, bank, x = drawn_attention().float(), _bank().float(), _x().float()
    with torch.autocast("cpu", torch.bfloat16):
        projected = layer.project_bank(bank)
    assert projected[0].dtype == torch.bfloat16
    out = layer(x, bank, projected=projected)
    torch.testing.assert_close(out, layer(x, bank), rtol=4e-2, atol=4e-2)


# Bad input


@pytest.mark.parametrize(
    ("inner", "message"),
    [(HIDDEN, "choose one of 1, 2, 4, 8, 16 heads$"), (10, "heads, or another bank.rank")],
)
def test_heads_must_divide_the_inner_width(inner: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryAttention(HIDDEN, WIDTH, inner, MemoryAttentionConfig(num_heads=6))


def test_a_bank_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 11 channels, .* made for 12"):
        drawn_attention()(_x(), _bank(11))


def test_chapters_must_divide_the_bank_whether_quantized_or_not() -> None:
    layer, router = drawn_attention(), _router(num_chapters=7)
    for bank in (_bank(), _bank().quantized(8)):
        with pytest.raises(ValueError, match="set bank.num_rows to 28 or 35"):
            layer(_x(), bank, chosen(router), router)


def test_routing_without_the_options_of_its_router_is_refused() -> None:
    with pytest.raises(ValueError, match="pass the options of its router"):
        drawn_attention()(_x(), _bank(), chosen(ROUTERS["joint"]))


def test_keys_and_values_of_another_number_of_chapters_are_refused() -> None:
    layer, bank, router = drawn_attention(), _bank(), ROUTERS["joint"]
    projected = layer.project_bank(bank)
    with pytest.raises(ValueError, match="1 chapters, the router 10: make it by project_bank"):
        layer(_x(), bank, chosen(router), router, projected=projected)
