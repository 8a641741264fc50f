"""An exported action expert, which acts and needs no lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_modules.models.action_sampler import ACTION, ActionSampler, restored_options
from lightning_modules.models.backbone import STATE
from lightning_modules.models.export_files import WEIGHTS, read_about

NORMALIZER = "normalizer."


class ExportedExpert(ActionSampler, nn.Module):
    """An action expert with its weights, in evaluation mode; what `ActionExpertPolicy` drives.

    Args:
        options: as `ActionSampler.stored_options` gives them.
        features: of the data.
        pretrained: where the pretrained weights lie now, if they have moved since training.
    """

    def __init__(
        self, options: dict[str, Any], features: dict[str, Any], pretrained: str | None = None
    ) -> None:
        super().__init__()
        self.choose(**restored_options(options, pretrained))
        self.build(features)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @classmethod
    def load(cls, folder: str | Path, pretrained: str | None = None) -> ExportedExpert:
        """Read an export; arguments and errors as `ActionExpertPolicy.from_export`."""
        about = read_about(folder, policy=True)
        features = about["features"]
        if features.get("tasks"):  # names of JSON are strings
            features["tasks"] = {int(key): task for key, task in features["tasks"].items()}
        expert = cls(about["options"], features, pretrained)
        weights = load_file(Path(folder) / WEIGHTS)
        for name, values in about["normalization"].items():
            weights[f"{NORMALIZER}{name}"] = torch.tensor(values, dtype=torch.float32)
        expert.complete_weights(weights, about["fingerprint"])
        expert.load_state_dict(weights)
        expert.normalizer.require(STATE, ACTION)
        return expert.eval().requires_grad_(False)


def save_expert(expert: Any, folder: Path) -> dict[str, Any]:
    """Write the weights of an action expert, without frozen pretrained ones.

    Args:
        expert: an `ActionSampler` and `nn.Module`.
        folder: exists.

    Returns:
        What `export.json` has to say for `ExportedExpert.load`.
    """
    state = expert.state_dict()
    left_out = {f"model.{name}" for name in expert.model.restorable()}
    # Clones: weights that are tied share their memory, which safetensors refuses.
    weights = {
        name: value.cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
        if name not in left_out and not name.startswith(NORMALIZER)
    }
    save_file(weights, folder / WEIGHTS)
    return {
        "layout": "expert",
        "options": expert.stored_options(),
        "features": expert.features,
        "normalization": {
            name: value.float().tolist()  # float32: exact in decimal digits, too
            for name, value in expert.normalizer.state_dict().items()
        },
        "fingerprint": expert.model.fingerprint(),
    }
