"""Closed-loop evaluation reports what happened, and training does not notice it."""

from __future__ import annotations

import io
import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from toy_streams import ToyModule, fit, read_tensorboard, same, scalar, toy_batches

import callbacks.closed_loop
from callbacks import EMA, ClosedLoopEvaluation
from callbacks.closed_loop import wilson_interval
from callbacks.success_figure import Evaluation, draw_trajectory
from datamodules.simulations import Simulation, episode_seed
from lightning_modules.streams import FastState


class ToyEnv:
    """A point that moves by its action; solved where x exceeds the goal's. Disturbs all RNGs."""

    def reset(self, seed: int) -> tuple[dict[str, np.ndarray], dict]:
        self.position = np.zeros(2)
        self.goal = np.array([1 + seed % 3, 0.0])  # needs 1, 2 or 3 steps
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        random.random(), np.random.rand(), torch.rand(1)
        self.position = self.position + action
        solved = bool(self.position[0] >= self.goal[0])
        return self._observe(), 0.0, False, False, {"is_success": solved}

    def close(self) -> None:
        pass

    @property
    def unwrapped(self) -> ToyEnv:
        return self

    def _observe(self) -> dict[str, np.ndarray]:
        return {
            "observation": self.position,
            "achieved_goal": self.position,
            "desired_goal": self.goal,
        }


class ToySimulation(Simulation):
    def make(self) -> Any:
        return ToyEnv()


SIMULATION = ToySimulation(
    name="Toy",
    environment="Toy-v0",
    task="pass the goal",
    state_names=("x", "y", "goal_x", "goal_y"),
    action_names=("dx", "dy"),
    max_steps=2,  # an episode that needs 3 fails
    fps=10,
)


# One wall in a corner of what would be drawn without it.
MAZE = {
    "maze_map": [[1, 0], [0, 0]], "maze_size_scaling": 0.5,
    "x_map_center": 0.0, "y_map_center": 0.5,
}  # fmt: skip


class ToyData(pl.LightningDataModule):
    simulation = SIMULATION
    goal_visible_steps: frozenset[int] | None = None

    def train_dataloader(self) -> DataLoader:
        return DataLoader(toy_batches(4), batch_size=None, collate_fn=same)

    test_dataloader = train_dataloader


class ToyPolicy:
    def __init__(self, module: ActingModule) -> None:
        self.module = module
        self.begun = False

    def check(self, state_dim: int, low: np.ndarray, high: np.ndarray) -> None:
        self.module.checked.append((state_dim, low.tolist(), high.tolist()))

    def reset(self) -> None:
        self.begun = True

    def select_actions(self, states: np.ndarray, new_episode: np.ndarray) -> np.ndarray:
        assert self.begun
        self.module.acted.append((self.module.alpha.detach().clone(), states, new_episode))
        assert not any(module.training for module in self.module.modules())
        assert not torch.is_grad_enabled()
        self.module(torch.randn(4, 5, 8), FastState.transient())
        return np.tile([1.0, 0.1], (len(states), 1)).astype(np.float32)


class ActingModule(ToyModule):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.layers[2].eval()  # a part that is frozen in eval mode must stay so
        self.acted: list[tuple[Tensor, np.ndarray, np.ndarray]] = []
        self.checked: list[tuple[int, list[float], list[float]]] = []

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def policy(self, seed: int = 0) -> ToyPolicy:
        return ToyPolicy(self)


@pytest.fixture(autouse=True)
def datamodule_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` of the toy streams passes a loader; these tests need a DataModule."""
    plain = pl.Trainer.fit

    def with_datamodule(self: pl.Trainer, module: Any, *args: Any, **options: Any) -> None:
        plain(self, module, datamodule=ToyData(), ckpt_path=options.get("ckpt_path"))

    monkeypatch.setattr(pl.Trainer, "fit", with_datamodule)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of weights and numbers: drawing takes most of an evaluation's time."""
    for name in (
        "draw_paths", "draw_trajectory", "animate_episodes", "log_figure", "log_animation",
    ):  # fmt: skip
        monkeypatch.setattr(callbacks.closed_loop, name, lambda *args, **options: None)


def run(folder: Path, *extra: pl.Callback, **options: Any) -> tuple[ActingModule, pl.Trainer]:
    torch.manual_seed(1)
    module = ActingModule()
    torch.manual_seed(2)
    return module, fit(module, [], folder, list(extra), **options)


def test_success_interval_length_line_and_figure_equal_the_episodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = ClosedLoopEvaluation(episodes=20, num_envs=6, every_n_steps=2)
    _, trainer = run(tmp_path, evaluation)
    needed = [1 + episode_seed("evaluate", 0, episode) % 3 for episode in range(20)]
    solved = sum(steps <= 2 for steps in needed)
    events = read_tensorboard(tmp_path)
    low, high = wilson_interval(solved, 20)
    expected = {
        "success": solved / 20, "success_low": low, "success_high": high,
        "episode_length": np.minimum(needed, 2).mean(),
    }  # fmt: skip
    for name, number in expected.items():
        written = scalar(events, f"closed_loop/{name}")
        assert list(written) == [0, 2, 4]
        assert written[0] == pytest.approx(number, rel=1e-6)
    assert {image.step for image in events.Images("closed_loop/paths")} == {0, 2, 4}
    out = capsys.readouterr().out
    line = f"closed-loop success: {5 * solved:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    for moment in ("before training", "step 2", "after training"):
        assert f"{line} over 20 episodes ({moment})" in out
    assert trainer.callback_metrics["closed_loop/success"].item() == pytest.approx(solved / 20)


def animations(folder: Path) -> list[bytes]:
    events = read_tensorboard(folder)
    return [image.encoded_image_string for image in events.Images("closed_loop/episodes")]


def test_only_the_evaluations_after_training_and_in_test_are_animated(tmp_path: Path) -> None:
    evaluation = ClosedLoopEvaluation(episodes=20, num_envs=6, every_n_steps=2)
    module, trainer = run(tmp_path, evaluation)
    assert len(animations(tmp_path)) == 1
    trainer.test(module, datamodule=ToyData(), verbose=False)
    after_training, in_test = animations(tmp_path)
    frames = Image.open(io.BytesIO(after_training)).n_frames
    assert frames == 3  # the start and two steps, which is the limit
    assert after_training == in_test


def test_the_animation_hides_the_goal_as_the_datamodule_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "shown", ClosedLoopEvaluation(episodes=2))
    monkeypatch.setattr(ToyData, "goal_visible_steps", frozenset({0}))
    run(tmp_path / "hidden", ClosedLoopEvaluation(episodes=2))
    assert animations(tmp_path / "shown") != animations(tmp_path / "hidden")


def test_walls_of_the_simulation_are_in_both_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = ("closed_loop/paths", "closed_loop/episodes")
    pictures = []
    for maze in (None, SimpleNamespace(**MAZE), SimpleNamespace(**MAZE)):
        monkeypatch.setattr(ToyEnv, "maze", maze, raising=False)
        folder = tmp_path / str(len(pictures))
        run(folder, ClosedLoopEvaluation(episodes=2, at_start=False))
        events = read_tensorboard(folder)
        pictures.append([events.Images(tag)[0].encoded_image_string for tag in tags])
    open_space, walled, again = pictures
    assert all(a != b for a, b in zip(open_space, walled, strict=True))
    assert walled == again


def test_training_with_evaluation_is_bit_identical_to_training_without(tmp_path: Path) -> None:
    evaluation = ClosedLoopEvaluation(episodes=3, num_envs=2, every_n_steps=1)
    module, _ = run(tmp_path / "with", evaluation)
    plain, _ = run(tmp_path / "without")
    for (name, mine), other in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert [m.training for m in module.modules()] == [m.training for m in plain.modules()]


@pytest.mark.usefixtures("without_pictures")
def test_without_isolated_random_states_training_would_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks.closed_loop, "isolate_rng", nullcontext)
    module, _ = run(tmp_path / "with", ClosedLoopEvaluation(episodes=3, every_n_steps=1))
    plain, _ = run(tmp_path / "without")
    assert not torch.equal(module.alpha, plain.alpha)


def test_python_and_numpy_random_states_are_put_back(tmp_path: Path) -> None:
    random.seed(5)
    np.random.seed(5)
    expected = random.Random(5).random(), np.random.RandomState(5).rand()
    run(tmp_path, ClosedLoopEvaluation(episodes=3))
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.usefixtures("without_pictures")
def test_the_averaged_weights_act_and_the_trained_ones_go_on(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "plain", ClosedLoopEvaluation(episodes=1, every_n_steps=1))
    module, _ = run(
        tmp_path / "ema", ClosedLoopEvaluation(episodes=1, every_n_steps=1), EMA(decay=0.5)
    )
    trained = _alphas(plain)
    acted = _alphas(module)
    average = trained[1]
    for before, after in zip(acted[2:], trained[2:], strict=True):
        # The evaluation comes first in the list of callbacks, so it sees the previous average.
        assert torch.allclose(before, average, rtol=1e-5)
        average = 0.5 * average + 0.5 * after


def _alphas(module: ActingModule) -> list[Tensor]:
    """alpha at each evaluation; its one episode begins with `new`."""
    return [alpha for alpha, _, new in module.acted if new[0]]


@pytest.mark.usefixtures("without_pictures")
def test_a_policy_that_does_not_fit_is_known_before_training(tmp_path: Path) -> None:
    evaluation = ClosedLoopEvaluation(episodes=1, at_start=False)
    module, trainer = run(tmp_path / "fits", evaluation)
    assert module.checked == [(4, [-1.0, -1.0], [1.0, 1.0])]
    evaluation.on_test_start(trainer, module)
    assert len(module.checked) == 2

    def refuse(self: ToyPolicy, *sizes: Any) -> None:
        raise ValueError("does not fit")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="does not fit"):
        patch.setattr(ToyPolicy, "check", refuse)
        run(tmp_path / "refused", ClosedLoopEvaluation(at_start=False, at_end=False))


@pytest.mark.usefixtures("without_pictures")
def test_goal_is_hidden_as_the_datamodule_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyData, "goal_visible_steps", frozenset({0}))
    module, _ = run(tmp_path, ClosedLoopEvaluation(episodes=4, num_envs=4, at_end=False))
    first, second = (states for _, states, _ in module.acted[:2])
    assert (first[:, 2] > 0).all()
    assert (second[:, 2:] == 0).any()


@pytest.mark.usefixtures("without_pictures")
def test_a_resumed_run_is_not_evaluated_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    evaluation = ClosedLoopEvaluation(episodes=1, at_end=False)
    run(tmp_path, evaluation, checkpoint, enable_checkpointing=True)
    assert "before training" in capsys.readouterr().out
    run(tmp_path / "rest", evaluation, ckpt_path=str(tmp_path / "step=4.ckpt"), max_epochs=2)
    assert "before training" not in capsys.readouterr().out


def test_the_trajectory_holds_every_evaluation_with_its_interval_and_goes_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[Evaluation]] = []
    draw = callbacks.closed_loop.draw_trajectory
    monkeypatch.setattr(
        callbacks.closed_loop, "draw_trajectory",
        lambda points, title: drawn.append(list(points)) or draw(points, title),
    )  # fmt: skip
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {"episodes": 3, "every_n_steps": 2}
    run(tmp_path, ClosedLoopEvaluation(**options), checkpoint, enable_checkpointing=True)
    steps = [[point.step for point in points] for points in drawn]
    # After training, step 4 is evaluated again, and counts once.
    assert steps == [[0], [0, 2], [0, 2, 4], [0, 2, 4]]
    solved = round(3 * drawn[0][0].success)
    assert drawn[0][0][2:] == wilson_interval(solved, 3)
    images = read_tensorboard(tmp_path).Images("closed_loop/trajectory")
    assert [image.step for image in images] == [0, 2, 4, 4]
    drawn.clear()
    run(
        tmp_path / "rest", ClosedLoopEvaluation(**options),
        ckpt_path=str(tmp_path / "step=4.ckpt"), max_epochs=2,
    )  # fmt: skip
    assert [point.step for point in drawn[-1]] == [0, 2, 4, 6, 8]


def test_a_test_run_is_no_point_of_the_trajectory(tmp_path: Path) -> None:
    evaluation = ClosedLoopEvaluation(episodes=2)
    module, trainer = run(tmp_path, evaluation)
    trainer.test(module, datamodule=ToyData(), verbose=False)
    assert [
        image.step for image in read_tensorboard(tmp_path).Images("closed_loop/trajectory")
    ] == [0, 4]


def test_the_trajectory_draws_rates_and_bands_at_their_steps() -> None:
    points = [Evaluation(0, 0.1, 0.0, 0.3), Evaluation(50, 0.8, 0.6, 0.9)]
    axes = draw_trajectory(points, "Toy").axes[0]
    line = axes.lines[0]
    assert line.get_xdata().tolist() == [0, 50] and line.get_ydata().tolist() == [0.1, 0.8]
    band = axes.collections[0].get_paths()[0].vertices
    assert {(0, 0.0), (0, 0.3), (50, 0.6), (50, 0.9)} <= {(x, y) for x, y in band.tolist()}
    assert (axes.get_xlabel(), axes.get_title()) == ("step", "Toy")


@pytest.mark.usefixtures("without_pictures")
def test_model_checkpoint_can_keep_the_most_successful(tmp_path: Path) -> None:
    evaluation = ClosedLoopEvaluation(episodes=2, every_n_steps=2, at_start=False)
    best = ModelCheckpoint(
        tmp_path, "best-{step}", monitor="closed_loop/success", mode="max", every_n_train_steps=2
    )
    run(tmp_path, evaluation, best, enable_checkpointing=True)
    assert best.best_model_score is not None


class FakeTrainer:
    strategy: Any = None
    datamodule: Any = None


def test_an_unknown_simulation_is_an_error_before_training() -> None:
    with pytest.raises(ValueError, match="set its option simulation"):
        ClosedLoopEvaluation().setup(FakeTrainer(), ActingModule(), "fit")


def test_a_sharded_module_is_an_error() -> None:
    trainer = FakeTrainer()
    trainer.strategy = ModelParallelStrategy()
    with pytest.raises(ValueError, match="ModelParallelStrategy"):
        ClosedLoopEvaluation(simulation="FetchReach").setup(trainer, ActingModule(), "fit")


@pytest.mark.parametrize("wrong", [{"episodes": 0}, {"num_envs": 0}, {"every_n_steps": 0}])
def test_numbers_below_one_are_an_error(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=0"):
        ClosedLoopEvaluation(**wrong)
