"""Tiny In-Place MLPs, their oracles, and reading a stream through them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from lightning_modules.layers.in_place_mlp import InPlaceConfig, InPlaceMLP, InPlaceMLPState
from lightning_modules.streams import FastState

SIZE, HIDDEN, CHUNK = 8, 12, 5
VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "symmetric": {"symmetric": True},
    "symmetric_of_seven": {"symmetric": True, "kernel_size": 7, "chunk_size": 2},
    "clipped": {"clip": 0.3, "projection": False},
    "symmetric_clipped": {"symmetric": True, "clip": 0.3},
    "short_chunks": {"chunk_size": 1, "symmetric": True},
    "one_tap": {"kernel_size": 1},
}


class GatedMLP(nn.Module):
    """As Llama and Qwen have it."""

    def __init__(self, size: int = SIZE, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden, bias=False)
        self.up_proj = nn.Linear(size, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, size, bias=False)
        self.act_fn = silu

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def in_place_mlp(variant: str = "causal", seed: int = 0, **options: Any) -> InPlaceMLP:
    """A float64 layer whose every parameter is random, so that it learns."""
    torch.manual_seed(seed)
    given = {"chunk_size": CHUNK, "eta": 0.5, "clip": None, **VARIANTS[variant], **options}
    layer = InPlaceMLP(GatedMLP().double(), InPlaceConfig(**given))
    layer.slot = "mlp"
    for parameter in layer.ttt.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def tokens(batch: int = 2, length: int = 17, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, SIZE, generator=generator, dtype=torch.float64)


def read(
    layer: InPlaceMLP, x: Tensor, sizes: Sequence[int] = (), state: Any = None, **flags: Tensor
) -> tuple[Tensor, InPlaceMLPState]:
    """Outputs and the last state of calls of these sizes (none: one call)."""
    handle = FastState() if state is None else FastState({"mlp": state._asdict()})
    sizes = list(sizes) or [x.shape[1]]
    cut = {name: value.split(sizes, 1) for name, value in flags.items()}
    parts = []
    for n, part in enumerate(x.split(sizes, 1)):
        here = {name: value[n] for name, value in cut.items()}
        parts.append(layer(part, fast_state=handle, **here))
        handle = handle.advance()
    after = handle.read("mlp", InPlaceMLPState)
    assert after is not None
    return torch.cat(parts, dim=1), after


def oracle_layer(data: dict[str, Tensor], about: dict[str, Any]) -> InPlaceMLP:
    """The layer of an oracle file; its projection is used without a transpose, as the release."""
    mlp = GatedMLP(*data["gate_proj.weight"].shape[::-1]).double()
    config = InPlaceConfig(
        clip=None,
        chunk_size=about["chunk"],
        eta=about["eta"],
        kernel_size=about["kernel"],
        symmetric=about["conv"] == "symmetric",
        projection=about["projection"],
    )
    layer = InPlaceMLP(mlp, config)
    layer.slot = "mlp"
    weights = {name: data[f"{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")}
    weights["ttt.ttt_conv"] = data["ttt_conv.weight"]
    if about["projection"]:
        weights["ttt.ttt_proj"] = data["ttt_proj.weight"].T
    layer.load_state_dict({f"{name}.weight": value for name, value in weights.items()})
    return layer
