"""What the kernels of TTT-as-LoRA are told of a call, beside its tensors."""

from typing import NamedTuple

from torch import Tensor

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


def held_get_gradients(start: Tensor | None, norm: Tensor | None, of_state: bool) -> bool:
    """Whether the tokens of the open mini-batch that a state held get gradients.

    They do if those of the state are asked for, and if the norm in the loss needs theirs.

    Args:
        start: the change of the state; None: there is none.
        norm: of the loss.
        of_state: whether a gradient of the state is asked for.
    """
    return start is not None and (of_state or norm is not None)
