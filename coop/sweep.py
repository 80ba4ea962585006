"""`coop run`: Hydra overrides -> runs -> what is missing is done, and what fails does not stop the rest."""

import copy
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from coop.claims import Claims, Turn
from coop.compose import register_datasets, sentence
from coop.config import run_config
from coop.errors import CoopError
from coop.launch import Launch, of_the_launcher
from coop.memory import keep_freed_memory
from coop.paths import resource_folder
from coop.progress import progress_display, track
from coop.results import FAILURE
from coop.runner import Run, Workshop, execute, prepare, read_result
from coop.work import POLL, Job, name_of, percent, work


def run_command(overrides: Sequence[str], multirun: bool, show: bool = False) -> int:
    """Do what `coop run` was asked to do; return the exit code. `show` prints the configuration and runs nothing."""
    keep_freed_memory()
    settings, overrides = of_the_launcher(overrides)
    launch = Launch.of(settings)
    if launch and not multirun:
        raise CoopError(f"{settings[0]} is for sweeps: coop run -m ...")
    register_datasets()
    jobs = expand(overrides) if multirun else [list(overrides)]
    with initialize_config_dir(str(resource_folder("conf")), version_base="1.3", job_name="coop"):
        composer = Composer()
        configs = [composer(job) for job in track(jobs, "composing", len(jobs))]
    if show:
        print("---\n".join(OmegaConf.to_yaml(config) for config in configs), end="")
        return 0
    workshop = Workshop()
    typed = [run_config(config) for config in configs]
    prepared = [prepare(config, workshop) for config in track(typed, "checking", len(typed))]
    if not multirun:
        return _single(prepared[0], workshop)
    planned = {run.folder: Job(run.config, run.folder) for run in prepared}
    return _sweep(list(planned.values()), workshop, launch)


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every run of a grid, as Hydra's own sweeper makes them."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        batches = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise CoopError(sentence(error)) from error
    return [list(job) for batch in batches for job in batch]


class Composer:
    """Hydra's composition, done once per combination of groups: the values of a grid are set on copies.

    Hydra itself sets values last, after all groups are merged, so that the result is the same; it takes a tenth of a
    second for each run, which a grid of a thousand would wait for.
    """

    def __init__(self) -> None:
        self._parser = OverridesParser.create()
        self._bases: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """Return the configuration of one run. Raises CoopError for what Hydra refuses."""
        try:
            parsed = {text: self._parse(text) for text in overrides}
            values = {text: override for text, override in parsed.items() if _sets_a_value(override)}
            groups = tuple(text for text in overrides if text not in values)
            if groups not in self._bases:
                self._bases[groups] = compose("config", overrides=list(groups))
            config = copy.deepcopy(self._bases[groups])
            try:
                for override in values.values():
                    OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
            except OmegaConfBaseException:
                return compose("config", overrides=list(overrides))  # says it in Hydra's words
            return config
        except (HydraException, OmegaConfBaseException) as error:
            raise CoopError(sentence(error)) from error

    @cache  # noqa: B019 - one composer lives as long as the command
    def _parse(self, text: str) -> Override:
        return self._parser.parse_override(text)


def _sets_a_value(override: Override) -> bool:
    """Whether an override changes a key, rather than choosing from a group or adding to the configuration."""
    groups = ("dataset", "backbone", "method", "protocol")
    plain = override.type == OverrideType.CHANGE and override.package is None and not override.is_sweep_override()
    return plain and override.key_or_group not in groups and not override.key_or_group.startswith("hydra")


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
    result = read_result(folder)
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
