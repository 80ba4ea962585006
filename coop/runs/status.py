"""`coop study`: which studies there are, what one is, and how far it has come."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coop.config import RunConfig, run_config
from coop.errors import CoopError
from coop.io import track
from coop.runs.grid import experiment_of, results_folder, study_jobs, study_runs
from coop.runs.remaining import Remaining, remaining
from coop.runs.study import Cell, Study, command_of, load_study, plan, study_names
from coop.runs.workshop import Workshop

STATES = ("done", "missing", "failed")
SHOWN = 20  # failures that are written out
Run = tuple[Cell, str, float | None, str | None, str | None]  # state, seconds, error, folder


def study_command(name: str | None, overrides: Sequence[str], status: bool) -> int:
    """List the studies, describe one, or say what is done of it; return the exit code."""
    console = _console()
    if name is None:
        if status:
            raise CoopError("--status needs a study's name: coop study NAME --status (coop study lists them)")
        _list(console)
        return 0
    study = load_study(name)
    named, overrides = experiment_of(overrides)
    if named:
        raise CoopError(f"+experiment={named}: the study is named already, {name}")
    planned = study_runs(study, overrides)
    if status:
        _status(study, overrides, [(cell, run_config(config)) for cell, config in planned], console)
    else:
        _describe(study, overrides, [cell for cell, _ in planned], console)
    return 0


def _console() -> Console:
    console = Console(soft_wrap=True, highlight=False)
    return console if console.is_terminal else Console(soft_wrap=True, highlight=False, width=160)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in ("runs", *STATES) else "left",
            no_wrap=column not in ("title", "reproduces"),
        )
    return table


def _list(console: Console) -> None:
    table = _table("study", "title", "reproduces", "runs")
    for name in study_names():
        study = load_study(name)
        table.add_row(name, escape(study.title), escape(study.reproduces), str(len(study_jobs(study))))
    console.print(table)
    console.print("coop study NAME says more; coop run -m +experiment=NAME runs it; coop report NAME shows it")


def _describe(study: Study, overrides: Sequence[str], cells: Sequence[Cell], console: Console) -> None:
    console.print(f"[bold]{escape(study.title)}[/bold]\nafter {escape(study.reproduces)}\n")
    console.print(escape(study.about), soft_wrap=False)
    table = _table("series", "runs")
    for label, count in Counter(cell.label for cell in cells).items():
        table.add_row(escape(label), str(count))
    console.print(table)
    different = len({_identity(cell) for cell in cells})
    shared = f", {different} of them different" if different < len(cells) else ""
    console.print(f"{len(cells)} runs{shared}: {escape(command_of(study.name, overrides))}")


def _status(
    study: Study, overrides: Sequence[str], planned: Sequence[tuple[Cell, RunConfig]], console: Console
) -> None:
    results = results_folder(overrides)
    cells = [cell for cell, _ in planned]
    frame = plan(cells, results).drop_duplicates(["label", "overrides"])
    found = frame[["state", "seconds", "error", "run"]].itertuples(index=False)
    runs: list[Run] = [(cell, *row) for cell, row in zip(cells, found, strict=True)]
    console.print(_counts(runs))
    different = list({_identity(run[0]): run for run in runs}.values())
    for error, folders in _failures(different).items():
        console.print(f"failed: {escape(error)}")
        for folder in folders[:SHOWN]:
            console.print(f"  in {escape(str(results / folder))}")
        if len(folders) > SHOWN:
            console.print(f"  and {len(folders) - SHOWN} more")
    todo = {_identity(cell) for cell, state, *_ in runs if state != "done"}
    for name, (count, reason) in absent_data(pair for pair in planned if _identity(pair[0]) in todo).items():
        console.print(f"no data for {_runs(count)} on {escape(name)}: {escape(reason)}")
    states = Counter(state for _, state, *_ in different)
    counts = ", ".join(f"{states[state]} {state}" for state in STATES)
    console.print(f"{counts}, of {_runs(len(different))} in {escape(str(results))}")
    console.print(told(remaining((cell, state, seconds) for cell, state, seconds, *_ in different)))
    if todo:
        console.print(f"the rest: {escape(command_of(study.name, overrides))}")


def _counts(runs: Iterable[Run]) -> Table:
    runs = list(runs)
    keys = ["dataset", *(["backbone"] if len({run[0].about["backbone"] for run in runs}) > 1 else [])]
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for cell, state, *_ in runs:
        counts.setdefault((cell.label, *(cell.about[key] for key in keys)), Counter())[state] += 1
    table = _table("series", *keys, *STATES)
    for place, of in counts.items():
        table.add_row(*map(escape, place), *(str(of[state] or "-") for state in STATES))
    return table


def _failures(runs: Iterable[Run]) -> dict[str, list[str]]:
    """Return the folders of failed runs, by their error."""
    found: dict[str, list[str]] = {}
    for _, state, _, error, folder in runs:
        if state == "failed":
            found.setdefault(str(error).split("\n", 1)[0], []).append(str(folder))
    return found


def absent_data(planned: Iterable[tuple[Cell, RunConfig]]) -> dict[str, tuple[int, str]]:
    """Return, by dataset, how many of these runs cannot be done for want of test images, and what is lacking."""
    groups: dict[str, list[RunConfig]] = {}
    for cell, config in planned:
        key = json.dumps([cell.about["dataset"], cell.about.get("targets")])
        groups.setdefault(key, []).append(config)
    workshop, found = Workshop(), dict[str, tuple[int, str]]()
    for configs in track(list(groups.values()), "looking for data", len(groups)):
        config = configs[0]
        try:
            for target in workshop.targets(config):
                workshop.check_test_images(target)
        except CoopError as error:
            found[str(config.dataset["name"])] = (len(configs), str(error))
    return found


def told(left: Remaining) -> str:
    """Return the time left in words."""
    if not left.estimated and not left.unknown:
        return "nothing is left to do"
    unknown = f"no estimate for {_runs(left.unknown)}, of whose kind none is finished"
    if not left.estimated:
        return f"time left: {unknown}"
    words = f"time left: about {duration(left.seconds)} for {_runs(left.estimated)}, one after the other"
    return f"{words}; {unknown}" if left.unknown else words


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours.

    >>> duration(5400)
    '1.5 hours'
    """
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length or (unit == "hours" and seconds >= length):
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _identity(cell: Cell) -> str:
    return json.dumps(dict(cell.about), sort_keys=True, default=str)
