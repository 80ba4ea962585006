"""What a run learned, as one safetensors file that says what it is and which weights it belongs to."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coop.clip.backbone import Backbone, load_backbone
from coop.options import method_options
from coop.data import open_rgb
from coop.errors import CoopError, unknown
from coop.io import atomic_write, track
from coop.methods import METHODS
from coop.methods.base import Classes, Method

FILE = "learned.safetensors"
FORMAT = "1"


@dataclass(frozen=True)
class Learned:
    """A method's learned tensors and everything that is needed to use them."""

    method: str
    options: dict[str, Any]
    classes: Classes
    seed: int
    architecture: str
    pretrained: str | None
    precision: str
    weights: str  # identity of the backbone that it was learned on
    state: dict[str, Tensor]

    @classmethod
    def of(cls, method: Method) -> "Learned":
        """Return what `method` has learned."""
        b = method.backbone
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in method.state().items()}
        options = dataclasses.asdict(method.options)
        names = (b.architecture, b.pretrained, b.precision, b.identity)
        return cls(method.name, options, method.classes, method.seed, *names, state)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        about = dataclasses.asdict(self)
        metadata = {k: json.dumps(v) for k, v in about.items() if k != "state"} | {"format": FORMAT}
        with atomic_write(path) as temporary:
            save_file(self.state, temporary, metadata=metadata)

    def load_backbone(self, device: str = "auto") -> Backbone:
        """Load the backbone that this was learned on. Raises CoopError if its weights have changed since."""
        backbone = load_backbone(self.architecture, self.pretrained, device, self.precision)
        self.check(backbone)
        return backbone

    def check(self, backbone: Backbone) -> None:
        """Raise CoopError if `backbone` is not the one that this was learned on."""
        if self.weights != backbone.identity:
            raise CoopError(
                f"this was learned on {self.architecture} with pretrained={self.pretrained}, precision="
                f"{self.precision} (weights {self.weights}), not on {backbone.architecture} with pretrained="
                f"{backbone.pretrained}, precision={backbone.precision} (weights {backbone.identity}): "
                "load the backbone that it was learned on"
            )

    def restore(self, backbone: Backbone, classes: Classes | None = None) -> Method:
        """Return the method as learned, for its own or other classes.

        Raises CoopError if `backbone` has other weights, or what was learned does not move to other classes.
        """
        self.check(backbone)
        kind = METHODS[self.method]
        made_for = self.classes if self.classes.names else classes
        if made_for is None or not made_for.names:
            raise CoopError("this file does not say which classes it is for: give class names (--classes a,b)")
        method = kind(backbone, made_for, method_options(kind.Options, self.options), self.seed)
        method.load_state(self.state)
        return method if classes is None or classes.names == made_for.names else method.for_classes(classes)


def load_learned(place: Path | str) -> Learned:
    """Read a learned file, or that of a run's folder. Raises CoopError if it is not one."""
    path = Path(place)
    path = path / FILE if path.is_dir() else path
    try:
        with safe_open(path, "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise CoopError(f"{place}: there is no {path.name} here; name a run's folder or a learned file") from error
    except (SafetensorError, OSError) as error:
        raise CoopError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CoopError(
            f"{path} holds nothing that this toolkit learned: name a run's folder, its {FILE}, "
            "or what `coop import` wrote"
        )
    try:
        about = {f.name: json.loads(metadata[f.name]) for f in dataclasses.fields(Learned) if f.name != "state"}
        classes = about.pop("classes")
        about["classes"] = Classes(tuple(classes["names"]), classes["template"], classes["dataset"])
    except (KeyError, ValueError, TypeError) as error:
        raise CoopError(f"{path} is damaged: its description cannot be read ({error})") from error
    if about["method"] not in METHODS:
        raise unknown("method", about["method"], METHODS)
    return Learned(**about, state=state)


def load_method(place: Path | str, device: str = "auto", backbone: Backbone | None = None) -> Method:
    """Return the method that a run learned, on the backbone that it was learned on (loaded unless given)."""
    artefact = load_learned(place)
    return artefact.restore(backbone or artefact.load_backbone(device))


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
        artefact = load_learned(place)
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
