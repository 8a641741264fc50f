"""Device statistics equal numpy's over everything that was added."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from two_processes import in_two_processes

from callbacks.statistics import (
    SAMPLE,
    BinnedMean,
    FirstNonFinite,
    RunningHistogram,
    RunningMoments,
    all_reduce,
    group_slots,
    row_means,
    to_host,
)

CPU = torch.device("cpu")


def add_moments(metric: RunningMoments, seed: int = 0) -> np.ndarray:
    """Three updates; returns the values `[slots, N]`."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for size in (4, 9, 1):
        values = 100 + 0.01 * torch.randn(2, size, 3, generator=generator)
        metric.update(group_slots(list(values)))
        seen.append(values.reshape(2, -1))
    return torch.cat(seen, dim=1).double().numpy()


def test_moments_equal_numpy_with_a_small_deviation_around_a_large_mean() -> None:
    metric = RunningMoments(2, CPU, threshold=100.0)
    values = add_moments(metric)
    result = {key: value.numpy() for key, value in metric.compute().items()}
    np.testing.assert_allclose(result["count"], [42, 42])
    np.testing.assert_allclose(result["mean"], values.mean(1), rtol=1e-7)
    np.testing.assert_allclose(result["std"], values.std(1), rtol=1e-3)  # float32 values near 100
    np.testing.assert_allclose(result["min"], values.min(1))
    np.testing.assert_allclose(result["max"], values.max(1))
    np.testing.assert_allclose(result["saturation"], (np.abs(values) > 100).mean(1))


def test_moments_of_slots_with_different_shapes_equal_numpy() -> None:
    metric = RunningMoments(2, CPU)
    first, second = torch.randn(3, 2), torch.randn(5)
    metric.update(group_slots([first, second]))
    for slot, values in enumerate((first.numpy(), second.numpy())):
        result = {key: value[slot].item() for key, value in metric.compute().items()}
        assert result["count"] == values.size
        assert result["mean"] == pytest.approx(values.mean(), rel=1e-6)
        assert result["std"] == pytest.approx(values.std(), rel=1e-6)


def test_moments_after_reset_equal_fresh_ones() -> None:
    metric, fresh = RunningMoments(2, CPU), RunningMoments(2, CPU)
    add_moments(metric, seed=1)
    metric.reset()
    add_moments(metric)
    add_moments(fresh)
    for key, value in fresh.compute().items():
        assert torch.equal(metric.compute()[key], value)


def test_histogram_equals_numpy_with_open_outer_bins() -> None:
    metric = RunningHistogram(2, CPU, low=-1.0, high=1.0, bins=8)
    values = 2 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    metric.update(group_slots(list(values[:, :20])))
    metric.update(group_slots(list(values[:, 20:])))
    edges = np.linspace(-1, 1, 9)
    edges[0], edges[-1] = -np.inf, np.inf
    expected = [np.histogram(row, edges)[0] for row in values.numpy()]
    np.testing.assert_array_equal(metric.compute()["counts"].numpy(), expected)


@pytest.mark.parametrize("width", [1024, 768, 1000])
def test_histogram_of_a_large_layer_counts_a_fair_sample_of_channels_and_tokens(width: int) -> None:
    """Where a value says which channel and token it is of, shares are those of all values."""
    tokens = 1024 * SAMPLE // 4096
    by_channel = torch.linspace(-0.999, 0.999, width).expand(tokens, width)
    by_token = torch.linspace(-0.999, 0.999, tokens).unsqueeze(1).expand(tokens, width)
    metric = RunningHistogram(2, CPU, low=-1.0, high=1.0, bins=8)
    metric.update(group_slots([by_channel, by_token]))
    counts = metric.compute()["counts"].numpy()
    # Independent draws would be off by 0.0026; a stride of `width` by 0.875.
    np.testing.assert_allclose(counts / SAMPLE, 1 / 8, atol=0.002)


def test_binned_mean_equals_numpy_and_clamps_the_index() -> None:
    metric = BinnedMean(2, CPU, bins=3)
    values = torch.randn(2, 6)
    index = torch.tensor([0, 2, 0, 7, 2, -1])
    metric.update(values[:, :4], index[:4])
    metric.update(values[:, 4:], index[4:])
    clamped = index.clamp(0, 2).numpy()
    result = metric.compute()
    for number in (0, 2):
        expected = values.numpy()[:, clamped == number].mean(1)
        np.testing.assert_allclose(result["mean"][:, number], expected, rtol=1e-6)
    assert result["mean"][:, 1].isnan().all()
    assert result["count"].tolist() == [3, 0, 3]


def test_first_non_finite_keeps_the_first_place_only() -> None:
    metric = FirstNonFinite(2, CPU)
    streams = torch.tensor([7, 8, 9])
    clean = torch.zeros(2, 3)
    bad, worse = clean.clone(), clean.clone()
    bad[1, 2], worse[0, 0] = float("inf"), float("nan")
    for step, values in enumerate((clean, bad, worse), start=1):
        metric.update(values, streams, step)
    assert metric.compute()["where"].tolist() == [2, 1, 2, 9]
    assert metric.compute()["found"].item() == 2


def test_row_means_equal_numpy() -> None:
    values = [torch.randn(3, 2, 4), torch.randn(3, 5)]
    result = row_means(group_slots(values))
    expected = [value.numpy().reshape(3, -1).mean(1) for value in values]
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6)


def test_slots_of_a_shape_are_reduced_together_and_stay_in_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (3, 2, 5), (3, 4), (3, 2), (3, 2, 5))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    groups = group_slots(values).map(lambda group: group + 1)
    assert [len(group) for group in groups] == [2, 2, 1]
    means = [value.reshape(3, -1).double().mean(1).numpy() + 1 for value in values]
    np.testing.assert_allclose(row_means(groups).numpy(), means, rtol=1e-5)
    metric, histogram = RunningMoments(5, CPU), RunningHistogram(5, CPU, low=-9.0, high=9.0, bins=1)
    metric.update(groups)
    histogram.update(groups)
    result = {key: value.numpy() for key, value in metric.compute().items()}
    np.testing.assert_allclose(result["mean"], [mean.mean() for mean in means], rtol=1e-5)
    np.testing.assert_allclose(result["max"], [value.max() + 1 for value in values], rtol=1e-5)
    sizes = [value.numel() for value in values]
    assert result["count"].tolist() == histogram.compute()["counts"].flatten().tolist() == sizes


def test_to_host_keeps_names_shapes_and_large_integers() -> None:
    tensors = {"a": torch.randn(2, 3), "id": torch.tensor([2**40 + 1]), "c": torch.tensor(0.5)}
    host = to_host(tensors)
    assert {key: value.shape for key, value in host.items()} == {"a": (2, 3), "id": (1,), "c": ()}
    np.testing.assert_array_equal(host["a"], tensors["a"].double().numpy())
    assert int(host["id"][0]) == 2**40 + 1


def reduce_in_process(rank: int, folder: Path) -> None:
    """Two processes see different values; each saves what it knows after the reduction."""
    moments, binned, first = RunningMoments(2, CPU), BinnedMean(1, CPU, 2), FirstNonFinite(1, CPU)
    add_moments(moments, seed=rank)
    binned.update(torch.tensor([[1.0 + rank]]), torch.tensor([rank]))
    first.update(torch.tensor([[float("nan") if rank else 0.0]]), torch.tensor([5]), step=3)
    all_reduce([moments, binned, first])
    result = {**moments.compute(), "binned": binned.compute()["mean"], **first.compute()}
    torch.save(result, folder / f"{rank}.pt")


@pytest.mark.slow
def test_all_reduce_of_two_processes_equals_numpy_over_both(tmp_path: Path) -> None:
    in_two_processes(reduce_in_process, tmp_path)
    both = np.concatenate([add_moments(RunningMoments(2, CPU), seed) for seed in (0, 1)], axis=1)
    for rank in (0, 1):
        result = torch.load(tmp_path / f"{rank}.pt")
        np.testing.assert_allclose(result["mean"], both.mean(1), rtol=1e-7)
        np.testing.assert_allclose(result["max"], both.max(1))
        np.testing.assert_allclose(result["min"], both.min(1))
        assert result["binned"].tolist() == [[1.0, 2.0]]
        assert result["found"] == 1
        assert result["where"].tolist() == ([3, 0, 0, 5] if rank else [-1, -1, -1, -1])
