"""Inputs and calls of `ops.ttt_lora`, shared by its tests; the rest is that of the TTT ops."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from ttt_cases import Case, random_flags

from lightning_modules.ops import ttt_lora

PER_TOKEN = ("q", "k", "v", "eta")
FORMS = {f"{mode}_{loss}": (mode, loss) for mode in "AB" for loss in ("plain", "ln")}


@dataclass(frozen=True)
class LoRACase(Case):
    """Arguments of one call: `tensors` are differentiable, `options` are the other keywords."""

    def run(self, backend: str, **options: Any) -> tuple[Tensor, Any]:
        """Call the op; `options` override those of the case."""
        keywords = {**self.options, "state": self.state, **options, "backend": backend}
        for name in ("norm_weight", "norm_bias"):
            if name in self.tensors:
                keywords.setdefault(name, self.tensors[name])
        names = (*PER_TOKEN, "w_base", "b_base")
        return ttt_lora(*(self.tensors[name] for name in names), **keywords)

    def tokens(self, index: Any) -> "LoRACase":
        """The call with only some of the tokens (any index of the time axis)."""
        return self._cut((slice(None), index))

    def rows(self, index: slice) -> "LoRACase":
        """The call with only some of the rows."""
        state = self.state
        if state is not None:
            state = type(state)(*(x[index] for x in state))
        return replace(self._cut(index), state=state)

    def member(self, index: int) -> "LoRACase":
        """One adapter of a group, alone."""
        tensors = {
            name: x[:, :, index] if name in PER_TOKEN else x[index]
            for name, x in self.tensors.items()
        }
        state = self.state
        if state is not None:
            weights, pending = state[:2], state[2:5]
            state = type(state)(
                *(x[:, index] for x in weights), *(x[:, :, index] for x in pending), *state[5:]
            )
        return replace(self, tensors=tensors, state=state)

    def _cut(self, index: Any) -> "LoRACase":
        cut = {name: self.tensors[name][index] for name in PER_TOKEN if self._has_time(name)}
        flags = {
            name: value[index]
            for name, value in self.options.items()
            if name in ("mask", "document_ids") and value is not None
        }
        return replace(self, tensors={**self.tensors, **cut}, options={**self.options, **flags})

    def _has_time(self, name: str) -> bool:
        return self.tensors[name].dim() > 1


def make_case(
    *,
    time: int,
    mini_batch_size: int = 4,
    mode: str = "A",
    loss: str = "plain",
    batch: int = 2,
    group: int | None = None,
    size: int = 4,
    eta: str = "token",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LoRACase:
    """Random inputs on the scale of a trained layer; eta for each token, each adapter or all."""
    generator = torch.Generator().manual_seed(seed)
    own = () if group is None else (group,)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    shapes = {"token": (batch, time, *own), "adapter": own, "all": ()}
    rate = torch.rand(shapes[eta], generator=generator, dtype=torch.float64)
    tensors = {name: normal(batch, time, *own, size, scale=0.6) for name in ("q", "k")}
    tensors["v"] = normal(batch, time, *own, size)
    tensors["eta"] = (0.1 + rate).to(dtype)
    tensors["w_base"] = normal(*own, size, size, scale=0.4)
    tensors["b_base"] = normal(*own, size, scale=0.4)
    if loss == "ln":
        tensors["norm_weight"] = 1 + normal(*own, size, scale=0.3)
        tensors["norm_bias"] = normal(*own, size, scale=0.3)
    options = {"mini_batch_size": mini_batch_size, "mode": mode, "loss": loss}
    return LoRACase("lora", tensors, options)


def case_of(form: str, time: int, **sizes: Any) -> LoRACase:
    """`make_case` by the name of a mode and a loss."""
    mode, loss = FORMS[form]
    return make_case(time=time, mode=mode, loss=loss, **sizes)


def carried_state(case: LoRACase, seed: int, time: int = 7) -> LoRACase:
    """Start the call from the state after other random tokens, a different number in each row."""
    q = case.tensors["q"]
    batch, group = q.shape[0], q.shape[2] if q.dim() == 4 else None
    other = make_case(
        time=time, batch=batch, group=group, size=q.shape[-1], seed=seed + 1, dtype=q.dtype
    )
    mask = torch.arange(time)[None] >= torch.arange(batch)[:, None]
    flags: dict[str, Tensor] = {"mask": mask}
    if "document_ids" in case.options:
        flags["document_ids"] = case.options["document_ids"][:, :1].expand(batch, time)
    earlier = {name: other.tensors[name] for name in PER_TOKEN}
    before = replace(
        case, tensors={**case.tensors, **earlier}, options={**case.options, **flags}, state=None
    )
    return replace(case, state=before.run("naive")[1])


def with_everything(case: LoRACase, seed: int) -> LoRACase:
    """Random mask and documents, and a state that some rows continue."""
    return carried_state(random_flags(case, seed, "mask", "document_ids"), seed)
