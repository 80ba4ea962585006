"""`coop run`: Hydra overrides -> runs -> what is missing is done, and what fails does not stop the rest."""

import copy
import re
import sys
from collections.abc import Sequence
from functools import cache

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from coop.config import first_line, run_config
from coop.data import dataset_descriptions
from coop.errors import CoopError
from coop.memory import keep_freed_memory
from coop.paths import resource_folder
from coop.progress import progress_display, track
from coop.runner import Run, Workshop, execute, prepare, read_result

LAUNCHER = "hydra/launcher="


def run_command(overrides: Sequence[str], multirun: bool, show: bool = False) -> int:
    """Do what `coop run` was asked to do; return the exit code. `show` prints the configuration and runs nothing."""
    keep_freed_memory()
    _register_datasets()
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
    runs = list({run.folder: run for run in prepared}.values())
    if not multirun:
        return _single(runs[0], workshop)
    if any(job.startswith(LAUNCHER) and job != f"{LAUNCHER}basic" for job in overrides):
        return _launch(overrides, runs)
    return _sweep(runs, workshop)


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every run of a grid, as Hydra's own sweeper makes them."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        batches = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise CoopError(_sentence(error)) from error
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
            raise CoopError(_sentence(error)) from error

    @cache  # noqa: B019 - one composer lives as long as the command
    def _parse(self, text: str) -> Override:
        return self._parser.parse_override(text)


def _sets_a_value(override: Override) -> bool:
    """Whether an override changes a key, rather than choosing from a group or adding to the configuration."""
    groups = ("dataset", "backbone", "method", "protocol")
    plain = override.type == OverrideType.CHANGE and override.package is None and not override.is_sweep_override()
    return plain and override.key_or_group not in groups and not override.key_or_group.startswith("hydra")


def _sentence(error: BaseException) -> str:
    """Return what Hydra means in one line: its message, or that of the cause where it has none."""
    while not str(error).strip() and error.__cause__:
        error = error.__cause__
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Config search path", "See https", "full_key"))]
    told = " ".join(line for line in kept if not line.startswith("object_type") and "provider=" not in line)
    return told or type(error).__name__


def _register_datasets() -> None:
    """Make each description in datasets/ a choice of Hydra's group `dataset`."""
    for name, path in dataset_descriptions().items():
        ConfigStore.instance().store(group="dataset", name=name, node=OmegaConf.load(path))


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
