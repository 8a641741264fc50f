"""Normalisation against the formulas, constant dimensions, checkpoints."""

import numpy as np
import pytest
import torch

from lightning_modules.layers.normalization import Normalizer

STATS = {
    "observation.state": {"mean": [1.0, 2.0], "std": [2.0, 0.0], "q01": [-1, 5], "q99": [3, 5]},
    "action": {"mean": [0.0], "std": [0.5], "q01": [-2.0], "q99": [2.0]},
}


def test_z_score_matches_numpy_and_constant_dimensions_are_only_shifted() -> None:
    x = torch.tensor([[3.0, 2.0], [1.0, 7.0]])
    actual = Normalizer(STATS).normalize("observation.state", x)
    expected = (x.numpy() - np.array([1.0, 2.0])) / np.array([2.0, 1.0])
    np.testing.assert_allclose(actual, expected)


def test_quantile_maps_q01_and_q99_to_minus_one_and_one() -> None:
    normalizer = Normalizer(STATS, mode="quantile")
    x = torch.tensor([[-1.0, 5.0], [3.0, 6.0], [1.0, 5.0]])
    actual = normalizer.normalize("observation.state", x)
    torch.testing.assert_close(actual, torch.tensor([[-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("mode", ["z_score", "quantile", "none"])
def test_unnormalize_inverts_normalize(mode: str) -> None:
    normalizer = Normalizer(STATS, mode=mode)
    x = torch.randn(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    back = normalizer.unnormalize("observation.state", normalizer.normalize("observation.state", x))
    torch.testing.assert_close(back, x)
    if mode == "none":
        assert normalizer.normalize("anything", x) is x


def test_statistics_travel_in_the_checkpoint() -> None:
    source = torch.nn.ModuleDict({"normalizer": Normalizer(STATS)})
    target = torch.nn.ModuleDict({"normalizer": Normalizer()})
    target.load_state_dict(source.state_dict())
    x = torch.tensor([[3.0, 4.0]])
    expected = source["normalizer"].normalize("observation.state", x)
    torch.testing.assert_close(target["normalizer"].normalize("observation.state", x), expected)
    assert not list(source.parameters())


def test_unknown_feature_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="'effort'.*observation_state_shift, .*action_scale"):
        Normalizer(STATS).normalize("effort", torch.zeros(1))


def test_missing_statistic_is_named() -> None:
    with pytest.raises(KeyError, match=r"'quantile' of 'action' needs .*'q01', 'q99'"):
        Normalizer({"action": {"mean": [0.0], "std": [1.0]}}, mode="quantile")


def test_unknown_mode_lists_the_modes() -> None:
    with pytest.raises(ValueError, match="z_score, quantile, none"):
        Normalizer(STATS, mode="minmax")  # type: ignore[arg-type]
