"""What of an action expert acts: built for its data, its weights put in, actions sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.adapters import (
    AdapterSpec,
    TTTAdapterConfig,
    as_config,
    complete_spec,
    inject_adapters,
    lay_out,
    read_plan,
    store_plan,
)
from lightning_modules.distributed.sharding import is_sharded
from lightning_modules.layers.normalization import NormalizationMode, Normalizer
from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.models.backbone import STATE, Backbone, Writers
from lightning_modules.models.backbones import (
    choose_backbone,
    layer_positions,
    restore_backbone,
    store_backbone,
)
from lightning_modules.models.flow_matching import euler_sample
from lightning_modules.models.pi0_options import PI0Options
from lightning_modules.streams import FastState

ACTION = "action"
TTTState = Literal["reset", "carry_denoise", "carry_episode"]


class ActionSampler:
    """Options, model and normaliser of an action expert, and the sampler of its actions.

    Mixed into an `nn.Module`: `ActionExpertModule` trains it, `ExportedExpert` only acts. Both
    name their weights alike, `model.*` and `normalizer.*`.

    Attributes:
        model: None until `build`.
        features: of the data for which the model was built.
    """

    model: Backbone | None
    normalizer: Normalizer
    features: dict[str, Any]

    def choose(
        self,
        backbone: Literal["state", "pi0"] = "state",
        expert: ExpertConfig | None = None,
        pi0: PI0Options | None = None,
        ttt: TTTAdapterConfig | None = None,
        ttt_layer_positions: Literal["all"] | list[int] | None = "all",
        adapters: list[AdapterSpec] | None = None,
        ttt_write: Writers | None = None,
        ttt_state: TTTState = "reset",
        execution_horizon: int = 8,
        denoise_steps: int = 10,
        normalization: NormalizationMode = "z_score",
    ) -> None:
        """Keep the options; for their meaning and errors see `ActionExpertModule`."""
        self.backbone_options = choose_backbone(backbone, expert=expert, pi0=pi0)
        self.ttt = ttt
        self.ttt_layer_positions = ttt_layer_positions
        self.adapters = read_plan(adapters)
        self.ttt_state = ttt_state
        self.ttt_write = ttt_write or ("observation" if ttt_state == "carry_episode" else "all")
        self.execution_horizon = execution_horizon
        self.denoise_steps = denoise_steps
        self.normalization = normalization
        self.features = {}
        self.model = None

    @property
    def carries_episode(self) -> bool:
        """Whether fast state goes on from chunk to chunk of an episode."""
        return self.ttt_state == "carry_episode"

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

    def stored_options(self) -> dict[str, Any]:
        """The options as plain values; `restored_options` reads them again."""
        return {
            **store_backbone(self.backbone_options),
            "ttt": None if self.ttt is None else asdict(self.ttt),
            "ttt_layer_positions": self.ttt_layer_positions,
            "adapters": store_plan(self.adapters),
            "ttt_write": self.ttt_write,
            "ttt_state": self.ttt_state,
            "execution_horizon": self.execution_horizon,
            "denoise_steps": self.denoise_steps,
            "normalization": self.normalization,
        }

    def complete_weights(self, weights: dict[str, Tensor], fingerprint: str | None) -> None:
        """Give stored weights the frozen pretrained ones that were left out of them.

        Args:
            weights: by name in the state dict; completed in place.
            fingerprint: of the pretrained weights that they were trained with.

        Raises:
            ValueError: the model has others.
        """
        assert self.model is not None
        if fingerprint != self.model.fingerprint():
            raise ValueError(
                "the checkpoint was trained on other pretrained weights than those that "
                "pi0.pretrained names now, or with another pi0.train: use the same as in training"
            )
        names = self.model.restorable()
        for name, parameter in self.model.named_parameters():
            if name in names:
                weights.setdefault(f"model.{name}", parameter.detach())


def restored_options(stored: Mapping[str, Any], pretrained: str | None = None) -> dict[str, Any]:
    """Inverse of `ActionSampler.stored_options`: arguments of `choose`.

    Args:
        stored: plain values.
        pretrained: where the pretrained weights lie now, if they have moved.

    Raises:
        ValueError: unknown options, or `pretrained` for a model without such weights.
    """
    options = restore_backbone(stored, pretrained)
    if options["ttt"] is not None:
        options["ttt"] = as_config(TTTAdapterConfig, options["ttt"], "ttt")
    return options
