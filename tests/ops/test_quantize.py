"""Rows of a bank as 8 and 4 bit codes, against the published ones (tests/oracles/memory_bank)."""

import pytest
import torch
from chapter_cases import SizeSpy
from helpers import ORACLES, load_oracle
from torch import Tensor

from lightning_modules.ops import dequantize_rows, quantize_rows

FILES = sorted(file.stem for file in (ORACLES / "memory_bank").glob("quant_*.safetensors"))
BITS = (4, 8)


def random_bank(rows: int = 12, width: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("file", FILES)
def test_codes_and_scales_are_the_published_ones(file: str) -> None:
    data, about = load_oracle(f"memory_bank/{file}")
    codes, scale = quantize_rows(data["memory"], about["bits"])
    assert codes.dtype == torch.int8
    assert torch.equal(codes, data["stored"])
    tolerance = {"rtol": about["rtol"], "atol": about["atol"]}
    torch.testing.assert_close(scale, data["scales"], **tolerance)
    rows = dequantize_rows(codes, scale, None, about["bits"])
    torch.testing.assert_close(rows, data["dequantized"], **tolerance)
    assert not rows[about["zero_row"]].any()
    assert scale[about["zero_row"]] == torch.tensor(1e-8, dtype=scale.dtype)


def test_all_files_are_there() -> None:
    assert len(FILES) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_error_is_at_most_half_a_step(bits: int, dtype: torch.dtype) -> None:
    bank = random_bank(64, 32).to(dtype)
    codes, scale = quantize_rows(bank, bits)
    rows = dequantize_rows(codes, scale, None, bits)
    assert rows.dtype == scale.dtype == torch.promote_types(dtype, torch.float32)
    # and the rounding of a product of up to 127 steps
    limit = scale.unsqueeze(1) * (0.5 + 128 * torch.finfo(scale.dtype).eps)
    error = (rows - bank).abs()
    assert (error <= limit).all()
    assert (error > 0.4 * scale.unsqueeze(1)).any()


@pytest.mark.parametrize("bits", BITS)
def test_codes_of_what_codes_stand_for_are_the_same(bits: int) -> None:
    codes, scale = quantize_rows(random_bank(64, 32), bits)
    again, scale_again = quantize_rows(dequantize_rows(codes, scale, None, bits), bits)
    assert torch.equal(codes, again)
    torch.testing.assert_close(scale, scale_again, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "largest"), [(4, 7), (8, 127)])
def test_halves_are_rounded_to_even_and_every_code_survives_packing(
    bits: int, largest: int
) -> None:
    codes = torch.arange(-largest, largest).float()  # an even number of them
    bank = torch.stack([codes + 0.5, codes])
    bank[:, 0] = -largest  # so that the scale is 1
    stored, scale = quantize_rows(bank, bits)
    assert torch.equal(scale, torch.ones(2))
    assert torch.equal(dequantize_rows(stored, scale, None, bits), bank.round())
    assert bank[0].round()[largest + 1] == 2  # 1.5, and 0.5 goes to 0
    assert bank[0].round()[largest] == 0


def test_four_bits_hold_the_even_column_in_the_low_half() -> None:
    bank = torch.tensor([[7.0, -7.0, -1.0, 3.0]])
    codes, _ = quantize_rows(bank, 4)
    halves = [[(byte & 15, byte >> 4 & 15) for byte in row] for row in codes.tolist()]
    assert halves == [[(7, 9), (15, 3)]]  # two's complement: -7 is 9, -1 is 15


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_rows_are_those_of_the_whole_bank(shape: tuple[int, ...], bits: int) -> None:
    codes, scale = quantize_rows(random_bank(), bits)
    rows = torch.randint(12, shape, generator=torch.Generator().manual_seed(1))
    expected = dequantize_rows(codes, scale, None, bits)[rows]
    actual = dequantize_rows(codes, scale, rows, bits)
    assert actual.shape == (*shape, 10)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("bits", BITS)
def test_reading_rows_makes_nothing_as_large_as_the_bank(bits: int) -> None:
    codes, scale = quantize_rows(random_bank(1000, 16), bits)
    rows = torch.tensor([3, 999, 0])
    with SizeSpy() as spy:
        dequantize_rows(codes, scale, rows, bits)
    assert spy.largest[1] <= 3 * 16
    with SizeSpy() as spy:  # the spy sees what a wrong variant would do
        dequantize_rows(codes, scale, None, bits)[rows]
    assert spy.largest[1] >= 1000 * 16


def test_quantised_rows_have_no_gradient() -> None:
    codes, scale = quantize_rows(random_bank().requires_grad_(), 8)
    assert not codes.requires_grad
    assert not scale.requires_grad


def test_odd_width_needs_eight_bits() -> None:
    bank = random_bank(width=5)
    with pytest.raises(ValueError, match=r"5 columns.*even number.*bits=8"):
        quantize_rows(bank, 4)
    assert quantize_rows(bank, 8)[0].shape == (12, 5)


def test_wrong_arguments_name_the_fix() -> None:
    bank = random_bank()
    codes, scale = quantize_rows(bank, 8)
    with pytest.raises(ValueError, match="bits=3: choose 8 or 4"):
        quantize_rows(bank, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bits=16: choose 8 or 4"):
        dequantize_rows(codes, scale, None, 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bank must be floating point \[N, d\]"):
        quantize_rows(codes, 8)
    with pytest.raises(ValueError, match=r"bank must be floating point \[N, d\]"):
        quantize_rows(bank[0], 8)
    with pytest.raises(ValueError, match=r"codes must be int8 \[N, d\]"):
        dequantize_rows(bank, scale, None, 8)
    with pytest.raises(ValueError, match="scale must have shape"):
        dequantize_rows(codes, scale[:3], None, 8)
