"""Pictures of episodes seen from above: where the task's object (block, gripper, ball) went.

A figure shows all episodes at once, green where solved and red where not. An animation shows a
few of them step by step, each in its own colour, so that it can be seen who goes to which goal.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import TABLEAU_COLORS, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from datamodules.mazes import Wall
from datamodules.rollout import RolloutResult

DPI = 80
SOLVED, FAILED, WALL = "tab:green", "tab:red", "0.75"
EPISODE_COLORS = [color for name, color in TABLEAU_COLORS.items() if name != "tab:gray"]
LAST_FRAME_MS = 2000
"""How long an animation stays at its end before it begins again."""


def draw_paths(result: RolloutResult, title: str, walls: Sequence[Wall] = ()) -> Figure:
    """Paths of all episodes of one evaluation; see `draw_comparison`."""
    return draw_comparison({title: result}, walls)


def draw_comparison(results: Mapping[str, RolloutResult], walls: Sequence[Wall] = ()) -> Figure:
    """Paths of all episodes, one panel per result, over the same part of the world.

    Args:
        results: title of a panel -> its episodes, from left to right.
        walls: obstacles, drawn in every panel.
    """
    figure, panels = _panels(results, walls, size=480)
    for axes, (title, result) in zip(panels, results.items(), strict=True):
        for path, goal, success in zip(
            result.positions, result.goals, result.successes, strict=True
        ):
            color = SOLVED if success else FAILED
            axes.plot(path[:, 0], path[:, 1], color=color, alpha=0.5, linewidth=1)
            axes.plot(*path[0, :2], "o", color=color, markersize=3)
            axes.plot(*goal[:2], "*" if success else "x", color=color, markersize=7)
        solved, episodes = int(result.successes.sum()), len(result.successes)
        axes.set_title(f"{title}: {solved} of {episodes} solved ({solved / episodes:.0%})")
        above = ", seen from above" if result.goals[0].size == 3 else ""
        axes.set_xlabel(f"x [m]{above}")
        axes.set_ylabel("y [m]")
    _add_legend(
        figure,
        _key("o", "start", "0.3"),
        _key("*", "goal, reached (close enough)", SOLVED),
        _key("x", "goal, missed", FAILED),
    )
    return figure


def animate_episodes(
    results: Mapping[str, RolloutResult],
    walls: Sequence[Wall] = (),
    *,
    episodes: Sequence[int],
    frames_per_second: float,
    size: int = 320,
    goal_visible_steps: Collection[int] | None = None,
) -> bytes:
    """Animated GIF of a few episodes; several policies act in the same ones side by side.

    A goal is shown while the policy sees it, and again when its episode is over.

    Args:
        results: title of a panel -> its episodes, from left to right.
        walls: obstacles, drawn in every panel.
        episodes: which episodes of every result move.
        frames_per_second: control steps shown per second; the simulation's `fps` is real time.
        size: width of a panel in pixels; below about 300 the legend is cut.
        goal_visible_steps: control steps at which the policy sees the goal; None shows it always.

    Returns:
        The file's content, the same for the same arguments.
    """
    figure, axes = _panels(results, walls, size)
    panels = [
        _Moving(*pair, episodes, goal_visible_steps)
        for pair in zip(axes, results.values(), strict=True)
    ]
    _add_legend(
        figure,
        _key("o", "one colour per episode", "0.3"),
        _key("*", "goal", "0.3", hollow=True),
        _key("*", "reached (close enough)", "0.3"),
        _key("x", "missed", "0.3"),
        columns=2 * len(results),
    )
    for panel, title in zip(axes, results, strict=True):
        panel.set_title(title)
        panel.set_xticks([])
        panel.set_yticks([])
    steps = 1 + max(panel.last_step for panel in panels)
    milliseconds = [round(1000 / frames_per_second)] * (steps - 1) + [LAST_FRAME_MS]
    return _gif(_frames(figure, panels, steps), milliseconds)


class _Moving:
    """What moves in one panel of an animation."""

    def __init__(
        self,
        axes: Axes,
        result: RolloutResult,
        episodes: Sequence[int],
        goal_visible_steps: Collection[int] | None,
    ) -> None:
        self.paths = [result.positions[n][:, :2] for n in episodes]
        self.goals = np.stack([result.goals[n][:2] for n in episodes])
        self.lengths = result.lengths[list(episodes)]
        self.successes = result.successes[list(episodes)]
        self.goal_visible_steps = goal_visible_steps
        self.colors = [EPISODE_COLORS[n % len(EPISODE_COLORS)] for n in range(len(episodes))]
        self.trails = LineCollection([], colors=self.colors, linewidths=1, alpha=0.6)
        axes.add_collection(self.trails, autolim=False)
        x, y = self.goals.T
        self.objects = axes.scatter(x, y, 36, self.colors, edgecolors="black", linewidths=0.5)
        self.seen = axes.scatter(x, y, 80, marker="*", facecolors="none", edgecolors=self.colors)
        self.reached = axes.scatter(x, y, 80, self.colors, marker="*")
        self.missed = axes.scatter(x, y, 50, self.colors, marker="x")
        self.caption = axes.set_xlabel(" ")
        for artist in self.artists:
            artist.set_animated(True)

    @property
    def last_step(self) -> int:
        """Control steps of the longest episode."""
        return int(self.lengths.max())

    @property
    def artists(self) -> list[Artist]:
        """In the order in which they are drawn."""
        return [self.trails, self.objects, self.seen, self.reached, self.missed, self.caption]

    def show(self, step: int) -> None:
        """Move everything to where it was after `step` control steps."""
        over = step >= self.lengths
        visible = self.goal_visible_steps is None or step in self.goal_visible_steps
        self.trails.set_segments([path[: step + 1] for path in self.paths])
        positions = np.stack([path[min(step, len(path) - 1)] for path in self.paths])
        self.objects.set_offsets(positions)
        for goals, shown in (
            (self.seen, ~over & visible),
            (self.reached, over & self.successes),
            (self.missed, over & ~self.successes),
        ):
            goals.set_offsets(np.where(shown[:, None], self.goals, np.nan))
        solved = (over & self.successes).sum()
        hidden = "" if visible or over.all() else ", goals hidden from the policy"
        self.caption.set_text(f"step {step}: {solved} of {len(over)} solved{hidden}")


def _panels(
    results: Mapping[str, RolloutResult], walls: Sequence[Wall], size: int
) -> tuple[Figure, list[Axes]]:
    """A square panel per result, all with the same limits, with the walls in them."""
    inches = size / DPI
    figure = Figure(figsize=(inches * len(results), inches + 0.9), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(1, len(results), squeeze=False)[0])
    low, high = _limits(results, walls)
    for axes in panels:
        boxes = [Rectangle((wall.x, wall.y), wall.width, wall.height) for wall in walls]
        # An edge of the same colour hides the seams between neighbouring squares.
        axes.add_collection(PatchCollection(boxes, facecolor=WALL, edgecolor=WALL), autolim=False)
        axes.set(aspect="equal", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    return figure, panels


def _limits(
    results: Mapping[str, RolloutResult], walls: Sequence[Wall]
) -> tuple[np.ndarray, np.ndarray]:
    """Corners `[2]` of the smallest square around everything, in metres."""
    points = [path[:, :2] for result in results.values() for path in result.positions]
    points += [goal[None, :2] for result in results.values() for goal in result.goals]
    points += [np.array([[w.x, w.y], [w.x + w.width, w.y + w.height]]) for w in walls]
    low, high = np.concatenate(points).min(axis=0), np.concatenate(points).max(axis=0)
    half = 0.54 * (high - low).max()  # markers at the border shall not be cut
    return (low + high) / 2 - half, (low + high) / 2 + half


def _key(marker: str, label: str, color: str, hollow: bool = False) -> Line2D:
    """An entry of the legend."""
    return Line2D(
        [], [], color=color, marker=marker, linestyle="", label=label,
        markerfacecolor="none" if hollow else color,
    )  # fmt: skip


def _add_legend(figure: Figure, *keys: Line2D, columns: int = 3) -> None:
    figure.legend(
        handles=keys, loc="outside lower center", ncols=columns, frameon=False, fontsize=8,
        handletextpad=0.2, columnspacing=1.0,
    )  # fmt: skip


def _frames(figure: Figure, panels: Sequence[_Moving], steps: int) -> Iterator[Image.Image]:
    """Pictures of steps 0, 1, ..., in few colours; what stands still is drawn once."""
    canvas, palette = FigureCanvasAgg(figure), _palette()
    canvas.draw()
    still = canvas.copy_from_bbox(figure.bbox)
    for step in range(steps):
        canvas.restore_region(still)
        for panel in panels:
            panel.show(step)
            for artist in panel.artists:
                figure.draw_artist(artist)
        frame = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        yield frame.quantize(palette=palette, dither=Image.Dither.NONE)


def _palette() -> Image.Image:
    """The colours of an animation, each fading to white and to black as its smoothed edges do.

    A palette counted from the frames would give most of its entries to shades of the walls.
    """
    colors = np.array([to_rgb(color) for color in ("black", WALL, *EPISODE_COLORS)])
    shares = np.array([1.0, 0.8, 0.6, 0.4, 0.2])[:, None, None]
    shades = [colors * shares + (1 - shares), colors * shares[1:], np.ones((1, 1, 3))]
    flat = np.concatenate([part.reshape(-1) for part in shades])
    image = Image.new("P", (1, 1))
    image.putpalette(np.rint(255 * flat).astype(np.uint8).tolist())
    return image


def _gif(frames: Iterable[Image.Image], milliseconds: Sequence[int]) -> bytes:
    """An endless animation of frames that share a palette."""
    first, *rest = frames
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=list(milliseconds), loop=0)
    return file.getvalue()
