"""A small action expert with random weights and open gates, and chunks for it."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.adapters import TTTAdapterConfig
from lightning_modules.layers.ttt import TTTConfig
from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.streams import StreamPlan

STATE, ACTION, HORIZON, STRIDE = 5, 3, 6, 4
FEATURES = {
    "state_dim": STATE,
    "action_dim": ACTION,
    "horizon": HORIZON,
    "stride": STRIDE,
    "image_keys": [],
    "delta_actions": (),
    "action_range": [[-0.5, -1.0, -1.0], [0.5, 1.0, 1.0]],
    "action_bounds": None,
}


def make_module(
    *,
    expert: dict[str, Any] | None = None,
    ttt: dict[str, Any] | None = None,
    layer: dict[str, Any] | None = None,
    features: dict[str, Any] | None = None,
    with_ttt: bool = True,
    **options: Any,
) -> ActionExpertModule:
    """Two layers of width 16; every parameter random, so that no zero gate hides a branch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8}
    adapter = TTTAdapterConfig(layer=TTTConfig(num_heads=2, **(layer or {})), **(ttt or {}))
    module = ActionExpertModule(
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        expert=ExpertConfig(**{**sizes, "intermediate_size": 32, **(expert or {})}),
        ttt=adapter if with_ttt else None,
        execution_horizon=STRIDE,
        denoise_steps=3,
        normalization="none",
        **options,
    )
    module.build({**FEATURES, **(features or {})})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def make_chunk(index: int = 0, rows: int = 3, first: bool | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(index)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    begins = index == 0 if first is None else first
    plan = StreamPlan(tuple(range(rows)), (index,) * rows, (begins,) * rows)
    return {
        "observation.state": randn(rows, STATE),
        "action": randn(rows, HORIZON, ACTION),
        "action_is_pad": torch.zeros(rows, HORIZON, dtype=torch.bool),
        "episode_index": torch.arange(rows) + 10,
        "frame_index": torch.full((rows,), STRIDE * index),
        "stream_id": torch.tensor(plan.stream_id),
        "chunk_index": torch.tensor(plan.chunk_index),
        "is_first": torch.tensor(plan.is_first),
        "plan": plan,
    }
