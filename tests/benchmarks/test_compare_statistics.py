"""Differences paired by file, intervals over files and the verdict, against plain loops."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from benchmark_cases import load

STATISTICS = load("compare_statistics.py")
Reading, Estimate = STATISTICS.Reading, STATISTICS.Estimate
VERDICTS = ("better", "equal", "worse")


def make_reading(files: list[list[float]], counts: list[list[int]] | None = None, chunk: int = 100):
    """Cells 0-64, 64-100, 100-200, ...; `files` are mean losses."""
    means = np.array(files)
    count = np.full(means.shape, 100) if counts is None else np.array(counts)
    starts = np.array([0, 64, *range(chunk, chunk * (means.shape[1] - 1), chunk)])
    names = tuple(f"{n}.txt" for n in range(len(means)))
    return Reading(np.nan_to_num(means * count), count, starts, names, chunk)


def one_cell(losses: np.ndarray):
    """Files of 100 tokens with these mean losses."""
    return make_reading([[loss, loss, loss] for loss in losses])


def whole(reading) -> np.ndarray:
    return STATISTICS.region(reading)


def test_means_over_files_and_over_tokens_by_hand() -> None:
    reading = make_reading([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], [[50, 50, 0], [100, 100, 200]])
    cells = whole(reading)
    assert STATISTICS.file_means(reading, cells).tolist() == [1.5, 5.0]
    assert STATISTICS.level(reading, cells).mean == pytest.approx(3.25)
    assert STATISTICS.token_mean(reading, cells) == pytest.approx((150 + 2000) / 500)
    late = STATISTICS.region(reading, 100)
    means = STATISTICS.file_means(reading, late)
    assert math.isnan(means[0]) and means[1] == 5.0
    assert STATISTICS.level(reading, late).files == 1


def test_a_file_counts_from_16_tokens_on() -> None:
    counts = [[15, 0, 0], [16, 0, 0]]
    means = STATISTICS.file_means(
        make_reading([[1.0, 0.0, 0.0]] * 2, counts), np.array([True, False, False])
    )
    assert math.isnan(means[0]) and means[1] == 1.0


def test_regions_and_bins_of_positions_by_hand() -> None:
    reading = make_reading([[1.0] * 9])  # cells from 0, 64, 100, 200, ..., 700
    assert STATISTICS.region(reading, 64, 200).tolist() == [False, True, True] + [False] * 6
    expected = [(0, 64), (64, 100), (100, 200), (200, 400), (400, np.inf)]
    assert STATISTICS.position_bins(reading) == expected
    chunks = STATISTICS.chunk_bins(reading)
    assert chunks[:2] == [(0, 100), (100, 200)] and len(chunks) == 8
    for bins in (expected, chunks):
        covered = np.sum([STATISTICS.region(reading, *edges) for edges in bins], axis=0)
        assert (covered == 1).all()


def test_bootstrap_equals_the_loop_over_the_same_draws() -> None:
    rng = np.random.default_rng(1)
    totals, weights = rng.normal(size=7), rng.uniform(1, 5, size=7)
    found = STATISTICS.bootstrap(totals, weights, resamples=50, seed=3)
    draws = np.random.default_rng(3).integers(7, size=(50, 7))
    means = sorted(
        sum(totals[f] for f in draw) / sum(weights[f] for f in draw) for draw in draws.tolist()
    )

    def quantile(q: float) -> float:
        place = q * 49
        below = int(place)
        return means[below] + (place - below) * (means[below + 1] - means[below])

    assert found.mean == pytest.approx(sum(totals) / sum(weights))
    assert (found.low, found.high) == pytest.approx((quantile(0.025), quantile(0.975)))
    assert found == STATISTICS.bootstrap(totals, weights, resamples=50, seed=3)
    assert found.low != STATISTICS.bootstrap(totals, weights, resamples=50, seed=4).low


def test_intervals_cover_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    true, hits, repeats = 0.3, 0, 400
    for _ in range(repeats):
        values = true + rng.exponential(size=40) - 1.0
        estimate = STATISTICS.bootstrap(values, np.ones(40), resamples=400)
        hits += estimate.low <= true <= estimate.high
    # 95 % less what percentiles of 40 skewed values lose; 0.01 is a standard error of the count.
    assert 0.90 <= hits / repeats <= 0.97


def test_of_few_files_there_is_no_interval_and_no_verdict() -> None:
    few = STATISTICS.bootstrap(np.full(4, -1.0), np.ones(4))
    assert few.mean == -1.0 and math.isnan(few.low) and STATISTICS.verdict(few) is None
    assert STATISTICS.verdict(STATISTICS.bootstrap(np.full(5, -1.0), np.ones(5))) == "better"
    none = STATISTICS.bootstrap(np.empty(0), np.empty(0))
    assert none.files == 0 and STATISTICS.verdict(none) is None


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-2, -1, "better"), (1, 2, "worse"), (-1, 1, "equal"), (-1, 0, "equal"), (0, 1, "equal")],
)
def test_verdict_is_where_the_interval_lies(low: float, high: float, expected: str) -> None:
    assert STATISTICS.verdict(Estimate((low + high) / 2, low, high, 30)) == expected


@pytest.mark.parametrize(("shift", "expected"), [(-0.1, "better"), (0.1, "worse"), (0.0, "equal")])
def test_constructed_losses_get_their_verdict(shift: float, expected: str) -> None:
    rng = np.random.default_rng(2)
    base = rng.uniform(1, 3, size=30)
    noise = rng.normal(scale=0.02, size=30)
    a, b = one_cell(base + shift + noise - noise.mean()), one_cell(base)
    for compare in (STATISTICS.difference, STATISTICS.token_difference):
        estimate = compare(a, b, whole(a))
        assert estimate.mean == pytest.approx(shift, abs=1e-9)
        assert STATISTICS.verdict(estimate) == expected


def test_pairing_finds_what_two_intervals_side_by_side_cannot() -> None:
    """Files differ by far more than the methods do."""
    rng = np.random.default_rng(3)
    base = rng.uniform(1, 3, size=30)
    a, b = one_cell(base - 0.02 + rng.normal(scale=0.02, size=30)), one_cell(base)
    assert STATISTICS.verdict(STATISTICS.difference(a, b, whole(a))) == "better"
    draws = rng.integers(30, size=(2, 2000, 30))  # unpaired: other files for each of them
    means = [
        STATISTICS.file_means(r, whole(r))[d].mean(1) for r, d in zip((a, b), draws, strict=True)
    ]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    assert STATISTICS.verdict(Estimate(0.0, low, high, 30)) == "equal"


def test_a_long_file_decides_over_tokens_and_not_over_files() -> None:
    counts = [[100, 100, 100]] * 9 + [[90_000, 100, 100]]
    a = make_reading([[1.9] * 3] * 9 + [[4.0] * 3], counts)
    b = make_reading([[2.0] * 3] * 9 + [[3.9] * 3], counts)
    assert STATISTICS.difference(a, b, whole(a)).mean == pytest.approx(-0.08)
    assert STATISTICS.token_difference(a, b, whole(a)).mean > 0


def test_seeds_are_averaged_within_files_before_files_are_drawn() -> None:
    a = {seed: one_cell(np.arange(6) + shift) for seed, shift in ((0, -3.0), (1, 1.0), (2, 9.0))}
    b = {seed: one_cell(np.arange(6)) for seed in (0, 1)}
    one, other, seeds = STATISTICS.shared(a, b)
    estimate = STATISTICS.difference(one, other, whole(one))
    assert seeds == 2 and estimate.mean == pytest.approx(-1.0)
    assert estimate.low == pytest.approx(-1.0)  # not the seeds' spread
    with pytest.raises(ValueError, match="no seed in common"):
        STATISTICS.shared({0: a[0]}, {1: b[1]})


def test_other_files_are_not_compared() -> None:
    a = one_cell(np.ones(6))
    with pytest.raises(ValueError, match="different files"):
        STATISTICS.difference(a, a._replace(names=("other",) * 6), whole(a))
    with pytest.raises(ValueError, match="different files"):
        STATISTICS.average([a, a._replace(count=a.count + 1)])


def test_the_decision_says_what_the_verdicts_are() -> None:
    texts = {v: STATISTICS.decide(*v) for v in product(VERDICTS, repeat=3)}
    assert len(set(texts.values())) == 27
    for (learning, memory, late), text in texts.items():
        assert text.startswith(learning.capitalize())
        assert ("helps" in text, "hurts" in text) == (memory == "better", memory == "worse")
        assert ("LoRA beats it" in text, "it beats LoRA" in text) == (
            late == "worse",
            late == "better",
        )
    assert STATISTICS.decide("equal", "better", None).count(".") == 2
    assert STATISTICS.decide(None, None, None).startswith("Undecided")


def test_what_is_stored_is_read_back(tmp_path: Path) -> None:
    reading = make_reading([[1.0, 2.0, 3.0]] * 2)
    np.savez(tmp_path / "reading.npz", **reading._asdict())
    found = STATISTICS.load(tmp_path / "reading.npz")
    assert found.names == reading.names and found.chunk_length == 100
    assert all(np.array_equal(x, y) for x, y in zip(found[:3], reading[:3], strict=True))
