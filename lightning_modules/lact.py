"""Stacked LaCT: a language model whose fast weights are written once per large chunk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from lightning_modules.adapters import (
    AdapterSpec,
    LaCTAdapterConfig,
    inject_adapters,
    parameter_group,
    read_plan,
    store_plan,
)
from lightning_modules.adapters.registry import check_names
from lightning_modules.base import ParameterGroup, Schedule
from lightning_modules.language import LanguageModule
from lightning_modules.layers.lact import FAST
from lightning_modules.models.lact import LaCTForCausalLM
from lightning_modules.models.lact_config import LaCTConfig
from lightning_modules.models.pretrained import LeftOut, PretrainedOptions


class LaCTModule(LanguageModule):
    """Language model with LaCT: from scratch, or beside the attention of a pretrained one.

    Every layer adds window attention and a memory, r stacked SwiGLU networks per head, that is
    written after each chunk of `lact_chunk_size` tokens by the gradient of `-<f(k), v>`. With
    `fast_state: carry` the memory, the window and the open chunk go on through a file.
    Source: Zhang et al., "Test-Time Training Done Right", 2025, arXiv:2505.23884.

    Args:
        optimizer: class and options, e.g. `{class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}`.
        config: options of `LaCTConfig` for a model from scratch, e.g. `{hidden_size: 256,
            num_hidden_layers: 6, lact_chunk_size: 512, window_size: 512, r: 2}`; the vocabulary
            comes from the data.
        pretrained: the language model to adapt instead.
        adapters: adapters of it, each with the layers that get it, e.g. `[{pattern: "*",
            adapter_type: lact, adapter_config: {chunk_size: 512}}]`.
        fast_state: `carry` goes on from chunk to chunk of a file, `reset` starts every chunk of
            the data afresh.
        compile_model: run the model through `torch.compile`, in place.
        schedule: learning rate over the run.
        groups: options of the parameter groups `base` (transformer), `adapter` (projections and
            norms of the memory), `gate`, `fast` (learned initial fast weights, their rates).

    Raises:
        ValueError: neither or both of config and pretrained, unknown options, or data that does
            not fit.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        config: dict[str, Any] | None = None,
        pretrained: PretrainedOptions | None = None,
        adapters: list[AdapterSpec] | None = None,
        fast_state: Literal["carry", "reset"] = "carry",
        compile_model: bool = False,
        schedule: Schedule | None = None,
        groups: dict[str, ParameterGroup] | None = None,
    ) -> None:
        super().__init__(optimizer, fast_state, compile_model, schedule, groups)
        if (config is None) == (pretrained is None):
            raise ValueError(
                "give either config (a LaCT model from scratch) or pretrained (a language model "
                "that gets adapters)"
            )
        self.config = config
        self.pretrained = pretrained
        self.adapters = read_plan(adapters)
        if config is not None:
            if adapters:
                raise ValueError("adapters are for pretrained; LaCT of config is in every layer")
        elif not adapters:
            raise ValueError("pretrained needs adapters, e.g. [{pattern: '*', adapter_type: lact}]")
        # Checked once, before any data is read; the vocabulary comes with the data.
        self._lact_config = None
        if config is not None:
            check_names(LaCTConfig, config, "config")
            self._lact_config = LaCTConfig(**config)

    def options(self) -> dict[str, Any]:
        """Options that a checkpoint must agree with."""
        return {
            "config": self.config,
            "pretrained": None if self.pretrained is None else asdict(self.pretrained),
            "adapters": store_plan(self.adapters),
        }

    def check(self, features: Mapping[str, Any]) -> None:
        """Raise a ValueError if no gradient could ever reach what writes the memory."""
        carried = self.streams.persistent and features["mode"] == "stream"
        read = features["chunk_length"] * (features["tbptt"] if carried else 1)
        for name, chunk in self._chunk_sizes():
            if read <= chunk:
                raise ValueError(
                    f"a step reads {read} tokens of a file (chunk_length x tbptt), no more than "
                    f"one chunk of LaCT ({name}={chunk}), so that nothing it writes is read inside "
                    "the step and its projections never learn: raise the DataModule's "
                    "chunk_length or tbptt, or lower lact_chunk_size"
                )
            if read <= 2 * chunk:
                rank_zero_warn(
                    f"a step reads {read} tokens of a file, so that LaCT ({name}={chunk}) writes "
                    f"once in it and its momentum never learns: better read more than {2 * chunk}"
                )

    @property
    def sharing_obstacle(self) -> str | None:
        """Adapters: the attention of a pretrained model beside them."""
        if self.pretrained is None:
            return None
        return "pretrained with adapters is read by one process; LaCT from scratch (config) is not"

    def _chunk_sizes(self) -> list[tuple[str, int]]:
        """Tokens of a chunk of LaCT, with the name of the option."""
        if self._lact_config is not None:
            return [("lact_chunk_size", self._lact_config.lact_chunk_size)]
        return [
            (
                f"adapters[{number}] update.lact_chunk_size",
                spec.adapter_config.update.lact_chunk_size,
            )
            for number, spec in enumerate(self.adapters)
            if isinstance(spec.adapter_config, LaCTAdapterConfig)
        ]

    def build_model(self, features: Mapping[str, Any]) -> PreTrainedModel:
        """LaCT from scratch, or the pretrained model with its adapters."""
        if self.pretrained is None:
            config = deepcopy(self._lact_config)
            config.vocab_size = features["vocab_size"]
            return LaCTForCausalLM(config)
        model = self.pretrained.load_for(features["vocab_size"])
        self.left_out = LeftOut(model)
        inject_adapters(model, self.adapters)
        return model

    def parameter_group(self, name: str) -> str:
        """What its adapter says; of a model from scratch `fast` or `base`."""
        if self.pretrained is not None:
            return parameter_group(self, name) or "base"
        return "base" if FAST.isdisjoint(name.split(".")) else "fast"

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Matrices decay; norms, biases, scale and offset of q and k do not."""
        return super().decays(name, parameter) and not re.search(r"qk_(scale|offset)", name)
