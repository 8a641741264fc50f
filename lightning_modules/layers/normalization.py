"""Normalisation of states and actions by the training data's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

NormalizationMode = Literal["z_score", "quantile", "none"]

CONSTANT = 1e-6
"""Spread below which a dimension counts as constant and is only shifted, not scaled."""

_NEEDED = {"z_score": ("mean", "std"), "quantile": ("q01", "q99"), "none": ()}


class Normalizer(nn.Module):
    """Elementwise `(x - shift) / scale` per feature, and its inverse.

    `z_score`: `shift = mean`, `scale = std`. `quantile`: q01 goes to -1 and q99 to 1, so
    `shift = (q01 + q99) / 2`, `scale = (q99 - q01) / 2`. Constant dimensions get scale 1.
    Shift and scale are buffers: they are saved with the weights, and a module made without
    statistics takes them from the checkpoint that it loads.

    Args:
        stats: feature -> statistic -> `[D]`, as `datamodules.statistics` computes them; None
            waits for a checkpoint.
        mode: `none` leaves every feature as it is.

    Raises:
        KeyError: a statistic that the mode needs is missing.
    """

    def __init__(
        self,
        stats: Mapping[str, Mapping[str, Any]] | None = None,
        mode: NormalizationMode = "z_score",
    ) -> None:
        super().__init__()
        if mode not in _NEEDED:
            raise ValueError(f"unknown normalisation {mode!r}; choose one of {', '.join(_NEEDED)}")
        self.mode = mode
        if mode != "none":
            for name, feature in (stats or {}).items():
                shift, scale = _shift_and_scale(name, feature, mode)
                self.register_buffer(_buffer(name, "shift"), shift)
                self.register_buffer(_buffer(name, "scale"), scale)

    def normalize(self, name: str, x: Tensor) -> Tensor:
        """`(x - shift) / scale` for `x [..., D]` of the named feature."""
        if self.mode == "none":
            return x
        shift, scale = self._parameters_of(name)
        return (x - shift) / scale

    def unnormalize(self, name: str, x: Tensor) -> Tensor:
        """`x * scale + shift` for `x [..., D]` of the named feature."""
        if self.mode == "none":
            return x
        shift, scale = self._parameters_of(name)
        return x * scale + shift

    def require(self, *names: str) -> None:
        """Make sure that the named features can be normalised.

        Raises:
            KeyError: one of them has no shift or no scale.
        """
        for name in names if self.mode != "none" else ():
            self._parameters_of(name)

    def _parameters_of(self, name: str) -> tuple[Tensor, Tensor]:
        shift, scale = _buffer(name, "shift"), _buffer(name, "scale")
        if shift not in self._buffers or scale not in self._buffers:
            raise KeyError(
                f"no shift and scale for feature {name!r} (only {', '.join(self._buffers)}); "
                "give its statistics to Normalizer(stats), load a checkpoint that has them, or "
                "use mode 'none'"
            )
        return getattr(self, shift), getattr(self, scale)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        for name in names:
            if self.mode != "none" and "." not in name and name not in self._buffers:
                self.register_buffer(name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _shift_and_scale(name: str, feature: Mapping[str, Any], mode: str) -> tuple[Tensor, Tensor]:
    missing = [statistic for statistic in _NEEDED[mode] if statistic not in feature]
    if missing:
        raise KeyError(
            f"normalisation {mode!r} of {name!r} needs the statistics {missing}, which are not "
            f"among {sorted(feature)}; compute them from the data or choose another mode"
        )
    first, second = (np.asarray(feature[key], dtype=np.float64) for key in _NEEDED[mode])
    if mode == "quantile":
        first, second = (first + second) / 2, (second - first) / 2
    scale = np.where(second < CONSTANT, 1.0, second)
    return torch.tensor(first, dtype=torch.float32), torch.tensor(scale, dtype=torch.float32)


def _buffer(name: str, kind: str) -> str:
    return f"{name.replace('.', '_')}_{kind}"
