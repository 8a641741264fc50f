"""A memory bank with chapter routing: a learned store that decoder layers read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from lightning_modules.base import Chunk, ParameterGroup, Schedule
from lightning_modules.language import IGNORED, LanguageModule
from lightning_modules.means import TargetMean
from lightning_modules.models.memory import BANKS, inject_memory
from lightning_modules.models.memory_options import MemoryOptions
from lightning_modules.models.pretrained import LeftOut, PretrainedOptions, build_base, check_base
from lightning_modules.models.projection_lora import ProjectionLoRA, inject_lora
from lightning_modules.streams import FastState

Arm = Literal["vanilla", "memory", "lora", "both"]
PREFIXES = 8
"""Places of a row at which the prefix-by-prefix loss is measured."""


class MemoryBankModule(LanguageModule):
    """Language model with a memory bank: from scratch, or inside a pretrained one.

    Chosen layers read a learned bank of N rows by cross-attention; a router, which sees nothing of
    the future, chooses which k of its C chapters. `out = softmax(q K^T / sqrt(d_h) + log w) V` over
    the rows of the chosen chapters, w their weights. The model starts exactly as its base.

    Args:
        optimizer: class and options, e.g. `{class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}`.
        arm: what is added: `vanilla` nothing, `memory` the bank, `lora` peft's LoRA on attention
            and MLPs, `both`.
        config: entries of the transformers configuration of a model from scratch, e.g.
            `{model_type: llama, hidden_size: 256, ...}`; the vocabulary comes from the data.
        pretrained: the language model to adapt instead.
        memory: the bank of the arms `memory` and `both`, and which layers read it.
        lora: size of the LoRA of the arms `lora` and `both`, which need `pretrained`.
        fast_state: `carry` goes on with a document's routing from chunk to chunk, `reset` starts
            every chunk afresh.
        compile_model: run the model through `torch.compile`, in place.
        schedule: learning rate over the run.
        groups: options of the parameter groups `base`, `memory` (readers, routers, norms), `bank`
            (rows; no weight decay) and `lora`.

    Raises:
        ValueError: neither or both of config and pretrained, options that exclude another, or data
            that does not fit.
    """

    GROUPS = ("base", "memory", "bank", "lora")
    OPTIONS: ClassVar[dict[str, type]] = {
        "pretrained": PretrainedOptions,
        "memory": MemoryOptions,
        "lora": ProjectionLoRA,
    }
    DATA_MODULES = ("TextStreamDataModule", "ChatDataModule", "RecallDataModule")

    def __init__(
        self,
        optimizer: OptimizerCallable,
        arm: Arm = "memory",
        config: dict[str, Any] | None = None,
        pretrained: PretrainedOptions | None = None,
        memory: MemoryOptions | None = None,
        lora: ProjectionLoRA | None = None,
        fast_state: Literal["carry", "reset"] = "carry",
        compile_model: bool = False,
        schedule: Schedule | None = None,
        groups: dict[str, ParameterGroup] | None = None,
    ) -> None:
        super().__init__(optimizer, fast_state, compile_model, schedule, groups)
        check_base(config, pretrained)
        if arm in ("lora", "both") and (pretrained is None or pretrained.train == "all"):
            raise ValueError(
                f"arm={arm} puts LoRA on a frozen model: give pretrained with train: adapters"
            )
        self.arm = arm
        self.config = config
        self.pretrained = pretrained
        self.memory = memory or MemoryOptions()
        self.lora = lora or ProjectionLoRA()
        if self._strategy == "sequence":
            rank_zero_warn(
                "router.strategy=sequence reads the tokens that are to be predicted: of its losses "
                "only val/prefix_loss, of tokens with nothing behind them, can be compared"
            )
            for stage in ("val", "test"):
                self.means[f"{stage}_prefix_loss"] = TargetMean()

    @property
    def _router(self) -> Any:
        """Options of the router; None without one."""
        inner = self.memory.memory
        routed = self.arm in ("memory", "both") and inner.product_keys is None
        return inner.router if routed and self.memory.placement != "none" else None

    @property
    def _strategy(self) -> str | None:
        return None if self._router is None else self._router.strategy

    def options(self) -> dict[str, Any]:
        """Options that a checkpoint must agree with."""
        return {
            "arm": self.arm,
            "config": self.config,
            "pretrained": None if self.pretrained is None else asdict(self.pretrained),
            "memory": asdict(self.memory),
            "lora": asdict(self.lora),
        }

    def check(self, features: Mapping[str, Any]) -> None:
        """Raise a ValueError if the router could never decide on what it is to read."""
        carried = self.streams.persistent and features["mode"] == "stream"
        if self._strategy == "block" and not carried:
            length, block = features["chunk_length"], self._router.block_size
            if length <= block:
                raise ValueError(
                    f"chunk_length={length} is no more than one block of the router "
                    f"(router.block_size={block}), so that it would never see a token: raise the "
                    "DataModule's chunk_length, or lower block_size"
                )
        if self._strategy == "prompt" and features["mode"] != "chat":
            raise ValueError(
                "router.strategy=prompt reads the prompts of conversations, but the data has "
                "none: use ChatDataModule, or the strategy block"
            )

    def configure_model(self) -> None:
        """Let packed documents begin with a block of the router, and build the model.

        They do so in every arm, so that all of them read the same rows.
        """
        datamodule = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        router = self.memory.memory.router
        if hasattr(datamodule, "align_documents") and router and router.strategy == "block":
            datamodule.align_documents(router.block_size)
        super().configure_model()

    def build_model(self, features: Mapping[str, Any]) -> PreTrainedModel:
        """The base, with what the arm adds."""
        model = build_base(self.config, self.pretrained, features["vocab_size"])
        if self.pretrained is not None:
            self.left_out = LeftOut(model)
        if self.arm in ("lora", "both"):
            inject_lora(model, self.lora)
        if self.arm in ("memory", "both"):
            inject_memory(model, self.memory)
        return model

    def context(self, chunk: Chunk) -> dict[str, Any]:
        """Keywords for the model, with what routers read."""
        context = super().context(chunk)
        for name in ("document_alignment", "prompt_mask"):
            if name in chunk:
                context[name] = chunk[name]
        if self.features["mode"] == "stream":
            # Chunks of a file begin where the one before ends, at a multiple of their length.
            context["document_alignment"] = self.features["chunk_length"]
        return context

    def parameter_group(self, name: str) -> str:
        """`bank`, `memory`, `lora` or `base`."""
        parts = name.split(".")
        if BANKS in parts:
            return "bank"
        if "memory" in parts:
            return "memory"
        return "lora" if any(part.startswith("lora_") for part in parts) else "base"

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Matrices decay; norms, biases and the rows of banks do not."""
        return super().decays(name, parameter) and self.parameter_group(name) != "bank"

    def _evaluation_step(self, name: str, batch: list[Chunk], batch_idx: int) -> None:
        super()._evaluation_step(name, batch, batch_idx)
        if f"{name}_prefix_loss" in self.means:
            metric = self.means[f"{name}_prefix_loss"]
            for chunk in batch:
                self._add_prefix_losses(metric, chunk)
            self.log(f"{name}/prefix_loss", metric, on_step=False, on_epoch=True)

    def _add_prefix_losses(self, metric: TargetMean, chunk: Chunk) -> None:
        """Losses of single tokens when the model is given nothing behind them.

        What is routed by the whole sequence is honest only in its last token.
        """
        length = chunk["input_ids"].shape[1]
        for last in range(length // PREFIXES - 1, length, max(1, length // PREFIXES)):
            prefix = {
                key: value[:, : last + 1]
                if isinstance(value, torch.Tensor) and value.dim() == 2
                else value
                for key, value in chunk.items()
            }
            losses = self.token_losses(prefix, FastState.transient())[:, -1:]
            metric.update(losses.sum(), (prefix["labels"][:, -1:] != IGNORED).sum())
