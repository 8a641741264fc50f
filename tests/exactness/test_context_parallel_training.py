"""Training with ContextParallel: two processes that share rows learn what one learns from them."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from process_cases import join_processes
from torch import Tensor
from two_processes import in_two_processes
from variant_cases import VARIANTS, Trace, make_trainer

from callbacks import ContextParallel

STEPS = 5
CASES = {
    "lact": {"tbptt": 2},
    "in_place": {"tbptt": 2},
    "lact_packed": {"mode": "packed"},
    "in_place_packed": {"mode": "packed"},
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Its steps are as exact as gradients are, unlike those of Adam where gradients are zero."""
    return torch.optim.SGD(parameters, lr=0.1)


def learn(case: str, folder: Path, *callbacks: pl.Callback, **options: Any) -> dict[str, Any]:
    """Losses, validation, weights and streams after a short run in float64."""
    variant = VARIANTS[case.removesuffix("_packed")]
    torch.manual_seed(0)
    module, trace = variant.module(), Trace()
    module.optimizer_factory = sgd
    data = variant.data(folder, **CASES[case])
    trainer = make_trainer(
        folder, STEPS, trace, *callbacks, precision="64-true", limit_val_batches=2, **options
    )
    torch.manual_seed(1)
    trainer.fit(module, data)
    return {
        "losses": trace.losses,
        "loss": trainer.callback_metrics["train/loss"].item(),
        "validation": trainer.validate(module, data, verbose=False)[0],
        "weights": dict(module.state_dict()),
        "slots": module.streams.slots("train"),
    }


def learn_shared(rank: int, folder: Path, *cases: str) -> None:
    for case in cases:
        options = join_processes(rank)
        found = learn(case, folder, ContextParallel(2), **options)
        torch.save(found, folder / f"{case}_{rank}.pt")


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    if expected.is_floating_point():  # losses are in float32, whatever the precision
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7, msg=what)
    else:
        assert torch.equal(actual, expected), what


@pytest.mark.slow
def test_two_processes_that_share_rows_learn_what_one_learns(tmp_path: Path) -> None:
    VARIANTS["lact"].data(tmp_path).prepare_data()  # the processes would write it side by side
    in_two_processes(learn_shared, tmp_path, *CASES)
    for case in CASES:
        whole = learn(case, tmp_path)
        parts = [torch.load(tmp_path / f"{case}_{r}.pt", weights_only=False) for r in (0, 1)]
        for part in parts:
            assert part["validation"] == pytest.approx(whole["validation"], rel=1e-6)
            assert part["loss"] == pytest.approx(whole["loss"], rel=1e-6)
            for name, value in whole["weights"].items():
                assert_close(part["weights"][name], value, f"{case}: {name}")
            for slot, fields in whole["slots"].items():
                for field, value in fields.items():
                    assert_close(part["slots"][slot][field], value, f"{case}: {slot} {field}")
        apart = [abs(parts[0]["losses"][n] - parts[1]["losses"][n]) for n in whole["losses"]]
        assert max(apart) > 1e-6, "both processes have read the same tokens"
