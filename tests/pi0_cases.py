"""A tiny PI0 with random weights and open gates, and chunks with pictures for it."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from expert_cases import STRIDE
from expert_cases import make_chunk as make_state_chunk
from torch import Tensor
from torch.nn import functional as F
from transformers import PI0Config, PI0ForConditionalGeneration

from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.adapters import TTTAdapterConfig
from lightning_modules.layers.ttt import TTTConfig
from lightning_modules.models.flow_matching import euler_sample
from lightning_modules.models.pi0_inputs import load_processor
from lightning_modules.models.pi0_options import PI0Options
from lightning_modules.models.projection_lora import ProjectionLoRA
from lightning_modules.streams import FastState, Slots

TOP, WRIST = "observation.images.top", "observation.images.wrist"
TASKS = {0: "Pick the cube.", 1: "Open the drawer, please."}
PADDED = 8  # max_state_dim and max_action_dim; the data has 5 and 3
HORIZON = 6
HIDDEN = 24
DECODER = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
CONFIG: dict[str, Any] = {
    "chunk_size": HORIZON,
    "max_state_dim": PADDED,
    "max_action_dim": PADDED,
    "vlm_config": {
        "model_type": "paligemma",
        "projection_dim": 16,
        "image_token_id": 260,
        "text_config": {
            "model_type": "gemma",
            "hidden_size": 16,
            "intermediate_size": 32,
            "vocab_size": 300,
            **DECODER,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "dit_config": {
        "model_type": "gemma",
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        **DECODER,
    },
}
FEATURES = {
    "state_dim": 5,
    "action_dim": 3,
    "horizon": HORIZON,
    "stride": STRIDE,
    "image_keys": [TOP, WRIST],
    "tasks": TASKS,
    "delta_actions": (),
    "action_range": [[-0.5, -1.0, -1.0], [0.5, 1.0, 1.0]],
    "action_bounds": None,
}


def make_pi0(
    *,
    ttt: dict[str, Any] | None = None,
    layer: dict[str, Any] | None = None,
    features: dict[str, Any] | None = None,
    with_ttt: bool = True,
    shake: bool = True,
    module: dict[str, Any] | None = None,
    **pi0: Any,
) -> ActionExpertModule:
    """Two layers of width 24; every parameter random, so that no zero gate hides a branch.

    Args:
        ttt: options of the adapter.
        layer: options of its TTT layer.
        features: changes to `FEATURES`.
        with_ttt: False leaves TTT out.
        shake: False leaves every parameter as it was initialised.
        module: further arguments of `ActionExpertModule`.
        **pi0: options of `PI0Options`; `config` is the tiny one unless `pretrained` is given.
    """
    torch.manual_seed(0)
    if "pretrained" not in pi0:
        pi0 = {"config": CONFIG, **pi0}
    adapter = TTTAdapterConfig(layer=TTTConfig(num_heads=2, **(layer or {})), **(ttt or {}))
    built = ActionExpertModule(
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        backbone="pi0",
        pi0=PI0Options(lora=pi0.pop("lora", ProjectionLoRA(rank=2)), **pi0),
        ttt=adapter if with_ttt else None,
        **{
            "execution_horizon": STRIDE,
            "denoise_steps": 3,
            "normalization": "none",
            **(module or {}),
        },
    )
    built.build({**FEATURES, **(features or {})})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters() if shake else ():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return built


def make_chunk(index: int = 0, rows: int = 3, first: bool | None = None) -> dict[str, Any]:
    """A chunk of `expert_cases` with two cameras of different size and instructions."""
    generator = torch.Generator().manual_seed(100 + index)

    def picture(height: int, width: int) -> Tensor:
        size = (rows, 3, height, width)
        return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)

    return {
        **make_state_chunk(index, rows, first),
        TOP: picture(20, 40),
        WRIST: picture(30, 24),
        "task": torch.arange(rows) % len(TASKS),
    }


def save_official(folder: Path, **changes: Any) -> PI0ForConditionalGeneration:
    """An official PI0 with random weights, saved to `folder` with its tokenizer."""
    torch.manual_seed(5)
    config = PI0Config(**deepcopy(CONFIG), **changes)
    official = PI0ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in official.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    official.save_pretrained(folder)
    load_processor(PI0Options(config=CONFIG), config).tokenizer.save_pretrained(folder)
    return official


def noise_and_time(seed: int, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Noise of the padded size, and a time for each row."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, HORIZON, PADDED, generator=generator)
    return noise, torch.rand(rows, generator=generator)


def official_inputs(module: ActionExpertModule, chunk: dict[str, Any]) -> dict[str, Tensor]:
    """Keywords of the official model for a chunk."""
    state = F.pad(chunk["observation.state"], (0, PADDED - 5))
    return {"state": state, **module.model.inputs(chunk, len(state))._asdict()}


def sample(module: ActionExpertModule, chunk: dict[str, Any], noise: Tensor, steps: int) -> Tensor:
    """As `sample_actions`, from given noise, padded dimensions included."""
    with torch.no_grad():
        observed = module.model.observe(chunk)
        return euler_sample(lambda x, t: module.model(observed, x, t), noise, steps)


def written(module: ActionExpertModule, seed: int, write: str) -> Slots:
    """What one call on noise and time of that seed leaves as fast state."""
    fast_state = FastState.transient()
    noise, time = noise_and_time(seed)
    observed = module.model.observe(make_chunk())
    module.model(observed, noise, time, fast_state=fast_state, write=write)
    return fast_state.outgoing
