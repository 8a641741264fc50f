"""TTT-gated action expert: a policy whose fast weights learn while the episode runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, NoReturn

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn import functional as F

from lightning_modules.adapters import (
    AdapterSpec,
    TTTAdapterConfig,
    as_config,
    complete_spec,
    inject_adapters,
    lay_out,
    parameter_group,
    read_plan,
    store_plan,
)
from lightning_modules.base import Chunk, ParameterGroup, Schedule
from lightning_modules.distributed.sharding import is_sharded
from lightning_modules.layers.normalization import Normalizer
from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.models.backbone import STATE, Backbone, Writers
from lightning_modules.models.backbones import (
    choose_backbone,
    layer_positions,
    restore_backbone,
    store_backbone,
)
from lightning_modules.models.flow_matching import (
    euler_sample,
    flow_matching_loss,
    interpolate,
    sample_time,
)
from lightning_modules.models.pi0_options import PI0Options
from lightning_modules.policy import ActionExpertPolicy
from lightning_modules.sized import SizedModule
from lightning_modules.streams import FastState

ACTION = "action"
CHECKPOINT_KEY = "action_expert"
"""Where a checkpoint holds what `ActionExpertModule.rebuild` needs beside the weights."""


class ActionExpertModule(SizedModule):
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
        self.backbone_options = choose_backbone(backbone, expert=expert, pi0=pi0)
        self.ttt = ttt
        self.ttt_layer_positions = ttt_layer_positions
        self.adapters = read_plan(adapters)
        self.ttt_state = ttt_state
        self.ttt_write = ttt_write or ("observation" if ttt_state == "carry_episode" else "all")
        self.execution_horizon = execution_horizon
        self.denoise_steps = denoise_steps
        self.normalization = normalization
        self.compile_model = compile_model
        self.features: dict[str, Any] = {}
        self.model: Backbone | None = None
        if compile_model and backbone != "state":
            raise ValueError("compile_model=true is for backbone: state; set it to false")

    def build_for(self, datamodule: Any) -> None:
        """Create the model for the DataModule's features and statistics."""
        self.build(datamodule.features, datamodule.statistics)

    def build(
        self, features: Mapping[str, Any], statistics: Mapping[str, Any] | None = None
    ) -> None:
        """Create the model.

        Args:
            features: `state_dim`, `action_dim`, `horizon`, `stride` (None without streams),
                `image_keys`, `tasks` (where there are cameras), `delta_actions`, `action_range` and
                `action_bounds` (which only a policy's `check` reads), as
                `ActionChunkDataModule.features` gives them.
            statistics: feature -> statistic -> values of the training data; None leaves them to
                the checkpoint that is loaded next.
        """
        plan = self.check(features)
        self.features = dict(features)
        self.normalizer = Normalizer(statistics, self.normalization)
        self.model = self.backbone_options.build(features)
        plan = [complete_spec(spec, self.model.cond_size) for spec in plan]
        inject_adapters(self.model.decoder, plan)
        self.model.complete()
        if self.compile_model:
            self.model.compile()

    def check(self, features: Mapping[str, Any]) -> list[AdapterSpec]:
        """Make sure that options and data fit; returns one line per layer with an adapter."""
        horizon, stride = features["horizon"], features["stride"]
        if min(self.denoise_steps, self.execution_horizon) < 1:
            raise ValueError("denoise_steps and execution_horizon must be at least 1")
        if self.execution_horizon > horizon:
            raise ValueError(
                f"execution_horizon={self.execution_horizon} exceeds the data's horizon {horizon}"
            )
        if self.ttt_state == "carry_episode" and stride != self.execution_horizon:
            raise ValueError(
                f"ttt_state=carry_episode carries the state every {self.execution_horizon} steps "
                f"(execution_horizon), but the data's stride is {stride}: set the DataModule's "
                f"mode to stream and its stride to {self.execution_horizon}"
            )
        self.backbone_options.check(features)
        lines = {f"adapters[{number}]": spec for number, spec in enumerate(self.adapters)}
        positions = None if self.ttt is None else self.ttt_layer_positions
        if layers := layer_positions(positions, self.backbone_options):
            lines["ttt_layer_positions"] = AdapterSpec(list(layers), "ttt", self.ttt)
        return lay_out(lines, self.backbone_options.num_layers)

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

    def _observe(self, observation: Mapping[str, Any]) -> Any:
        """What the backbone needs of an observation, for training and for all Euler steps."""
        assert self.model is not None
        state = self.normalizer.normalize(STATE, observation[STATE])
        return self.model.observe({**observation, STATE: state})

    @torch.no_grad()
    def sample_actions(
        self,
        observation: Tensor | Mapping[str, Any],
        fast_state: FastState | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample a chunk of actions by Euler steps from noise (t = 1) to data (t = 0).

        Args:
            observation: state vector in the units of the data, `[B, S]`, or a mapping with that
                under "observation.state" and what else the backbone sees (cameras, task).
            fast_state: handle on the rows' state. All Euler steps read the same state; what the
                last one writes is the state after the chunk.
            generator: source of noise.

        Returns:
            Actions in the units of the data, `[B, A, D]`.
        """
        assert self.model is not None
        # `forward`, not the call: what is compiled for training would compile anew for every
        # number of rows that a batch of environments happens to ask for. Sharded weights are not
        # compiled, and only the call gathers them.
        forward = self.model if is_sharded(self.model) else self.model.forward
        fast = fast_state or FastState.transient()
        if not isinstance(observation, Mapping):
            observation = {STATE: observation}
        state, observed = observation[STATE], self._observe(observation)
        shape = (state.shape[0], self.features["horizon"], self.model.action_size)
        noise = torch.randn(shape, device=state.device, generator=generator)

        def velocity(noisy: Tensor, time: Tensor) -> Tensor:
            nonlocal fast
            out = forward(
                observed, noisy, time.expand(len(noisy)), fast_state=fast, write=self.ttt_write
            )
            if self.ttt_state == "carry_denoise":
                fast = fast.advance()
            return out

        actions = euler_sample(velocity, noise, self.denoise_steps)
        actions = actions[..., : self.features["action_dim"]]
        return self._absolute(self.normalizer.unnormalize(ACTION, actions), state)

    def _absolute(self, actions: Tensor, state: Tensor) -> Tensor:
        """Actions `[B, A, D]` of which some dimensions are relative to the state `[B, S]`."""
        actions = actions.clone()
        for dim in self.features["delta_actions"]:  # a list as index would be copied to the device
            actions[..., dim] += state[:, None, dim]
        return actions

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
            "options": {
                **store_backbone(self.backbone_options),
                "ttt": None if self.ttt is None else asdict(self.ttt),
                "ttt_layer_positions": self.ttt_layer_positions,
                "adapters": store_plan(self.adapters),
                "ttt_write": self.ttt_write,
                "ttt_state": self.ttt_state,
                "execution_horizon": self.execution_horizon,
                "denoise_steps": self.denoise_steps,
                "normalization": self.normalization,
            },
            "features": self.features,
            "fingerprint": self.model.fingerprint(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the model before its weights are loaded; data of another kind is an error."""
        stored = _stored(checkpoint)["features"]
        if self.model is None:
            self.build(stored)
        self._put_back(checkpoint)
        for key in ("state_dim", "action_dim", "horizon", "image_keys", "delta_actions"):
            if stored[key] != self.features[key]:
                raise ValueError(
                    f"the checkpoint was trained with {key}={stored[key]}, the data has "
                    f"{self.features[key]}: use the data it was trained on, or train anew"
                )

    def _put_back(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the state dict of a checkpoint the pretrained weights that it left out."""
        assert self.model is not None
        if _stored(checkpoint).get("fingerprint") != self.model.fingerprint():
            raise ValueError(
                "the checkpoint was trained on other pretrained weights than those that "
                "pi0.pretrained names now, or with another pi0.train: use the same as in training"
            )
        names = self.model.restorable()
        for name, parameter in self.model.named_parameters():
            if name in names:
                checkpoint["state_dict"].setdefault(f"model.{name}", parameter.detach())

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
        options = restore_backbone(stored["options"], pretrained)
        if options["ttt"] is not None:
            options["ttt"] = as_config(TTTAdapterConfig, options["ttt"], "ttt")
        module = cls(_refuse_to_train, **options)
        module.build(stored["features"])
        module._put_back(checkpoint)
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


def _refuse_to_train(parameters: Any) -> NoReturn:
    raise RuntimeError(
        "a module that was rebuilt from a checkpoint has no optimizer: to train on, run "
        "python cli.py fit --ckpt_path, or make an ActionExpertModule with one"
    )
