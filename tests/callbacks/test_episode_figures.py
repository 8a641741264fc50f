"""Pictures of episodes show the walls, the goals while they are seen, and who arrived."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageSequence
from toy_streams import read_tensorboard

from callbacks.episode_figures import animate_episodes, draw_comparison, draw_paths
from callbacks.logging import log_animation
from datamodules.mazes import Wall
from datamodules.rollout import RolloutResult

WALLS = (Wall(-2.0, -2.0, 1.0, 4.0), Wall(1.0, 1.0, 0.5, 0.5))
EPISODES = {"episodes": (0,), "frames_per_second": 20}


def walk(episodes: int, steps: int, successes: Any = True, dims: int = 2) -> RolloutResult:
    """Episodes that wander from the origin; their goals are two metres away from it."""
    rng = np.random.default_rng(0)
    moves = rng.normal(0, 0.05, (episodes, steps + 1, dims))
    angles = rng.uniform(0, 2 * np.pi, episodes)
    goals = np.zeros((episodes, dims))
    goals[:, :2] = 2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return RolloutResult(
        successes=np.broadcast_to(np.array(successes), episodes),
        lengths=np.full(episodes, steps),
        positions=list(moves.cumsum(axis=1)),
        goals=list(goals),
        actions=[np.zeros((steps, 2))] * episodes,
    )


def frames(gif: bytes) -> list[np.ndarray]:
    """Pictures `[height, width, 3]` without title, caption and legend."""
    images = ImageSequence.Iterator(Image.open(io.BytesIO(gif)))
    return [np.array(image.convert("RGB"))[24:332] for image in images]


def same(first: list[np.ndarray], second: list[np.ndarray]) -> list[bool]:
    return [np.array_equal(a, b) for a, b in zip(first, second, strict=True)]


# --- figures ---


def test_panels_have_the_same_limits_and_every_one_its_success_rate() -> None:
    near, far = walk(4, 5, successes=[True, True, True, False]), walk(5, 300, successes=False)
    figure = draw_comparison({"carried": near, "forgotten": far}, WALLS)
    first, second = figure.axes
    assert first.get_title() == "carried: 3 of 4 solved (75%)"
    assert second.get_title() == "forgotten: 0 of 5 solved (0%)"
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    everything = np.concatenate([*near.positions, *far.positions, near.goals])
    (left, right), (bottom, top) = first.get_xlim(), first.get_ylim()
    assert left < everything[:, 0].min() and everything[:, 0].max() < right
    assert bottom < everything[:, 1].min() and everything[:, 1].max() < top


def test_walls_are_drawn_where_they_stand() -> None:
    axes = draw_paths(walk(2, 5), "maze", WALLS).axes[0]
    boxes = [path.get_extents().bounds for path in axes.collections[0].get_paths()]
    np.testing.assert_allclose(boxes, WALLS)
    assert not draw_paths(walk(2, 5), "open").axes[0].collections[0].get_paths()


def test_solved_and_failed_episodes_differ_in_colour_and_mark() -> None:
    lines = draw_paths(walk(2, 5, successes=[True, False]), "two").axes[0].lines
    assert [line.get_marker() for line in lines] == ["None", "o", "*", "None", "o", "x"]
    colors = [line.get_color() for line in lines]
    assert set(colors[:3]) == {"tab:green"} and set(colors[3:]) == {"tab:red"}


def test_positions_in_space_are_seen_from_above() -> None:
    assert draw_paths(walk(2, 5), "flat").axes[0].get_xlabel() == "x [m]"
    axes = draw_paths(walk(2, 5, dims=3), "space").axes[0]
    assert axes.get_xlabel() == "x [m], seen from above"


# --- animations ---


def test_an_animation_has_a_frame_per_step_at_the_asked_speed() -> None:
    gif = animate_episodes({"walk": walk(3, 12)}, episodes=(0, 2), frames_per_second=25)
    image = Image.open(io.BytesIO(gif))
    durations = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    assert durations == [40] * 12 + [2000]
    assert image.size[0] == 320 and image.info["loop"] == 0
    moving = frames(gif)
    assert not any(same(moving[:-1], moving[1:]))


@pytest.mark.slow
def test_an_animation_is_the_same_every_time_and_fits_a_readme() -> None:
    results = {"carried": walk(9, 80), "forgotten": walk(9, 80, successes=False)}
    options: dict[str, Any] = {"episodes": range(9), "frames_per_second": 20}
    gif = animate_episodes(results, WALLS, **options)
    assert gif == animate_episodes(results, WALLS, **options)
    assert len(gif) < 300_000
    assert Image.open(io.BytesIO(gif)).size[0] == 640


def test_a_goal_is_shown_while_the_policy_sees_it_and_when_the_episode_is_over() -> None:
    results = {"walk": walk(1, 6)}
    always = frames(animate_episodes(results, **EPISODES))
    at_times = frames(animate_episodes(results, goal_visible_steps={0, 3}, **EPISODES))
    assert same(always, at_times) == [True, False, False, True, False, False, True]


def straight(episodes: int, steps: list[int], success: bool = True) -> RolloutResult:
    """Episode n goes from (0, n) to (2, n); its goal is at (1, n + 3), in the upper half."""
    paths = [np.linspace(0, 2, length + 1) for length in steps]
    return RolloutResult(
        successes=np.full(episodes, success),
        lengths=np.array(steps),
        positions=[np.stack([x, np.full(len(x), float(n))], axis=1) for n, x in enumerate(paths)],
        goals=[np.array([1.0, n + 3.0]) for n in range(episodes)],
        actions=[np.zeros((length, 2)) for length in steps],
    )


def pixels(frame: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of a colour, `[N, 2]`."""
    return np.argwhere((frame == color).all(axis=-1))


HALF = 150  # rows of the upper half of a frame
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # of the first and of the second episode


def test_the_object_moves_along_its_path_and_leaves_a_trail() -> None:
    moving = frames(animate_episodes({"one": straight(1, [9])}, goal_visible_steps=(), **EPISODES))
    # The last frame has the goal in the same colour, in its upper half.
    centers = np.array([pixels(frame[HALF:], BLUE).mean(axis=0) for frame in moving])
    assert np.ptp(centers[:, 0]) < 1
    width = centers[-1, 1] - centers[0, 1]
    expected = centers[0, 1] + width * np.arange(10) / 9
    np.testing.assert_allclose(centers[:, 1], expected, atol=1)  # pixels are whole
    row, column = centers[0].round().astype(int)
    assert (moving[-1][HALF + row, column] != 255).any()
    assert (moving[-1][HALF + row - 12 : HALF + row - 8, column] == 255).all()


@pytest.mark.parametrize("success", [True, False])
def test_a_reached_goal_is_a_star_and_a_missed_one_a_cross(success: bool) -> None:
    gif = animate_episodes({"one": straight(1, [4], success)}, goal_visible_steps=(), **EPISODES)
    before, after = (frame[:HALF] for frame in frames(gif)[-2:])
    mark = np.any(before != after, axis=-1)
    rows, columns = (np.flatnonzero(mark.any(axis=axis)) for axis in (1, 0))
    corner = mark[rows[0] :, : columns[-1] + 1][:3, -3:]
    assert corner.any() == (not success)


def test_a_finished_episode_stands_still_until_the_longest_is_over() -> None:
    results = {"two": straight(2, [3, 8])}
    moving = frames(animate_episodes(results, episodes=(0, 1), frames_per_second=20))
    assert len(moving) == 9
    first = [pixels(frame, BLUE).tolist() for frame in moving]
    second = [pixels(frame, ORANGE).tolist() for frame in moving]
    assert first[1] != first[2] != first[3]
    assert all(now == first[3] for now in first[4:])
    assert all(a != b for a, b in pairwise(second))


def test_walls_stand_in_every_frame() -> None:
    results = {"walk": walk(1, 3)}
    wall = Wall(0.5, -0.5, 0.4, 0.4)  # inside the limits that the goal needs
    with_wall = frames(animate_episodes(results, (wall,), **EPISODES))
    assert not any(same(with_wall, frames(animate_episodes(results, **EPISODES))))


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed_before"])
def test_an_animation_is_read_back_from_the_event_file(tmp_path: Path, closed: bool) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="")
    trainer: Any = SimpleNamespace(is_global_zero=True, loggers=[logger])
    gif = animate_episodes({"walk": walk(2, 7)}, episodes=(0, 1), frames_per_second=20)
    if closed:
        logger.experiment.close()  # as Lightning does between fit and test
    log_animation(trainer, "closed_loop/episodes", gif, 5)
    logger.experiment.flush()
    (written,) = read_tensorboard(tmp_path).Images("closed_loop/episodes")
    image = Image.open(io.BytesIO(written.encoded_image_string))
    assert image.format == "GIF" and image.n_frames == 8 and written.step == 5
    assert image.size == (written.width, written.height) and image.size[0] == 320
