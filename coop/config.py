"""The configuration of a run: dataclasses that hold every default, and what makes one of them from keys and values.

A key is a group (`dataset=dtd`, `backbone=rn50`, `method=coop`, `protocol=base_to_new`), a value inside one
(`dataset.template=...`), an option of the method (`lr=0.01`, `augment.views=0`; coop/options.py), or one of
`RunSettings`. Groups' choices are files: datasets/*.yaml, conf/backbone/*.yaml, conf/protocol/*.yaml.
"""

import inspect
import json
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from coop.data.few_shot import Shots, check_validation
from coop.data.spec import DatasetSpec, dataset_descriptions, describe_folder, load_description
from coop.errors import CoopError, first_line, short, unknown
from coop.io import cache_folder, read_yaml, resource_folder
from coop.options import OPTIONS, PRECISIONS, Augment, MethodOptions, Training, flat, from_mapping, method_options

PROTOCOLS = ("all_classes", "base_to_new", "cross_dataset", "domain_generalisation")
GROUPS = {"dataset": "fashion_mnist", "backbone": "lit_lite", "method": "coop", "protocol": "all_classes"}
SAMPLE_KEYS = ("shots", "seed", "sample_file", "validation")  # nothing for a method that does not train
MAX_SEED = 2**63 - 1
MAX_WORKERS = 1024  # processes are started for all of them, however few images there are


@dataclass(frozen=True)
class BackboneConfig:
    """Which model: `name` is what results call it (default: both others), `pretrained` a tag or a checkpoint file."""

    name: str = ""
    architecture: str = ""
    pretrained: str | None = None


@dataclass(frozen=True)
class ProtocolConfig:
    """What is trained and tested on. `targets` are the other datasets that are tested on, each with its own name."""

    name: str = "all_classes"
    targets: tuple[DatasetSpec, ...] = ()


@dataclass(frozen=True)
class RunSettings:
    """The keys that every run has, beside the groups and the method's options."""

    shots: str | int = field(default=16, metadata={"help": "training images per class, or all"})
    seed: int = field(default=1, metadata={"help": "of the sample, the initial values and the order of the images"})
    validation: str = field(
        default="min4",
        metadata={
            "help": "validation images per class: none, min4 = min(shots, 4), shots, full, held_out (one of the shots, "
            "not trained on), or test (the test set)"
        },
    )
    sample_file: str | None = field(default=None, metadata={"help": "a few-shot list (coop data sample --output)"})
    device: str = field(default="auto", metadata={"help": "auto (CUDA where there is one), cpu, cuda, cuda:1"})
    precision: str = field(default="fp32", metadata={"help": "of the frozen towers: fp32, bf16, fp16"})
    workers: int | None = field(default=None, metadata={"help": "processes that decode images; null: by the cores"})
    data_root: str = field(default="${oc.env:COOP_DATA,data}", metadata={"help": "folder of the datasets"})
    cache: str | None = field(default=None, metadata={"help": "of features; null: COOP_CACHE, or ~/.cache/coop"})
    results: str = field(default="results", metadata={"help": "folder of the runs"})


@dataclass(frozen=True)
class RunConfig:
    """One run. `shots` and `seed` are 0 where the method does not train."""

    dataset: DatasetSpec
    backbone: BackboneConfig
    method: str
    options: MethodOptions
    protocol: ProtocolConfig
    shots: Shots
    seed: int
    validation: str
    sample_file: Path | None
    device: str
    precision: str
    workers: int
    data_root: Path
    cache: Path
    results: Path


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that keys and values ask for; what is not given has its default.

    Raises CoopError for an unknown key or choice, a value that no run can have, and a key that the chosen method does
    not use (`unused_keys`).
    """
    check_keys(values)
    for key, reason in unused_keys(values).items():
        raise CoopError(f"{key}={short(values[key])}: {reason}")
    return _run_config(resolve_interpolations(values))


def _run_config(values: Mapping[str, Any]) -> RunConfig:
    settings = from_mapping(RunSettings, {k: v for k, v in values.items() if k in _SETTINGS})
    method = chosen_method(values)
    kind = OPTIONS[method]
    shots: Shots = 0
    seed = 0
    if kind.trains:
        shots, seed = parse_shots(settings.shots), _whole("seed", settings.seed, 0, MAX_SEED)
    dataset = dataset_config(values)
    if settings.precision not in PRECISIONS:
        raise unknown("precision", settings.precision, PRECISIONS)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", settings.device):
        raise CoopError(f"device={short(settings.device)}: give auto, cpu, cuda or cuda:NUMBER")
    check_validation(settings.validation)
    workers = settings.workers
    return RunConfig(
        dataset=dataset,
        backbone=backbone_config(values),
        method=method,
        options=method_options(kind, values, dataset.name).resolved(shots, dataset.name),
        protocol=protocol_config(values, dataset.name),
        shots=shots,
        seed=seed,
        validation=settings.validation,
        sample_file=named_path("sample_file", settings.sample_file) if settings.sample_file and kind.trains else None,
        device=settings.device,
        precision=settings.precision,
        workers=_whole("workers", workers, 0, MAX_WORKERS)
        if workers is not None
        else min(8, (os.cpu_count() or 2) // 2),
        data_root=named_path("data_root", settings.data_root),
        cache=named_path("cache", settings.cache) if settings.cache else cache_folder(),
        results=named_path("results", settings.results),
    )


_SETTINGS = {f.name for f in fields(RunSettings)}


def chosen_method(values: Mapping[str, Any]) -> str:
    """Return the method's name. Raises CoopError for an unknown one."""
    method = values.get("method", GROUPS["method"])
    if not isinstance(method, str) or method not in OPTIONS:
        raise unknown("method", str(method), OPTIONS)
    return method


@cache
def option_names(method: str) -> frozenset[str]:
    """Return the keys of a method's options, without what is nested in them."""
    return frozenset(f.name for f in fields(OPTIONS[method]))


@cache
def _all_option_names() -> frozenset[str]:
    return frozenset().union(*map(option_names, OPTIONS))


def check_keys(keys: Iterable[str]) -> None:
    """Raise CoopError, with the closest match, for a key that nothing reads."""
    options = _all_option_names()
    for key in keys:
        head, _, rest = key.partition(".")
        inside = {"dataset": fields(DatasetSpec), "backbone": fields(BackboneConfig)}
        if head in inside and rest:
            names = [f.name for f in inside[head]]
            if rest.split(".")[0] not in names:
                raise unknown(f"key of {head}", rest, names)
        elif head == "protocol" and rest:
            if rest not in ("name", "targets"):
                raise unknown("key of protocol", rest, ("name", "targets"))
        elif head not in options and (rest or head not in _SETTINGS | GROUPS.keys()):
            close = get_close_matches(key, [*GROUPS, *_SETTINGS, *options], n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise CoopError(f"unknown key {short(key)}: {hint}'coop run --help-keys' lists all")


def unused_keys(values: Mapping[str, Any]) -> dict[str, str]:
    """Return {key: why the chosen method does not use it} for those of `values` that it does not use."""
    method = chosen_method(values)
    kind = OPTIONS[method]
    names = option_names(method)
    out: dict[str, str] = {}
    for key in values:
        head = key.split(".")[0]
        if head in SAMPLE_KEYS and not kind.trains:
            out[key] = f"method={method} does not train; for methods that do: {_listed(_training_methods())}"
        elif head not in names and head not in _SETTINGS and head not in GROUPS:
            having = [name for name in OPTIONS if head in option_names(name)]
            out[key] = f"method={method} has no {head}; methods that have it: {_listed(having)}"
    if "n_ctx" in values and values["n_ctx"] is not None and "ctx_init" in names:
        given = {k: v for k, v in values.items() if k == "ctx_init"}
        words = dict(vars(method_options(kind, given)))["ctx_init"]
        if words is not None:
            out["n_ctx"] = (
                f"it counts random vectors, and method={method} begins with ctx_init='{words}': give ctx_init=null"
            )
    if "validation" in values and kind.trains:
        rest = {key: value for key, value in values.items() if key not in out}
        if not method_options(kind, rest, dataset_config(values).name).uses_validation:
            using = [name for name, other in OPTIONS.items() if other().uses_validation]
            out["validation"] = (
                f"method={method} chooses nothing on validation images here; by default do: {_listed(using)}"
            )
    return out


def dataset_config(values: Mapping[str, Any]) -> DatasetSpec:
    """Return the description of the dataset that is trained on."""
    return described(_choice("dataset", values), _inside("dataset", values))


_described: dict[str, DatasetSpec] = {}  # a sweep's runs share few datasets


def described(name: str, changes: Mapping[str, Any]) -> DatasetSpec:
    """Return the description called `name` with changed keys; equal ones are one object."""
    known = repr((name, sorted(changes.items())))
    if known not in _described:
        nested: dict[str, Any] = {}
        for key, value in changes.items():
            head, _, rest = key.partition(".")
            if rest and not isinstance(nested.get(head, {}), Mapping):
                raise CoopError(f"dataset.{key}={short(value)}: dataset.{head} has a value, {short(nested[head])}")
            nested[head] = {**nested.get(head, {}), rest: value} if rest else value
        _described[known] = load_description(name, **nested)
    return _described[known]


@cache
def _file(group: str, name: str) -> dict[str, Any]:
    """Return the keys of a choice's file in conf/."""
    path = resource_folder("conf") / group / f"{name}.yaml"
    try:
        return read_yaml(path)
    except (YAMLError, ValueError) as error:
        raise CoopError(f"{path}: {first_line(error)}") from error


@cache
def group_choices(group: str) -> tuple[str, ...]:
    """Return the names that a group may be given."""
    if group == "method":
        return tuple(sorted(OPTIONS))
    if group == "dataset":
        return tuple(sorted(dataset_descriptions()))
    return tuple(sorted(path.stem for path in (resource_folder("conf") / group).glob("*.yaml")))


def backbone_config(values: Mapping[str, Any]) -> BackboneConfig:
    """Return the backbone that is chosen, with its changed keys."""
    chosen = _choice("backbone", values)
    keys = {**_file("backbone", chosen), **_inside("backbone", values)}
    backbone = from_mapping(BackboneConfig, keys, "backbone")
    if backbone.architecture in ("", "???"):
        raise CoopError(f"backbone={chosen} needs backbone.architecture=NAME, one that open_clip knows")
    if not backbone.name:
        parts = (part and Path(part).stem for part in (backbone.architecture, backbone.pretrained))
        backbone = replace(backbone, name="-".join(part for part in parts if part))
    _check_name("backbone.name", backbone.name)
    return backbone


def protocol_config(values: Mapping[str, Any], dataset: str) -> ProtocolConfig:
    """Return the protocol that is chosen and its targets. Raises CoopError for a target that is named twice."""
    keys = {**_file("protocol", _choice("protocol", values)), **_inside("protocol", values)}
    name, targets = keys.get("name"), keys.get("targets")
    if name not in PROTOCOLS:
        raise unknown("protocol", str(name), PROTOCOLS)
    if not isinstance(targets, list | tuple | None):
        raise CoopError(f"protocol.targets={short(targets)}: give a list: [dtd,eurosat] or [/folder/a,/folder/b]")
    if name == "base_to_new" and targets:
        raise CoopError("protocol=base_to_new tests on both halves of its dataset: it has no protocol.targets")
    if name in ("cross_dataset", "domain_generalisation") and not targets:
        raise CoopError(f"protocol={name} needs protocol.targets=[...]: the datasets to test on")
    specs: list[DatasetSpec] = []
    for target in targets or ():
        taken = [dataset, *(spec.name for spec in specs)]
        spec = _target(target, taken)
        place = spec.root or spec.file
        if spec.name in taken or (place and place in [other.root or other.file for other in specs]):
            raise CoopError(f"protocol.targets names '{spec.name}' twice, or the dataset that is trained on")
        specs.append(spec)
    return ProtocolConfig(name, tuple(specs))


def _target(target: Any, taken: Sequence[str]) -> DatasetSpec:
    """Return a target's description: of a known dataset, of an own folder or CSV by its path, or of a mapping.

    A mapping has changed keys, and the `name` of a known dataset, or the `root` (or `file`) of an own one. An own one
    is called by the last part of its path, with more of the path where that name is in `taken`.
    """
    keys = {str(key): value for key, value in target.items()} if isinstance(target, Mapping) else {"name": target}
    name, place = keys.get("name"), keys.pop("root", None) or keys.pop("file", None)
    if place is None and isinstance(name, str) and ("/" in name or name.startswith(("~", "."))):
        place = keys.pop("name")
    if name in group_choices("dataset") and name not in ("folder", "csv"):
        del keys["name"]
        return described(str(name), {**keys, **({"root": place} if place else {})})
    if place is None:
        known = set(group_choices("dataset")) - {"folder", "csv", "hub"}
        raise CoopError(f"{unknown('target', short(name), known)}, or the path of an own folder: ./{short(name)}")
    if name in ("folder", "csv"):
        del keys["name"]
    wanted = repr((place, sorted(keys.items()), taken))
    if wanted not in _described:
        _described[wanted] = describe_folder(str(place), taken, **keys)
    return _described[wanted]


def _choice(group: str, values: Mapping[str, Any]) -> str:
    """Return what a group is given. Raises CoopError for what is not one of its choices."""
    chosen = values.get(group, GROUPS[group])
    choices = group_choices(group)
    if not isinstance(chosen, str) or chosen not in choices:
        raise unknown(group, short(chosen), choices)
    return chosen


def _inside(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{group}.")}


def config_text(config: RunConfig) -> str:
    """Return a configuration as YAML, its keys as the command line has them; a dataset's empty keys are left out."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    options = plain.pop("options")
    empty = asdict(DatasetSpec("", "", ""))
    for description in (plain["dataset"], *plain["protocol"]["targets"]):
        for key in [key for key, value in description.items() if value == empty[key]]:
            del description[key]
    head = {group: plain.pop(group) for group in GROUPS}
    text: str = yaml.safe_dump({**head, **options, **plain}, sort_keys=False, allow_unicode=True, width=120)
    return text


def key_help(asked: Sequence[str] = ()) -> str:
    """Return what every key means and what it is by default, or that of the keys and methods that are `asked` for.

    Raises CoopError for a key, or the method of `method=NAME`, that there is not.
    """
    keys = {name: _flat_defaults(kind()) for name, kind in OPTIONS.items()}
    blocks = {"": [f"{group}={default}: one of {', '.join(group_choices(group))}" for group, default in GROUPS.items()]}
    blocks[""] += [f"{f.name}={_default_text(f.default)}: {f.metadata['help']}" for f in fields(RunSettings)]
    inside = {"dataset": DatasetSpec, "backbone": BackboneConfig, "protocol": ProtocolConfig, "augment": Augment}
    blocks |= {f"{group}.KEY": _wrapped(kind) for group, kind in inside.items()}
    blocks["training"] = _wrapped(Training)
    for name, kind in OPTIONS.items():
        listed = ", ".join(f"{key}={value}" for key, value in keys[name].items())
        blocks[f"method={name}"] = [*_wrapped(kind), *textwrap.wrap(f"Keys: {listed}", 116)]
    text = []
    for word in asked:
        key, _, value = word.partition("=")
        check_keys([key])
        if key == "method" and value:
            text += [f"method={chosen_method({key: value})}", *blocks[f"method={value}"], ""]
            continue
        head, _, rest = key.partition(".")
        text += [line for line in blocks[""] if line.startswith(f"{head}=")]
        group = f"{head}.KEY" if f"{head}.KEY" in blocks else "training" if key in _flat_defaults(Training()) else ""
        text += [f"{group}: {' '.join(blocks[group])}"] if group else []
        for name, defaults in keys.items():
            said = re.findall(rf"(?:^|(?<=[.;] ))[^.;]*`{key}[`=][^.;]*", " ".join(blocks[f"method={name}"]))
            text += [f"method={name}: {'; '.join([f'{key}={defaults[key]}', *said])}"] if key in defaults else []
        text.append("")
    if not asked:
        text = [line for title, lines in blocks.items() for line in ([title, *lines] if title else lines) + [""]]
    return "\n".join(text[:-1]) + "\n"


def _wrapped(kind: type) -> list[str]:
    return textwrap.wrap(" ".join(inspect.cleandoc(kind.__doc__ or "").split()), 116, break_on_hyphens=False)


def _flat_defaults(options: MethodOptions) -> dict[str, str]:
    """Return the keys of a method's options, nested ones with a dot, and the defaults as the command line has them."""
    return {name: _default_text(value) for name, value in flat(vars(options)).items()}


def _default_text(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def resolve_interpolations(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `values` with each ${key} replaced by the value of another given key, setting or environment variable."""
    if not any(isinstance(value, str) and "${" in value for value in values.values()):
        return values
    root: Any = OmegaConf.create({})
    try:
        for key, value in {**{f.name: f.default for f in fields(RunSettings)}, **GROUPS, **values}.items():
            if key not in GROUPS:
                OmegaConf.update(root, key, value, force_add=True)
            elif not any(other.startswith(f"{key}.") for other in values):
                root[key] = value
        return {
            key: OmegaConf.select(root, key) if isinstance(value, str) and "${" in value else value
            for key, value in values.items()
        }
    except OmegaConfBaseException as error:
        raise CoopError(f"a value with ${{...}} cannot be resolved: {first_line(error)}") from error


def parse_shots(value: Any) -> Shots:
    """Return images per class, or "all". Raises CoopError for anything else."""
    text = str(value)
    if text == "all":
        return "all"
    if text.isdecimal() and 1 <= int(text) < MAX_SEED:
        return int(text)
    raise CoopError(
        f"shots={short(value)}: give a number of images per class, 1 or more, or all (epochs=0 does not train)"
    )


def _whole(name: str, value: int, least: int, most: int = MAX_SEED) -> int:
    if least <= value <= most:
        return value
    limit = "and less than 2**63" if most == MAX_SEED else f"at most {most}"
    raise CoopError(f"{name}={value}: give a whole number, {least} or more, {limit}")


def named_path(name: str, value: Any) -> Path:
    """Return the path that a key's value names, `~` resolved. Raises CoopError for none and for a user unknown here."""
    text = str(value)
    if not text.strip() or "\0" in text or text == "None":
        raise CoopError(f"{name}={short(value)}: give a folder or a file")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise CoopError(f"{name}={short(value)}: there is no such user's home folder") from error


def _check_name(key: str, name: str) -> None:
    """Raise CoopError for a name that cannot be that of a folder and a row of a table."""
    if not any(letter.isalnum() for letter in name) or len(name) > 100 or not name.isprintable():
        raise CoopError(f"{key}={short(name)}: give a name of at most 100 characters on one line, with letters")


def _training_methods() -> list[str]:
    return [name for name, kind in OPTIONS.items() if kind.trains]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
