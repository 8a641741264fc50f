"""What a model of the export's cases computes; runs where lightning cannot be imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_modules.streams import FastState

BY_POLICY = {"expert", "expert_carried", "pi0", "pi0_pretrained"}
CHUNK = 16


@torch.no_grad()
def read(model: Any) -> Tensor:
    """Logits of two chunks, the second read with what the first has taught, `[2, 2, T, V]`."""
    ids = torch.randint(0, 256, (2, 2, CHUNK), generator=torch.Generator().manual_seed(5))
    if not any(map(_learns, model.modules())):
        return torch.stack([model(input_ids=chunk, use_cache=False).logits for chunk in ids])
    state, found = FastState(), []
    for chunk in ids:
        found.append(model(input_ids=chunk, use_cache=False, fast_state=state).logits)
        state = state.advance()
    return torch.stack(found)


def _learns(module: Any) -> bool:
    names = ("LaCTLayer", "MemoryBranch", "InPlaceMLP", "TTTLoraLinear", "LaCTAttentionAdapter")
    return type(module).__name__ in names


def act(policy: Any) -> Tensor:
    """Actions of two environments over three chunks, in one of which an episode begins."""
    generator = torch.Generator().manual_seed(6)
    actions = []
    policy.reset()
    for step in range(9):
        state = torch.randn(2, 5, generator=generator)
        observation: Any = state
        if policy.module.features["image_keys"]:
            pictures = torch.rand(2, 3, 20, 24, generator=generator)
            keys = policy.module.features["image_keys"]
            observation = {"observation.state": state, **dict.fromkeys(keys, pictures)}
            observation["task"] = list(policy.module.features["tasks"].values())
        actions.append(policy.select_action(observation))
        if step == 4:
            policy.reset(torch.tensor([True, False]))
    return torch.stack(actions)
