"""What the kernels of TTT-as-LoRA are told of a call, beside its tensors."""

from typing import NamedTuple

from lightning_modules.ops.ttt_lora.plan import Plan


class Call(NamedTuple):
    """What the kernels must know of a call beside its tensors.

    Attributes:
        size: m.
        mode_b: tokens see the own mini-batch.
        plan: where the blocks lie.
        width: columns of the outputs, at least d; those behind d are zero.
        eps: of the norm in the loss.
        unit: keys and queries are to be normalised.
        output_eps: of the output's norm.
        residual: add the queries to what is read.
    """

    size: int
    mode_b: bool
    plan: Plan
    width: int
    eps: float
    unit: bool = False
    output_eps: float = 1e-5
    residual: bool = False
