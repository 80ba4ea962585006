"""What a report finds, in sentences, the most important first."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from coop.report.averages import averages
from coop.report.cells import Cell, Record, cells_of, dividing, is_baseline, most, named, said, value_of, with_key
from coop.report.content import Value
from coop.report.missing import unique_runs

SUMMED_UP = {"base_to_new": "harmonic_mean", "cross_dataset": "average", "domain_generalisation": "average"}


def summary(records: Sequence[Record], main: str | None) -> list[str]:
    """Return the sentences; `main` is the series that the study is about."""
    main_records = [r for r in records if r["target"] == SUMMED_UP.get(str(r["protocol"]), r["dataset"])]
    out = [_completeness(records)]
    if not any(r["state"] == "done" for r in main_records):
        return [*out, *_failures(records)]
    for backbone in dict.fromkeys(said(r["backbone"]) for r in main_records):
        some = [r for r in main_records if said(r["backbone"]) == backbone]
        several = len({r["backbone"] for r in main_records}) > 1
        for tell in (_best, _losses, _extremes, _calibration):
            sentence = tell(some, main)
            if sentence:
                out.append(f"{backbone}: {sentence}" if several else sentence)
    return [*out, *_failures(records)]


def _completeness(records: Sequence[Record]) -> str:
    runs = unique_runs(records)
    done = sum(r["state"] == "done" for r in runs)
    failed = sum(r["state"] == "failed" for r in runs)
    datasets = list(dict.fromkeys(str(r["dataset"]) for r in runs))
    there = [d for d in datasets if any(r["dataset"] == d and r["state"] == "done" for r in runs)]
    if done == len(runs):
        return f"Complete: all {done} runs are done."
    told = f"{done} of {len(runs)} runs are done" + (f", {failed} failed" if failed else "")
    if len(datasets) > 1 and done:
        none = [d for d in datasets if d not in there]
        told += f"; there are results on {len(there)} of {len(datasets)} datasets"
        told += f", none yet on {', '.join(none)}" if none else ""
    return f"{told}."


def _cells(records: Sequence[Record]) -> list[Cell]:
    keys = ["dataset", "label", "shots"]
    return cells_of(records, [*keys, *dividing(records, keys)])


def _best(records: Sequence[Record], main: str | None) -> str | None:
    """Say which series is best on average at the most shots, against what is not trained."""
    places = _at_most_shots(records)
    if not places:
        return None
    by_label = {label: (value, note) for label, value, note in places if value.mean is not None}
    if not by_label:
        return None
    best = max(by_label, key=lambda label: by_label[label][0].mean or 0)
    value, note = by_label[best]
    shots = _most_shots(records)
    at = f"With {with_key('shots', shots)}, {best}" if shots else best
    told = f"{at} {'is the best series:' if len(by_label) > 1 else 'reaches'} {value.mean:.1f} % {note}"
    if value.difference is not None and abs(value.difference) >= 0.05:
        told += f", {_points(value.difference)} {_side(value.difference)} zero-shot with the dataset's template"
    if main and main in by_label and main != best:
        own = by_label[main][0]
        told += f"; {main} reaches {own.mean:.1f} %"
        told += f" ({own.difference:+.1f})" if own.difference is not None else ""
    return f"{told}."


def _at_most_shots(records: Sequence[Record]) -> list[tuple[str, Value, str]]:
    """Return (label, value, what it is over) of every series at the most shots, and of what is not trained."""
    shots = _most_shots(records)
    some = [r for r in records if r["shots"] in (0, shots)]
    there = {r["dataset"] for r in some if r["state"] == "done"}
    cells = _cells([r for r in some if r["dataset"] in there] if len(there) == 1 else some)
    if not cells:
        return []
    whole = averages(cells, list(cells[0].keys))
    if whole:
        return [(_label(one.keys), one.value, f"on average {one.value.note.split(';')[-1].strip()}") for one in whole]
    return [(_label(cell.keys), value_of(cell), f"on {said(cell.keys['dataset'])}") for cell in cells]


def _label(keys: Mapping[str, Any]) -> str:
    more = {key: value for key, value in keys.items() if key not in ("dataset", "label", "shots", "target")}
    return ", ".join([str(keys["label"]), *named(more)])


def _most_shots(records: Iterable[Record]) -> Any:
    """Return the most shots that are done, `all` counting most; 0 where nothing is trained."""
    return most([0, *(r["shots"] for r in records if r["state"] == "done")])


def _differences(records: Sequence[Record], main: str | None) -> list[tuple[float, Cell]]:
    """Return the main series' differences to zero-shot, the largest first."""
    cells = _cells([r for r in records if r["label"] == main and not is_baseline(r)])
    values = [(value_of(cell).difference, cell) for cell in cells]
    return sorted(((d, cell) for d, cell in values if d is not None), key=lambda pair: -pair[0])


def _losses(records: Sequence[Record], main: str | None) -> str | None:
    """Say where the main series is worse than zero-shot."""
    found = _differences(records, main)
    lost = [(d, cell) for d, cell in found if d < 0]
    if not found:
        return None
    if not lost:
        return f"{main} is nowhere below zero-shot ({len(found)} {_plural(found, 'place')} measured)."
    worst = "; ".join(f"{_where(cell)} ({d:+.1f})" for d, cell in reversed(lost[-3:]))
    return f"{main} is below zero-shot in {len(lost)} of {len(found)} measured places: worst {worst}."


def _extremes(records: Sequence[Record], main: str | None) -> str | None:
    """Say where the main series gains most and least at the most shots."""
    own = [r for r in records if r["label"] == main]
    shots = _most_shots(own)
    found = _differences([r for r in own if r["shots"] == shots], main)
    if len(found) < 2:
        return None
    (high, first), (low, last) = found[0], found[-1]
    at = f"With {with_key('shots', shots)}, " if shots else ""
    return (
        f"{at}{main} gains most on {said(first.the('dataset'))} ({high:+.1f} points) "
        f"and least on {said(last.the('dataset'))} ({low:+.1f})."
    )


def _calibration(records: Sequence[Record], main: str | None) -> str | None:
    """Compare calibration errors of the main series and of zero-shot on the datasets that both have."""
    own = [r for r in records if r["label"] == main and r["state"] == "done"]
    shots = _most_shots(own)
    mine = _ece([r for r in own if r["shots"] == shots])
    zero = _ece([r for r in records if is_baseline(r)])
    both = [dataset for dataset in mine if dataset in zero]
    if not both or not shots:
        return None
    ours, theirs = (fmean(some[dataset] for dataset in both) for some in (mine, zero))
    over = f"mean over {len(both)} datasets" if len(both) > 1 else f"on {both[0]}"
    change = "rises" if ours > theirs else "falls"
    return (
        f"The expected calibration error {change} from {theirs:.1f} % (zero-shot) to {ours:.1f} % "
        f"({main}, {with_key('shots', shots)}; {over})."
    )


def _ece(records: Iterable[Record]) -> dict[str, float]:
    by: dict[str, list[float]] = {}
    for record in records:
        if record["state"] == "done" and record.get("ece") is not None:
            by.setdefault(str(record["dataset"]), []).append(100 * float(record["ece"]))
    return {dataset: fmean(values) for dataset, values in by.items()}


def _failures(records: Sequence[Record]) -> list[str]:
    failed = [r for r in unique_runs(records) if r["state"] == "failed"]
    if not failed:
        return []
    errors = list(dict.fromkeys(str(r.get("error") or "unknown") for r in failed))
    more = f" and {len(errors) - 1} other reasons" if len(errors) > 1 else ""
    return [f"{len(failed)} {_plural(failed, 'run')} failed: {errors[0]}{more}."]


def _where(cell: Cell) -> str:
    shots = cell.the("shots")
    return ", ".join([said(cell.the("dataset")), *([with_key("shots", shots)] if shots else [])])


def _points(difference: float) -> str:
    return f"{abs(difference):.1f} points"


def _side(difference: float) -> str:
    return "above" if difference >= 0 else "below"


def _plural(items: Sequence[Any], word: str) -> str:
    return word if len(items) == 1 else f"{word}s"
