"""`coop report`: a study's report, made from whatever is there."""

import sys
from collections.abc import Sequence
from pathlib import Path

from coop.errors import CoopError
from coop.report.beside import Literature
from coop.report.build import make_report
from coop.report.files import write_report
from coop.runs.grid import results_folder, study_cells
from coop.runs.study import command_of, load_study, plan


def report_command(name: str, overrides: Sequence[str], output: Path | None) -> list[Path]:
    """Write the report of a study into `output` (reports/<name>); return its files, the page first.

    Raises CoopError if there is no such study or no such results folder; runs that are not there are shown as missing.
    """
    study, results = load_study(name), results_folder(overrides)
    if not results.is_dir():
        raise CoopError(f"there is no results folder {results}: name it (results=FOLDER), or run something first")
    frame = plan(study_cells(study, overrides), results)
    report = make_report(study, frame, Literature.of(study.name), results, overrides)
    if not report.done:
        run = command_of(study.name, overrides)
        print(f"coop: nothing of this study is done in {results} yet: {run}", file=sys.stderr)
    return write_report(report, output or Path("reports") / study.name)
