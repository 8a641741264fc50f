"""Wrapper around an attention module: the common part of all attention adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

BASE = "base_attention"

CONTEXT_KEYS = (
    "fast_state",
    "adarms_cond",
    "segments",
    "gate_attn",
    "residual",
    "write_mask",
    "write_weight",
    "mask",
    "document_ids",
)
"""Keywords that are meant for adapters; the base attention never sees them."""


class BaseAttentionAdapter(nn.Module):
    """Stands in the place of an attention module and completes its output.

    The forward call takes the keywords of the base and those of `CONTEXT_KEYS`, calls the base
    with its own, and returns `(adapt(attn_output, ...), *rest)`. Reading an attribute that the
    adapter does not have (`layer_idx`, `config`, `head_dim`, ...) reads it from the base.

    A subclass implements `delta`, what it adds; `adapt` returns the **complete** attention output,
    gates applied. An adapter that does not add (it replaces attention, or combines other adapters)
    overrides `adapt` instead. Weights of a checkpoint of the base load under their old names.

    Attributes:
        slot: name of the layer in `FastState`: its module path, set by `inject_adapters`.
        applies_gates: tells the decoder layer not to apply the gate of attention again.
        merged: whether `merge_adapters` has folded this site into the base.

    Args:
        base_attention: called with keywords, returns `(attn_output, attn_weights)`.
    """

    slot: str = ""
    applies_gates: bool = True
    merged: bool = False

    def __init__(self, base_attention: nn.Module) -> None:
        super().__init__()
        self.base_attention = base_attention
        self.register_load_state_dict_pre_hook(_accept_base_keys)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if BASE not in modules:
                raise
            return getattr(modules[BASE], name)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        """Attention, completed by the adapter.

        Args:
            hidden_states: input of attention (normed), `[B, T, hidden]`.
            **kwargs: keywords of the base attention, and those of `CONTEXT_KEYS`.

        Returns:
            The adapted attention output `[B, T, hidden]`, then what else the base returned.
        """
        context = {key: kwargs.pop(key) for key in CONTEXT_KEYS if key in kwargs}
        attn_output, *rest = self.attend(hidden_states, **kwargs)
        return self.adapt(attn_output, hidden_states, **context), *rest

    def attend(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        """Call the base attention, with keywords only, unless it is replaced: `(None, None)`.

        With a key-value cache the base is called even then: models read their position from the
        length of the cache.
        """
        if self.replaces_attention and kwargs.get("past_key_values") is None:
            return None, None
        return self.base_attention(hidden_states=hidden_states, **kwargs)

    def adapt(
        self,
        attn_output: Tensor,
        hidden_states: Tensor,
        *,
        gate_attn: Tensor | None = None,
        **context: Any,
    ) -> Tensor:
        """The complete attention output: `gate_attn * attn_output + delta`.

        Args:
            attn_output: output of the base attention, `[B, T, hidden]`, before any gate.
            hidden_states: input of attention, `[B, T, hidden]`.
            gate_attn: gate of attention, broadcastable to `[B, T, hidden]`; None is 1.
            **context: further keywords of `CONTEXT_KEYS`.

        Returns:
            `[B, T, hidden]`.
        """
        added = self.delta(attn_output, hidden_states, gate_attn=gate_attn, **context)
        attention = gated(attn_output, gate_attn)
        return attention if added is None else attention + added

    def delta(
        self,
        attn_output: Tensor,
        hidden_states: Tensor,
        *,
        gate_attn: Tensor | None = None,
        **context: Any,
    ) -> Tensor | None:
        """What the adapter adds to gated attention, its own gate applied; arguments as `adapt`.

        Returns:
            `[B, T, hidden]`, or None for nothing.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say what it adds to attention: implement delta (or "
            "adapt, for one that cannot be summed with others)"
        )

    @property
    def replaces_attention(self) -> bool:
        """Whether the output does not depend on attention, which then need not run."""
        return False

    def reset_parameters(self) -> None:
        """Initialise what the adapter adds; the base stays as it is."""

    def own_slot(self) -> str:
        """`slot`, for an adapter that carries state, or leaves losses or statistics.

        Raises:
            ValueError: no slot is set.
        """
        if not self.slot:
            raise ValueError(
                "the adapter has no slot for its state: use inject_adapters, or set adapter.slot "
                "to a name that no other layer has"
            )
        return self.slot

    def merge_obstacle(self) -> str | None:
        """Why this cannot be folded exactly into the weights of the base; None if it can."""
        return f"{type(self).__name__} does not say that it can be merged exactly"

    def detach_base(self) -> BaseAttentionAdapter:
        """Give up the base attention: this adapter becomes a member of one that owns the base."""
        del self._modules[BASE]
        return self


def gated(branch: Tensor, gate: Tensor | None) -> Tensor:
    """`branch * gate`, or the branch itself without a gate."""
    return branch if gate is None else branch * gate


def _accept_base_keys(adapter: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give keys of the unwrapped attention (`q_proj.weight`) their name inside the adapter."""
    own = {*adapter._modules, *adapter._parameters, *adapter._buffers}
    if BASE not in own:
        return
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if name.split(".", 1)[0] not in own:
            state_dict[f"{prefix}{BASE}.{name}"] = state_dict.pop(key)
