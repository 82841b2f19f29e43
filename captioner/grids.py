"""Compressed grids as people write them: `5x5`, `5` or `(5, 5)`. Imports nothing heavy."""

from collections.abc import Sequence

Grid = tuple[int, int]
"""Rows and columns of compressed tokens."""


def parse_grid(grid: str | int | Sequence[int] | None) -> Grid | None:
    """Read a compressed grid: `"5x5"`, 5 and [5, 5] are (5, 5); `None`, which stands for a default, passes.

    Raises:
        ValueError: it is none of those.
    """
    if grid is None:
        return None
    if isinstance(grid, str):
        sides = [int(side) if side.isdecimal() else 0 for side in grid.lower().split("x")]
    else:
        sides = [grid] if isinstance(grid, int) else list(grid)
    if len(sides) == 1:
        sides *= 2
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"grid '{grid}' is not of the form ROWSxCOLUMNS, such as 5x5")
    return sides[0], sides[1]
