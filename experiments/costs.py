"""What the studies cost: runs, images to encode, training steps, and the hours that these take at known rates.

    python -m experiments.costs [STUDY ...]

Nothing is run: steps follow from the protocol, images from the datasets' published sizes, rates are below with their
origin. Views of images are counted once for each backbone, as the cache keeps them: the test view, and one for each
epoch where a method is trained on new ones. Not counted: linear probes, and what is done once, such as loading a
backbone.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from coop.data import load_description
from coop.runs.key import RunKey
from coop.runs.study import load_study, planned_runs, study_names

STATE = 0.530 / 449  # s for a token's state, there and back: a step with 449 took 530.1 ms on 2 CPU cores (README)
SUFFIX = 4.3  # states of a class behind the context: (449 - 17) / 100
FLOPS = 128e9  # of that step; image towers are taken to be as fast
ADAPTER = 0.0012  # s a step of CLIP-Adapter, on 2 CPU cores, 10 to 102 classes, lit_lite
ORIGINAL = (14 * 60 + 40) * 60 / 100_000 / 1000  # s a step and class, CoOp's code, RTX 3090, images encoded each time
COCOOP, PROGRAD = 0.160, 22 / 6  # s an image; against CoOp (KgCoOp's authors; classes and GPU not said)
GFLOP = {  # of an image: open_clip's model_profile.csv, and torch's FlopCounterMode for RN50x4, RN50x16 and SigLIP
    "rn50": 12.22, "rn101": 19.54, "rn50x4": 42.56, "rn50x16": 149.39, "vit_b32": 8.82, "vit_b16": 35.13,
    "vit_l14": 162.03, "vit_b16_laion2b": 35.13, "vit_b16_datacomp": 35.13, "vit_b16_siglip": 35.42,
}  # fmt: skip


@dataclass
class Cost:
    """Of some runs: images that are encoded, GFLOP of that, training steps, hours."""

    runs: int = 0
    images: float = 0.0
    encoding: float = 0.0
    steps: float = 0.0
    cpu: float = 0.0
    gpu: float = 0.0


def cost(keys: Iterable[RunKey]) -> Cost:
    """Return what different runs cost together."""
    different = [key.as_dict() for key in dict.fromkeys(keys)]
    out = Cost(runs=len(different))
    for backbone, images in images_of(different).items():
        out.images += images
        out.encoding += images * GFLOP[backbone]
    out.cpu = out.encoding * 1e9 / FLOPS / 3600
    for about in different:
        steps, cpu, gpu = training(about)
        out.steps += steps
        out.cpu += cpu / 3600
        out.gpu += gpu / 3600
    return out


def training(about: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return a run's steps, and the seconds of training on a CPU, and of the original code on a GPU."""
    classes = classes_of(about)
    if not about.get("epochs"):
        return 0.0, 0.0, 0.0
    steps = float(about["epochs"] * max(classes * about["shots"] // about["batch_size"], 1))
    if about["method"] == "clip_adapter":
        return steps, steps * ADAPTER, 0.0
    n_ctx, wide = about["n_ctx"] or 4, 13.3 / 5.96 if about["backbone"] == "vit_l14" else 1.0
    end = about.get("ctx_position", "end") == "end"
    behind = n_ctx if about.get("class_specific") else 0 if end else n_ctx / 2
    gradients = 2 if about["method"] == "prograd" else 1
    cpu = (n_ctx + 1 + classes * (SUFFIX + behind)) * STATE * wide
    gpu = {"cocoop": COCOOP, "prograd": classes * ORIGINAL * PROGRAD}.get(about["method"], classes * ORIGINAL)
    return steps, steps * cpu * gradients, steps * gpu * wide


def classes_of(about: Mapping[str, Any]) -> int:
    """Return how many classes a run trains on."""
    classes = load_description(about["dataset"]).expected.classes or 0
    return -(-classes // 2) if about["protocol"] == "base_to_new" else classes


def images_of(runs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the views of images that are encoded, by backbone: test sets once, samples as far as they differ."""
    tests: set[tuple[str, str]] = set()
    samples: dict[tuple[str, str], dict[int, set[tuple[Any, int]]]] = {}  # by the number of random views
    for about in runs:
        tests |= {(about["backbone"], name) for name in (about["dataset"], *about.get("targets", ()))}
        asked, epochs = about.get("augment.views", 0), about.get("epochs") or 0
        views = epochs if asked == "epochs" else asked if epochs else 0
        if about["shots"]:
            of_set = samples.setdefault((about["backbone"], about["dataset"]), {})
            of_set.setdefault(views, set()).add((about["shots"], about["seed"]))
    out: dict[str, float] = {}
    for backbone, name in tests:
        out[backbone] = out.get(backbone, 0) + (load_description(name).expected.test or 0)
    for (backbone, name), drawn in samples.items():
        before = -1  # the test view is the first
        for views in sorted(drawn):  # an image has as many views as the run that wants most of it
            wanting = set().union(*(some for other, some in drawn.items() if other >= views))
            out[backbone] += drawn_images(name, wanting) * (views - before)
            before = views
    return out


def drawn_images(dataset: str, drawn: Iterable[tuple[Any, int]]) -> float:
    """Return how many training images are in at least one of the samples, which are drawn independently."""
    expected = load_description(dataset).expected
    train, classes = expected.train or 0, expected.classes or 1
    left = 1.0
    for shots, _ in drawn:
        left *= 0 if shots == "all" else max(1 - shots * classes / train, 0)
    return train * (1 - left)


def main(names: Sequence[str]) -> None:
    """Print a row for each study."""
    shown = [name for name in study_names() if name not in ("demo", "methods")]  # measured; has methods without a rate
    costs = {name: cost(run.key for run in planned_runs(load_study(name))) for name in names or shown}
    rows = [(name, c.runs, c.images, c.encoding / 1000, c.steps, c.cpu, c.gpu) for name, c in costs.items()]
    headers = ["study", "runs", "views", "TFLOP", "steps", "CPU hours", "original, RTX 3090, hours"]
    print(tabulate(rows, headers, floatfmt=",.0f"))


if __name__ == "__main__":
    main(sys.argv[1:])
