"""Several adapters at one attention module: side by side, or one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_modules.adapters.base import BaseAttentionAdapter, gated
from lightning_modules.adapters.registry import (
    as_config,
    create_attention_adapter,
    register_attention_adapter,
)

SEPARATOR = "/"
"""Between the slot of a composite and the name of a member."""


@dataclass(frozen=True)
class MemberSpec:
    """One member of a composite.

    Args:
        adapter_type: registered name, e.g. `ttt`, also of another composite.
        adapter_config: its options, as `create_attention_adapter` takes them.
    """

    adapter_type: str
    adapter_config: Any | None = None


def member_specs(members: Any) -> dict[str, MemberSpec]:
    """Members by name, checked.

    Args:
        members: name -> `MemberSpec`, or a dict of its fields.

    Raises:
        ValueError: none at all, a name that cannot be one, or an unknown field.
    """
    if not isinstance(members, Mapping) or not members:
        raise ValueError(
            f"members={members!r}: give at least one, as "
            "{name: {adapter_type: ..., adapter_config: ...}}"
        )
    for name in members:
        _check_name(name)
    return {name: as_config(MemberSpec, spec, f"members.{name}") for name, spec in members.items()}


def _check_name(name: Any) -> None:
    """Names become parts of module paths and of slots."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"{name!r} cannot name a member: use letters, digits and underscores, and start with "
            "a letter"
        )
    if name == "self_attn" or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{name!r} cannot name a member: a module has something of that name")


@dataclass(frozen=True)
class CompositeConfig:
    """What is combined.

    Args:
        members: name -> `{adapter_type, adapter_config}`, in order.
    """

    members: dict[str, MemberSpec]

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", member_specs(self.members))


class CompositeAdapter(BaseAttentionAdapter):
    """Owner of the base attention and of member adapters, each with a fast state of its own.

    A member called `fast` has the slot `<slot of the composite>/fast`, at any depth of nesting.

    Args:
        base_attention: see `BaseAttentionAdapter`.
        config: has `members`.

    Raises:
        ValueError: a member's options are wrong; the message names the member.
    """

    def __init__(self, base_attention: nn.Module, config: Any) -> None:
        super().__init__(base_attention)
        self.adapter_config = config
        self.members = nn.ModuleDict(
            {name: _build(base_attention, name, spec) for name, spec in config.members.items()}
        )
        self._slot = ""

    @property
    def slot(self) -> str:
        """Name of the layer in `FastState`; setting it names the members."""
        return self._slot

    @slot.setter
    def slot(self, slot: str) -> None:
        self._slot = slot
        for name, member in self.members.items():
            member.slot = f"{slot}{SEPARATOR}{name}" if slot else ""

    def reset_parameters(self) -> None:
        """Initialise the members."""
        for member in self.members.values():
            member.reset_parameters()

    def parameter_group(self, name: str) -> str:
        """What the member says that has the parameter (`members.<member>.<name>`)."""
        if not name.startswith("members."):
            return super().parameter_group(name)
        _, member, inner = name.split(".", 2)
        return self.members[member].parameter_group(inner)

    def merge_obstacle(self) -> str | None:
        """The first obstacle of a member."""
        for name, member in self.members.items():
            obstacle = member.merge_obstacle()
            if obstacle is not None:
                return f"member {name!r}: {obstacle}"
        return None


@register_attention_adapter("parallel", CompositeConfig)
class ParallelAdapter(CompositeAdapter):
    """`gate_attn * attn + sum_i delta_i`: every member reads attention as it is.

    Args:
        base_attention: see `BaseAttentionAdapter`.
        config: the members.

    Raises:
        ValueError: a member that is no sum with attention.
    """

    def __init__(self, base_attention: nn.Module, config: CompositeConfig) -> None:
        super().__init__(base_attention, config)
        require_summable("parallel", self.members)

    def delta(self, attn_output: Tensor, hidden_states: Tensor, **context: Any) -> Tensor | None:
        """Sum of the members' deltas, `[B, T, hidden]`; None if none adds anything."""
        total = None
        for member in self.members.values():
            total = added(total, member.delta(attn_output, hidden_states, **context))
        return total


@register_attention_adapter("series", CompositeConfig)
class SeriesAdapter(CompositeAdapter):
    """`out_1 = adapt_1(attn, gate_attn)`, then `out_i = adapt_i(out_{i-1})` without gate.

    To every member after the first, the output of the one before is what attention gave; all of
    them have the same `hidden_states`, the input of attention.

    Args:
        base_attention: see `BaseAttentionAdapter`.
        config: the members, in order.

    Raises:
        ValueError: a member after the first that replaces attention.
    """

    def __init__(self, base_attention: nn.Module, config: CompositeConfig) -> None:
        super().__init__(base_attention, config)
        for name, member in list(self.members.items())[1:]:
            if any(adapter.replaces_attention for adapter in _adapters(member)):
                raise ValueError(
                    f"series: member {name!r} replaces attention, so that those before it would "
                    "have no effect: put it first"
                )

    @property
    def replaces_attention(self) -> bool:
        """Whether the first member does."""
        return next(iter(self.members.values())).replaces_attention

    def adapt(
        self,
        attn_output: Tensor | None,
        hidden_states: Tensor,
        *,
        gate_attn: Tensor | None = None,
        **context: Any,
    ) -> Tensor:
        """Output of the last member; see `BaseAttentionAdapter.adapt`."""
        out, gate = attn_output, gate_attn
        for member in self.members.values():
            out, gate = member.adapt(out, hidden_states, gate_attn=gate, **context), None
        return out

    def delta(
        self,
        attn_output: Tensor,
        hidden_states: Tensor,
        *,
        gate_attn: Tensor | None = None,
        **context: Any,
    ) -> Tensor | None:
        """What all members together add: `sum_i delta_i`, of a series inside a composite."""
        total, out, gate = None, attn_output, gate_attn
        for member in self.members.values():
            change = member.delta(out, hidden_states, gate_attn=gate, **context)
            total, out, gate = added(total, change), added(gated(out, gate), change), None
        return total


def added(value: Tensor | None, change: Tensor | None) -> Tensor | None:
    """`value + change`, where None is nothing."""
    if value is None or change is None:
        return change if value is None else value
    return value + change


def require_summable(kind: str, members: nn.ModuleDict) -> None:
    """Check that every member, and every one inside it, is attention plus a `delta`.

    Raises:
        ValueError: one is not.
    """
    for name, member in members.items():
        for adapter in _adapters(member):
            if adapter.replaces_attention:
                raise ValueError(
                    f"{kind}: member {name!r} replaces attention, so that it cannot be summed with "
                    "others: give it another mode, or make it the first of a series"
                )
            if not _has_delta(adapter):
                raise ValueError(
                    f"{kind}: member {name!r} has {type(adapter).__name__}, which does not say "
                    "what it adds to attention (delta), so that it cannot be summed with others: "
                    "put it into a series"
                )


def _adapters(member: nn.Module) -> list[BaseAttentionAdapter]:
    """The member, and the adapters inside it."""
    return [module for module in member.modules() if isinstance(module, BaseAttentionAdapter)]


def _has_delta(adapter: BaseAttentionAdapter) -> bool:
    return type(adapter).delta is not BaseAttentionAdapter.delta


def _build(base_attention: nn.Module, name: str, spec: MemberSpec) -> BaseAttentionAdapter:
    try:
        adapter = create_attention_adapter(base_attention, spec.adapter_type, spec.adapter_config)
    except ValueError as error:
        raise ValueError(f"member {name!r}: {error}") from error
    return adapter.detach_base()
