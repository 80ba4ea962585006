"""Cells of one series beside those of another that it is compared with."""

from collections.abc import Sequence

from coop.report.cells import Cell, Record, cells_of, dividing

_PLACE = ("dataset", "backbone", "precision", "protocol", "target")  # where both must be the same


def pairs(
    learned: Sequence[Record], base: Sequence[Record], over: str
) -> tuple[list[str], list[tuple[Cell, Cell | None]]]:
    """Return the keys beyond `over` that tell the learned series' cells apart, and each cell with its baseline.

    A baseline has the same dataset, backbone and test set; where it has several settings (shots, say), the same ones.
    It is None where there is none, or no single one.
    """
    more = dividing(learned, [over])
    shared = [over, *(key for key in more if key in _PLACE)]
    settings = dividing(base, shared)
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells_of(base, [*shared, *settings]):
        found.setdefault(tuple(repr(cell.keys[key]) for key in shared), []).append(cell)
    out: list[tuple[Cell, Cell | None]] = []
    for cell in cells_of(learned, [over, *more]):
        candidates = found.get(tuple(repr(cell.keys[key]) for key in shared), [])
        for key in settings:
            alike = [one for one in candidates if repr(one.keys[key]) == repr(cell.the(key))]
            candidates = alike or candidates
        out.append((cell, candidates[0] if len(candidates) == 1 else None))
    return more, out
