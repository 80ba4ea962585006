"""The vocabulary words nearest to learned context vectors: `coop words`, and the words of a report."""

import dataclasses
import io
import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable

from coop.errors import CoopError, first_line, unknown
from coop.io import track
from coop.report.frame import heading, text_of, where
from coop.report.tables import to_csv
from coop.runs.study import WordsPart

if TYPE_CHECKING:  # torch is loaded where vectors are read
    from coop.clip.words import Word

FORMATS = ("text", "json", "csv")
TOP, CLASSES = 5, 3  # words for each vector; classes of a class-specific context
PLACE = ("label", "dataset", "backbone", "shots")
ContextWords = dict[str | None, list[list["Word"]]]  # class (None: unified) -> vector -> nearest words
Near = tuple[str, bool, float]  # text, whether it is a whole word, distance
PublishedWord = tuple[str, float | None, bool]  # word, distance, verified


def context_words(
    place: Path, top: int, metric: str, whole_words: bool, class_name: str | None = None, device: str = "auto"
) -> ContextWords:
    """Return the nearest words of what a run learned, by class where its context is class-specific.

    Raises CoopError if it learned no context, or has no such class.
    """
    from coop.clip.words import nearest_words, read_context

    ctx: Any
    classes: tuple[str, ...]
    source: Any
    known = read_context(place)  # without torch, where that can be
    if known is not None:
        ctx, classes, source = known
    else:
        from coop.learned import load_learned

        learned = load_learned(place)
        if learned.state.get("ctx") is None:
            raise CoopError(f"{place}: method={learned.method} learned no context vectors: choose a run of coop")
        ctx, classes = learned.state["ctx"], learned.classes.names
        source = learned.load_backbone(device)
    names: tuple[str | None, ...] = classes if ctx.ndim == 3 else (None,)
    if class_name is not None:
        if ctx.ndim == 2:
            raise CoopError(f"{place}: the context is unified, the same for all classes: leave out --class")
        if class_name not in names:
            raise unknown("class", class_name, classes)
    tables = dict(zip(names, ctx if ctx.ndim == 3 else ctx[None], strict=True))
    wanted = names if class_name is None else (class_name,)
    return {name: nearest_words(tables[name], source, top, metric, whole_words) for name in wanted}


def render_words(words: ContextWords, form: str, width: int | None = None) -> str:
    """Return the words as text (a row for each context vector), JSON or CSV (a row for each word).

    `width` is the terminal's, for text: where rows are longer, their words continue on the next line.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if form == "json":
        content = [
            {"class": name, "context": [[dataclasses.asdict(word) for word in row] for row in rows]}
            for name, rows in words.items()
        ]
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if form == "csv":
        lines = [
            {"class": name, "vector": number, "rank": rank, **dataclasses.asdict(word)}
            for name, rows in words.items()
            for number, row in enumerate(rows, start=1)
            for rank, word in enumerate(row, start=1)
        ]
        return to_csv(pd.DataFrame(lines).astype({"distance": object}) if lines else pd.DataFrame())
    out = io.StringIO()
    console = Console(file=out, width=1000, highlight=False, markup=False)
    for name, rows in words.items():
        if name is not None:
            console.print(f"class {name}")
        texts = [[f"{word_text(word.text, word.whole)} {word.distance:.4f}" for word in row] for row in rows]
        columns = [max(map(len, column)) for column in zip(*texts, strict=True)]
        if width is not None and len("vector") + sum(columns) + 2 * len(columns) > width:
            for number, row in enumerate(texts, start=1):
                console.print(_wrapped(f"{number:>6}  ", row, width))
            continue
        grid = RichTable(box=None, pad_edge=False, header_style="bold")
        grid.add_column("vector", justify="right")
        for rank in range(len(columns)):
            grid.add_column(f"{rank + 1}.")
        for number, row in enumerate(texts, start=1):
            grid.add_row(str(number), *row)
        console.print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _wrapped(begin: str, texts: Sequence[str], width: int) -> str:
    """Return texts in lines of at most `width`, broken between them alone and indented below the first."""
    kept = "  ".join(text.replace(" ", "\xa0") for text in texts)  # textwrap breaks at no such space
    lines = textwrap.wrap(kept, width, initial_indent=begin, subsequent_indent=" " * len(begin), break_long_words=False)
    return "\n".join(lines).replace("\xa0", " ")


def word_text(text: str, whole: bool) -> str:
    """Return a word; a fragment has a hyphen, since something follows it. What no font can show is spelt as codes."""
    spelt = "".join(c if c.isprintable() and not "\ue000" <= c <= "\uf8ff" else f"\\u{ord(c):04x}" for c in text)
    return spelt if whole or text.startswith("<") else f"{spelt}-"


@dataclass(frozen=True)
class Words:
    """The words nearest to each context vector of a run (of one class, where the context is class-specific)."""

    title: str
    run: str
    vectors: tuple[tuple[Near, ...], ...]  # nearest first
    published: tuple[PublishedWord, ...] = ()


class ReportWords:
    """Finds the words of a report; a backbone is loaded once, and one that cannot be loaded is tried once."""

    def __init__(self, results: Path, published: pd.DataFrame, device: str = "cpu", unverified: bool = False) -> None:
        self._results, self._device = results, device
        self._published: dict[tuple[str, ...], list[PublishedWord]] = {}
        for row in published.sort_values("position").to_dict("records"):
            if row["verified"] or unverified:
                distance = None if pd.isna(row["distance"]) else float(row["distance"])
                place = tuple(text_of(row[key]) for key in PLACE)
                self._published.setdefault(place, []).append((str(row["word"]), distance, bool(row["verified"])))
        self._backbones: dict[tuple[Any, ...], Any] = {}

    def __call__(self, frame: pd.DataFrame, show: WordsPart) -> tuple[list[Words], list[str]]:
        """Return the words of each run that `show` means - of the first seed, unless it says which - and notes."""
        chosen = where(frame, show.where)
        chosen = chosen[chosen["label"] == show.label].drop_duplicates(["dataset", "backbone", "shots"])
        made: list[Words] = []
        notes: list[str] = []
        found: list[tuple[Words, Any, Any]] = []
        for row in chosen.to_dict("records"):
            title = ", ".join([text_of(row["dataset"]), show.label, heading("shots", row["shots"])])
            theirs = tuple(self._published.get(tuple(text_of(row[key]) for key in PLACE), ()))
            if row["state"] != "done":
                made += [Words(f"{title} (our run is {row['state']})", "", (), theirs)] if theirs else []
                continue
            try:
                found += self._contexts(str(row["run"]), title, theirs)
            except CoopError as error:
                notes.append(f"no nearest words: {error}")
                made += (
                    [Words(f"{title} (ours cannot be computed here)", str(row["run"]), (), theirs)] if theirs else []
                )
        return [*_nearest(found), *made], list(dict.fromkeys(notes))

    def _contexts(self, run: str, title: str, theirs: tuple[PublishedWord, ...]) -> list[tuple[Words, Any, Any]]:
        """Return what a run learned, with its backbone. Raises CoopError where either is not there."""
        if not (self._results / run / "learned.safetensors").is_file():  # torch need not be loaded to find that out
            raise CoopError(f"{run} did not keep what it learned")
        from coop.learned import load_learned

        learned = load_learned(self._results / run)
        ctx = learned.state.get("ctx")
        if ctx is None:
            raise CoopError(f"method={learned.method} learned no context vectors ({run})")
        backbone = self._backbone(learned)
        if ctx.ndim == 2:
            return [(Words(title, run, (), theirs), ctx, backbone)]
        names = learned.classes.names[:CLASSES]
        return [(Words(f"{title}, class {name}", run, ()), ctx[i], backbone) for i, name in enumerate(names)]

    def _backbone(self, learned: Any) -> Any:
        """Return the backbone that something was learned on. Raises CoopError where it cannot be loaded here."""
        key = (learned.architecture, learned.pretrained, learned.precision, learned.weights)
        if key not in self._backbones:
            try:
                self._backbones[key] = learned.load_backbone(self._device)
            except Exception as error:  # no network, no weights, no memory: a report is made all the same
                self._backbones[key] = first_line(error) or type(error).__name__
        if isinstance(self._backbones[key], str):
            raise CoopError(f"{learned.architecture} cannot be loaded here ({self._backbones[key]})")
        return self._backbones[key]


def _nearest(found: Sequence[tuple[Words, Any, Any]]) -> list[Words]:
    """Return the words of all contexts: of those on one backbone at once, since its vocabulary takes a while."""
    if not found:
        return []
    import torch

    from coop.clip.words import nearest_words

    near: dict[int, tuple[tuple[Near, ...], ...]] = {}
    backbones: Mapping[int, Any] = {id(backbone): backbone for _, _, backbone in found}
    for key, backbone in track(list(backbones.items()), "nearest words", len(backbones)):
        some = [i for i, (_, _, own) in enumerate(found) if id(own) == key]
        rows = nearest_words(torch.cat([found[i][1] for i in some]), backbone, TOP, "euclidean", whole_words=True)
        words = iter([tuple((word.text, word.whole, word.distance) for word in row) for row in rows])
        for i in some:
            near[i] = tuple(itertools.islice(words, len(found[i][1])))
    return [dataclasses.replace(words, vectors=near[i]) for i, (words, _, _) in enumerate(found)]
