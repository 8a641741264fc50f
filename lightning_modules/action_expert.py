"""TTT-gated action expert: a policy whose fast weights learn while the episode runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn import functional as F

from lightning_modules.adapters import AdapterSpec, TTTAdapterConfig, parameter_group
from lightning_modules.base import Chunk, ParameterGroup, Schedule, refuse_to_train
from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.models.action_sampler import ACTION, ActionSampler, restored_options
from lightning_modules.models.backbone import STATE, Writers
from lightning_modules.models.flow_matching import flow_matching_loss, interpolate, sample_time
from lightning_modules.models.pi0_options import PI0Options
from lightning_modules.policy import ActionExpertPolicy
from lightning_modules.sized import SizedModule
from lightning_modules.streams import FastState

CHECKPOINT_KEY = "action_expert"
"""Where a checkpoint holds what `ActionExpertModule.rebuild` needs beside the weights."""


class ActionExpertModule(ActionSampler, SizedModule):
    """Flow-matching action expert with test-time training after attention.

    Per layer `x + gate_attn * attn + gate_ttt * ttt(attn)`, then the MLP with its own gate; the
    TTT layer takes the chunk's observation and action tokens as one non-causal mini-batch.
    Training minimises `|| v(x_t, t) - (noise - action) ||^2` over the valid entries, with
    `x_t = t * noise + (1 - t) * action` and `t ~ 0.001 + 0.999 * Beta(1.5, 1)`.

    Sizes and normalisation statistics come from the DataModule and are stored in the checkpoint.

    Args:
        optimizer: class and options, e.g. `{class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}`.
        backbone: `state` trains a small transformer over the state vector from scratch, `pi0` goes
            on from a pretrained vision-language-action model.
        expert: size of the transformer of `state`.
        pi0: which model `pi0` loads, and what of it is trained.
        ttt: the TTT adapter; None trains the control without TTT.
        ttt_layer_positions: layers with TTT: "all" or a list of indices; None means none.
        adapters: further adapters, of any kind, each with the layers of the expert that get it;
            `[{pattern: "*", adapter_type: lora, adapter_config: {rank: 8}}]`. `ttt_write`,
            `ttt_state` and `groups` hold for them, too.
        ttt_write: tokens that update the fast weights; None takes `observation` when the state is
            carried through an episode and `all` otherwise.
        ttt_state: `reset` starts every call from the learned weights, `carry_denoise` carries
            the state across the Euler steps of one chunk, `carry_episode` across the chunks of an
            episode (trained through the `tbptt` chunks of a batch).
        execution_horizon: actions played before the next chunk is sampled; with `carry_episode`
            the data's stride must equal it.
        denoise_steps: Euler steps of the sampler.
        normalization: `z_score`, `quantile` (q01 and q99 to -1 and 1) or `none`.
        compile_model: train through `torch.compile`: fewer kernels to launch, for about a minute
            of compilation at the start. Only for `state`.
        schedule: learning rate over the run.
        groups: options of the parameter groups `base` (transformer), `adapter` (slow weights of
            TTT, LoRA), `gate` (also routers), `fast` (learned initial fast weights and their step
            sizes).

    Raises:
        ValueError: options of another backbone, a layer that is not there or would get two
            adapters, unknown adapters or options of them, or data that does not fit.
    """

    DATA_MODULES = ("ActionChunkDataModule", "RecordedSimulation")
    NEEDS = "action_dim"

    def __init__(
        self,
        optimizer: OptimizerCallable,
        backbone: Literal["state", "pi0"] = "state",
        expert: ExpertConfig | None = None,
        pi0: PI0Options | None = None,
        ttt: TTTAdapterConfig | None = None,
        ttt_layer_positions: Literal["all"] | list[int] | None = "all",
        adapters: list[AdapterSpec] | None = None,
        ttt_write: Writers | None = None,
        ttt_state: Literal["reset", "carry_denoise", "carry_episode"] = "reset",
        execution_horizon: int = 8,
        denoise_steps: int = 10,
        normalization: Literal["z_score", "quantile", "none"] = "z_score",
        compile_model: bool = False,
        schedule: Schedule | None = None,
        groups: dict[str, ParameterGroup] | None = None,
    ) -> None:
        super().__init__(optimizer, schedule, groups, persistent=ttt_state == "carry_episode")
        self.choose(
            backbone=backbone,
            expert=expert,
            pi0=pi0,
            ttt=ttt,
            ttt_layer_positions=ttt_layer_positions,
            adapters=adapters,
            ttt_write=ttt_write,
            ttt_state=ttt_state,
            execution_horizon=execution_horizon,
            denoise_steps=denoise_steps,
            normalization=normalization,
        )
        self.compile_model = compile_model
        if compile_model and backbone != "state":
            raise ValueError("compile_model=true is for backbone: state; set it to false")

    def build_for(self, datamodule: Any) -> None:
        """Create the model for the DataModule's features and statistics."""
        self.build(datamodule.features, datamodule.statistics)

    def build(
        self, features: Mapping[str, Any], statistics: Mapping[str, Any] | None = None
    ) -> None:
        """Create the model; see `ActionSampler.build`."""
        super().build(features, statistics)
        if self.compile_model:
            self.model.compile()

    def chunk_loss(
        self, chunk: Chunk, fast_state: FastState, generator: torch.Generator | None
    ) -> Tensor:
        """Flow-matching loss over the valid entries of a chunk; see `AdapterModule.chunk_loss`."""
        assert self.model is not None
        observed = self._observe(chunk)
        actions = self.normalizer.normalize(ACTION, chunk[ACTION])
        action_dim = actions.shape[-1]
        actions = F.pad(actions, (0, self.model.action_size - action_dim))
        noise, time = self.draw(chunk, actions, generator)
        noisy, target = interpolate(actions, noise, time)
        velocity = self.model(observed, noisy, time, fast_state=fast_state, write=self.ttt_write)
        loss, per_row = flow_matching_loss(velocity, target, chunk["action_is_pad"], action_dim)
        if fast_state.listens("loss"):
            fast_state.publish("loss", "model", per_row=per_row)
        return loss

    def chunk_targets(self, chunk: Chunk) -> Tensor:
        """Number of recorded actions of a chunk."""
        return (~chunk["action_is_pad"]).sum()

    def draw(
        self, chunk: Chunk, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Noise like `actions [B, A, D]` and times `[B]` at which a chunk is trained."""
        noise = torch.randn(
            actions.shape, dtype=actions.dtype, device=actions.device, generator=generator
        )
        return noise, sample_time(actions.shape[:1], generator=generator, device=actions.device)

    def predict_chunk(
        self, chunk: Chunk, fast_state: FastState, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Sampled actions beside the recorded ones, both absolute and in the units of the data.

        Returns:
            `episode_index [B]`, `frame_index [B]`, `action [B, A, D]` (sampled),
            `recorded_action [B, A, D]` and `action_is_pad [B, A]`.
        """
        return {
            "episode_index": chunk["episode_index"],
            "frame_index": chunk["frame_index"],
            ACTION: self.sample_actions(chunk, fast_state, generator),
            "recorded_action": self._absolute(chunk[ACTION], chunk[STATE]),
            "action_is_pad": chunk["action_is_pad"],
        }

    def policy(self, seed: int = 0) -> ActionExpertPolicy:
        """This module as a policy; the weights are shared, nothing is copied."""
        return ActionExpertPolicy(self, seed=seed)

    def parameter_group(self, name: str) -> str:
        """What its adapter says, or `adapter` for LoRA by peft, or `base`."""
        group = parameter_group(self, name)
        if group is not None:
            return group
        return "adapter" if ".lora_" in name else "base"

    def left_out_names(self) -> set[str]:
        """Frozen weights of a pretrained model."""
        assert self.model is not None
        return {f"model.{name}" for name in self.model.restorable()}

    def shard_model(self) -> None:
        """Share the model out, with the fingerprint of what checkpoints leave out taken before."""
        assert self.model is not None
        self.model.fingerprint()
        super().shard_model()
        register_fsdp_forward_method(self.model, "observe")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store options and sizes, so that `rebuild` needs nothing but the checkpoint.

        Frozen weights of a pretrained model stay where they were loaded from.
        """
        assert self.model is not None
        for name in self.model.restorable():
            checkpoint["state_dict"].pop(f"model.{name}", None)
        checkpoint[CHECKPOINT_KEY] = {
            "options": self.stored_options(),
            "features": self.features,
            "fingerprint": self.model.fingerprint(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the model before its weights are loaded; data of another kind is an error."""
        stored = _stored(checkpoint)["features"]
        if self.model is None:
            self.build(stored)
        self._complete(checkpoint)
        for key in ("state_dim", "action_dim", "horizon", "image_keys", "delta_actions"):
            if stored[key] != self.features[key]:
                raise ValueError(
                    f"the checkpoint was trained with {key}={stored[key]}, the data has "
                    f"{self.features[key]}: use the data it was trained on, or train anew"
                )

    def _complete(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the state dict of a checkpoint the pretrained weights that it left out."""
        fingerprint = _stored(checkpoint).get("fingerprint")
        self.complete_weights(checkpoint.get("state_dict", {}), fingerprint)

    @classmethod
    def rebuild(
        cls, checkpoint: Mapping[str, Any], pretrained: str | None = None
    ) -> ActionExpertModule:
        """The module of a checkpoint, for inference: in eval mode, with its weights.

        The weights are those under `state_dict`, which are the averages where EMA ran.

        Args:
            checkpoint: content of the file.
            pretrained: where the pretrained weights lie now, if they have moved since training.

        Raises:
            ValueError: it is not the checkpoint of an action expert, or its pretrained weights
                are not there.
            KeyError: it lacks a statistic that normalisation needs.
        """
        stored = _stored(checkpoint)
        module = cls(refuse_to_train, **restored_options(stored["options"], pretrained))
        module.build(stored["features"])
        module._complete(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        module.normalizer.require(STATE, ACTION)
        return module.eval().requires_grad_(False)


def _stored(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(checkpoint, Mapping) or CHECKPOINT_KEY not in checkpoint:
        raise ValueError(
            f"this is not the checkpoint of an ActionExpertModule: it has no {CHECKPOINT_KEY!r}; "
            "use one that `python cli.py fit` wrote with this model and this version"
        )
    return checkpoint[CHECKPOINT_KEY]
