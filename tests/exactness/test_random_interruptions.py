"""Two hundred interruptions at random places of random runs, and no difference."""

import random
from pathlib import Path
from typing import Any

import pytest
from variant_cases import STEPS, VARIANTS, assert_same, every_variant, train

pytestmark = pytest.mark.slow

RUNS, STOPS = 10, 4


def random_run(draw: random.Random, name: str) -> dict[str, Any]:
    """Sizes that a user may choose, as options of `train`."""
    data = {"batch_size": draw.choice([1, 2, 3]), "tbptt": draw.choice([1, 2, 3])}
    data["seed"] = draw.randrange(100)
    if name != "action_expert":
        data["chunk_length"] = draw.choice([11, 16, 24])
    return {"data": data, "gradient_clip_val": draw.choice([None, 0.1])}


@every_variant
def test_interrupted_anywhere_is_never_interrupted(name: str, tmp_path: Path) -> None:
    assert len(VARIANTS) * RUNS * STOPS >= 200
    draw = random.Random(name)
    for run in range(RUNS):
        folder = tmp_path / str(run)
        folder.mkdir()
        options = random_run(draw, name)
        stops = sorted(draw.sample(range(1, STEPS), STOPS))
        whole = train(name, folder, **options)
        assert_same(train(name, folder, stops=stops, **options), whole)
