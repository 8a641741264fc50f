"""TTT-gated action expert: a policy whose fast weights learn while the episode runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Literal, NoReturn

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lightning_modules.adapters import TTTAdapterConfig, as_config, inject_adapters
from lightning_modules.base import AdapterModule, Chunk, ParameterGroup, Schedule
from lightning_modules.layers.normalization import Normalizer
from lightning_modules.models.action_expert import ActionExpert, ExpertConfig, Writers
from lightning_modules.models.flow_matching import (
    euler_sample,
    flow_matching_loss,
    interpolate,
    sample_time,
)
from lightning_modules.policy import STATE, ActionExpertPolicy
from lightning_modules.streams import FastState

ACTION = "action"
CHECKPOINT_KEY = "action_expert"
"""Where a checkpoint holds what `ActionExpertModule.rebuild` needs beside the weights."""


class ActionExpertModule(AdapterModule):
    """Flow-matching action expert with test-time training after attention.

    Per layer `x + gate_attn * attn + gate_ttt * ttt(attn)`, then the MLP with its own gate; the
    TTT layer takes the chunk's observation and action tokens as one non-causal mini-batch.
    Training minimises `|| v(x_t, t) - (noise - action) ||^2` over the valid entries, with
    `x_t = t * noise + (1 - t) * action` and `t ~ 0.001 + 0.999 * Beta(1.5, 1)`.

    Sizes and normalisation statistics come from the DataModule and are stored in the checkpoint.

    Args:
        optimizer: e.g. `{class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}`.
        expert: size of the transformer.
        ttt: the TTT adapter; None trains the control without TTT.
        ttt_layer_positions: layers with TTT: "all" or a list of indices; None means none.
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
            of compilation at the start.
        schedule: learning rate over the run.
        groups: options of the parameter groups `base` (transformer), `adapter` (slow weights of
            TTT), `gate`, `fast` (learned initial fast weights and their step sizes).

    Raises:
        ValueError: TTT layers out of range or without `ttt`, or data that does not fit.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        expert: ExpertConfig | None = None,
        ttt: TTTAdapterConfig | None = None,
        ttt_layer_positions: Literal["all"] | list[int] | None = "all",
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
        self.expert = expert or ExpertConfig()
        self.ttt = ttt
        self.ttt_layers = _layer_positions(ttt, ttt_layer_positions, self.expert.num_layers)
        self.ttt_state = ttt_state
        self.ttt_write = ttt_write or ("observation" if ttt_state == "carry_episode" else "all")
        self.execution_horizon = execution_horizon
        self.denoise_steps = denoise_steps
        self.normalization = normalization
        self.compile_model = compile_model
        self.features: dict[str, Any] = {}
        self.model: ActionExpert | None = None

    def configure_model(self) -> None:
        """Build the model for the DataModule's features, unless a checkpoint does so."""
        loads_checkpoint = self._trainer is None  # in `load_from_checkpoint`
        if self.model is None and not loads_checkpoint:
            datamodule = getattr(self.trainer, "datamodule", None)
            if not hasattr(datamodule, "features"):
                raise ValueError(
                    "ActionExpertModule takes its sizes from the DataModule: "
                    "use ActionChunkDataModule or RecordedSimulation (data.class_path)"
                )
            self.build(datamodule.features, datamodule.statistics)

    def build(
        self, features: Mapping[str, Any], statistics: Mapping[str, Any] | None = None
    ) -> None:
        """Create the model.

        Args:
            features: `state_dim`, `action_dim`, `horizon`, `stride` (None without streams),
                `image_keys`, `delta_actions`, `action_range` and `action_bounds` (which only a
                policy's `check` reads), as `ActionChunkDataModule.features` gives them.
            statistics: feature -> statistic -> values of the training data; None leaves them to
                the checkpoint that is loaded next.
        """
        self._check(features)
        self.features = dict(features)
        self.normalizer = Normalizer(statistics, self.normalization)
        self.model = ActionExpert(self.expert, features["state_dim"], features["action_dim"])
        if self.ttt is not None and self.ttt_layers:
            config = replace(self.ttt, cond_size=self.model.cond_size)
            plan = [(f"layers.{index}.self_attn", "ttt", config) for index in self.ttt_layers]
            inject_adapters(self.model, plan)
        if self.compile_model:
            self.model.compile()

    def _check(self, features: Mapping[str, Any]) -> None:
        horizon, stride = features["horizon"], features["stride"]
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
        if features["image_keys"]:
            raise ValueError(
                "this expert sees the state vector only; remove "
                f"image_keys={features['image_keys']}"
            )

    def chunk_loss(
        self, chunk: Chunk, fast_state: FastState, generator: torch.Generator | None
    ) -> Tensor:
        """Flow-matching loss over the valid entries of a chunk; see `AdapterModule.chunk_loss`."""
        assert self.model is not None
        state = self.normalizer.normalize(STATE, chunk[STATE])
        actions = self.normalizer.normalize(ACTION, chunk[ACTION])
        noise = torch.randn(
            actions.shape, dtype=actions.dtype, device=actions.device, generator=generator
        )
        time = sample_time(actions.shape[:1], generator=generator, device=actions.device)
        noisy, target = interpolate(actions, noise, time)
        velocity = self.model(state, noisy, time, fast_state=fast_state, write=self.ttt_write)
        loss, per_row = flow_matching_loss(velocity, target, chunk["action_is_pad"])
        if fast_state.listens("loss"):
            fast_state.publish("loss", "model", per_row=per_row)
        return loss

    @torch.no_grad()
    def sample_actions(
        self,
        state: Tensor,
        fast_state: FastState | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample a chunk of actions by Euler steps from noise (t = 1) to data (t = 0).

        Args:
            state: observation in the units of the data, `[B, S]`.
            fast_state: handle on the rows' state. All Euler steps read the same state; what the
                last one writes is the state after the chunk.
            generator: source of noise.

        Returns:
            Actions in the units of the data, `[B, A, D]`.
        """
        assert self.model is not None
        # `forward`, not the call: what is compiled for training would compile anew for every
        # number of rows that a batch of environments happens to ask for.
        forward, fast = self.model.forward, fast_state or FastState.transient()
        observation = self.normalizer.normalize(STATE, state)
        shape = (state.shape[0], self.features["horizon"], self.features["action_dim"])
        noise = torch.randn(shape, device=state.device, generator=generator)

        def velocity(noisy: Tensor, time: Tensor) -> Tensor:
            nonlocal fast
            out = forward(
                observation, noisy, time.expand(len(noisy)), fast_state=fast, write=self.ttt_write
            )
            if self.ttt_state == "carry_denoise":
                fast = fast.advance()
            return out

        actions = euler_sample(velocity, noise, self.denoise_steps)
        return self._absolute(self.normalizer.unnormalize(ACTION, actions), state)

    def _absolute(self, actions: Tensor, state: Tensor) -> Tensor:
        """Actions `[B, A, D]` of which some dimensions are relative to the state `[B, S]`."""
        dims = list(self.features["delta_actions"])
        actions = actions.clone()
        actions[..., dims] += state[:, None, dims]
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
            ACTION: self.sample_actions(chunk[STATE], fast_state, generator),
            "recorded_action": self._absolute(chunk[ACTION], chunk[STATE]),
            "action_is_pad": chunk["action_is_pad"],
        }

    def policy(self, seed: int = 0) -> ActionExpertPolicy:
        """This module as a policy; the weights are shared, nothing is copied."""
        return ActionExpertPolicy(self, seed=seed)

    def parameter_group(self, name: str) -> str:
        """`gate`, `fast` and `adapter` inside a TTT adapter, `base` elsewhere."""
        if ".ttt" not in name:
            return "base"
        if "gate" in name:
            return "gate"
        leaf = name.rsplit(".", 1)[-1]
        fast = ("W1", "b1", "W2", "b2", "learnable_ttt_lr_weight", "learnable_ttt_lr_bias")
        return "fast" if leaf in fast else "adapter"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store options and sizes, so that `rebuild` needs nothing but the checkpoint."""
        checkpoint[CHECKPOINT_KEY] = {
            "options": {
                "expert": asdict(self.expert),
                "ttt": None if self.ttt is None else asdict(self.ttt),
                "ttt_layer_positions": list(self.ttt_layers),
                "ttt_write": self.ttt_write,
                "ttt_state": self.ttt_state,
                "execution_horizon": self.execution_horizon,
                "denoise_steps": self.denoise_steps,
                "normalization": self.normalization,
            },
            "features": self.features,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the model before its weights are loaded; data of another kind is an error."""
        stored = _stored(checkpoint)["features"]
        if self.model is None:
            self.build(stored)
        for key in ("state_dim", "action_dim", "horizon", "delta_actions"):
            if stored[key] != self.features[key]:
                raise ValueError(
                    f"the checkpoint was trained with {key}={stored[key]}, the data has "
                    f"{self.features[key]}: use the data it was trained on, or train anew"
                )

    @classmethod
    def rebuild(cls, checkpoint: Mapping[str, Any]) -> ActionExpertModule:
        """The module of a checkpoint, for inference: in eval mode, with its weights.

        The weights are those under `state_dict`, which are the averages where EMA ran.

        Args:
            checkpoint: content of the file.

        Raises:
            ValueError: it is not the checkpoint of an action expert.
            KeyError: it lacks a statistic that normalisation needs.
        """
        stored = _stored(checkpoint)
        options = dict(stored["options"])
        expert = as_config(ExpertConfig, options.pop("expert"), "expert")
        ttt = options.pop("ttt")
        if ttt is not None:
            ttt = as_config(TTTAdapterConfig, ttt, "ttt")
        module = cls(_refuse_to_train, expert=expert, ttt=ttt, **options)
        module.build(stored["features"])
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


def _layer_positions(
    ttt: TTTAdapterConfig | None, positions: Literal["all"] | list[int] | None, depth: int
) -> tuple[int, ...]:
    if ttt is None or positions is None:
        return ()
    if positions == "all":
        return tuple(range(depth))
    outside = [index for index in positions if not 0 <= index < depth]
    if outside:
        raise ValueError(
            f"ttt_layer_positions has {outside[0]}, but the expert's {depth} layers are "
            f"0 to {depth - 1}"
        )
    return tuple(sorted(set(positions)))
