"""Wilson's interval, against a published table."""

import pytest

from callbacks.closed_loop import wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_newcombe_1998_table_1(
    successes: int, n: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_contains_all_successes_and_rejects_nonsense() -> None:
    assert wilson_interval(100, 100)[1] == 1.0
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson_interval(3, 2)
