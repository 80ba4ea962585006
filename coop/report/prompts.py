"""The words nearest to learned context vectors, for a report."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.clip.words import nearest_words
from coop.config import first_line
from coop.errors import CoopError
from coop.io import track
from coop.learned import Learned, load_learned
from coop.report.cells import Record, said, where, with_key
from coop.report.content import NearWord, Words
from coop.report.runs import Runs

TOP = 5  # words for each vector
CLASSES = 3  # of a class-specific context
PLACE = ("label", "dataset", "backbone", "shots")
Read = tuple[str, float | None, bool]  # a published word, its distance, whether it was checked


class Prompts:
    """Finds words; one backbone stays loaded, and one that cannot be loaded is tried once."""

    def __init__(self, runs: Runs, published: pd.DataFrame, device: str) -> None:
        self._runs, self._device = runs, device
        self._published = _words_of(published)
        self._backbones: dict[tuple[Any, ...], Backbone | str] = {}

    def __call__(self, records: Sequence[Record], show: Mapping[str, Any]) -> tuple[list[Words], list[str]]:
        """Return the words of each run that `show` means - of the first seed, unless it says which - and notes."""
        label, conditions = str(show["label"]), show.get("where", {})
        chosen = [r for r in where(records, conditions) if r["label"] == label]
        first: dict[tuple[str, ...], Record] = {}
        for record in chosen:
            first.setdefault(tuple(str(record[key]) for key in ("dataset", "backbone", "shots")), record)
        made: list[Words] = []
        notes: list[str] = []
        found: list[_Prompt] = []
        for record in first.values():
            title = ", ".join([said(record["dataset"]), label, with_key("shots", record["shots"])])
            theirs = self._published.get(tuple(said(record[key]) for key in PLACE), ())
            if record["state"] != "done":
                made += [Words(f"{title} (our run is {record['state']})", "", (), theirs)] if theirs else []
                continue
            try:
                found += self._prompts(str(record["run"]), title, theirs)
            except CoopError as error:
                notes.append(f"no nearest words: {error}")
                gone = f"{title} (ours cannot be told here)"
                made += [Words(gone, str(record["run"]), (), theirs)] if theirs else []
        return [*_words(found), *made], list(dict.fromkeys(notes))

    def _prompts(self, run: str, title: str, theirs: tuple[Read, ...]) -> list["_Prompt"]:
        """Return what a run learned, with its backbone. Raises CoopError where either is not there."""
        artefact = load_learned(self._runs.folder(run))
        ctx = artefact.state.get("ctx")
        if ctx is None:
            raise CoopError(f"method={artefact.method} learned no context vectors ({run})")
        backbone = self._backbone(artefact)
        if ctx.ndim == 2:
            return [_Prompt(title, run, ctx, backbone, theirs)]
        names = artefact.classes.names[:CLASSES]
        return [_Prompt(f"{title}, class {name}", run, ctx[i], backbone, ()) for i, name in enumerate(names)]

    def _backbone(self, artefact: Learned) -> Backbone:
        """Return the backbone that something was learned on. Raises CoopError where it cannot be loaded here."""
        key = (artefact.architecture, artefact.pretrained, artefact.precision, artefact.weights)
        if key not in self._backbones:
            try:
                self._backbones[key] = artefact.load_backbone(self._device)
            except Exception as error:  # no network, no weights, no memory: a report is made all the same
                self._backbones[key] = first_line(error) or type(error).__name__
        found = self._backbones[key]
        if isinstance(found, str):
            raise CoopError(f"{artefact.architecture} cannot be loaded here ({found})")
        return found


@dataclass(frozen=True)
class _Prompt:
    title: str
    run: str
    ctx: Float[Tensor, "m d"]
    backbone: Backbone
    theirs: tuple[Read, ...]


def _words(prompts: Sequence[_Prompt]) -> list[Words]:
    """Return the words of all prompts: of those on one backbone at once, since listing its vocabulary takes a while."""
    near: dict[int, tuple[tuple[NearWord, ...], ...]] = {}
    backbones = {id(prompt.backbone): prompt.backbone for prompt in prompts}
    for key, backbone in track(list(backbones.items()), "nearest words", len(backbones)):
        some = [i for i, prompt in enumerate(prompts) if id(prompt.backbone) == key]
        rows = nearest_words(torch.cat([prompts[i].ctx for i in some]), backbone, TOP, "euclidean", whole_words=True)
        words = iter([tuple(NearWord(word.text, word.whole, word.distance) for word in row) for row in rows])
        for i in some:
            near[i] = tuple(itertools.islice(words, len(prompts[i].ctx)))
    return [Words(prompt.title, prompt.run, near[i], prompt.theirs) for i, prompt in enumerate(prompts)]


def _words_of(published: pd.DataFrame) -> dict[tuple[str, ...], tuple[Read, ...]]:
    """Return the published words by label, dataset, backbone and shots, in the order of the context vectors."""
    found: dict[tuple[str, ...], list[Read]] = {}
    for row in published.sort_values("position").to_dict("records"):
        distance = None if pd.isna(row["distance"]) else float(row["distance"])
        place = tuple(said(row[key]) for key in PLACE)
        found.setdefault(place, []).append((str(row["word"]), distance, bool(row["verified"])))
    return {place: tuple(words) for place, words in found.items()}
