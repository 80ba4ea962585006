"""What a report says, before it is drawn: plain values that the page, the tables and the figures are made from.

All accuracies, gains, errors and spreads are in percent. None stands for what is not known.
"""

from dataclasses import dataclass
from typing import Literal

State = Literal["done", "partial", "missing", "failed"]


@dataclass(frozen=True)
class Published:
    """A published number and where it was read."""

    value: float
    source: str  # paper, table and where the number was read
    verified: bool  # False: recalled, never checked against the paper; shown in grey, never as a target
    note: str = ""


@dataclass(frozen=True)
class Value:
    """One cell: the mean over runs that differ in their seed alone, and the runs that it comes from."""

    state: State  # partial: some seeds are there
    mean: float | None = None
    std: float | None = None  # over the population of seeds
    n: int = 0  # runs that are there
    planned: int = 0
    difference: float | None = None  # to zero-shot with the dataset's template, on the same test set and backbone
    runs: tuple[str, ...] = ()  # their folders below the results
    seeds: tuple[int, ...] = ()
    error: str = ""  # why a run failed
    published: tuple[Published, ...] = ()
    note: str = ""  # e.g. "over 4 of 11 datasets"


@dataclass(frozen=True)
class Grid:
    """A table: row headers (one text per key in `keys`), and a value for each column; None where none is planned."""

    id: str
    title: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Value | None, ...]], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A series of a panel: its points (x, value), and published ones."""

    label: str
    points: tuple[tuple[float, Value], ...]
    published: tuple[tuple[float, Published], ...] = ()
    star: bool = False  # one point at x = 0: zero-shot


@dataclass(frozen=True)
class Panel:
    """One pair of axes. Without points in any line it is shown as missing."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Curves:
    """Panels that share their axes' names and their series: a label has one colour in all of them."""

    id: str
    title: str
    x: str  # e.g. "shots (training images per class)"
    y: str  # e.g. "accuracy (%)"
    panels: tuple[Panel, ...]
    log2: bool = True  # x is spaced by doublings (0 stands apart)


@dataclass(frozen=True)
class Bars:
    """Sorted bars, one for each name (a dataset); None where it is missing. Values are differences in points."""

    id: str
    title: str
    unit: str
    bars: tuple[tuple[str, Value], ...]  # mean is the difference; sorted, missing ones last
    published: tuple[tuple[str, Published], ...] = ()


@dataclass(frozen=True)
class NearWord:
    """A vocabulary token near a context vector. A fragment (not `whole`) is shown with a hyphen."""

    text: str
    whole: bool
    distance: float


@dataclass(frozen=True)
class Words:
    """The words nearest to each context vector of a run (of one class, where the context is class-specific)."""

    title: str
    run: str
    vectors: tuple[tuple[NearWord, ...], ...]  # nearest first
    published: tuple[tuple[str, float | None, bool], ...] = ()  # the paper's word per vector, distance, verified


@dataclass(frozen=True)
class Example:
    """A test image whose answer changed, as a small JPEG in a data address."""

    image: str
    label: str
    baseline: str
    learned: str


@dataclass(frozen=True)
class ClassGain:
    """A class's accuracy by the baseline and by the learned method (means over seeds), its number of test images."""

    name: str
    baseline: float
    learned: float
    n: int
    examples: tuple[Example, ...] = ()  # of the most changed classes


@dataclass(frozen=True)
class Bin:
    """Predictions with a confidence between `low` and `high`: how many, their mean confidence, how many were right."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Confusion:
    """Images of class `label` called `predicted`: by the learned method and by the baseline, of n images; percent."""

    label: str
    predicted: str
    learned: float
    baseline: float
    n: int


@dataclass(frozen=True)
class Detail:
    """One series on one dataset, class by class, against a baseline."""

    dataset: str
    label: str
    baseline: str
    runs: tuple[str, ...]
    classes: tuple[ClassGain, ...]  # by gain, largest first
    reliability: tuple[tuple[str, float, tuple[Bin, ...]], ...]  # series, its expected calibration error, its bins
    confusions: tuple[Confusion, ...]  # most frequent first
    note: str = ""  # e.g. why there are no example images


@dataclass(frozen=True)
class Reproduction:
    """What others report of reproducing a published number."""

    what: str
    published: str
    reproduced: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class Missing:
    """Planned runs without a result: how many, of what, and the command that does them."""

    what: str
    count: int
    failed: int
    error: str
    command: str


@dataclass(frozen=True)
class Report:
    """Everything that a page shows, in its order."""

    name: str
    title: str
    reproduces: str
    about: str
    summary: tuple[str, ...]  # sentences, the most important first
    planned: int
    done: int
    failed: int
    made: str  # date and time
    versions: tuple[tuple[str, str], ...]
    parts: tuple[Grid | Curves | Bars | Words | Detail, ...]
    reproductions: tuple[Reproduction, ...] = ()
    missing: tuple[Missing, ...] = ()
    notes: tuple[str, ...] = ()
