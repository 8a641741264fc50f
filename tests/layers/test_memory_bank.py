"""Banks: reads against the published ones, rounding in training and for good, chapters."""

from typing import Any

import pytest
import torch
from bank_cases import SizeSpy, normal, standard_bank
from helpers import load_oracle
from torch import Tensor, nn

from lightning_modules.layers.memory_bank import (
    FactorizedBank,
    MemoryBank,
    QuantizedBank,
    StandardBank,
    chapter_rows,
    check_chapters,
    make_bank,
)
from lightning_modules.layers.memory_options import BankConfig
from lightning_modules.ops import quantize_rows

N, WIDTH, RANK = 24, 10, 4
KINDS = ("standard", "factorized", "reduced")
ROWS = torch.tensor([7, 0, 7, 23, 5])
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
"""The oracles' own tolerance: at most another order of a sum of 6 products in float64."""


def _bank(kind: str = "standard", bits: int | None = None, **options: Any) -> MemoryBank:
    torch.manual_seed(0)
    rank = None if kind == "standard" else RANK
    config = BankConfig(num_rows=N, kind=kind, rank=rank, bits=bits, **options)
    return make_bank(config, WIDTH).double()


def _of_oracle(case: str) -> tuple[MemoryBank, dict[str, Tensor], dict[str, Tensor]]:
    """A bank with the oracle's values, the tensors, and the gradients that they should have."""
    tensors, metadata = load_oracle(f"memory_bank/{case}")
    kinds = {"standard": "standard", "factorized": "factorized", "reduced_dim": "reduced"}
    kind = kinds[metadata.get("bank", "standard")]
    config = BankConfig(metadata["num_rows"], kind, rank=metadata.get("rank") or None)
    bank = make_bank(config, metadata["dim"]).double()
    names = {"left": "A", "right": "B"} if kind == "factorized" else {"weight": "memory"}
    bank.load_state_dict({ours: tensors[theirs] for ours, theirs in names.items()})
    return bank, tensors, {ours: tensors[f"grad/{theirs}"] for ours, theirs in names.items()}


# Reads


@pytest.mark.parametrize("case", ["read_standard", "read_factorized", "read_reduced"])
def test_rows_and_gradients_match_the_published_bank(case: str) -> None:
    bank, tensors, gradients = _of_oracle(case)
    everything = torch.arange(bank.num_rows)
    for out in (bank.rows(), bank.read(everything)):
        torch.testing.assert_close(out, tensors["out"], **CLOSE)
        bank.zero_grad()
        (out * tensors["grad_out"]).sum().backward()
        for name, expected in gradients.items():
            torch.testing.assert_close(bank.get_parameter(name).grad, expected, **CLOSE)


def test_rows_of_chapters_match_the_published_gather_and_its_gradient_adds() -> None:
    bank, tensors, gradients = _of_oracle("chapter_gather")
    rows_per_chapter = check_chapters(bank.num_rows, 6)
    rows = chapter_rows(tensors["chapter_ids"], rows_per_chapter)
    assert torch.equal(rows, tensors["row_ids"])
    out = bank.read(rows.flatten()).unflatten(0, rows.shape)
    assert torch.equal(out, tensors["out"])
    (out * tensors["grad_out"]).sum().backward()
    torch.testing.assert_close(bank.weight.grad, gradients["weight"], **CLOSE)
    unread = sorted(set(range(bank.num_rows)) - set(rows.flatten().tolist()))
    counts = tensors["chapter_ids"].flatten().bincount(minlength=6)
    assert unread and counts.max() > 1  # the oracle has chapters that nobody and that several chose
    assert not bank.weight.grad[unread].any()


def test_wrong_variant_whose_chapters_interleave_does_not_match_the_published_gather() -> None:
    _, tensors, _ = _of_oracle("chapter_gather")
    interleaved = tensors["chapter_ids"].unsqueeze(-1) + 6 * torch.arange(4)
    assert not torch.equal(interleaved.flatten(-2), tensors["row_ids"])


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_rows_equals_taking_them_from_all_rows(kind: str, bits: int | None) -> None:
    bank = _bank(kind, bits)
    found, expected = bank.read(ROWS), bank.rows()[ROWS]
    torch.testing.assert_close(found, expected, **CLOSE)
    weight = normal(*found.shape)
    gradients = [
        torch.autograd.grad((i * weight).sum(), bank.parameters()) for i in (found, expected)
    ]
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_read_of_a_factorized_bank_never_makes_the_product(bits: int | None) -> None:
    bank = FactorizedBank(1000, WIDTH, RANK, bits)
    with SizeSpy() as spy:
        bank.read(ROWS)
    assert spy.largest < 1000
    with SizeSpy() as spy:  # the spy sees it
        bank.rows()
    assert spy.largest >= 1000 * WIDTH


@pytest.mark.parametrize(("kind", "width"), [("standard", 10), ("factorized", 10), ("reduced", 4)])
def test_options_make_banks_of_these_sizes(kind: str, width: int) -> None:
    bank = _bank(kind)
    assert (bank.num_rows, bank.width) == (N, width) and bank.rows().shape == (N, width)
    assert isinstance(bank, FactorizedBank if kind == "factorized" else StandardBank)
    if kind != "reduced":
        assert _bank(kind, width=14).rows().shape == (N, 14)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_new_rows_have_a_standard_deviation_of_two_hundredths(kind: str) -> None:
    torch.manual_seed(0)
    bank = make_bank(BankConfig(2000, kind, rank=None if kind == "standard" else 64), 256)
    for parameter in bank.parameters():
        nn.init.zeros_(parameter)
    bank.reset_parameters()
    with torch.no_grad():
        # 3 standard errors: products share 256 * 64 entries of B, and the others are more.
        assert abs(bank.rows().std() / 0.02 - 1) < 3 / (2 * 256 * 64) ** 0.5
        assert abs(bank.rows().mean()) < 1e-3


def test_the_bank_of_the_published_model_has_as_many_parameters() -> None:
    with torch.device("meta"):
        bank = make_bank(BankConfig(4097 * 64), 768)
    assert sum(parameter.numel() for parameter in bank.parameters()) == 201_375_744


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_a_bank_are_recognised_by_the_name_of_its_attribute(kind: str) -> None:
    parent = nn.Module()
    parent.bank, parent.other = _bank(kind), nn.Linear(2, 2)
    names = {name for name, _ in parent.named_parameters() if name.split(".")[0] == "bank"}
    assert len(names) == (2 if kind == "factorized" else 1)
    assert all(isinstance(parent.get_submodule(n.rpartition(".")[0]), MemoryBank) for n in names)


# Rounding in training


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_rounded_rows_equal_a_quantized_bank_bit_for_bit(kind: str, bits: int) -> None:
    bank = _bank(kind, bits)
    quantized = bank.quantized(bits)
    assert torch.equal(bank.rows(), quantized.rows())
    assert not torch.equal(bank.rows(), _bank(kind).rows())
    torch.testing.assert_close(quantized.read(ROWS), bank.read(ROWS), **CLOSE)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_errs_by_half_a_scale_at_most(kind: str, bits: int) -> None:
    exact = _bank(kind).rows()
    _, scale = quantize_rows(exact.detach(), bits)
    error = (_bank(kind, bits).rows() - exact).abs() / scale[:, None]
    assert 0.4 < error.max() <= 0.5 + 1e-9  # 240 errors come close to the limit, none passes it


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_rounding_equal_those_without_bit_for_bit(kind: str, bits: int) -> None:
    found = []
    for bank in (_bank(kind), _bank(kind, bits)):
        rows = bank.rows()
        found.append(torch.autograd.grad((rows * normal(*rows.shape)).sum(), bank.parameters()))
    for actual, expected in zip(*found, strict=True):
        assert expected.any() and torch.equal(actual, expected)


def test_wrong_variant_without_straight_through_gradients_gets_none_from_the_rounding() -> None:
    weight = standard_bank(normal(N, WIDTH)).weight
    scale = weight.abs().amax(-1, keepdim=True) / 127
    ((weight / scale).round() * scale).sum().backward()
    assert not torch.allclose(weight.grad, torch.ones_like(weight), atol=0.1)


def test_wrong_variant_that_rounds_the_factors_is_not_the_rounded_product() -> None:
    bank = _bank("factorized", 8)
    factors = [standard_bank(part.detach()).quantized(8).rows() for part in (bank.left, bank.right)]
    assert not torch.allclose(factors[0] @ factors[1].T, bank.rows(), rtol=1e-3, atol=1e-5)


def test_fewer_bits_are_quantized_from_the_rows_not_from_the_rounded_rows() -> None:
    expected = _bank().quantized(4).codes
    assert torch.equal(_bank(bits=8).quantized(4).codes, expected)
    twice = standard_bank(_bank(bits=8).rows().detach()).quantized(4).codes
    assert not torch.equal(twice, expected)


# Quantized banks


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_bank_has_buffers_and_no_parameters(bits: int) -> None:
    bank = _bank("factorized").quantized(bits)
    assert not list(bank.parameters()) and not bank.rows().requires_grad
    assert bank.codes.dtype == torch.int8
    assert bank.codes.numel() == N * WIDTH * bits // 8 and bank.scale.shape == (N,)
    assert isinstance(bank, QuantizedBank) and (bank.num_rows, bank.width) == (N, WIDTH)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_bank_is_saved_and_loaded_bit_for_bit(bits: int) -> None:
    bank = _bank().float().quantized(bits)
    other = QuantizedBank(N, WIDTH, bits)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.rows(), bank.rows())


def test_quantizing_again_changes_nothing() -> None:
    bank = _bank().quantized(8)
    again = bank.quantized(8)
    assert torch.equal(again.codes, bank.codes)
    torch.testing.assert_close(again.scale, bank.scale, **CLOSE)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_read_never_computes_the_whole_bank(bits: int) -> None:
    bank = StandardBank(1000, WIDTH).quantized(bits)
    with SizeSpy() as spy:
        bank.read(ROWS)
    assert spy.largest <= 1000  # the scales
    with SizeSpy() as spy:  # the spy sees it
        bank.rows()
    assert spy.largest >= 1000 * WIDTH


def test_scales_stay_float32_in_a_module_of_bfloat16() -> None:
    bank = _bank().float().quantized(8)
    before = bank.rows()
    parent = nn.Sequential(bank, nn.Linear(2, 2)).bfloat16()
    assert parent[1].weight.dtype == torch.bfloat16
    assert bank.scale.dtype == torch.float32 and torch.equal(bank.rows(), before)
    assert bank.double().scale.dtype == torch.float64
    assert bank.to("meta").scale.is_meta


def test_a_bfloat16_bank_is_quantized_with_float32_scales() -> None:
    quantized = _bank().bfloat16().quantized(8)
    exact = _bank().bfloat16().rows().float()
    assert quantized.scale.dtype == torch.float32
    assert ((quantized.rows() - exact).abs() <= quantized.scale[:, None] * 0.5001).all()
    rounded = _bank(bits=8).bfloat16().rows()
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, quantized.rows().bfloat16())


# Bad input


@pytest.mark.parametrize(
    ("rows", "chapters", "nearest"),
    [(100, 64, "64 or 128"), (128, 64, ""), (63, 64, "64$"), (4097 * 64 + 1, 4097, "262208 or")],
)
def test_chapters_must_divide_the_rows(rows: int, chapters: int, nearest: str) -> None:
    if not nearest:
        assert check_chapters(rows, chapters) == 2
        return
    with pytest.raises(ValueError, match=f"num_rows={rows} .* set bank.num_rows to {nearest}"):
        check_chapters(rows, chapters)


@pytest.mark.parametrize(
    "config",
    [
        BankConfig(8, width=7, bits=4),
        BankConfig(8, "factorized", width=7, rank=2, bits=4),
        BankConfig(8, "reduced", rank=3, bits=4),
    ],
)
def test_four_bits_need_an_even_width(config: BankConfig) -> None:
    with pytest.raises(ValueError, match="choose an even width .* or 8 bits"):
        make_bank(config, 8)
    with pytest.raises(ValueError, match="even width"):
        StandardBank(8, 7).quantized(4)


def test_a_bank_that_says_nothing_about_its_rows_says_so() -> None:
    with pytest.raises(NotImplementedError, match="MemoryBank does not say"):
        MemoryBank(2, 2).rows()
