"""What a run learned, as one safetensors file that says what it is and which weights it belongs to."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coop.backbone import Backbone, load_backbone
from coop.config import method_options
from coop.errors import CoopError, unknown
from coop.methods import METHODS, Classes, Method
from coop.paths import written_whole

FILE = "learned.safetensors"
FORMAT = "1"


@dataclass(frozen=True)
class Artefact:
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
    def of(cls, method: Method) -> "Artefact":
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
        with written_whole(path) as temporary:
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


def load_artefact(place: Path | str) -> Artefact:
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
        about = {f.name: json.loads(metadata[f.name]) for f in dataclasses.fields(Artefact) if f.name != "state"}
        classes = about.pop("classes")
        about["classes"] = Classes(tuple(classes["names"]), classes["template"], classes["dataset"])
    except (KeyError, ValueError, TypeError) as error:
        raise CoopError(f"{path} is damaged: its description cannot be read ({error})") from error
    if about["method"] not in METHODS:
        raise unknown("method", about["method"], METHODS)
    return Artefact(**about, state=state)


def load_method(place: Path | str, device: str = "auto", backbone: Backbone | None = None) -> Method:
    """Return the method that a run learned, on the backbone that it was learned on (loaded unless given)."""
    artefact = load_artefact(place)
    return artefact.restore(backbone or artefact.load_backbone(device))
