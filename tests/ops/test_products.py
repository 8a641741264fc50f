"""Products of 16-bit numbers in float32: forward and backward are those of the rounded numbers."""

import pytest
import torch
from torch import Tensor

from lightning_modules.ops.products import product

SHAPES = {
    "matrices": ((1, 5, 7), (1, 7, 3)),
    "batch": ((2, 9, 33, 17), (2, 9, 17, 70)),
}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wide", [(), (0,), (0, 1)], ids=["both", "second", "neither"])
def test_is_the_float64_product_of_what_bfloat16_keeps(
    wide: tuple[int, ...], shape: str, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(size, generator=generator).to(
            device, torch.float32 if i in wide else torch.bfloat16
        )
        for i, size in enumerate(SHAPES[shape])
    ]
    for x in inputs:
        x.requires_grad_(True)
    result = product(*inputs, torch.bfloat16)
    assert result.dtype == torch.float32
    a, b = (rounded(x.detach()) for x in inputs)
    torch.testing.assert_close(result.double(), a @ b, rtol=1e-5, atol=1e-5)
    grad = torch.randn(result.shape, generator=generator).to(device)
    result.backward(grad)
    expected = rounded(grad) @ b.mT, a.mT @ rounded(grad)
    for x, gradient in zip(inputs, expected, strict=True):
        assert x.grad is not None and x.grad.dtype == x.dtype
        tolerance = 1e-5 if x.dtype == torch.float32 else 2**-8  # the gradient itself is rounded
        torch.testing.assert_close(x.grad.double(), gradient, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_multiply_as_usual(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert torch.equal(product(a, b, dtype), a.to(dtype) @ b.to(dtype))


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    a, b = torch.randn(1, 3, 4), torch.randn(1, 4, 5, requires_grad=True)
    product(a, b, torch.bfloat16).sum().backward()
    assert a.grad is None and b.grad is not None
