"""2SFS: LayerNorms of both towers first, then a linear head (Farina et al., CVPR 2025)."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.clip.towers import Block, Change, Changes
from coop.features import Samples
from coop.methods.base import Classes, generator
from coop.methods.tower_method import FLOOR, StepTrainedTowerMethod, check_depth
from coop.options import TwoStageOptions
from coop.train import Batch, cosine_by_step

NORMS = ("ln_1", "ln_2")


class TwoStage(StepTrainedTowerMethod):
    """Stage 1 trains gain and bias of ln_1 and ln_2 by cross-entropy; stage 2 a head W that starts at the adapted t_c.

    int(fraction n) of n steps are stage 1. Each stage has an AdamW, a cosine and passes over the sample of its own. A
    class that was trained is unit(W_c) at test, any other the adapted text tower's feature (selective inference).
    As released: ln_pre, ln_post and ln_final stay frozen, and weight decay pulls gains towards 0. Departures: learned
    tensors are float32; in stage 2 the adapted image features of a fixed view are computed once.
    """

    name = "two_stage"
    Options = TwoStageOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: TwoStageOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        assert self.images is not None
        self.norms: dict[str, nn.Parameter] = {}
        towers = {
            "text": (backbone.tower.blocks, options.first_text_block),
            "image": (self.images.blocks, options.first_image_block),
        }
        self.prompts = self.template_encoder(classes, options.template)
        for tower, (blocks, first) in towers.items():
            if options.towers in ("both", tower):
                check_depth(self.name, f"first_{tower}_block", first, len(blocks) - 1, tower)
                self.norms |= _norms(tower, blocks, first)
        self.stage, self.random = 1, generator(seed)
        self.trained_names = classes.names
        self.head = nn.Parameter(self.adapted_text())

    def changes(self, tower: str) -> Changes:
        """Return the LayerNorms of one tower."""
        numbers = sorted({int(name.split(".")[1]) for name in self.norms if name.startswith(tower)})

        def pair(i: int, norm: str) -> tuple[Tensor, Tensor]:
            return self.norms[f"{tower}.{i}.{norm}.weight"], self.norms[f"{tower}.{i}.{norm}.bias"]

        return Changes(blocks={i: Change(ln_1=pair(i, "ln_1"), ln_2=pair(i, "ln_2")) for i in numbers})

    def text_changes(self) -> Changes:
        """Return the text tower's LayerNorms."""
        return self.changes("text")

    def image_changes(self) -> Changes:
        """Return the image tower's LayerNorms."""
        return self.changes("image")

    @torch.no_grad()
    def adapted_text(self) -> Float[Tensor, "c e"]:
        """Return the adapted text tower's class features, normalised."""
        return F.normalize(self.prompts(self.text_changes()), dim=-1)

    def class_features(self) -> Float[Tensor, "c e"]:
        """Return what the stage trains: the text tower's class features, or the head's rows."""
        return super().class_features() if self.stage == 1 else F.normalize(self.head, dim=-1)

    def test_class_features(self) -> Float[Tensor, "c e"]:
        """Return the head's rows for trained classes, the adapted text tower's features for others."""
        head = F.normalize(self.head, dim=-1)
        if self.classes.names == self.trained_names:
            return head
        known = dict(zip(self.trained_names, head, strict=True))
        text = self.adapted_text()
        return torch.stack([known.get(name, text[i]) for i, name in enumerate(self.classes.names)])

    def image_features(self, inputs: Shaped[Tensor, "b *row"]) -> Float[Tensor, "b e"]:
        """Return image features, normalised; in stage 2 without gradient, and kept for the rows of the sample."""
        if self.stage == 1 or inputs.ndim > 1:
            return super().image_features(inputs)
        with torch.no_grad():
            return self.frozen("adapted", inputs, super().image_features)

    def run_training(self, train_set: Samples, val: Samples) -> list[float]:
        """Train both stages; return every step's loss."""
        losses: list[float] = []
        self.random = generator(self.seed)
        for self.stage in (1, 2):
            if self.stage == 2:
                self.head.data.copy_(self.adapted_text())
            losses += super().run_training(train_set, val)
        self.stage = 1
        return losses

    def stage_steps(self) -> int:
        """Return the number of steps of the stage."""
        steps = self.options.steps or 0
        first = int(steps * self.options.fraction)
        return first if self.stage == 1 else steps - first

    def rates(self, per_epoch: int) -> list[float]:
        """Return the learning rates of the stage."""
        return cosine_by_step(self.stage_steps(), self.options.lr, final=FLOOR)

    def batches(self, train_set: Samples) -> Iterator[Batch]:
        """Yield the batches of the stage."""
        return self.passes(train_set, self.stage_steps(), self.random)

    def trainable(self) -> list[nn.Parameter]:
        """Return the LayerNorms, or in stage 2 the head."""
        return list(self.norms.values()) if self.stage == 1 else [self.head]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `tower.block.norm.weight` and `.bias` (width,), and `head` (c, e)."""
        return {**self.norms, "head": self.head}

    def for_classes(self, classes: Classes) -> "TwoStage":
        """Return the adapted towers for other classes, among which trained ones keep their row of the head."""
        method = TwoStage(self.backbone, classes, self.options, self.seed)
        method.head = nn.Parameter(self.head.detach().clone())
        method.trained_names = self.trained_names
        method.load_state(self.state())
        return method

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """Return the model's state_dict with the adapted LayerNorms: a checkpoint for open_clip, without the head."""
        state: Mapping[str, Tensor] = self.backbone.model.state_dict()
        prefixes = {"text": self.backbone.tower.prefix, "image": "visual."}
        changed = {}
        for name, parameter in self.norms.items():
            tower, rest = name.split(".", 1)
            key = f"{prefixes[tower]}transformer.resblocks.{rest}"
            changed[key] = parameter.detach().to(state[key].dtype)
        return {name: changed.get(name, tensor).clone() for name, tensor in state.items()}


def _norms(tower: str, blocks: list[Block], first: int) -> dict[str, nn.Parameter]:
    """Return copies of the gains and biases of blocks from `first` on, in float32."""
    out = {}
    for i in range(first, len(blocks)):
        for norm in NORMS:
            module: nn.LayerNorm = getattr(blocks[i], norm)
            for part in ("weight", "bias"):
                out[f"{tower}.{i}.{norm}.{part}"] = nn.Parameter(getattr(module, part).detach().float().clone())
    return out
