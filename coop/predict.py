"""Using what a run learned on any images, also for other class names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from coop.artefact import load_artefact
from coop.backbone import Backbone
from coop.data import open_rgb
from coop.errors import CoopError
from coop.methods import Classes, Method
from coop.progress import track

BATCH = 64


class Classifier:
    """A learned method with its backbone, on images.

    >>> classifier = Classifier.load("results/eurosat/rn50/coop/shots16-seed1-0a1b2c3d")  # doctest: +SKIP
    >>> classifier.predict(["field.jpg"], top=3)  # doctest: +SKIP
    [[('Annual Crop Land', 0.83), ('Pasture Land', 0.09), ('Permanent Crop Land', 0.05)]]
    """

    def __init__(self, method: Method) -> None:
        self.method = method

    @classmethod
    def load(
        cls,
        place: Path | str,
        class_names: Sequence[str] | None = None,
        device: str = "auto",
        backbone: Backbone | None = None,
    ) -> "Classifier":
        """Load a run's folder or a learned file, with its backbone unless that is given.

        `class_names` asks for other classes than the learned ones. Raises CoopError if what was learned cannot move.
        """
        artefact = load_artefact(place)
        classes = artefact.classes
        if class_names is not None:
            names = tuple(name.strip() for name in class_names)
            if not names or not all(names) or len(set(names)) < len(names):
                raise CoopError(f"classes {', '.join(names)}: give different names, none empty")
            classes = Classes(names, artefact.classes.template, artefact.classes.dataset)
        return cls(artefact.restore(backbone or artefact.load_backbone(device), classes))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of `probabilities`."""
        return self.method.classes.names

    @torch.no_grad()
    def probabilities(self, images: Sequence[Path | str | Image.Image]) -> torch.Tensor:
        """Return (n, c) class probabilities. Raises CoopError for a file that is no image."""
        backbone, rows = self.method.backbone, []
        starts = range(0, len(images), BATCH)
        for start in track(starts, "encoding images", len(starts)):
            some = [_opened(image) for image in images[start : start + BATCH]]
            features = backbone.encode_images(torch.stack([backbone.preprocess(image) for image in some]))
            rows.append(self.method.logits(features).softmax(dim=-1).cpu())
        return torch.cat(rows) if rows else torch.empty(0, len(self.class_names))

    def predict(self, images: Sequence[Path | str | Image.Image], top: int = 5) -> list[list[tuple[str, float]]]:
        """Return each image's `top` classes with their probabilities, most probable first."""
        if top < 1:
            raise CoopError(f"top={top}: give 1 or more")
        values, order = self.probabilities(images).topk(min(top, len(self.class_names)), dim=-1)
        names: Any = self.class_names
        return [
            [(names[i], value) for i, value in zip(row, near, strict=True)]
            for row, near in zip(order.tolist(), values.tolist(), strict=True)
        ]


def _opened(image: Path | str | Image.Image) -> Image.Image:
    return image.convert("RGB") if isinstance(image, Image.Image) else open_rgb(image)
