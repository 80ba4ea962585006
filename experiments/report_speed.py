"""How long `coop table` and `coop report` take over many finished runs, and how large the page is.

    python -m experiments.report_speed                # eleven datasets, four seeds: 1111 runs
    python -m experiments.report_speed --runs 10000   # more seeds, until there are as many
    python -m experiments.report_speed --keep FOLDER  # keeps the runs and the report

The study is few_shot. Results and predictions are drawn at random: as many classes as each dataset has, 1,000 images.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from coop.data import load_description
from coop.io import track
from coop.runs.store import METRICS, Predictions, write_predictions, write_result
from coop.runs.study import PlannedRun, load_study, planned_runs

STUDY, IMAGES = "few_shot", 1000
STANDARD = 1111  # runs of few_shot with four seeds


def main(arguments: list[str] | None = None) -> None:
    """Make the runs, time both commands, print seconds and sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for the runs and the report (default: none is kept)")
    parser.add_argument("--runs", type=int, default=STANDARD, help="how many, at most (1111)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        place = args.keep or Path(temporary)
        seeds = -(-args.runs // 275)  # 25 trained runs of each seed on each of eleven datasets
        overrides = ["backbone=lit_lite", f"seed={','.join(map(str, range(1, max(4, seeds) + 1)))}"]
        planned = planned_runs(load_study(STUDY), overrides)[: args.runs]
        make_runs(planned, place / "results")
        print(f"{len(planned)} finished runs on {os.cpu_count()} cores")
        print(f"coop table:  {seconds(['table', str(place / 'results')]):.2f} s")
        report = ["report", STUDY, *overrides, f"results={place / 'results'}", "--output", str(place / "report")]
        print(f"coop report: {seconds(report):.2f} s", end="")
        page = (place / "report" / "index.html").stat().st_size
        print(f" (page {page / 1e6:.2f} MB); load {os.getloadavg()[0]:.1f}")


def make_runs(planned: list[PlannedRun], results: Path) -> None:
    """Write a result and predictions for each planned run."""
    draw = np.random.default_rng(0)
    for run in track(planned, "writing runs", len(planned)):
        expected = load_description(run.key.dataset).expected
        classes = expected.classes if expected else None
        assert classes, f"the description of {run.key.dataset} does not say how many classes it has"
        key = replace(run.key, data="drawn")
        folder = key.folder(results)
        folder.mkdir(parents=True, exist_ok=True)
        label = (np.arange(IMAGES) % classes).astype(np.int32)
        accuracy = 0.4 + 0.02 * float(run.key.shots) + draw.uniform(0, 0.1)
        right = draw.random(IMAGES) < accuracy
        predicted = np.where(right, label, draw.integers(0, classes, IMAGES)).astype(np.int32)
        confidence = draw.random(IMAGES).astype(np.float32)
        write_predictions(folder, {key.dataset: Predictions(label, predicted, confidence)})
        by_class = {f"class {i}": float(draw.random()) for i in range(classes)}
        metrics = dict.fromkeys(METRICS, 0.3) | {"accuracy": accuracy, "n": IMAGES, "per_class_accuracy": by_class}
        result = {"targets": {key.dataset: metrics}, "fit": {}, "seconds": {"fit": 1.0}, "notes": [], "own_split": False}
        result |= {"versions": {}, "split_source": "official", "weights": "drawn", "finished": "2026-01-01"}
        write_result(folder, key, json.loads(json.dumps(result)))


def seconds(command: list[str]) -> float:
    """Return how long a command takes, from its start to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "coop.cli", *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
