"""From Hydra's configuration to typed dataclasses: DictConfig comes this far and no deeper."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from coop.clip.backbone import PRECISIONS
from coop.data.few_shot import Shots
from coop.errors import CoopError, unknown
from coop.io import cache_folder
from coop.options import OPTIONS

PROTOCOLS = ("all_classes", "base_to_new", "cross_dataset", "domain_generalisation")


@dataclass(frozen=True)
class BackboneConfig:
    """Which model: `name` is what results call it."""

    name: str
    architecture: str
    pretrained: str | None = None


@dataclass(frozen=True)
class ProtocolConfig:
    """What is trained and tested on; `targets` are names of datasets, or mappings with a name and changed keys."""

    name: str = "all_classes"
    targets: tuple[Any, ...] = ()


@dataclass(frozen=True)
class RunConfig:
    """One cell of a table. `options` is the method's own dataclass; `dataset` is a description (coop.data)."""

    dataset: Mapping[str, Any]
    backbone: BackboneConfig
    method: str
    options: Any
    shots: Shots
    seed: int
    protocol: ProtocolConfig
    sample_file: Path | None
    device: str
    precision: str
    workers: int
    data_root: Path
    cache: Path
    results: Path


def run_config(config: DictConfig) -> RunConfig:
    """Return the typed configuration of one run. Raises CoopError for values that no run can have."""
    try:
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise CoopError(f"the configuration is not complete: {first_line(error)}") from error
    values.pop("hydra", None)
    method = values.pop("method")
    if method not in OPTIONS:
        raise unknown("method", str(method), OPTIONS)
    kind = OPTIONS[method]
    shots: Shots
    if kind.trains:
        shots, seed = _shots(values["shots"]), _whole("seed", values["seed"], 0)
    else:
        shots, seed = 0, 0
    dataset = values["dataset"]
    options = method_options(kind, values).resolved(shots, str(dataset.get("name")))
    if values["precision"] not in PRECISIONS:
        raise unknown("precision", str(values["precision"]), PRECISIONS)
    protocol = ProtocolConfig(values["protocol"]["name"], tuple(values["protocol"]["targets"] or ()))
    if protocol.name not in PROTOCOLS:
        raise unknown("protocol", protocol.name, PROTOCOLS)
    workers = values["workers"]
    return RunConfig(
        dataset=dataset,
        backbone=_typed(BackboneConfig, values["backbone"], "backbone"),
        method=method,
        options=options,
        shots=shots,
        seed=seed,
        protocol=protocol,
        sample_file=_path(values["sample_file"]) if values["sample_file"] and kind.trains else None,
        device=str(values["device"]),
        precision=values["precision"],
        workers=_whole("workers", workers, 0) if workers is not None else min(8, (os.cpu_count() or 2) // 2),
        data_root=_path(values["data_root"]),
        cache=_path(values["cache"]) if values["cache"] else cache_folder(),
        results=_path(values["results"]),
    )


def method_options(kind: type, values: Mapping[str, Any]) -> Any:
    """Return a method's options from the flat keys that it has. Raises CoopError for a value of a wrong type."""
    names = {f.name for f in dataclasses.fields(kind)}
    return _typed(kind, {key: value for key, value in values.items() if key in names}, "")


_filled: dict[tuple[type, str], Any] = {}  # a sweep's runs have few different options: checked once each


def _typed(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """Fill a (frozen) dataclass, with OmegaConf's type checks and conversions."""
    known = (kind, repr(sorted(values.items())))
    if known in _filled:
        return _filled[known]
    try:
        _filled[known] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(values)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        name = ".".join(part for part in (where, str(key) if key else "") if part)
        raise CoopError(f"{name}: {first_line(error)}" if name else first_line(error)) from error
    return _filled[known]


def _shots(value: Any) -> Shots:
    if value == "all" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise CoopError(f"shots={value}: give a number of images per class, 1 or more, or all (epochs=0 does not train)")


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    raise CoopError(f"{name}={value}: give a whole number, {least} or more")


def _path(value: Any) -> Path:
    return Path(str(value)).expanduser()


def first_line(error: BaseException) -> str:
    """Return what an error of a library says, on one line."""
    return " ".join(str(error).split("\n", 1)[0].split())
