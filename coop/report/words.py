"""The nearest words of a learned prompt: for the terminal, JSON and CSV."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable

from coop.clip.words import Word, nearest_words
from coop.errors import CoopError, unknown
from coop.learned import load_learned

FORMATS = ("text", "json", "csv")
Words = dict[str | None, list[list[Word]]]  # class name (None: unified) -> context vector -> nearest words


def context_words(
    place: Path, top: int, metric: str, whole_words: bool, class_name: str | None = None, device: str = "auto"
) -> Words:
    """Return the nearest words of what a run learned, by class where its context is class-specific.

    Raises CoopError if it learned no context, or has no such class.
    """
    artefact = load_learned(place)
    ctx = artefact.state.get("ctx")
    if ctx is None:
        raise CoopError(f"{place}: method={artefact.method} learned no context vectors: choose a run of coop")
    names: tuple[str | None, ...] = artefact.classes.names if ctx.ndim == 3 else (None,)
    if class_name is not None:
        if ctx.ndim == 2:
            raise CoopError(f"{place}: the context is unified, the same for all classes: leave out --class")
        if class_name not in names:
            raise unknown("class", class_name, artefact.classes.names)
    backbone = artefact.load_backbone(device)
    tables = dict(zip(names, ctx if ctx.ndim == 3 else ctx[None], strict=True))
    wanted = names if class_name is None else (class_name,)
    return {name: nearest_words(tables[name], backbone, top, metric, whole_words) for name in wanted}


def render_words(words: Words, form: str) -> str:
    """Return the words as text (a row for each context vector), JSON or CSV (a row for each word)."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if form == "json":
        return (
            json.dumps(
                [
                    {"class": name, "context": [[dataclasses.asdict(word) for word in row] for row in rows]}
                    for name, rows in words.items()
                ],
                indent=1,
                ensure_ascii=False,
            )
            + "\n"
        )
    if form == "csv":
        return pd.DataFrame(_records(words)).to_csv(index=False)
    out = io.StringIO()
    console = Console(file=out, width=1000, highlight=False, markup=False)
    for name, rows in words.items():
        if name is not None:
            console.print(f"class {name}")
        grid = RichTable(box=None, pad_edge=False, header_style="bold")
        grid.add_column("vector", justify="right")
        for rank in range(len(rows[0])):
            grid.add_column(f"{rank + 1}.")
        for number, row in enumerate(rows, start=1):
            grid.add_row(str(number), *(f"{_shown(word)} {word.distance:.4f}" for word in row))
        console.print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _shown(word: Word) -> str:
    """Show a fragment with a hyphen: something follows it."""
    return word.text if word.whole or word.text.startswith("<") else f"{word.text}-"


def _records(words: Words) -> list[dict[str, Any]]:
    return [
        {"class": name, "vector": number, "rank": rank, **dataclasses.asdict(word)}
        for name, rows in words.items()
        for number, row in enumerate(rows, start=1)
        for rank, word in enumerate(row, start=1)
    ]
