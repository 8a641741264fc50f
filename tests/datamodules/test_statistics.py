"""Statistics against numpy on the whole array."""

import numpy as np
import pytest

from datamodules.statistics import QUANTILES, RunningStatistics, feature_statistics


def numpy_statistics(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "mean": rows.mean(0),
        "std": rows.std(0),
        "min": rows.min(0),
        "max": rows.max(0),
        **{name: np.quantile(rows, q, axis=0) for name, q in QUANTILES.items()},
    }


@pytest.mark.parametrize("cuts", [[], [1], [100, 101, 700], [0, 500]])
def test_blocks_give_what_numpy_gives_for_all_rows(cuts: list[int]) -> None:
    # A mean far from zero: sums of squares would lose the spread.
    rows = np.random.default_rng(0).normal([1e4, 0, -3], [1e-2, 1, 50], size=(1000, 3))
    result = feature_statistics(np.split(rows, cuts))
    for name, expected in numpy_statistics(rows).items():
        np.testing.assert_allclose(result[name], expected, rtol=1e-7, atol=1e-9, err_msg=name)
    assert result["count"].tolist() == [1000]


def test_thinned_quantiles_stay_close_and_do_not_depend_on_blocks() -> None:
    rows = np.random.default_rng(0).normal(size=(20_000, 2))
    results = []
    for block in (7, 1000):
        running = RunningStatistics(sample_rows=3000)
        for start in range(0, len(rows), block):
            running.update(rows[start : start + block])
        results.append(running.result())
    for name, q in QUANTILES.items():
        np.testing.assert_array_equal(results[0][name], results[1][name])
        # Standard error of the 1 % quantile of 2,500 rows of a normal distribution: 0.075.
        np.testing.assert_allclose(results[0][name], np.quantile(rows, q, axis=0), atol=0.25)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no training episode has a frame"):
        feature_statistics([np.zeros((0, 2))])
