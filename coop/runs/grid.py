"""From what was asked on the command line, or by a study, to the configuration of every run."""

import copy
import json
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from coop.config import run_config
from coop.data import dataset_descriptions
from coop.errors import CoopError, unknown
from coop.io import resource_folder, track
from coop.options import OPTIONS
from coop.runs.protocol import reported
from coop.runs.store import planned_identity
from coop.runs.study import Cell, Study, filled, texts_of

METHOD_KEYS = {field.name for options in OPTIONS.values() for field in fields(options)}
SAMPLE_KEYS = {"shots", "seed", "sample_file"}


def register_datasets() -> None:
    """Make each description in datasets/ a choice of Hydra's group `dataset`."""
    for name, path in dataset_descriptions().items():
        ConfigStore.instance().store(group="dataset", name=name, node=OmegaConf.load(path))


def parse(overrides: Sequence[str]) -> list[Override]:
    """Return overrides as Hydra reads them. Raises CoopError for what it cannot read."""
    try:
        return list(OverridesParser.create().parse_overrides(list(overrides)))
    except HydraException as error:
        raise CoopError(sentence(error)) from error


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every run of a grid, as Hydra's own sweeper makes them."""
    parsed = parse(overrides)
    try:
        return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    except HydraException as error:
        raise CoopError(sentence(error)) from error


class Composer:
    """Hydra's composition, done once per method: datasets, backbones and values of a grid are set on copies.

    Hydra itself sets values last, after all groups are merged, so that the result is the same; it takes a tenth of a
    second for each run, which a grid of a thousand would wait for.
    """

    def __init__(self) -> None:
        self._parser = OverridesParser.create()
        self._bases: dict[tuple[str, ...], bytes] = {}  # pickled: a copy takes a sixth of deepcopy's time
        self._parts = _parts()

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """Return the configuration of one run. Raises CoopError for what Hydra refuses."""
        try:
            parsed = {text: self._parse(text) for text in overrides}
            values = {text: override for text, override in parsed.items() if _sets_a_value(override)}
            config = self._base(tuple(text for text in overrides if text not in values))
            try:
                for override in values.values():
                    OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
            except OmegaConfBaseException:
                return compose("config", overrides=list(overrides))  # says it in Hydra's words
            return config
        except (HydraException, OmegaConfBaseException) as error:
            raise CoopError(sentence(error)) from error

    def _base(self, groups: tuple[str, ...]) -> DictConfig:
        """Return a new configuration for the choices of groups alone."""
        parts = [text for text in groups if text in self._parts]
        if groups not in self._bases:
            if parts:
                base = self._base(tuple(text for text in groups if text not in parts))
                for text in parts:
                    OmegaConf.update(base, text.split("=")[0], copy.deepcopy(self._parts[text]), merge=False)
            else:
                base = compose("config", overrides=list(groups))
            self._bases[groups] = pickle.dumps(base)
        config: DictConfig = pickle.loads(self._bases[groups])
        return config

    @cache  # noqa: B019 - one composer lives as long as the command
    def _parse(self, text: str) -> Override:
        return self._parser.parse_override(text)


def _parts() -> dict[str, DictConfig]:
    """Return {"dataset=dtd": its file, ...}: the choices of groups whose files fill a key of their own, no more."""
    files = {f"dataset={name}": path for name, path in dataset_descriptions().items()}
    for group in ("backbone", "protocol"):
        files |= {f"{group}={path.stem}": path for path in (resource_folder("conf") / group).glob("*.yaml")}
    loaded = {text: OmegaConf.load(path) for text, path in files.items()}
    return {text: config for text, config in loaded.items() if isinstance(config, DictConfig)}


@contextmanager
def composer() -> Iterator[Composer]:
    """Open conf/ and datasets/ for composing."""
    register_datasets()
    with initialize_config_dir(str(resource_folder("conf")), version_base="1.3", job_name="coop"):
        yield Composer()


def configurations(jobs: Sequence[Sequence[str]]) -> list[DictConfig]:
    """Return the configuration of each run, from its overrides."""
    with composer() as compose_one:
        return [compose_one(job) for job in track(jobs, "composing", len(jobs))]


def study_cells(study: Study, overrides: Sequence[str] = ()) -> list[Cell]:
    """Return the runs of a study, each once per label; `overrides` change its grids (see `study_jobs`)."""
    return [cell for cell, _ in study_runs(study, overrides)]


def study_runs(study: Study, overrides: Sequence[str] = ()) -> list[tuple[Cell, DictConfig]]:
    """Return the runs of a study with their configurations."""
    jobs = study_jobs(study, overrides)
    configs = configurations([job for _, job in jobs])
    runs: dict[str, tuple[Cell, DictConfig]] = {}
    for (label, job), config in zip(jobs, configs, strict=True):
        typed = run_config(config)
        if typed.sample_file:
            raise CoopError("sample_file=... belongs to one run: a study draws its samples by shots and seed")
        about = planned_identity(typed)
        targets = reported(typed.protocol.name, about["dataset"], about.get("targets", ()))
        cell = Cell(filled(label, about, study.name), about, targets, tuple(job))
        runs.setdefault(json.dumps([cell.label, about], sort_keys=True, default=str), (cell, config))
    return list(runs.values())


def study_jobs(study: Study, overrides: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    """Return (label, overrides) of a study's runs.

    A key in `overrides` takes the place of the grids' own values in every series; `method` selects series instead.
    Of a key that a method does not have, one value is kept, so that no run is planned twice.
    """
    given = [override for override in parse(overrides) if override.key_or_group != "method"]
    wanted = _values([override for override in parse(overrides) if override.key_or_group == "method"])
    jobs: list[tuple[str, list[str]]] = []
    for series in study.series:
        grid = {key: texts_of(values) for key, values in (study.grid | series.grid).items()}
        methods = grid.get("method", ["coop"])
        grid["method"] = [method for method in methods if wanted is None or method in wanted]
        replaced = {override.key_or_group for override in given}
        arguments = [f"{key}={','.join(texts)}" for key, texts in grid.items() if key not in replaced]
        if grid["method"]:
            expanded = expand([*arguments, *(str(override.input_line) for override in given)])
            jobs += [(series.label, job) for job in _without_repeats(expanded)]
    if not jobs:
        has = {text for series in study.series for text in texts_of((study.grid | series.grid).get("method", "coop"))}
        raise unknown(f"method of study {study.name}", ",".join(wanted or ()), has)
    return jobs


def experiment_of(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the study that `+experiment=NAME` names, if there is one, and the other overrides."""
    chosen = [text for text in overrides if re.match(r"\+{0,2}experiment=", text)]
    names = [text.split("=", 1)[1] for text in chosen]
    if len(names) > 1 or any("," in name for name in names):
        raise CoopError(f"{' '.join(chosen)}: a sweep runs one study; name one, and start the others after it")
    return (names[0] if names else None), [text for text in overrides if text not in chosen]


def results_folder(overrides: Sequence[str]) -> Path:
    """Return the folder that `results=...` names, or the usual one."""
    (config,) = configurations([[text for text in overrides if text.startswith("results=")]])
    return run_config(config).results


def _values(overrides: Iterable[Override]) -> list[str] | None:
    """Return the values that overrides of one key choose from, as texts; None if there is no override."""
    texts = [str(override.input_line) for override in overrides]
    return [job[0].split("=", 1)[1] for text in texts for job in expand([text])] if texts else None


def _without_repeats(jobs: Iterable[list[str]]) -> list[list[str]]:
    """Leave out jobs that differ only in keys that their method does not have."""
    kept: dict[tuple[str, ...], list[str]] = {}
    for job in jobs:
        chosen = [text.split("=", 1)[1] for text in job if text.startswith("method=")]
        method = OPTIONS.get(chosen[-1] if chosen else "coop")
        idle: set[str] = set()
        if method:
            idle = METHOD_KEYS - {field.name for field in fields(method)}
            idle |= set() if method.trains else SAMPLE_KEYS
        telling = tuple(text for text in job if re.split(r"[.=]", text, maxsplit=1)[0] not in idle)
        kept.setdefault(telling, job)
    return list(kept.values())


def _sets_a_value(override: Override) -> bool:
    """Whether an override changes a key, rather than choosing from a group or adding to the configuration."""
    groups = ("dataset", "backbone", "method", "protocol")
    plain = override.type == OverrideType.CHANGE and override.package is None and not override.is_sweep_override()
    return plain and override.key_or_group not in groups and not override.key_or_group.startswith("hydra")


def sentence(error: BaseException) -> str:
    """Return what Hydra means in one line: its message, or that of the cause where it has none."""
    while not str(error).strip() and error.__cause__:
        error = error.__cause__
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Config search path", "See https", "full_key"))]
    told = " ".join(line for line in kept if not line.startswith("object_type") and "provider=" not in line)
    return told or type(error).__name__
