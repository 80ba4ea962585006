"""Learned files: one safetensors file per run, which names its method and backbone, and a classifier made of it.

The file holds the method's tensors; its metadata holds, as JSON, the method's name and options, the classes, and the
backbone with a digest of its weights. Nothing in it is executed, and nothing is built before it has been checked.
"""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from coop.clip.backbone import Backbone, load_backbone
from coop.clip.words import LEARNED_FILE
from coop.data import open_rgb
from coop.data.images import SUFFIXES
from coop.errors import CoopError, first_line, unknown
from coop.io import atomic_write, check_has_end, read_file, track
from coop.methods import METHODS
from coop.methods.base import Classes, Method
from coop.methods.coop import CoOp, PromptLearner
from coop.methods.prompt_ensemble import PromptEnsemble
from coop.options import PRECISIONS, CoOpOptions, MethodOptions, method_options

FILE = LEARNED_FILE
FORMAT = "1"
BATCH = 16  # images that are decoded and classified at once
ImageLike = Path | str | Image.Image | np.ndarray | Tensor


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
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in method.state().items()}
        options = dataclasses.asdict(method.options)
        return cls(method.name, options, method.classes, method.seed, **backbone_fields(method.backbone), state=state)

    def save(self, path: Path) -> None:
        """Write the file atomically. Raises CoopError for values that are not finite."""
        for name, tensor in self.state.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CoopError(f"method={self.method} learned {name} with values that are not finite: lower lr")
        fields = dataclasses.asdict(self)
        metadata = {k: json.dumps(v) for k, v in fields.items() if k != "state"} | {"format": FORMAT}
        content = _sorted_metadata(save(self.state, metadata=metadata))
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)  # the permissions of any new file; safetensors' own writer gives 0600

    def load_backbone(self, device: str = "auto") -> Backbone:
        """Load the backbone that this was learned on. Raises CoopError if its weights have changed since."""
        backbone = load_backbone(self.architecture, self.pretrained, device, self.precision)
        self.check_backbone(backbone)
        return backbone

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise CoopError if `backbone` is not the one that this was learned on."""
        if self.weights != backbone.identity:
            raise CoopError(
                f"this was learned on {self.architecture} with pretrained={self.pretrained}, precision="
                f"{self.precision} (weights {self.weights}), not on {backbone.architecture} with pretrained="
                f"{backbone.pretrained}, precision={backbone.precision} (weights {backbone.identity}): "
                "load the backbone that it was learned on"
            )

    def typed_options(self) -> MethodOptions:
        """Return the method's options. Raises CoopError where they are wrong, or do not fit the tensors."""
        options: MethodOptions = method_options(METHODS[self.method].Options, self.options)
        ctx, n_ctx = self.state.get("ctx"), getattr(options, "n_ctx", None)
        if ctx is not None and n_ctx is not None and (ctx.ndim < 2 or ctx.shape[-2] != n_ctx):
            raise CoopError(f"the file says n_ctx={n_ctx}, but its context has the shape {tuple(ctx.shape)}")
        return options

    def restore(self, backbone: Backbone, classes: Classes | None = None) -> Method:
        """Return the method as learned, for its own or other classes.

        Raises CoopError if `backbone` has other weights, or what was learned does not move to other classes.
        """
        self.check_backbone(backbone)
        trained_for = self.classes if self.classes.names else classes
        if trained_for is None or not trained_for.names:
            raise CoopError("this file does not say which classes it is for: give class names (--classes a,b)")
        method = METHODS[self.method](backbone, trained_for, self.typed_options(), self.seed)
        method.load_state(self.state)
        return method if classes is None or classes.names == trained_for.names else method.for_classes(classes)


def _sorted_metadata(content: bytes) -> bytes:
    """Return a safetensors file with its metadata in order, so that equal contents are equal files."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def backbone_fields(backbone: Backbone) -> dict[str, Any]:
    """Return what a learned file records of its backbone."""
    return {
        "architecture": backbone.architecture,
        "pretrained": backbone.pretrained,
        "precision": backbone.precision,
        "weights": backbone.identity,
    }


def learned_path(place: Path | str) -> Path:
    """Return the learned file that `place` names: itself, or that of a run's folder."""
    path = Path(place)
    return path / FILE if path.is_dir() else path


def load_learned(place: Path | str) -> Learned:
    """Read a learned file, or that of a run's folder. Raises CoopError if it is not one, or is damaged."""
    path = learned_path(place)
    try:
        check_has_end(path)
        path.open("rb").close()  # the library says less of why it cannot
        with safe_open(path, "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        raise CoopError(f"{path}: {first_line(error)}; name a run's folder or a learned file") from error
    except SafetensorError as error:
        raise CoopError(f"{path} is not a safetensors file: {first_line(error)}") from error
    if metadata.get("format") != FORMAT:
        raise CoopError(
            f"{path} holds nothing that this toolkit learned: name a run's folder, its {FILE}, "
            "or what `coop import` wrote"
        )
    try:
        fields = {f.name: json.loads(metadata[f.name]) for f in dataclasses.fields(Learned) if f.name != "state"}
        return Learned(**_checked_fields(fields), state=state)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CoopError(f"{path} is damaged: its description cannot be read ({str(error)[:200]})") from error


def _checked_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Check the types of a file's description. Raises ValueError, or CoopError for an unknown method."""
    classes = fields["classes"]
    texts = [fields[key] for key in ("method", "architecture", "precision", "weights")]
    texts += [classes["template"], classes["dataset"], *classes["names"], fields["pretrained"] or ""]
    if not all(isinstance(text, str) for text in texts) or not isinstance(classes["names"], list):
        raise ValueError("a name in it is not a text")
    if not isinstance(fields["options"], dict) or type(fields["seed"]) is not int:
        raise ValueError("its options or its seed have a wrong type")
    if fields["precision"] not in PRECISIONS:
        raise ValueError(f"precision is {fields['precision'][:40]}")
    if fields["method"] not in METHODS:
        raise unknown("method", fields["method"], METHODS)
    return fields | {"classes": Classes(tuple(classes["names"]), classes["template"], classes["dataset"])}


def load_method(place: Path | str, device: str = "auto", backbone: Backbone | None = None) -> Method:
    """Return the method that a run learned, on the backbone that it was learned on (loaded unless given)."""
    learned = load_learned(place)
    return learned.restore(backbone or learned.load_backbone(device))


def _load_member(run: str, backbone: Backbone) -> Method:
    return load_method(run, backbone=backbone)


PromptEnsemble.load_member = staticmethod(_load_member)


@dataclass(frozen=True)
class Prediction:
    """The `top` classes of one image with their probabilities, most probable first; or why it could not be read."""

    image: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


class Classifier:
    """A learned method that classifies images: files, PIL images, or uint8 arrays (h, w, 3)."""

    def __init__(self, learned: Method | PromptLearner) -> None:
        self.method = _as_method(learned) if isinstance(learned, PromptLearner) else learned

    @classmethod
    def load(
        cls,
        place: Path | str,
        class_names: Sequence[str] | None = None,
        device: str = "auto",
        backbone: Backbone | None = None,
    ) -> "Classifier":
        """Load what a run learned from its folder or file.

        `class_names` are other classes than the learned ones. Raises CoopError if what was learned cannot move.
        """
        learned = load_learned(place)
        classes = learned.classes
        if class_names is not None:
            names = tuple(name.strip() for name in class_names)
            if not names or not all(names) or len(set(names)) < len(names):
                raise CoopError(f"classes {', '.join(names)[:200]}: give different names, none empty")
            classes = Classes(names, learned.classes.template, learned.classes.dataset)
        return cls(learned.restore(backbone or learned.load_backbone(device), classes))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of `probabilities`."""
        return self.method.classes.names

    @torch.no_grad()
    def probabilities(self, images: Sequence[ImageLike]) -> Tensor:
        """Return (n, c) class probabilities. Raises CoopError for a file that is no image."""
        rows = [self._probabilities([_opened(image) for image in some]) for some in _batches(images)]
        return torch.cat(rows) if rows else torch.empty(0, len(self.class_names))

    def predict(self, images: Sequence[ImageLike], top: int = 5) -> list[list[tuple[str, float]]]:
        """Return each image's `top` classes with their probabilities, most probable first."""
        _check_top(top)
        return [self._top(row, top) for row in self.probabilities(images)]

    @torch.no_grad()
    def predict_files(self, paths: Sequence[Path | str], top: int = 5) -> Iterator[Prediction]:
        """Yield a prediction for each file, in order; a file that cannot be read yields its error."""
        _check_top(top)
        for some in _batches(paths):
            opened: dict[int, Image.Image] = {}
            errors: dict[int, str] = {}
            for i, path in enumerate(some):
                try:
                    opened[i] = _opened(path)
                except CoopError as error:
                    errors[i] = str(error)
            rows = iter(self._probabilities(list(opened.values())) if opened else ())
            for i, path in enumerate(some):
                if i in errors:
                    yield Prediction(str(path), error=errors[i])
                else:
                    yield Prediction(str(path), tuple(self._top(next(rows), top)))

    def _probabilities(self, images: list[Image.Image]) -> Tensor:
        backbone, tap = self.method.backbone, self.method.options.reads
        if tap == "pixels":
            inputs = torch.stack([backbone.pixel_transform(image) for image in images])
        else:
            encode = backbone.encode_images if tap == "final" else backbone.encode_pre_projection
            inputs = encode(torch.stack([backbone.preprocess(image) for image in images]))
        logits = self.method.logits(inputs)
        if not logits.isfinite().all():
            raise CoopError(
                f"method={self.method.name} gave logits that are not finite for these images: the weights of "
                f"{backbone.architecture} or what was learned are damaged"
            )
        return logits.softmax(dim=-1).cpu()

    def _top(self, row: Tensor, top: int) -> list[tuple[str, float]]:
        values, order = row.topk(min(top, len(self.class_names)))
        return [(self.class_names[i], value) for i, value in zip(order.tolist(), values.tolist(), strict=True)]


def export_checkpoint(method: Method, path: Path) -> None:
    """Write an open_clip checkpoint of the backbone with what `method` learned merged into its weights.

    Raises CoopError for a method whose change is not one of weights.
    """
    merged = getattr(method, "merged_state", None)
    if merged is None:
        raise CoopError(
            f"method={method.name} does not change the backbone's weights, so there is no checkpoint to merge into: "
            "use its learned file with coop predict or coop.Classifier"
        )
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in merged().items()})
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def image_files(places: Sequence[Path]) -> list[Path]:
    """Return the images that a user names: files as they are, all images below a folder, a CSV's column `path`.

    Raises CoopError for a folder without images and for a CSV without that column.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            below = [Path(folder, name) for folder, _, names in os.walk(place, onerror=_refuse) for name in names]
            inside = sorted(path for path in below if path.suffix.lower() in SUFFIXES)
            if not inside:
                raise CoopError(f"{place} has no images below it (files that end in .jpg, .png, ...)")
            found += inside
        elif place.suffix.lower() == ".csv":
            found += _listed_images(place)
        else:
            found.append(place)
    return found


def _refuse(error: OSError) -> None:
    raise error


def _listed_images(table: Path) -> list[Path]:
    try:
        rows = list(csv.DictReader(io.StringIO(read_file(table).decode("utf-8-sig")), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise CoopError(f"{table} cannot be read as a CSV file ({first_line(error)})") from error
    if not rows or "path" not in rows[0]:
        raise CoopError(f"{table} has no rows with a column 'path': give the images there, relative to the file")
    return [table.parent / str(row["path"]) for row in rows]


def _as_method(learner: PromptLearner) -> CoOp:
    """Return CoOp with the context of a prompt learner that was trained from Python."""
    options = CoOpOptions(
        n_ctx=learner.n_ctx,
        ctx_position=learner.ctx_position,
        class_specific=learner.class_specific,
        epochs=0,
    )
    method = CoOp(learner.backbone, Classes(learner.class_names), options)
    method.load_state({"ctx": learner.ctx.detach()})
    return method


def _batches(images: Sequence[Any]) -> Iterator[Sequence[Any]]:
    if isinstance(images, str | Path | Image.Image):
        raise CoopError(f"predict got one image, {str(images)[:200]}: give a list of images")
    starts = range(0, len(images), BATCH)
    return (images[start : start + BATCH] for start in track(starts, "classifying images", len(starts)))


def _opened(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Tensor | np.ndarray):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise CoopError(
                f"predict got an array of shape {array.shape} and type {array.dtype}: give uint8 (height, width, 3)"
            )
        return Image.fromarray(array)
    return open_rgb(Path(image))


def _check_top(top: int) -> None:
    if top < 1:
        raise CoopError(f"top={top}: give 1 or more")
