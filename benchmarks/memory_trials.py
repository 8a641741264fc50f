"""The named trials of the memory bank: every arm at every learning rate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from training_runs import Trial

LR = "model.init_args.optimizer.init_args.lr"
WIDTH = "model.init_args.config.intermediate_size"
MEMORY = "model.init_args.memory.memory."
VANILLA = {"model.init_args.arm": "vanilla"}


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Args:
        config: name of a file in `configs/`, without `.yaml`.
        about: what it is, in words.
        rates: learning rates from which the best is taken.
        changes: dotted key -> value, set in the config.
    """

    config: str
    about: str
    rates: tuple[float, ...]
    changes: dict[str, Any] = field(default_factory=dict)


SCRATCH = (1e-3, 2e-3, 4e-3, 8e-3)
ADAPTER = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
PRODUCT_KEYS = {"num_keys": 90, "num_heads": 4, "top_k": 32, "key_width": 128}

ARMS: dict[str, Arm] = {
    "scratch/vanilla": Arm("memory_scratch", "no memory", SCRATCH, VANILLA),
    "scratch/block": Arm("memory_scratch", "bank, routed by block", SCRATCH),
    "scratch/token": Arm(
        "memory_scratch", "bank, routed by token", SCRATCH, {f"{MEMORY}router.strategy": "token"}
    ),
    "scratch/product_keys": Arm(
        "memory_scratch",
        "product keys",
        SCRATCH,
        {f"{MEMORY}product_keys": PRODUCT_KEYS},
    ),
    "scratch/equal_flops": Arm(
        "memory_scratch",
        "no memory, MLP widened to the FLOPs of the bank by block",
        SCRATCH,
        {**VANILLA, WIDTH: 1000},
    ),
    "scratch/equal_parameters": Arm(
        "memory_scratch",
        "no memory, MLP widened to the parameters of the bank by block",
        SCRATCH,
        {**VANILLA, WIDTH: 1344},
    ),
    **{
        f"adapter/{arm}": Arm("memory_vs_lora", about, rates, {"model.init_args.arm": arm})
        for arm, about, rates in (
            ("memory", "bank in a frozen language model", ADAPTER),
            ("lora", "LoRA in it", ADAPTER),
            ("both", "both", ADAPTER),
        )
    },
    "adapter/base": Arm(
        "memory_vs_lora",
        "the frozen model as it is (a new memory, one step at learning rate 0)",
        (0.0,),
        {"model.init_args.arm": "memory"},
    ),
}

HELD_OUT = ("adapter",)
"""Arms whose loss on other text is measured, too: what they have forgotten."""

TRIALS: dict[str, Trial] = {
    f"{name}/{rate:g}": Trial(arm.config, f"{arm.about}, lr {rate:g}", {**arm.changes, LR: rate})
    for name, arm in ARMS.items()
    for rate in arm.rates
}


def arm_of(trial: str) -> str:
    """Name of the arm of a trial."""
    return trial.rpartition("/")[0]
