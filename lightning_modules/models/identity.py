"""Which weights a model has, whatever wraps it: what belongs to exactly these can be told apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_modules.adapters.base import BASE
from lightning_modules.adapters.fingerprint import fingerprint
from lightning_modules.adapters.inject import parameter_group

WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", BASE, "base_layer"}
)
"""What torch.compile, FSDP, activation checkpointing and adapters insert into names, anywhere."""


@dataclass(frozen=True)
class Weights:
    """A short hash of every parameter of a model.

    Names are relative to the innermost module that holds all parameters, and without `WRAPPERS`:
    a LightningModule, its model, a `PeftModel`, DDP or a compiled model around that have the same
    weights. Whether a parameter is trained does not matter, so training and inference agree.
    Buffers do not count. Of a tensor the hash takes shape and about 64 values, spread out
    (`adapters.fingerprint`), as float32: other dtypes agree if their values do.

    Args:
        digests: canonical name -> hash.
    """

    digests: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """The weights that a model has now; waits for the device."""
        named = dict(model.named_parameters())
        return cls(
            {name: fingerprint([("", named[own])])[:8] for name, own in _canonical(named).items()}
        )

    @property
    def fingerprint(self) -> str:
        """One short hash of all of them."""
        return fingerprint((f"{name} {digest}", _NOTHING) for name, digest in self._sorted())

    def difference(self, model: nn.Module) -> str | None:
        """What distinguishes a model's weights from these, in words; None: nothing does."""
        here = Weights.of(model).digests
        changed = [n for n in here if n in self.digests and here[n] != self.digests[n]]
        added = [n for n in here if n not in self.digests]
        absent = [n for n in self.digests if n not in here]
        if not changed and not added and not absent:
            return None
        parts = []
        if changed:
            common = len(here) - len(added)
            whose = _whose(model, changed)
            parts.append(f"{len(changed)} of {common} weights{whose} have other values")
        if absent:
            parts.append(f"{len(absent)} weights are missing here")
        if added:
            parts.append(f"{len(added)} weights{_whose(model, added)} were not there")
        first = min((*changed, *absent, *added))
        return f"{', '.join(parts)} (e.g. {first})"

    def _sorted(self) -> Iterator[tuple[str, str]]:
        yield from sorted(self.digests.items())


_NOTHING = Tensor()


def _canonical(names: Iterable[str]) -> dict[str, str]:
    """Names without what wraps the model -> names; sorted."""
    split = {name: name.split(".") for name in names}
    depth = 0
    while len(split) > 0 and all(len(parts) > depth + 1 for parts in split.values()):
        if len({parts[depth] for parts in split.values()}) > 1:
            break
        depth += 1
    inner = {name: parts[depth:] for name, parts in split.items()}
    bare = {name: [p for p in parts if p not in WRAPPERS] for name, parts in inner.items()}
    unique = len({tuple(parts) for parts in bare.values()}) == len(bare)
    chosen = bare if unique else inner
    return dict(sorted((".".join(parts), name) for name, parts in chosen.items()))


def _whose(model: nn.Module, names: Iterable[str]) -> str:
    """Whether these weights are the base's or an adapter's, in words; empty without adapters."""
    own = _canonical(name for name, _ in model.named_parameters())
    added = {n for n, name in own.items() if "lora_" in name or parameter_group(model, name)}
    if not added:
        return ""
    kinds = {"adapter" if name in added else "base" for name in names}
    return f" of the {' and the '.join(sorted(kinds))}"
