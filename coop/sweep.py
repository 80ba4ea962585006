"""`coop run`: what is missing of the runs that were asked for is done, and what fails does not stop the rest."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from coop.compose import configurations, expand, experiment_of, study_runs
from coop.config import first_line, run_config
from coop.errors import CoopError
from coop.memory import keep_freed_memory
from coop.paths import resource_folder
from coop.progress import progress_display, track
from coop.runner import Run, Workshop, execute, prepare, read_result
from coop.study import load_study

LAUNCHER = "hydra/launcher="


def run_command(overrides: Sequence[str], multirun: bool, show: bool = False) -> int:
    """Do what `coop run` was asked to do; return the exit code. `show` prints the configuration and runs nothing."""
    keep_freed_memory()
    study, rest = experiment_of(overrides)
    if study and not multirun:
        raise CoopError(f"+experiment={study} is a sweep of many runs: coop run -m +experiment={study}")
    if study:
        configs = [config for _, config in study_runs(load_study(study), rest)]
    else:
        configs = configurations(expand(overrides) if multirun else [list(overrides)])
    if show:
        print("---\n".join(OmegaConf.to_yaml(config) for config in configs), end="")
        return 0
    console, workshop = Console(soft_wrap=True, highlight=False), Workshop()
    runs, lacking = _prepared(configs, workshop, stop=study is None)
    for name, reasons in lacking.items():
        remedy = "" if "coop data prepare" in reasons[0] else f" (coop data prepare {name})"
        console.print(f"{name}: {len(reasons)} runs left out: {escape(reasons[0] + remedy)}")
    if not multirun:
        return _single(runs[0], workshop)
    if not runs:
        return 1
    if any(job.startswith(LAUNCHER) and job != f"{LAUNCHER}basic" for job in overrides):
        code = _launch(overrides, runs)
    else:
        code = _sweep(runs, workshop)
    return 1 if lacking else code


def _prepared(configs: Sequence[DictConfig], workshop: Workshop, stop: bool) -> tuple[list[Run], dict[str, list[str]]]:
    """Return the runs, checked, each once, and by dataset why some cannot be done: what its data lacks.

    With `stop` the first reason is raised.
    """
    runs: dict[Path, Run] = {}
    lacking: dict[str, list[str]] = {}
    for config in track([run_config(config) for config in configs], "checking", len(configs)):
        try:
            run = prepare(config, workshop)
            runs.setdefault(run.folder, run)
        except CoopError as error:
            if stop:
                raise
            lacking.setdefault(str(config.dataset["name"]), []).append(str(error))
    return list(runs.values()), lacking


def _single(run: Run, workshop: Workshop) -> int:
    console = Console(soft_wrap=True, highlight=False)
    if run.done:
        console.print(f"done already: {escape(str(run.folder))}")
    else:
        with progress_display():
            execute(run, workshop)
    console.print(describe(run))
    return 0


def _sweep(runs: Sequence[Run], workshop: Workshop) -> int:
    """Do the missing runs, one backbone after the other so that each is loaded once."""
    console = Console(soft_wrap=True, highlight=False)
    missing = _missing(runs, console)
    missing.sort(key=lambda run: (str(run.config.backbone), run.config.precision, run.dataset.name))
    failed = 0
    for number, run in enumerate(track(missing, "runs", len(missing)), start=1):
        place = f"[{number}/{len(missing)}] {name_of(run)}"
        with progress_display() as display:
            out = display.console if not display.disable else console
            try:
                result = execute(run, workshop)
                seconds = sum(result["seconds"].values())
                out.print(f"{escape(place)}  {_percent(result['accuracy'])}  ({seconds:.1f} s)", highlight=False)
            except Exception as error:
                failed += 1
                out.print(f"{escape(place)}  failed: {escape(first_line(error))}", highlight=False)
    return _closing(runs, failed, console)


def _launch(overrides: Sequence[str], runs: Sequence[Run]) -> int:
    """Hand the grid to a Hydra launcher (Slurm, joblib); its jobs do what is missing, in processes of their own."""
    GlobalHydra.instance().clear()
    console = Console(soft_wrap=True, highlight=False)
    missing = _missing(runs, console)
    if missing:
        arguments, sys.argv = sys.argv, ["coop", "--multirun", *overrides]
        try:
            hydra.main(config_path=str(resource_folder("conf")), config_name="config", version_base="1.3")(job)()
        finally:
            sys.argv = arguments
    return _closing(runs, sum(not run.done for run in runs), console)


def job(config: DictConfig) -> None:
    """One run in a launcher's process; its failure is recorded in its folder and stops nothing else."""
    workshop = Workshop()
    run = prepare(run_config(config), workshop)
    if not run.done:
        try:
            execute(run, workshop)
        except Exception as error:
            print(f"{name_of(run)}  failed: {first_line(error)}", file=sys.stderr)


def _missing(runs: Sequence[Run], console: Console) -> list[Run]:
    """Return the runs that have no result yet, and say how many there are."""
    missing = [run for run in runs if not run.done]
    console.print(f"{len(runs)} runs: {len(runs) - len(missing)} done already, {len(missing)} to do")
    return missing


def _closing(runs: Sequence[Run], failed: int, console: Console) -> int:
    results = runs[0].config.results
    console.print(f"{len(runs) - failed} done, {failed} failed", end="")
    console.print(f" (why: failure.json in its folder under {results})" if failed else f"; see: coop table {results}")
    return 1 if failed else 0


def name_of(run: Run) -> str:
    """Return a run's name for people: its folder below the results, without the digest."""
    return re.sub(r"[-/][0-9a-f]{8}$", "", str(run.folder.relative_to(run.config.results)))


def describe(run: Run) -> str:
    """Return what a finished run found, in a few lines."""
    result = read_result(run.folder)
    lines = [name_of(run)]
    width = max(len(name) for name in result["targets"])
    for name, m in result["targets"].items():
        lines.append(
            f"  {name:<{width}}  accuracy {_percent(m['accuracy'])}  macro F1 {_percent(m['macro_f1'])}"
            f"  ECE {_percent(m['ece'])}  ({m['n']} images)"
        )
    lines += [
        f"  {key.replace('_', ' ')} {_percent(result[key])}" for key in ("harmonic_mean", "average") if key in result
    ]
    lines += [f"  note: {note}" for note in result["notes"]]
    return escape("\n".join([*lines, f"  in {run.folder}"]))


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
