"""Prompt ensembles: the class features of several learned prompts, averaged (as CLIP does with hand-written ones)."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.io import track
from coop.methods.base import Classes, CosineClassifier, Method, load_parameters
from coop.methods.coop import CoOp
from coop.options import PromptEnsembleOptions


class PromptEnsemble(CosineClassifier):
    """logits = exp(logit scale) * f . w_c, with w_c the normalised mean of the runs' normalised class features.

    The runs are loaded when they are first needed; what is saved are the mean features, which need no runs.
    """

    name = "prompt_ensemble"
    Options = PromptEnsembleOptions
    load_member: ClassVar[Callable[[str, Backbone], Method]]  # of a run's folder; set by coop.learned, which reads it

    def __init__(self, backbone: Backbone, classes: Classes, options: PromptEnsembleOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        if not options.runs:
            raise CoopError("method=prompt_ensemble needs the folders of its runs: runs=[FOLDER,FOLDER]")
        self._loaded: Tensor | None = None

    @cached_property
    def members(self) -> list[CoOp]:
        """The runs' methods, for these classes. Raises CoopError for a run that has no class features of its own."""
        members = []
        for run in track(self.options.runs, "loading runs", len(self.options.runs)):
            member = type(self).load_member(run, self.backbone)
            if not isinstance(member, CoOp):
                raise CoopError(f"{run} is a run of method={member.name}: an ensemble takes coop, kgcoop and prograd")
            moved = member if member.classes.names == self.classes.names else member.for_classes(self.classes)
            assert isinstance(moved, CoOp)
            members.append(moved)
        return members

    @torch.no_grad()
    def class_features(self) -> Float[Tensor, "c e"]:
        """Return the normalised mean of the runs' class features."""
        if self._loaded is None:
            features = torch.stack([member.class_features() for member in self.members])
            self._loaded = F.normalize(features.mean(dim=0), dim=-1)
        return self._loaded

    def state(self) -> dict[str, Tensor]:
        """Return `class_features` (c, e)."""
        return {"class_features": self.class_features()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load mean class features; the runs are not needed then."""
        shape = len(self.classes.names), self.backbone.joint_width
        features = torch.empty(shape, device=self.backbone.device)
        load_parameters(self.name, {"class_features": features}, state)
        self._loaded = features
        self.reset_cache()

    def for_classes(self, classes: Classes) -> "PromptEnsemble":
        """Return an ensemble of the same runs for other classes."""
        return PromptEnsemble(self.backbone, classes, self.options, self.seed)
