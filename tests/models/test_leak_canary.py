"""Leak canary: on tokens that nobody can predict, only a model that reads the future beats chance.

Tokens are independent and uniform over V, so that no causal model can have a loss below ln V.
"""

from types import ModuleType

import pytest
from benchmark_cases import load


@pytest.fixture(scope="module")
def canary() -> ModuleType:
    """What the benchmark trains and measures."""
    return load("leak_canary.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "router"),
    [
        ("token", {}),
        ("block", {}),
        ("rolling", {}),
        ("prompt", {}),
        ("block", {"mixing": "mixture", "shared": 2}),
    ],
    ids=["token", "block", "rolling", "prompt", "mixture with shared chapters"],
)
def test_causal_routing_never_beats_chance(
    strategy: str, router: dict[str, object], canary: ModuleType
) -> None:
    loss, error = canary.measured(canary.trained(strategy, **router))
    assert loss >= canary.CHANCE - 3 * error, f"{loss} nats, but chance is {canary.CHANCE}"
    assert loss < canary.CHANCE + 0.02  # trained, not broken


@pytest.mark.slow
def test_routing_by_the_whole_sequence_beats_chance_and_prefixes_show_that_it_cheats(
    canary: ModuleType,
) -> None:
    model = canary.trained("sequence")
    loss, error = canary.measured(model)
    assert loss < canary.CHANCE - 20 * error, f"{loss} nats: the canary has no power"
    honest, error = canary.measured(model, prefixes=True)
    assert honest >= canary.CHANCE - 3 * error
