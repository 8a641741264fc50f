"""Success rate of the policy that is being trained, in the simulator."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from callbacks.ema import EMA, shards_parameters
from callbacks.episode_figures import animate_episodes, draw_paths
from callbacks.logging import log_animation, log_figure, log_scalars
from callbacks.success_figure import Evaluation, draw_trajectory
from callbacks.throughput import Throughput
from datamodules.mazes import Wall, walls_of
from datamodules.rollout import RolloutResult, rollout
from datamodules.simulations import Simulation, get_simulation

Z_95 = 1.959963984540054
"""The standard normal's 0.975 quantile."""
ANIMATED = 9
"""Episodes in an animation: as many as there are colours that can be told apart."""


class ClosedLoopEvaluation(Callback):
    """Let the policy act in the simulator and write its success rate.

    The rate comes with its 95 % Wilson interval as `closed_loop/success`, `success_low`,
    `success_high`, beside `closed_loop/episode_length` (mean control steps); TensorBoard gets the
    paths of all episodes (after training and after `test` also an animation of the first nine) and
    the success rate of all evaluations of the run, before it was interrupted, too. One line goes to
    the terminal. `closed_loop/success` can be the `monitor` of a
    ModelCheckpoint. Training goes on as if nothing had happened: random states, modes and fast
    state are put back. With the EMA callback the averaged weights are evaluated.

    Runs before training (not when resuming), every n steps, after training, and after `test`.

    Args:
        episodes: episodes per evaluation.
        num_envs: environments that run side by side.
        every_n_steps: optimizer steps between two evaluations; None evaluates at the ends only.
        at_start: evaluate before training.
        at_end: evaluate after training.
        seed: decides the episodes' starts and goals, and the policy's noise.
        simulation: name of the task; None takes the DataModule's.

    Raises:
        ValueError: no simulation is known, or the strategy shards the module.
    """

    def __init__(
        self,
        episodes: int = 100,
        num_envs: int = 20,
        every_n_steps: int | None = None,
        at_start: bool = True,
        at_end: bool = True,
        seed: int = 0,
        simulation: str | None = None,
    ) -> None:
        for name, value in (("episodes", episodes), ("num_envs", num_envs)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1, or null")
        self.episodes = episodes
        self.num_envs = num_envs
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        self.seed = seed
        self.simulation = simulation
        self._evaluated = 0
        self._trajectory: list[Evaluation] = []
        self._walls: tuple[Wall, ...] = ()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(simulation=self.simulation)

    def state_dict(self) -> dict[str, Any]:
        return {"trajectory": [tuple(evaluation) for evaluation in self._trajectory]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._trajectory = [Evaluation(*numbers) for numbers in state_dict["trajectory"]]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage not in ("fit", "test"):
            return
        if shards_parameters(trainer):
            raise ValueError(
                "ClosedLoopEvaluation runs the policy in one process, which has only a part of it "
                f"under {type(trainer.strategy).__name__}; remove it from trainer.callbacks and "
                "evaluate the checkpoint with: python cli.py test"
            )
        # A missing simulator shall be known now, not after hours of training.
        env = self._simulation(trainer).make()
        self._walls = walls_of(env)
        env.close()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._check(trainer, pl_module)
        self._evaluated = trainer.global_step
        if trainer.global_step == 0:
            self._trajectory = []
        if self.at_start and trainer.global_step == 0:
            self.evaluate(trainer, pl_module, "before training")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (
            self.every_n_steps
            and step // self.every_n_steps > self._evaluated // self.every_n_steps
        ):
            self.evaluate(trainer, pl_module, f"step {step}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.at_end:
            self.evaluate(trainer, pl_module, "after training", last=True)

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._check(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.evaluate(trainer, pl_module, "test", last=True)

    def evaluate(
        self, trainer: pl.Trainer, pl_module: Any, moment: str, last: bool = False
    ) -> None:
        """Run the episodes on the first process and write what happened; the others wait.

        Args:
            trainer: whose loggers are written to.
            pl_module: its `policy(seed=...)` has `check`, `reset` and `select_actions`.
            moment: when this is, for the printed line.
            last: no evaluation follows, so this one is also animated.
        """
        scalars: dict[str, float] = {}
        if trainer.is_global_zero:
            simulation = self._simulation(trainer)
            with _undisturbed(trainer, pl_module):
                result = self._roll_out(trainer, pl_module, simulation)
            scalars = _scalars(result)
            log_scalars(trainer, scalars, trainer.global_step)
            figure = draw_paths(result, simulation.name, self._walls)
            log_figure(trainer, "closed_loop/paths", figure, trainer.global_step)
            if trainer.state.fn == TrainerFn.FITTING:
                self._draw_trajectory(trainer, simulation, scalars)
            if last:
                self._animate(trainer, result, simulation)
            pl_module.print(_line(scalars, len(result.successes), moment))
        scalars = trainer.strategy.broadcast(scalars)
        trainer.callback_metrics.update({tag: torch.tensor(n) for tag, n in scalars.items()})
        self._evaluated = trainer.global_step

    def _roll_out(
        self, trainer: pl.Trainer, pl_module: Any, simulation: Simulation
    ) -> RolloutResult:
        policy = pl_module.policy(seed=self.seed)
        policy.reset()
        return rollout(
            simulation,
            policy.select_actions,
            episodes=self.episodes,
            num_envs=self.num_envs,
            seed=self.seed,
            goal_visible_steps=_goal_visible_steps(trainer),
        )

    def _check(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Before anything is run: can the policy act in this simulation at all?"""
        simulation = self._simulation(trainer)
        pl_module.policy().check(len(simulation.state_names), *simulation.action_bounds)

    def _animate(self, trainer: pl.Trainer, result: RolloutResult, simulation: Simulation) -> None:
        gif = animate_episodes(
            {simulation.name: result},
            self._walls,
            episodes=range(min(ANIMATED, len(result.lengths))),
            frames_per_second=simulation.fps,
            goal_visible_steps=_goal_visible_steps(trainer),
        )
        log_animation(trainer, "closed_loop/episodes", gif, trainer.global_step)

    def _draw_trajectory(
        self, trainer: pl.Trainer, simulation: Simulation, scalars: dict[str, float]
    ) -> None:
        rates = (
            scalars[f"closed_loop/{name}"] for name in ("success", "success_low", "success_high")
        )
        # The last step may be evaluated twice, as one of every n and after training.
        earlier = [point for point in self._trajectory if point.step < trainer.global_step]
        self._trajectory = [*earlier, Evaluation(trainer.global_step, *rates)]
        title = f"{simulation.name}, {self.episodes} episodes each"
        figure = draw_trajectory(self._trajectory, title)
        log_figure(trainer, "closed_loop/trajectory", figure, trainer.global_step)

    def _simulation(self, trainer: pl.Trainer) -> Simulation:
        datamodule = getattr(trainer, "datamodule", None)
        simulation = self.simulation or getattr(datamodule, "simulation", None)
        if simulation is None:
            raise ValueError(
                "ClosedLoopEvaluation does not know what to simulate: set its option simulation "
                "(FetchReach, PointMaze, ...) or use a DataModule that records one"
            )
        return get_simulation(simulation) if isinstance(simulation, str) else simulation


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    r"""Confidence interval of a share (Wilson 1927): 95 % with the default `z`.

    $$\frac{p + z^2/2n \pm z \sqrt{p (1 - p)/n + z^2/4n^2}}{1 + z^2/n}, \qquad p = successes / n.$$

    Raises:
        ValueError: n is not positive or successes is not between 0 and n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: need n >= 1 and 0 <= successes <= n")
    p = successes / n
    center = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding must not push an end past the share itself where that is 0 or 1.
    return min(p, max(0.0, (center - half) / scale)), max(p, min(1.0, (center + half) / scale))


def _goal_visible_steps(trainer: pl.Trainer) -> Collection[int] | None:
    """A goal that the data hides at some steps is hidden from the policy as well."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    return None if datamodule is None else datamodule.goal_visible_steps


@contextmanager
def _undisturbed(trainer: pl.Trainer, pl_module: nn.Module) -> Iterator[None]:
    """Averaged weights if there are any, eval mode, no gradients; everything is put back."""
    training = [(module, module.training) for module in pl_module.modules()]
    with ExitStack() as stack:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EMA):
                stack.enter_context(callback.swapped())
            if isinstance(callback, Throughput):
                stack.enter_context(callback.paused(trainer))
        stack.enter_context(isolate_rng())
        stack.enter_context(torch.no_grad())
        stack.enter_context(trainer.precision_plugin.forward_context())
        pl_module.eval()
        try:
            yield
        finally:
            for module, mode in training:
                module.training = mode


def _scalars(result: RolloutResult) -> dict[str, float]:
    low, high = wilson_interval(int(result.successes.sum()), len(result.successes))
    return {
        "closed_loop/success": result.success_rate,
        "closed_loop/success_low": low,
        "closed_loop/success_high": high,
        "closed_loop/episode_length": float(result.lengths.mean()),
    }


def _line(scalars: dict[str, float], episodes: int, moment: str) -> str:
    rate, low, high = (
        100 * scalars[f"closed_loop/{name}"] for name in ("success", "success_low", "success_high")
    )
    return (
        f"closed-loop success: {rate:.1f} % [{low:.1f}, {high:.1f}] over {episodes} episodes "
        f"({moment})"
    )
