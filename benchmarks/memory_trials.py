"""The named trials of the memory bank: every arm at every learning rate."""

from __future__ import annotations

from training_runs import Arm, trials_of

WIDTH = "model.init_args.config.intermediate_size"
MEMORY = "model.init_args.memory.memory."
VANILLA = {"model.init_args.arm": "vanilla"}

SCRATCH = (1e-3, 2e-3, 4e-3, 8e-3)
ADAPTER = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
PRODUCT_KEYS = {"num_keys": 90, "num_heads": 4, "top_k": 32, "key_width": 128}

ARMS: dict[str, Arm] = {
    "scratch/vanilla": Arm("memory_scratch", "no memory", VANILLA, SCRATCH),
    "scratch/block": Arm("memory_scratch", "bank, routed by block", rates=SCRATCH),
    "scratch/token": Arm(
        "memory_scratch", "bank, routed by token", {f"{MEMORY}router.strategy": "token"}, SCRATCH
    ),
    "scratch/product_keys": Arm(
        "memory_scratch",
        "product keys",
        {f"{MEMORY}product_keys": PRODUCT_KEYS},
        SCRATCH,
    ),
    "scratch/equal_flops": Arm(
        "memory_scratch",
        "no memory, MLP widened to the FLOPs of the bank by block",
        {**VANILLA, WIDTH: 1000},
        SCRATCH,
    ),
    "scratch/equal_parameters": Arm(
        "memory_scratch",
        "no memory, MLP widened to the parameters of the bank by block",
        {**VANILLA, WIDTH: 1344},
        SCRATCH,
    ),
    **{
        f"adapter/{arm}": Arm("memory_vs_lora", about, {"model.init_args.arm": arm}, rates)
        for arm, about, rates in (
            ("memory", "bank in a frozen language model", ADAPTER),
            ("lora", "LoRA in it", ADAPTER),
            ("both", "both", ADAPTER),
        )
    },
    "adapter/base": Arm(
        "memory_vs_lora",
        "the frozen model as it is (a new memory, one step at learning rate 0)",
        {"model.init_args.arm": "memory"},
        (0.0,),
    ),
}

HELD_OUT = ("adapter",)
"""Arms whose loss on other text is measured, too: what they have forgotten."""

TRIALS = trials_of(ARMS)
