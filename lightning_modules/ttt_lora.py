"""TTT-as-LoRA: adapters of a frozen language model that learn while they read a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from lightning_modules.base import ParameterGroup, Schedule
from lightning_modules.distributed.sharding import is_sharded
from lightning_modules.language import LanguageModule
from lightning_modules.models.adapter_files import save_adapters
from lightning_modules.models.in_place import InPlaceOptions
from lightning_modules.models.pretrained import LeftOut, PretrainedOptions, build_base, check_base
from lightning_modules.models.projection_lora import ProjectionLoRA
from lightning_modules.models.ttt_lora import (
    GROUPS,
    METHODS,
    Method,
    TTTLoRAPlacement,
    inject_method,
    parameter_group,
)


class TTTLoRAModule(LanguageModule):
    """Language model with adapters that learn while they read: TTT-LoRA or In-Place TTT, or LoRA.

    TTT-LoRA puts a small map between two projections of every linear layer, where LoRA has a
    rank; each mini-batch of tokens takes a gradient step on it, row by row,
    `W <- W - eta/m sum_t k_t^T (k_t W + b - (v_t - k_t))`. In-Place TTT adds `eta V^T Z` of every
    chunk to the down projection of an MLP (arXiv:2604.06169). With `fast_state: carry` what was
    learned goes on through a file and is forgotten where another begins. The model starts exactly
    as its base.

    Args:
        optimizer: class and options, e.g. `{class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}`.
        method: what is added: `none`, `lora`, `ttt_lora`, `in_place`, or `ttt_lora+lora`.
        pretrained: the language model to adapt.
        config: instead, entries of the transformers configuration of a model from scratch, e.g.
            `{model_type: llama, hidden_size: 256, ...}`, all of which is trained with its
            adapters; the vocabulary comes from the data.
        ttt_lora: size and place of TTT-LoRA, in the methods `ttt_lora` and `ttt_lora+lora`.
        in_place: options of In-Place TTT, in the method `in_place`.
        lora: size and place of peft's LoRA, in the methods `lora` and `ttt_lora+lora`.
        fast_state: `carry` goes on from chunk to chunk of a file, `reset` starts every chunk
            afresh.
        compile_model: run the model through `torch.compile`, in place. For a GPU: on a CPU the loop
            over mini-batches is unrolled, which takes the compiler minutes for every layer.
        schedule: learning rate over the run.
        groups: options of the parameter groups `base`, `theta` (projections and norms of
            TTT-LoRA), `fast` (its learned initial fast weights), `gate` (its step sizes),
            `in_place` and `lora`.

    Raises:
        ValueError: neither or both of config and pretrained, or data that does not fit.
    """

    GROUPS = GROUPS
    OPTIONS: ClassVar[dict[str, type]] = {
        "pretrained": PretrainedOptions,
        "ttt_lora": TTTLoRAPlacement,
        "in_place": InPlaceOptions,
        "lora": ProjectionLoRA,
    }
    DATA_MODULES = (
        "TextStreamDataModule",
        "ChatDataModule",
        "RecallDataModule",
        "AudioCodeDataModule",
    )

    def __init__(
        self,
        optimizer: OptimizerCallable,
        method: Method = "ttt_lora",
        pretrained: PretrainedOptions | None = None,
        config: dict[str, Any] | None = None,
        ttt_lora: TTTLoRAPlacement | None = None,
        in_place: InPlaceOptions | None = None,
        lora: ProjectionLoRA | None = None,
        fast_state: Literal["carry", "reset"] = "carry",
        compile_model: bool = False,
        schedule: Schedule | None = None,
        groups: dict[str, ParameterGroup] | None = None,
    ) -> None:
        super().__init__(optimizer, fast_state, compile_model, schedule, groups)
        check_base(config, pretrained)
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; choose {', '.join(METHODS)}")
        self.method = method
        self.pretrained = pretrained
        self.config = config
        self.ttt_lora = ttt_lora or TTTLoRAPlacement()
        self.in_place = in_place or InPlaceOptions()
        self.lora = lora or ProjectionLoRA()

    def options(self) -> dict[str, Any]:
        """Options that a checkpoint must agree with: those of other methods do not matter."""
        return {
            "method": self.method,
            "pretrained": None if self.pretrained is None else asdict(self.pretrained),
            "config": self.config,
            **{
                name: asdict(getattr(self, name))
                for name in self.method.split("+")
                if name != "none"
            },
        }

    def check(self, features: Mapping[str, Any]) -> None:
        """Raise a ValueError if no gradient could ever reach what writes."""
        if self.method.startswith("ttt_lora"):
            learner = self.ttt_lora.learner
            name, size = "ttt_lora.learner.mini_batch_size", learner.mini_batch_size
            if learner.mode == "B":
                return  # reads its own mini-batch, too
        elif self.method == "in_place":
            name, size = "in_place.layer.chunk_size", self.in_place.layer.chunk_size
        else:
            return
        carried = self.streams.persistent and features["mode"] == "stream"
        read = features["chunk_length"] * (features["tbptt"] if carried else 1)
        advice = f"raise the DataModule's chunk_length or tbptt, or lower {name}"
        if read <= size:
            raise ValueError(
                f"a step reads {read} tokens of a file (chunk_length x tbptt), no more than "
                f"{name}={size}: nothing that is written is read inside the step, so that what "
                f"writes would never learn; {advice}"
            )
        if read < 2 * size:
            rank_zero_warn(
                f"a step reads {read} tokens of a file, less than twice {name}={size}: little of "
                f"what is written is read inside the step; {advice}"
            )

    @property
    def sharing_obstacle(self) -> str | None:
        """Every method but In-Place (and the plain model)."""
        if self.method in ("in_place", "none"):
            return None
        return f"method={self.method} learns token by token in one process; method=in_place can"

    def build_model(self, features: Mapping[str, Any]) -> PreTrainedModel:
        """The base, with what the method adds."""
        model = build_base(self.config, self.pretrained, features["vocab_size"])
        frozen = [p for p in model.parameters() if not p.requires_grad]
        if self.pretrained is not None:
            self.left_out = LeftOut(model)
        inject_method(model, self.method, self.ttt_lora, self.in_place, self.lora)
        model.requires_grad_(True)  # peft freezes the base, also where all of it is trained
        for parameter in frozen:
            parameter.requires_grad_(False)
        return model

    def save_adapters(self, folder: str | Path) -> None:
        """Write the trained adapters, without their base unless that was trained, too.

            TTTLoRAModule.load_from_checkpoint("last.ckpt", **init_args).save_adapters("saved")
            model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
            load_adapters(model, "saved")  # of lightning_modules.models.adapter_files

        Args:
            folder: a new or empty folder.

        Raises:
            ValueError: there is no model yet, it has no adapters, or it is sharded.
            FileExistsError: there is something in the folder.
        """
        if self.model is None:
            raise ValueError("there is no model to save yet: fit, or load a checkpoint first")
        if is_sharded(self.model):
            raise ValueError(
                "the weights are sharded over several processes: save a checkpoint, put it into "
                "one file (python -m lightning_modules.distributed.consolidate FOLDER FILE), and "
                "load that"
            )
        trained = self.pretrained is None or self.pretrained.train == "all"
        save_adapters(self.model, folder, with_base=trained)

    def parameter_group(self, name: str) -> str:
        """One of `GROUPS`, see `models.ttt_lora.parameter_group`."""
        return parameter_group(name)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Matrices decay; norms, biases and the learned initial fast weights do not."""
        return super().decays(name, parameter) and self.parameter_group(name) != "fast"
