"""Compressed grids in the forms that users write: `5x5`, `5` or `(5, 5)`. Imports nothing heavy."""

from collections.abc import Iterable
from operator import index
from typing import overload

from captioner.errors import SettingError

Grid = tuple[int, int]
"""Rows and columns of compressed tokens."""


@overload
def parse_grid(grid: None) -> None: ...


@overload
def parse_grid(grid: str | int | Iterable[int]) -> Grid: ...


def parse_grid(grid: str | int | Iterable[int] | None) -> Grid | None:
    """Return a compressed grid as rows and columns: `"5x5"`, `"5"`, 5 and [5, 5] are (5, 5); `None` stays `None`.

    Raises:
        SettingError: the grid has another form.
    """
    if grid is None:
        return None
    try:
        if isinstance(grid, str):
            sides = [int(side) for side in grid.lower().split("x")]
        else:
            sides = [index(side) for side in (grid if isinstance(grid, Iterable) else [grid])]
    except (TypeError, ValueError):
        sides = []
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2 or min(sides) < 1:
        raise SettingError(f"grid '{grid}' is not of the form ROWSxCOLUMNS, such as 5x5", "grid", "grids")
    return sides[0], sides[1]


def write_grid(grid: Iterable[int]) -> str:
    """Return a grid, or another size in rows and columns, as text such as `5x5`: the inverse of `parse_grid`."""
    return "x".join(map(str, grid))
