"""What the action expert's module knows of a backbone: one interface, whatever is behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from lightning_modules.streams import FastState

STATE = "observation.state"

Writers = Literal["all", "observation", "action"]
"""Which tokens update the fast weights."""


class Backbone(nn.Module):
    """Velocity field `v(x_t, t, observation)` of a chunk of actions.

    What does not depend on noise and time is computed once per chunk (`observe`) and used for the
    training step or for all Euler steps of the sampler (`forward`).

    Attributes:
        action_size: width of noise and velocity: the action's, or more where a pretrained model
            pads it.
    """

    action_size: int

    @property
    def decoder(self) -> nn.Module:
        """Transformer whose `layers.<i>.self_attn` may get adapters."""
        raise NotImplementedError

    @property
    def cond_size(self) -> int | None:
        """Size of the timestep condition; None without adaRMS."""
        raise NotImplementedError

    def observe(self, observation: Mapping[str, Any]) -> Any:
        """What `forward` needs of an observation.

        Args:
            observation: a chunk of the batch contract with a normalised `observation.state
                [B, S]`, or what a policy sees.
        """
        raise NotImplementedError

    def forward(
        self,
        observed: Any,
        noisy_actions: Tensor,
        time: Tensor,
        *,
        fast_state: FastState | None = None,
        write: Writers = "all",
    ) -> Tensor:
        """Velocity of every action.

        Args:
            observed: what `observe` returned; it is not changed.
            noisy_actions: x_t, `[B, A, action_size]`.
            time: flow-matching time in [0, 1], 1 is noise, `[B]`.
            fast_state: handle on the fast state; None starts afresh and keeps nothing.
            write: which tokens update the fast weights.

        Returns:
            `[B, A, action_size]`.
        """
        raise NotImplementedError

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """What `to`, `half`, `bfloat16` and Lightning's true-precision plugins call."""
        with exact_frequencies(self):
            return super()._apply(*args, **kwargs)

    def complete(self) -> None:
        """Called once when the adapters are in: decide which parameters are trained."""

    def restorable(self) -> frozenset[str]:
        """Names of parameters that checkpoints leave out, because building brings them back."""
        return frozenset()

    def fingerprint(self) -> str | None:
        """Short hash of the parameters that checkpoints leave out; None if there are none."""
        return None


@contextmanager
def exact_frequencies(model: nn.Module) -> Iterator[None]:
    """Keep the frequencies of positions and times as they are while a model changes its dtype.

    Rounded to bfloat16 they are off by up to 0.4 %: an angle at position 500 by 2, and the fastest
    of the time features, with 1571 t, by 6.
    """
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("freq")
    ]
    yield
    for module, name, buffer in kept:
        now = module.get_buffer(name)
        if now.dtype.itemsize < buffer.dtype.itemsize:
            setattr(module, name, buffer.to(now.device))


class BackboneOptions(Protocol):
    """Options of a backbone: they check the data and build the model for it."""

    @property
    def num_layers(self) -> int:
        """Layers of the decoder that gets the adapters."""

    def check(self, features: Mapping[str, Any]) -> None:
        """Raise a ValueError if the data (`ActionChunkDataModule.features`) does not fit."""

    def build(self, features: Mapping[str, Any]) -> Backbone:
        """The model, without adapters."""

    @classmethod
    def restore(cls, stored: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`."""


def action_tokens(length: int, observed: int, device: torch.device) -> Tensor:
    """Which of `length` tokens are actions, bool `[T]`: all behind the first `observed`."""
    return torch.arange(length, device=device) >= observed


def write_mask(is_action: Tensor, write: Writers, batch: int) -> Tensor:
    """Tokens that write, bool `[batch, T]`, from `is_action [T]`."""
    writes = {
        "all": torch.ones_like(is_action),
        "observation": ~is_action,
        "action": is_action,
    }[write]
    return writes.expand(batch, -1)


def with_unseen_observation(condition: Tensor) -> Tensor:
    """`[B, 2, C]` for segments: 0 for observation tokens, the condition `[B, C]` for actions."""
    return torch.stack([torch.zeros_like(condition), condition], dim=1)
