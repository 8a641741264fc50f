"""LoRA on the linear maps of a decoder's attention and MLPs, by peft."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_modules.models.peft_files import put_beside

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ProjectionLoRA:
    """LoRA on the linear maps of attention and MLPs, by peft.

    Args:
        rank: r of `W + (alpha / r) B A`.
        alpha: scale of the update.
        targets: linear maps of a decoder layer that get one.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1")
        unknown = sorted(set(self.targets) - set(LORA_TARGETS))
        if unknown or not self.targets:
            raise ValueError(
                f"lora.targets {unknown or 'is empty'}: choose from {', '.join(LORA_TARGETS)}"
            )


def inject_lora(model: nn.Module, options: ProjectionLoRA) -> None:
    """Put LoRA into a model, in place; peft freezes what was there."""
    from peft import LoraConfig  # slow to import, and seldom needed

    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=list(options.targets),
        lora_dropout=0.0,
    )
    put_beside(model, config)
