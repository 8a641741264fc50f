"""In-Place TTT inside a Hugging Face decoder: every n-th MLP learns while it reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lightning_modules.adapters.deep_context import connect, disconnect
from lightning_modules.adapters.inject import ATTENTION_NAME
from lightning_modules.layers.in_place_mlp import InPlaceConfig, InPlaceMLP

MLP_NAME = "mlp"


@dataclass(frozen=True)
class InPlaceOptions:
    """Which MLPs learn, and how.

    Args:
        every_n: the last of every n layers.
        layer: how its down projection learns.
    """

    every_n: int = 4
    layer: InPlaceConfig = field(default_factory=InPlaceConfig)

    def __post_init__(self) -> None:
        if self.every_n < 1:
            raise ValueError(f"in_place.every_n={self.every_n} must be at least 1")


def inject_in_place(model: nn.Module, options: InPlaceOptions) -> list[str]:
    """Let the MLPs of every n-th layer learn. The model computes what it did, bit for bit.

    Load the base weights first. The MLPs keep the names of their weights; what is new is in
    `mlp.ttt`, the options in `model.in_place_options`. State comes with `fast_state=` or a
    `FastStateCache`.

    Args:
        model: a decoder whose layers have `self_attn` and a gated `mlp`.
        options: which, and how.

    Returns:
        Paths of the MLPs.

    Raises:
        ValueError: the model has fewer layers than n, or no such layers.
        TypeError: an MLP is of another kind.
    """
    owners = [p.rpartition(".") for p, _ in model.named_modules()]
    layers = [owner for owner, _, name in owners if name == ATTENTION_NAME]
    chosen = layers[options.every_n - 1 :: options.every_n]
    if not chosen:
        raise ValueError(
            f"in_place.every_n={options.every_n}, but {type(model).__name__} has {len(layers)} "
            f"layers with {ATTENTION_NAME}: choose at most that"
        )
    learning = {}
    for layer in chosen:
        module = model.get_submodule(layer)
        learning[f"{layer}.{MLP_NAME}"] = InPlaceMLP(getattr(module, MLP_NAME), options.layer)
    contexts = connect(model, list(learning))
    for path, mlp in learning.items():
        mlp.slot, mlp.context = path, contexts[path]
        owner = model.get_submodule(path.rpartition(".")[0])
        setattr(owner, MLP_NAME, mlp.train(owner.training))
    model.in_place_options = options
    return list(learning)


def remove_in_place(model: nn.Module) -> list[str]:
    """Put back the same MLPs, without what they have learned; returns their paths.

    Other adapters of their gate and up projections stay.
    """
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, InPlaceMLP)]
    for path, mlp in found:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, mlp.unwrap())
    model.__dict__.pop("in_place_options", None)
    disconnect(model)
    return [path for path, _ in found]
