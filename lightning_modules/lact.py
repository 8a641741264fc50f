"""Stacked LaCT: a language model whose fast weights are written once per large chunk."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
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
from lightning_modules.base import ParameterGroup, Schedule
from lightning_modules.language import LanguageModule
from lightning_modules.models.lact import LaCTForCausalLM
from lightning_modules.models.lact_config import LaCTConfig
from lightning_modules.models.pretrained import LeftOut, PretrainedOptions

FAST = re.compile(r"\.(w[012]|stacked_mlps|lr_proj|momentum_proj)(\.|$)")
"""Parameters that are fast weights at the start of a file, or say how they learn."""


class LaCTModule(LanguageModule):
    """Language model with LaCT: from scratch, or beside the attention of a pretrained one.

    Every layer adds window attention and a memory, r stacked SwiGLU networks per head, that is
    written after each chunk of `lact_chunk_size` tokens by the gradient of `-<f(k), v>`. With
    `fast_state: carry` the memory, the window and the open chunk go on through a file.
    Source: Zhang et al., "Test-Time Training Done Right", 2025, arXiv:2505.23884.

    Args:
        optimizer: e.g. `{class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}`.
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
            _check_names(config)
            LaCTConfig(**config)  # wrong values end here, before any data is read
        elif not adapters:
            raise ValueError("pretrained needs adapters, e.g. [{pattern: '*', adapter_type: lact}]")

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

    def _chunk_sizes(self) -> list[tuple[str, int]]:
        """Tokens of a chunk of LaCT, with the name of the option."""
        if self.config is not None:
            return [("lact_chunk_size", LaCTConfig(**self.config).lact_chunk_size)]
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
            assert self.config is not None
            return LaCTForCausalLM(
                LaCTConfig(**{**self.config, "vocab_size": features["vocab_size"]})
            )
        model = self.pretrained.load()
        if features["vocab_size"] > model.config.vocab_size:
            raise ValueError(
                f"the data has token ids up to {features['vocab_size'] - 1}, but "
                f"{self.pretrained.name} knows {model.config.vocab_size}: tokenise the data with "
                "the model's own tokenizer (data.init_args.tokenizer)"
            )
        self.left_out = LeftOut(model)
        inject_adapters(model, self.adapters)
        return model

    def parameter_group(self, name: str) -> str:
        """What its adapter says; of a model from scratch `fast`, `adapter` or `base`."""
        if self.pretrained is not None:
            return parameter_group(self, name) or "base"
        return "fast" if FAST.search(name) else "base"

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Matrices decay; norms, biases, scale and offset of q and k do not."""
        return super().decays(name, parameter) and not re.search(r"qk_(scale|offset)", name)


def _check_names(config: Mapping[str, Any]) -> None:
    known = [option.name for option in fields(LaCTConfig)]
    for name in config:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"config has no option {name!r}; {hint}")
