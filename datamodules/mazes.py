"""Where a simulated task has walls, so that pictures of its episodes can show them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import gymnasium

WALL = 1
"""How gymnasium-robotics marks a wall in a maze's map."""


class Wall(NamedTuple):
    """A rectangle that nothing can enter, seen from above, in metres.

    Args:
        x: left edge.
        y: lower edge.
        width: along x.
        height: along y.
    """

    x: float
    y: float
    width: float
    height: float


def walls_of(env: gymnasium.Env) -> tuple[Wall, ...]:
    """One square per wall cell of the environment's maze; none where there is no maze.

    Args:
        env: an environment of any simulation.
    """
    maze = getattr(env.unwrapped, "maze", None)
    if maze is None:
        return ()
    size = maze.maze_size_scaling
    # Rows of the map are counted from the top, y from the bottom.
    return tuple(
        Wall(column * size - maze.x_map_center, maze.y_map_center - (row + 1) * size, size, size)
        for row, cells in enumerate(maze.maze_map)
        for column, cell in enumerate(cells)
        if cell == WALL
    )
