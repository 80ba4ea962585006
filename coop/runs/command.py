"""`coop run`: what is missing of the runs that were asked for is done, and what fails does not stop the rest."""

import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from coop.config import run_config
from coop.errors import CoopError
from coop.io import progress_display, read_json, track
from coop.machine import keep_freed_memory
from coop.runs.claims import Claims, Turn
from coop.runs.grid import configurations, expand, experiment_of, study_runs
from coop.runs.launch import Launch, of_the_launcher
from coop.runs.run import Run, execute, prepare
from coop.runs.store import FAILURE, RESULT
from coop.runs.study import load_study
from coop.runs.workers import POLL, Job, name_of, percent, work
from coop.runs.workshop import Workshop


def run_command(overrides: Sequence[str], multirun: bool, show: bool = False) -> int:
    """Do what `coop run` was asked to do; return the exit code. `show` prints the configuration and runs nothing."""
    keep_freed_memory()
    settings, overrides = of_the_launcher(overrides)
    launch = Launch.of(settings)
    if launch and not multirun:
        raise CoopError(f"{settings[0]} is for sweeps: coop run -m ...")
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
    code = _sweep([Job(run.config, run.folder) for run in runs], workshop, launch)
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
    claims, told = Claims([run.folder]), False
    while not run.done:
        with claims.claim(run.folder) as turn, progress_display():
            if turn is Turn.MINE:
                execute(run, workshop)
        if turn is Turn.OVER and not run.done:
            raise CoopError(f"another process tried this run meanwhile, and it failed: see {run.folder}")
        if turn is Turn.BUSY:
            if not told:
                console.print("waiting for another process, which is at this run")
                told = True
            time.sleep(POLL)
    console.print(describe(run.folder, run.config.results))
    return 0


def _sweep(jobs: Sequence[Job], workshop: Workshop, launch: Launch | None) -> int:
    """Do the missing runs, here or in processes of a launcher; one backbone after the other, each loaded once."""
    console = Console(soft_wrap=True, highlight=False)
    missing = [job for job in jobs if not job.done]
    console.print(f"{len(jobs)} runs: {len(jobs) - len(missing)} done already, {len(missing)} to do")
    missing.sort(key=lambda job: (str(job.config.backbone), job.config.precision, str(job.config.dataset.get("name"))))
    claims = Claims(job.folder for job in missing)
    troubles: list[str] = []
    if missing and launch:
        troubles = launch(missing, claims)
    else:
        work(missing, claims, workshop, wait=True)
    return _closing(jobs, troubles, console)


def _closing(jobs: Sequence[Job], troubles: Sequence[str], console: Console) -> int:
    """Say what is there now, by what lies on disk; return the exit code."""
    results = escape(str(jobs[0].config.results))
    for trouble in troubles:
        console.print(f"a process of the launcher ended early: {escape(trouble)} (what it printed: {results}/.sweep)")
    left = [job for job in jobs if not job.done]
    failed = sum((job.folder / FAILURE).is_file() for job in left)
    console.print(f"{len(jobs) - len(left)} done, {failed} failed", end="")
    if failed:
        console.print(f" (why: failure.json in its folder under {results})", end="")
    if len(left) > failed:
        console.print(f", {len(left) - failed} interrupted: the same command does them", end="")
    console.print("" if left else f"; see: coop table {results}")
    return 1 if left or troubles else 0


def describe(folder: Path, results: Path) -> str:
    """Return what a finished run found, in a few lines."""
    result = read_json(folder / RESULT)
    lines = [name_of(folder, results)]
    width = max(len(name) for name in result["targets"])
    for name, m in result["targets"].items():
        lines.append(
            f"  {name:<{width}}  accuracy {percent(m['accuracy'])}  macro F1 {percent(m['macro_f1'])}"
            f"  ECE {percent(m['ece'])}  ({m['n']} images)"
        )
    lines += [
        f"  {key.replace('_', ' ')} {percent(result[key])}" for key in ("harmonic_mean", "average") if key in result
    ]
    lines += [f"  note: {note}" for note in result["notes"]]
    return escape("\n".join([*lines, f"  in {folder}"]))
