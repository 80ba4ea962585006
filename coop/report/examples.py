"""Example images of the classes that changed most, as small pictures inside the page."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from coop.data import Dataset, open_rgb, read_dataset
from coop.errors import CoopError
from coop.report.content import Example
from coop.report.reliability import Predictions
from coop.report.runs import Runs
from coop.runs.protocol import targets_of
from coop.runs.store import CONFIG

SIDE = 112  # pixels
QUALITY = 72
EACH = 4  # images of a class
BUDGET = 1_000_000  # characters of pictures in a page


class Pictures:
    """The test images of datasets as data addresses, as long as the page's budget lasts."""

    def __init__(self, runs: Runs) -> None:
        self._runs, self._left = runs, BUDGET
        self._datasets: dict[str, Dataset | str] = {}

    def refused(self, run: str, target: str) -> str:
        """Return why there are no example images of a run, or nothing where there can be."""
        dataset = self._dataset(run)
        if isinstance(dataset, str):
            return dataset
        if self._left <= 0:
            return "no example images: the page has as many as it can hold"
        return "" if self._paths(run, target) else "no example images of other datasets' test sets"

    def changed(
        self, run: str, target: str, label: int, learned: Sequence[Predictions], baseline: Predictions, gained: bool,
        names: Sequence[str],
    ) -> tuple[Example, ...]:  # fmt: skip
        """Return images of class `label` that the baseline had wrong and the learned runs right (or the other way).

        Those on which the most runs agree come first; what is shown as the learned answer is the first run's.
        """
        dataset, paths = self._dataset(run), self._paths(run, target)
        assert isinstance(dataset, Dataset)
        right = torch.stack([one["predicted"] == one["label"] for one in learned])
        was = baseline["predicted"] == baseline["label"]
        turned = (right & ~was) if gained else (~right & was)
        votes = turned.int().sum(0) * (turned[0] & (baseline["label"] == label))
        order = torch.argsort(votes, descending=True, stable=True)[:EACH]
        examples = []
        for i in order[votes[order] > 0].tolist():
            if self._left <= 0:
                break
            try:
                picture = thumbnail(dataset.root / paths[i])
            except CoopError:
                continue  # an image that has gone since the run
            self._left -= len(picture)
            answers = (names[int(some["predicted"][i])] for some in (baseline, learned[0]))
            examples.append(Example(picture, names[label], *answers))
        return tuple(examples)

    def _dataset(self, run: str) -> Dataset | str:
        """Return a run's dataset as it was, or why it is not here."""
        if run not in self._datasets:
            self._datasets[run] = _read(self._runs.folder(run), self._runs.result(run)["identity"])
        return self._datasets[run]

    def _paths(self, run: str, target: str) -> Sequence[str]:
        dataset = self._dataset(run)
        assert isinstance(dataset, Dataset)
        protocol = self._runs.result(run)["identity"]["protocol"]
        return next((t.test.paths for t in targets_of(protocol, dataset) if t.name == target), ())


def _read(folder: Path, identity: Mapping[str, Any]) -> Dataset | str:
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
        dataset = read_dataset(config["dataset"], Path(config["data_root"]))
    except (CoopError, OSError, KeyError, TypeError, ValueError) as error:
        return f"no example images: {error}"
    if dataset.digest != identity["data"]:
        return f"no example images: the dataset in {dataset.root} is not the one that the runs used"
    return dataset


def thumbnail(path: Path) -> str:
    """Return an image as a JPEG of at most SIDE pixels in a data address. Raises CoopError if it cannot be read."""
    image = open_rgb(path)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def same_images(one: Tensor, other: Tensor) -> bool:
    """Whether two runs' labels are those of the same test images."""
    return bool(one.shape == other.shape and torch.equal(one, other))
