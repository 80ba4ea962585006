"""Run folders: what one is called, what lies in it, and all of them as one table.

<results>/<dataset>/<backbone>/<method>/<shots16-seed1-n_ctx4-...>-<8 digits of the run's identity>/
    config.yaml          everything that made the run
    sample.json          the few-shot list
    learned.safetensors  what was learned
    predictions.safetensors  label, predicted class and its probability of every test image
    result.json          written last: a run is done if and only if it exists
    failure.json         instead, why it is not
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor

from coop.clip.backbone import LIT_LITE
from coop.clip.lit_lite import ASSETS, TEXT_FILE
from coop.config import RunConfig
from coop.data import Dataset
from coop.errors import CoopError
from coop.io import atomic_write, read_json

RESULT, FAILURE, CONFIG, SAMPLE = "result.json", "failure.json", "config.yaml", "sample.json"
PREDICTIONS = "predictions.safetensors"


def planned_identity(config: RunConfig) -> dict[str, Any]:
    """Return what makes a run the run that it is, as far as it is known without reading its data."""
    about: dict[str, Any] = {
        "dataset": str(config.dataset.get("name")),
        "dataset_template": str(config.dataset.get("template")),
        "backbone": config.backbone.name,
        "architecture": _file_or_name(config.backbone.architecture),
        "pretrained": _file_or_name(config.backbone.pretrained or _embedded(config.backbone.architecture)),
        "precision": config.precision,
        "method": config.method,
        "protocol": config.protocol.name,
        "shots": config.shots,
        "seed": config.seed,
        **flat(asdict(config.options)),
    }
    if config.protocol.targets:
        names = (target.get("name") if isinstance(target, Mapping) else target for target in config.protocol.targets)
        about["targets"] = tuple(str(name) for name in names)
    return about


def identity(config: RunConfig, dataset: Dataset, targets: Mapping[str, str], sample: str | None) -> dict[str, Any]:
    """Return what makes a run the run that it is: two equal ones give the same result.

    `targets` are the other datasets that it is tested on, with their digests; `sample` is a sample file's digest.
    """
    about = {"dataset": dataset.name, "data": dataset.digest} | planned_identity(config)
    if targets:
        about["targets"] = dict(targets)
    if sample:
        about["sample"] = sample
    return about


def run_folder(results: Path, about: Mapping[str, Any], defaults: Mapping[str, Any]) -> Path:
    """Return the folder of the run that `about` identifies; options that are not `defaults` are part of its name."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:8]
    words = [f"shots{about['shots']}", f"seed{about['seed']}"] if about["shots"] else []
    words += [f"{key}-{about[key]}" for key in defaults if key != "epochs" and about[key] != defaults[key]]
    if about["protocol"] != "all_classes":
        words.append(about["protocol"])
    name = _as_name("-".join([*words, digest]))
    return shelf(results, about) / (name if len(name) <= 120 else f"{name[:110]}-{digest}")


def shelf(results: Path, about: Mapping[str, Any]) -> Path:
    """Return the folder in which the folders of all runs of a dataset, backbone and method lie."""
    return results.joinpath(*(_as_name(str(about[key])) for key in ("dataset", "backbone", "method")))


def _as_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text)


def flat(mapping: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested keys joined by dots, as they are written on the command line."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{before}{key}.")
        else:
            out[before + key] = value
    return out


def write_predictions(folder: Path, predictions: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write what was predicted, by test set, whole or not at all: the images in the order of the test split."""
    tensors = {f"{target}/{key}": tensor for target, some in predictions.items() for key, tensor in some.items()}
    with atomic_write(folder / PREDICTIONS) as temporary:
        save_file(tensors, temporary)


def read_predictions(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return what a run predicted, by test set: `label`, `predicted`, `confidence` (n). Empty if it was not kept."""
    out: dict[str, dict[str, Tensor]] = {}
    if (folder / PREDICTIONS).is_file():
        for name, tensor in load_file(folder / PREDICTIONS).items():
            target, _, key = name.rpartition("/")
            out.setdefault(target, {})[key] = tensor
    return out


def read_results(results: Path) -> pd.DataFrame:
    """Return all finished runs under `results`, a row for each test set: what the run is, and its metrics.

    Columns: everything in its identity, `target`, `accuracy`, `macro_f1`, `ece`, `mean_confidence`, `n`, `own_split`,
    `run` (its folder). Raises CoopError if there is none.
    """
    rows: list[dict[str, Any]] = []
    if not results.is_dir():
        raise CoopError(f"there is no results folder {results}: name it, or run something first (coop run)")
    for path in sorted(results.rglob(RESULT)):
        try:
            result = read_json(path)
            about = {k: v for k, v in result["identity"].items() if k not in ("targets", "data")}
            common = about | {"own_split": result["own_split"], "run": str(path.parent)}
            if result["fit"].get("n_ctx") is not None:
                common["n_ctx"] = result["fit"]["n_ctx"]
            for target, metrics in result["targets"].items():
                measured = {k: v for k, v in metrics.items() if k != "per_class_accuracy"}
                rows.append(common | {"target": target} | measured)
            for target in ("harmonic_mean", "average"):
                if target in result:
                    rows.append(common | {"target": target, "accuracy": result[target]})
        except (ValueError, KeyError, TypeError) as error:
            raise CoopError(f"{path} is not a result of this toolkit ({error!r}): remove it, run it again") from error
    if not rows:
        raise CoopError(f"there are no finished runs under {results}: run something first (coop run)")
    return pd.DataFrame(rows, dtype=object)  # whole numbers stay whole where others lack them


def _embedded(architecture: str) -> str | None:
    """Return the file whose content decides what the embedded model is."""
    return str(ASSETS / TEXT_FILE) if architecture == LIT_LITE else None


_digests: dict[tuple[str, int, int], str] = {}


def _file_or_name(name: str | None) -> str | None:
    """Return a name as it is, and a file as the digest of its content, so that a changed file is another run."""
    path = Path(name) if name else None
    if path is None or not path.is_file():
        return name
    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns)
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return _digests[key]
