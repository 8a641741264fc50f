"""LanguageModule: what the variants that predict tokens share."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from transformers import PreTrainedModel

from lightning_modules.adapters.registry import as_config
from lightning_modules.base import Chunk, ParameterGroup, Schedule, refuse_to_train
from lightning_modules.generation import FastStateCache
from lightning_modules.layers.rope import document_positions
from lightning_modules.means import TargetMean
from lightning_modules.models.pretrained import LeftOut, PretrainedOptions
from lightning_modules.models.shared_attention import share_attention
from lightning_modules.models.uncached import Uncached, recomputes
from lightning_modules.sized import SizedModule
from lightning_modules.streams import FastState
from lightning_modules.token_shares import own_chunk

IGNORED = -100
"""Label of a token that is not to be predicted."""


class LanguageModule(SizedModule):
    """Next-token prediction over streams of text or packed documents.

    The loss of a chunk is the mean over its labels, `-log p(labels[t] | input_ids[.. t])`: labels
    are already shifted by the DataModule, so that the first token of every chunk is predicted from
    the last one of the chunk before. A subclass builds the model for the DataModule's features.

    Args:
        optimizer: class and options, e.g. `{class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}`.
        fast_state: `carry` goes on from chunk to chunk of a file, `reset` starts every chunk
            afresh.
        compile_model: run the model through `torch.compile`, in place.
        schedule: learning rate over the run.
        groups: options of the parameter groups.
    """

    DATA_MODULES = ("TextStreamDataModule", "RecallDataModule")
    NEEDS = "vocab_size"
    OPTIONS: ClassVar[dict[str, type]] = {"pretrained": PretrainedOptions}
    """Options that checkpoints hold as plain values, and their classes."""

    def __init__(
        self,
        optimizer: OptimizerCallable,
        fast_state: Literal["carry", "reset"] = "carry",
        compile_model: bool = False,
        schedule: Schedule | None = None,
        groups: dict[str, ParameterGroup] | None = None,
    ) -> None:
        super().__init__(optimizer, schedule, groups, persistent=fast_state == "carry")
        self.compile_model = compile_model
        self.features: dict[str, Any] = {}
        self.data_facts: dict[str, Any] = {}
        self.model: PreTrainedModel | None = None
        self.left_out: LeftOut | None = None
        for stage in ("val", "test"):
            self.means[f"{stage}_accuracy"] = TargetMean()

    @property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.model.forward).parameters

    @abstractmethod
    def build_model(self, features: Mapping[str, Any]) -> PreTrainedModel:
        """The model with its adapters, called once; `features` are those of the DataModule."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What a checkpoint must agree with: options of the model as plain values."""

    def check(self, features: Mapping[str, Any]) -> None:
        """Raise a ValueError if options and data do not fit together."""

    def build_for(self, datamodule: Any) -> None:
        """Create the model for the DataModule's features; keep what is known of the data."""
        self.data_facts = _facts(datamodule)
        self.build(datamodule.features)

    def build(self, features: Mapping[str, Any]) -> None:
        """Create the model.

        Args:
            features: `vocab_size`, `chunk_length`, `tbptt` and `mode` of the data, as
                `TextStreamDataModule.features` gives them.
        """
        self.check(features)
        self.features = dict(features)
        self.model = self.build_model(features)
        if getattr(self, "pretrained", None) is None:
            self._end_as_documents_do()
        if self.streams.group is not None:
            self.share_rows(self.streams.group)
        if self.compile_model:
            self.model.compile()

    def _end_as_documents_do(self) -> None:
        """Let `generate` stop at the data's end of a document, not at a configuration's default."""
        assert self.model is not None
        ends = getattr(self.model, "generation_config", None)
        if ends is None:
            return
        bos, eos, pad = (self.features.get(f"{name}_id") for name in ("bos", "eos", "pad"))
        # transformers hides what looks like padding in a prompt: a token that is read, too, where
        # data have none of its own, must not.
        pad = eos if pad in (bos, 0) else pad
        ends.bos_token_id, ends.eos_token_id, ends.pad_token_id = bos, eos, pad

    def logits(self, chunk: Chunk, fast_state: FastState) -> Tensor:
        """Scores of the next token at every position, `[B, T, vocabulary]`."""
        assert self.model is not None
        return self.model(
            input_ids=chunk["input_ids"],
            use_cache=False,
            fast_state=fast_state,
            **self.context(chunk),
        ).logits

    def context(self, chunk: Chunk) -> dict[str, Any]:
        """Keywords with which the model reads a chunk, beside its tokens and its state."""
        context: dict[str, Any] = {}
        if "mask" in chunk and chunk.get("padded", True):
            context["mask"] = chunk["mask"]
        if "document_ids" in chunk:
            context["document_ids"] = chunk["document_ids"]
        if "document_ids" in chunk and self._takes_positions:
            # A model whose attention knows no documents takes them from positions that restart.
            context["position_ids"] = position_in_file(chunk)
        if "place" in chunk and self._takes_positions:
            context["position_ids"] = chunk["place"]
        if self._takes_positions and "position_ids" not in context and not recomputes(self.model):
            context["past_key_values"] = Uncached()
        return context

    def token_losses(self, chunk: Chunk, fast_state: FastState) -> Tensor:
        """Loss of every label in nats, 0 where there is none, `[B, T]`, at least float32."""
        return self._losses_of(self.logits(chunk, fast_state), chunk, fast_state)

    def _losses_of(self, logits: Tensor, chunk: Chunk, fast_state: FastState) -> Tensor:
        labels = chunk["labels"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(labels.shape)
        if fast_state.listens("token_loss"):
            position = torch.where(labels != IGNORED, position_in_file(chunk), -1)
            fast_state.publish("token_loss", "model", loss=losses, position=position)
        return losses

    def chunk_loss(
        self, chunk: Chunk, fast_state: FastState, generator: torch.Generator | None
    ) -> Tensor:
        """Mean loss over the labels of a chunk; 0 if it has none.

        Where processes share the rows, the mean of what they return is that of the chunk: each
        returns P times its share.
        """
        losses = self.token_losses(self._own(chunk, fast_state), fast_state).sum()
        mean = losses / self.chunk_targets(chunk).clamp(min=1)
        return mean if fast_state.group is None else mean * fast_state.group.size()

    def chunk_targets(self, chunk: Chunk) -> Tensor:
        """Number of labels of a chunk."""
        return (chunk["labels"] != IGNORED).sum()

    @staticmethod
    def _own(chunk: Chunk, fast_state: FastState) -> Chunk:
        """The tokens of a chunk that this process reads."""
        if fast_state.group is None:
            return chunk
        return own_chunk(chunk, position_in_file(chunk), fast_state.group)

    @property
    def sharing_obstacle(self) -> str | None:
        """Why processes cannot share the rows; None if they can."""
        return f"{type(self).__name__} needs all tokens of a row"

    def share_rows(self, group: ProcessGroup) -> None:
        """From now on read the own part of every row, which the processes of the group share.

        Every process is given the whole chunks, the same on all. The loss is the mean over the
        processes, as `ddp` takes it of their gradients, and the streams hold the same state.

        Raises:
            ValueError: the module needs all tokens of a row.
        """
        if self.sharing_obstacle is not None:
            raise ValueError(f"rows cannot be shared: {self.sharing_obstacle}")
        self.streams.group = group
        if self.model is not None and self._takes_positions:
            share_attention(self.model)

    def _evaluation_step(self, name: str, batch: list[Chunk], batch_idx: int) -> None:
        # By label, not by batch: batches at the end of an epoch have fewer of them.
        for chunk in batch:
            fast_state = self.streams.begin(chunk)
            chunk = self._own(chunk, fast_state)
            logits = self.logits(chunk, fast_state)
            values = {
                "loss": self._losses_of(logits, chunk, fast_state),
                "accuracy": (logits.argmax(-1) == chunk["labels"]).float(),
            }
            labelled = chunk["labels"] != IGNORED
            for key, value in values.items():
                total = torch.where(labelled, value, 0.0).sum()
                self.means[f"{name}_{key}"].update(total, labelled.sum())
        for key in ("loss", "accuracy"):
            metric = self.means[f"{name}_{key}"]
            self.log(f"{name}/{key}", metric, on_step=False, on_epoch=True)

    def predict_chunk(
        self, chunk: Chunk, fast_state: FastState, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """How well each row was predicted.

        Returns:
            `stream_id [B]`, `chunk_index [B]`, `loss [B]` (mean over the labels, nats; 0 without)
            and `labels [B]`, how many there were.
        """
        if fast_state.group is not None:
            raise ValueError("predictions are made row by row: predict without ContextParallel")
        losses = self.token_losses(chunk, fast_state)
        labels = (chunk["labels"] != IGNORED).sum(dim=1)
        return {
            "stream_id": chunk["stream_id"],
            "chunk_index": chunk["chunk_index"],
            "loss": losses.sum(dim=1) / labels.clamp(min=1),
            "labels": labels,
        }

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, cache: FastStateCache | None = None, **options: Any
    ) -> Tensor:
        """Continue token sequences; what the fast weights learn on the way lives in the cache.

        Args:
            input_ids: prompts, int64 `[B, T]`, padded on the left (with `attention_mask=`).
            cache: goes on from here, and is changed; None starts afresh.
            **options: of `transformers.GenerationMixin.generate`, e.g. `max_new_tokens`.

        Returns:
            Prompts and continuations, `[B, T']`.
        """
        assert self.model is not None
        cache = FastStateCache(self.model.config) if cache is None else cache
        return self.model.generate(input_ids, past_key_values=cache, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store options and features; frozen pretrained weights stay where they came from."""
        for name in self._frozen():
            checkpoint["state_dict"].pop(name, None)
        checkpoint[type(self).__name__] = {
            "options": self.options(),
            "features": self.features,
            "fingerprint": self.left_out and self.left_out.fingerprint(self.model),
            "data": self.data_facts,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model if needed, and put back the weights that were left out.

        Raises:
            ValueError: the checkpoint is of another class, of other options, or of other
                pretrained weights.
        """
        stored = _stored_by(type(self).__name__, checkpoint)
        self.data_facts = self.data_facts or stored.get("data", {})
        # Of a pretrained model the weights must agree (below), not where they lie.
        stored_options = {k: v for k, v in stored["options"].items() if k != "pretrained"}
        self._compare(stored_options, self.options(), "model.init_args")
        if self.model is None:
            self.build(stored["features"])
        self._compare(
            {"vocab_size": stored["features"]["vocab_size"]},
            {"vocab_size": self.features["vocab_size"]},
            "data",
        )
        if not self._agrees(stored["fingerprint"]):
            raise ValueError(
                "the checkpoint was trained on other pretrained weights than pretrained.name "
                "gives now: use the same as in training"
            )
        for key, parameter in self._frozen().items():
            checkpoint["state_dict"].setdefault(key, parameter.detach())

    def _agrees(self, fingerprint: str | None) -> bool:
        """Whether a checkpoint with this fingerprint left out the weights that are here."""
        if self.left_out is None:
            return fingerprint is None
        return self.left_out.agrees(self.model, fingerprint)

    @classmethod
    def rebuild(
        cls, checkpoint: Mapping[str, Any], pretrained: str | None = None
    ) -> LanguageModule:
        """The module of a checkpoint, for inference: in eval mode, with its weights.

        Nothing but the checkpoint is needed, and the pretrained weights that it left out. The
        weights are those under `state_dict`, which are the averages where EMA ran.

        Args:
            checkpoint: content of the file.
            pretrained: where the pretrained weights lie now, if they have moved since training.

        Raises:
            ValueError: it is the checkpoint of another class, of other pretrained weights, or
                `pretrained` is given for a model that was trained from scratch.
        """
        stored = dict(_stored_by(cls.__name__, checkpoint)["options"])
        if pretrained is not None:
            if stored["pretrained"] is None:
                raise ValueError("pretrained was given, but the checkpoint has all of its weights")
            stored["pretrained"] = {**stored["pretrained"], "name": pretrained}
        for name, options in cls.OPTIONS.items():
            if stored.get(name) is not None:
                stored[name] = as_config(options, stored[name], name)
        module = cls(refuse_to_train, **stored)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        return module.eval().requires_grad_(False)

    def left_out_names(self) -> set[str]:
        """Frozen pretrained weights."""
        return set(self._frozen())

    def shard_model(self) -> None:
        """Share the model out; what checkpoints leave out of it is known by name from now on."""
        if self.left_out is not None:
            self.left_out.settle(self.model)
        super().shard_model()

    def _frozen(self) -> dict[str, Tensor]:
        """Weights that checkpoints leave out, by their name in the module's state dict."""
        if self.left_out is None:
            return {}
        return {f"model.{name}": value for name, value in self.left_out.named(self.model)}

    @staticmethod
    def _compare(stored: Mapping[str, Any], here: Mapping[str, Any], place: str) -> None:
        for key, value in stored.items():
            if here.get(key) != value:
                raise ValueError(
                    f"the checkpoint was trained with {key}={value}, but {place} says "
                    f"{key}={here.get(key)}: use the same options, or train anew"
                )


def _facts(datamodule: Any) -> dict[str, Any]:
    """Where the data comes from and where its tokenizer lies, as plain values for checkpoints."""
    facts = dict(getattr(datamodule, "provenance", {}))
    if (folder := getattr(datamodule, "tokenizer_folder", None)) is not None:
        facts["tokenizer_folder"] = str(folder)
    return {name: v if isinstance(v, int | float) else str(v) for name, v in facts.items()}


def _stored_by(name: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a module of this class left in a checkpoint."""
    if name not in checkpoint:
        raise ValueError(f"this is not the checkpoint of a {name}: use one that fit wrote")
    return checkpoint[name]


def position_in_file(chunk: Chunk) -> Tensor:
    """Index of every token in its file, or in its document where rows are packed, `[B, T]`."""
    if "position" in chunk:  # of a part of the rows
        return chunk["position"]
    if "document_ids" in chunk:
        return document_positions(chunk["input_ids"], document_ids=chunk["document_ids"])
    rows, length = chunk["input_ids"].shape
    time = torch.arange(length, device=chunk["input_ids"].device).expand(rows, -1)
    return time + chunk["chunk_index"].unsqueeze(1) * length
