"""What a study still lacks, and the command that does it."""

from collections.abc import Iterable, Mapping, Sequence

from coop.report.cells import NO_KEYS, Record, said
from coop.report.content import Missing
from coop.runs.study import command_of

_NARROWING = ("method", "shots", "seed")  # a command for these alone redoes nothing: what is done is skipped
NAMED = 3  # series that a line names before it counts them


def unique_runs(records: Iterable[Record]) -> list[Record]:
    """Return one record for each planned run: not for each of its test sets, nor for each series that shares it."""
    shared = ("label", "target", *(key for key in NO_KEYS if key != "seed"))
    return list({repr([(k, v) for k, v in r.items() if k not in shared]): r for r in records}.values())


def missing_runs(records: Sequence[Record], study: str, overrides: Sequence[str]) -> list[Missing]:
    """Return what is missing, datasets that lack the same things together; `overrides` are those of the report."""
    runs = unique_runs(records)
    lacking: dict[tuple[str, ...], list[Record]] = {}
    for (_, backbone), some in _by(runs, ("dataset", "backbone")).items():
        gone = [record for record in some if record["state"] != "done"]
        if gone:
            pattern = sorted(f"{r['label']} {said(r['shots'])} {said(r['seed'])} {r['state']}" for r in gone)
            lacking.setdefault((backbone, *pattern), []).extend(gone)
    asked = {override.split("=", 1)[0] for override in overrides}
    every = {key: {said(record[key]) for record in runs} for key in ("dataset", "backbone")}
    out = []
    for gone in lacking.values():
        datasets = list(dict.fromkeys(said(record["dataset"]) for record in gone))
        places = [(dataset, said(gone[0]["backbone"])) for dataset in datasets]
        planned = [record for record in runs if (said(record["dataset"]), said(record["backbone"])) in places]
        failed = [record for record in gone if record["state"] == "failed"]
        out.append(
            Missing(
                what=f"{', '.join(datasets)}: {_what(gone, planned)}",
                count=len(gone),
                failed=len(failed),
                error=str(failed[0].get("error") or "") if failed else "",
                command=_command(study, overrides, gone, planned, {k: v for k, v in every.items() if k not in asked}),
            )
        )
    return out


def _by(records: Iterable[Record], keys: Sequence[str]) -> dict[tuple[str, ...], list[Record]]:
    out: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        out.setdefault(tuple(said(record[key]) for key in keys), []).append(record)
    return out


def _what(gone: Sequence[Record], planned: Sequence[Record]) -> str:
    if len(gone) == len(planned):
        return "everything"
    labels = list(dict.fromkeys(str(record["label"]) for record in gone))
    return "; ".join(labels) if len(labels) <= NAMED else f"{len(labels)} series"


def _command(
    study: str,
    overrides: Sequence[str],
    gone: Sequence[Record],
    planned: Sequence[Record],
    own: Mapping[str, set[str]],
) -> str:
    """Return the narrowest command that surely does these runs; `own` are values that the study has by itself."""
    narrowed = {}
    for key in ("dataset", "backbone"):
        values = list(dict.fromkeys(said(record[key]) for record in gone))
        if set(values) != own.get(key):
            narrowed[key] = ",".join(values)
    for key in _NARROWING:
        wanted, all_of = (list(dict.fromkeys(said(r[key]) for r in some)) for some in (gone, planned))
        if key != "method":  # what is not trained has none, whatever is asked for
            wanted, all_of = ([value for value in values if value != "0"] for values in (wanted, all_of))
        if wanted and len(wanted) < len(all_of):
            narrowed[key] = ",".join(sorted(wanted, key=_size))
    kept = [override for override in overrides if override.split("=", 1)[0] not in narrowed]
    words = [f"{key}={value}" for key, value in narrowed.items()]
    return command_of(study, [*words, *kept])


def _size(text: str) -> tuple[float, str]:
    return (float(text), "") if text.replace(".", "", 1).isdigit() else (float("inf"), text)
