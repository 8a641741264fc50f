"""Wrapper around an attention module: the common part of all attention adapters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.generation import check_nothing_missed, state_of
from lightning_modules.streams import FastState

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


EXPECTED = (
    "adapters wrap attention modules as Hugging Face decoders have them, called with keywords "
    "(hidden_states=, ...) and returning a tuple (attn_output, attn_weights)"
)


class BaseAttentionAdapter(nn.Module):
    """Stands in the place of an attention module and completes its output.

    The forward call takes the keywords of the base and those of `CONTEXT_KEYS`, calls the base
    with its own, and returns `(adapt(attn_output, ...), *rest)`. Reading an attribute that the
    adapter does not have (`layer_idx`, `config`, `head_dim`, ...) reads it from the base.

    Fast state comes from `fast_state=` or, without it, from a cache that carries one
    (`generation.FastStateCache` as `past_key_values`); the cache then gets the next state.

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

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Attention, completed by the adapter.

        Args:
            hidden_states: input of attention (normed), `[B, T, hidden]`.
            *args: an error: adapters find keywords by name.
            **kwargs: keywords of the base attention, and those of `CONTEXT_KEYS`.

        Returns:
            The adapted attention output `[B, T, hidden]`, then what else the base returned.

        Raises:
            TypeError: the attention is called, or answers, unlike Hugging Face attention.
            ValueError: the fast state is another batch's, or misses what the cache has seen.
        """
        if args:
            raise TypeError(f"{self._base_name} was called with positional arguments; {EXPECTED}")
        context = {key: kwargs.pop(key) for key in CONTEXT_KEYS if key in kwargs}
        cache = kwargs.get("past_key_values") if context.get("fast_state") is None else None
        if carries := isinstance(getattr(cache, "fast_state", None), FastState):
            context["fast_state"] = state_of(cache, len(hidden_states))
        elif cache is not None:
            self._check_nothing_missed(cache)
        returned = self.attend(hidden_states, **kwargs)
        if not isinstance(returned, tuple):
            raise TypeError(f"{self._base_name} returned a {type(returned).__name__}; {EXPECTED}")
        attn_output, *rest = returned
        adapted = self.adapt(attn_output, hidden_states, **context)
        if carries:
            cache.fast_state = context["fast_state"].advance()
        return adapted, *rest

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

    def parameter_group(self, name: str) -> str:
        """Group in which a parameter of the adapter is trained: `adapter`, `gate` or `fast`.

        Args:
            name: of a parameter inside the adapter, e.g. `lora_A.weight`.
        """
        return "adapter"

    def detach_base(self) -> BaseAttentionAdapter:
        """Give up the base attention: this adapter becomes a member of one that owns the base."""
        del self._modules[BASE]
        return self

    @property
    def carries_state(self) -> bool:
        """Whether the output depends on what earlier calls have read, as a causal memory's does.

        Such an adapter refuses to continue a sequence from its keys and values alone.
        """
        inner = (module for module in self.modules() if module is not self)
        return any(isinstance(m, BaseAttentionAdapter) and m.carries_state for m in inner)

    @property
    def _base_name(self) -> str:
        base = self._modules.get(BASE)
        return type(self if base is None else base).__name__

    def _check_nothing_missed(self, cache: Any) -> None:
        """Raise if a cache without fast state holds tokens that a memory would have to know."""
        layer = getattr(self, "layer_idx", None)
        if layer is not None and self.carries_state:
            check_nothing_missed(cache, layer, f"the fast weights of {self.slot or 'this layer'}")


def check_attention(attention: nn.Module) -> None:
    """Raise TypeError if a module cannot be called as Hugging Face attention is."""
    parameters = inspect.signature(attention.forward).parameters
    if "hidden_states" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    raise TypeError(
        f"{type(attention).__name__}.forward takes ({', '.join(parameters)}); {EXPECTED}"
    )


def gated(branch: Tensor, gate: Tensor | None) -> Tensor:
    """`branch * gate`, or the branch itself without a gate."""
    return branch if gate is None else branch * gate


@torch.no_grad()
def publish_gates(
    fast_state: FastState,
    slot: str,
    gates: Mapping[str, Tensor | None],
    branches: Mapping[str, Tensor | None],
    residual: Tensor | None,
) -> None:
    """Publish gates as applied, and the size of each gated branch relative to the residual stream.

    Args:
        fast_state: where to publish.
        slot: of the adapter.
        gates: name -> gate; None where there is none.
        branches: name -> gated branch, `[B, T, hidden]`.
        residual: residual stream before attention, `[B, T, hidden]`; None where it is not known.
    """
    values = dict(gates)
    if residual is not None:
        scale = _row_norms(residual)
        for name, branch in branches.items():
            if branch is not None:
                values[f"ratio_{name}"] = _row_norms(branch) / scale
    present = {name: value for name, value in values.items() if value is not None}
    fast_state.publish("gate", slot, **present)


def _row_norms(x: Tensor) -> Tensor:
    """Norm of all that a row has, `[B]`, in float32 at least."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), dtype=dtype)


def _accept_base_keys(adapter: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give keys of the unwrapped attention (`q_proj.weight`) their name inside the adapter."""
    own = {*adapter._modules, *adapter._parameters, *adapter._buffers}
    if BASE not in own:
        return
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if name.split(".", 1)[0] not in own:
            state_dict[f"{prefix}{BASE}.{name}"] = state_dict.pop(key)
