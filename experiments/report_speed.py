"""How long a report of a thousand finished runs takes, and how large its page is.

    python -m experiments.report_speed                # eleven datasets, four seeds: 1111 runs
    python -m experiments.report_speed --keep FOLDER  # keeps the runs and the report

The study is few_shot. Two real runs on the sample and the model that ship with the toolkit (extra `demo`) are copied to
every planned run's folder, each with its own identity, as many classes as its dataset has, and drawn predictions.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coop.cli import main as coop
from coop.data import load_description
from coop.evaluate import evaluate, predictions
from coop.io import track, write_json
from coop.runs.grid import study_cells
from coop.runs.store import RESULT, run_folder, write_predictions
from coop.runs.study import Cell, load_study

STUDY = "few_shot"
OVERRIDES = ("backbone=lit_lite", "seed=1,2,3,4")
REAL = ("dataset=fashion_mnist", "backbone=lit_lite", "workers=0", "shots=1", "epochs=1", "augment.views=0")


def main(arguments: list[str] | None = None) -> None:
    """Make the runs, time the report, print seconds and sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for the runs and the report (default: none is kept)")
    keep = parser.parse_args(arguments).keep
    with tempfile.TemporaryDirectory() as temporary:
        place = keep or Path(temporary)
        cells = study_cells(load_study(STUDY), OVERRIDES)
        make_runs(cells, place)
        print(measure(len(cells), place))


def make_runs(cells: list[Cell], place: Path) -> None:
    """Do the two real runs and copy them to the folder of every cell."""
    real = {}
    for method in ("zero_shot", "coop"):
        if coop(["run", *REAL, f"method={method}", f"results={place / 'real'}"]):
            raise SystemExit(f"the run of {method} failed")
        (real[method],) = (place / "real").glob(f"*/*/{method}/*/{RESULT}")
    draw = random.Random(0)
    for cell in track(cells, "copying runs", len(cells)):
        method = str(cell.about["method"])
        source = real[method if method in real else "coop"]
        copy_run(source, cell.about, place / "results", draw)


def copy_run(source: Path, about: Mapping[str, Any], results: Path, draw: random.Random) -> None:
    """Copy a run to another's folder, with drawn logits for the same number of images and other classes."""
    result = json.loads(source.read_text(encoding="utf-8"))
    identity = dict(about) | {"data": result["identity"]["data"]}
    folder = run_folder(results, identity, {})
    shutil.copytree(source.parent, folder, dirs_exist_ok=True)
    classes, n = _classes(str(about["dataset"])), next(iter(result["targets"].values()))["n"]
    labels = torch.arange(n) % classes
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += 0.5 + float(about["shots"]) ** 0.5
    metrics = evaluate(logits, labels, tuple(f"class {i}" for i in range(classes)))
    result |= {"identity": identity, "accuracy": metrics.accuracy, "targets": {about["dataset"]: vars(metrics)}}
    write_predictions(folder, {str(about["dataset"]): predictions(logits, labels)})
    write_json(folder / RESULT, result)


def _classes(dataset: str) -> int:
    expected = load_description(dataset).expected
    assert expected.classes, f"the description of {dataset} does not say how many classes it has"
    return expected.classes


def measure(count: int, place: Path) -> str:
    """Return how long the command took, from its start to its end, and what it wrote."""
    command = [sys.executable, "-m", "coop.cli", "report", STUDY, *OVERRIDES, f"results={place / 'results'}"]
    started = time.perf_counter()
    subprocess.run([*command, "--output", str(place / "report")], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    page = (place / "report" / "index.html").stat().st_size
    files = [path for path in (place / "report").rglob("*") if path.is_file()]
    whole = sum(path.stat().st_size for path in files)
    return (
        f"{count} finished runs: {seconds:.1f} s on {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}); "
        f"page {page / 1e6:.2f} MB, all {len(files)} files {whole / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
