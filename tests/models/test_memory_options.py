"""Which layers have a memory and which share a bank; options that exclude another."""

from typing import Any

import pytest

from lightning_modules.models.memory_options import MemoryOptions


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"placement": "none"}, []),
        ({"placement": "first_k", "count": 2}, [0, 1]),
        ({"placement": "last_k", "count": 2}, [4, 5]),
        ({"placement": "every_n", "count": 2}, [1, 3, 5]),
        ({"placement": "every_n", "count": 4}, [3]),
        ({"placement": "custom", "layers": (4, 1)}, [1, 4]),
    ],
)
def test_placement_chooses_layers(options: dict[str, Any], expected: list[int]) -> None:
    assert MemoryOptions(**options).places(6) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 0, 0, 0, 0]),
        ({"sharing": "per_layer"}, [0, 1, 2, 3, 4]),
        ({"sharing": "every_k_layers", "sharing_k": 2}, [0, 0, 1, 1, 2]),
    ],
)
def test_sharing_chooses_banks(options: dict[str, Any], expected: list[int]) -> None:
    assert MemoryOptions(**options).bank_of(5) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "first_k"}, "need a count of at least 1"),
        ({"placement": "every_n", "count": 0}, "need a count of at least 1"),
        ({"placement": "all", "count": 2}, "the others have none"),
        ({"placement": "custom"}, "custom needs a list of layers"),
        ({"layers": (1,)}, "custom needs a list of layers"),
        ({"sharing": "every_k_layers"}, "needs sharing_k"),
        ({"sharing_k": 2}, "needs sharing_k"),
        ({"sharing": "every_k_layers", "sharing_k": 0}, "at least 1"),
    ],
)
def test_options_that_exclude_another_name_the_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "custom", "layers": (2, 6)}, "from 0 to 5, not 6"),
        ({"placement": "custom", "layers": (-1,)}, "from 0 to 5, not -1"),
        ({"placement": "custom", "layers": (1, 1)}, "choose different layers"),
        ({"placement": "last_k", "count": 7}, "the model has 6 layers"),
    ],
)
def test_layers_that_the_model_lacks_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryOptions(**options).places(6)
