"""Window sums against a loop, exactly: the values are whole numbers."""

import pytest
import torch

from lightning_modules.layers.window_sums import window_sums

DOCUMENT = torch.tensor(
    [[0, 0, 0, 0, 1, 1, 1, 2, 3, 3, 3], [0] * 11, [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2]]
)


def _values(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-9, 9, (3, length, 2), generator=generator).double()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 100, None])
def test_sums_equal_a_loop(window: int | None, documents: bool) -> None:
    for length in (1, 2, 3, 8, 11):
        values, number = _values(length), DOCUMENT[:, :length]
        expected = torch.zeros_like(values)
        for row in range(3):
            for t in range(length):
                for s in range(0 if window is None else max(t - window + 1, 0), t + 1):
                    if not documents or number[row, s] == number[row, t]:
                        expected[row, t] += values[row, s]
        assert torch.equal(window_sums(values, number if documents else None, window), expected)


def test_another_document_in_the_row_changes_no_bit_of_a_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 40, 2, generator=generator)
    number = (torch.arange(40) >= 13).long().unsqueeze(0)
    alone = window_sums(values[:, 13:])
    assert torch.equal(window_sums(values, number)[:, 13:], alone)
    values[:, :13] = torch.tensor([1e9, torch.inf])
    assert torch.equal(window_sums(values, number)[:, 13:], alone)
    differences = (values.cumsum(1) - values[:, :13].sum(1, keepdim=True))[:, 13:]
    assert not torch.equal(differences, alone)  # the simpler way would not do


@pytest.mark.parametrize("window", [3, None])
def test_gradients_equal_finite_differences(window: int | None) -> None:
    values = _values(11).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: window_sums(v, DOCUMENT, window), values)
