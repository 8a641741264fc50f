"""Several named adapters at one attention module, of which one is active."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lightning_modules.adapters.base import gated
from lightning_modules.adapters.compose import CompositeAdapter, MemberSpec, member_specs
from lightning_modules.adapters.registry import register_attention_adapter

Activation = list[tuple["SwitchAdapter", str | None]]


@dataclass(frozen=True)
class SwitchConfig:
    """What can be switched.

    Args:
        members: name -> `{adapter_type, adapter_config}`.
        active: name of the member that is active at first; None is attention as it is.
    """

    members: dict[str, MemberSpec]
    active: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", member_specs(self.members))
        if self.active is not None and self.active not in self.members:
            raise ValueError(
                f"active={self.active!r} is no member; members are {', '.join(self.members)}"
            )


@register_attention_adapter("switch", SwitchConfig)
class SwitchAdapter(CompositeAdapter):
    """The output of the active member, or attention as it is.

    A member that is not active does not run: its fast state is carried on unchanged and its
    parameters get no gradient (across processes, DDP then needs `find_unused_parameters`). Which
    member is active is no part of a checkpoint.

    Args:
        base_attention: see `BaseAttentionAdapter`.
        config: the members, and which of them is active at first.
    """

    def __init__(self, base_attention: nn.Module, config: SwitchConfig) -> None:
        super().__init__(base_attention, config)
        self.active = config.active

    @property
    def replaces_attention(self) -> bool:
        """Whether the active member does."""
        return self.active is not None and self.members[self.active].replaces_attention

    @property
    def carries_state(self) -> bool:
        """Whether the active member does."""
        return self.active is not None and self.members[self.active].carries_state

    def adapt(
        self,
        attn_output: Tensor | None,
        hidden_states: Tensor,
        *,
        gate_attn: Tensor | None = None,
        **context: Any,
    ) -> Tensor:
        """Output of the active member; see `BaseAttentionAdapter.adapt`."""
        if self.active is None:
            return gated(attn_output, gate_attn)
        member = self.members[self.active]
        return member.adapt(attn_output, hidden_states, gate_attn=gate_attn, **context)

    def delta(self, attn_output: Tensor, hidden_states: Tensor, **context: Any) -> Tensor | None:
        """What the active member adds, `[B, T, hidden]`; None if it is none."""
        if self.active is None:
            return None
        return self.members[self.active].delta(attn_output, hidden_states, **context)

    def extra_repr(self) -> str:
        """The active member, for `print(model)`."""
        return f"active={self.active!r}"


def set_active(model: nn.Module, name: str | None, pattern: str = "*") -> list[str]:
    """Switch the adapters of a model.

    Args:
        model: has switch adapters.
        name: member that becomes active; None for attention as it is.
        pattern: shell pattern of the module paths of the switches that are set, for models where
            they have different members.

    Returns:
        The paths of the switches that were set.

    Raises:
        ValueError: no switch there, or one without that member; nothing is switched.
    """
    switches = {
        path: module for path, module in _switches(model).items() if fnmatchcase(path, pattern)
    }
    if not switches:
        known = ", ".join(_switches(model)) or "none: inject adapters of type 'switch'"
        raise ValueError(f"pattern {pattern!r} matches no switch adapter; there are: {known}")
    for path, switch in switches.items():
        if name is not None and name not in switch.members:
            raise ValueError(
                f"{path} has no adapter {name!r}; there are {', '.join(switch.members)}, and None "
                "for attention as it is"
            )
    for switch in switches.values():
        switch.active = name
    return list(switches)


@contextmanager
def active_adapter(model: nn.Module, name: str | None, pattern: str = "*") -> Iterator[None]:
    """Switch the adapters of a model in a context; see `set_active`.

    Afterwards, also after an exception, every switch is where it was.
    """
    before = activation(model)
    set_active(model, name, pattern)
    try:
        yield
    finally:
        restore(before)


def activation(model: nn.Module) -> Activation:
    """Which member of every switch is active, for `restore`."""
    return [(switch, switch.active) for switch in _switches(model).values()]


def restore(before: Activation) -> None:
    """Put every switch back to where it was at `activation`."""
    for switch, name in before:
        switch.active = name


def _switches(model: nn.Module) -> dict[str, SwitchAdapter]:
    return {path: m for path, m in model.named_modules() if isinstance(m, SwitchAdapter)}
