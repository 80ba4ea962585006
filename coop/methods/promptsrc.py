"""PromptSRC: prompts in both towers that are held near the frozen model (Khattak et al., ICCV 2023)."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.clip.prompts import IMAGENET_80, readable_name
from coop.errors import CoopError
from coop.features import Samples
from coop.methods.base import Classes
from coop.methods.deep_prompts import Ivlp
from coop.options import PromptSRCOptions

EARLY, LATE = (30.0, 30.0), (45.0, 5.0)  # mean and deviation of the released Gaussians, for 50 epochs
RELEASED = {
    **dict.fromkeys(("imagenet", "caltech101", "oxford_pets", "food101", "ucf101", "sun397"), EARLY),
    **dict.fromkeys(("stanford_cars", "oxford_flowers", "fgvc_aircraft", "dtd", "eurosat"), LATE),
}
# The released teacher averages 60 of OpenAI's 80 templates, all but these.
LEFT_OUT = (
    "a jpeg corrupted photo of the {}.", "a good photo of a {}.", "a plushie {}.", "a photo of the nice {}.",
    "a photo of the small {}.", "a photo of the weird {}.", "the cartoon {}.", "art of the {}.", "a drawing of the {}.",
    "a photo of the large {}.", "a black and white photo of a {}.", "the plushie {}.", "a dark photo of a {}.",
    "itap of a {}.", "graffiti of the {}.", "a toy {}.", "itap of my {}.", "a photo of a cool {}.",
    "a photo of a small {}.", "a tattoo of the {}.",
)  # fmt: skip
TEACHER_TEMPLATES = tuple(template for template in IMAGENET_80 if template not in LEFT_OUT)


class PromptSRC(Ivlp):
    """IVLP with the loss CE(p) + 25 mean|t - t*| + 10 mean|f - f*| + (1 / BC) sum_bc q (log q - log p).

    t, f and p are the prompted class features, image features and probabilities, starred and q those of the frozen
    model: t* the unit mean of the unnormalised features of 60 templates, f* of the same view. The result is the sum
    over epochs i = 1 .. E of g_i times the parameters after epoch i, g a Gaussian normalised over the epochs.
    As released: the divergence is KL(frozen || prompted), divided by images and classes. Departures: learned tensors
    are float32; f* of a fixed view is computed once; the released choice of the Gaussian by dataset is an option
    (`average=released_per_dataset`), not the default.
    """

    name = "promptsrc"
    Options = PromptSRCOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: PromptSRCOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self._teacher: Tensor | None = None
        self.weights = self.epoch_weights()
        self._sums: dict[str, Tensor] = {}

    def epoch_weights(self) -> Float[Tensor, " epochs"]:
        """Return g. Raises CoopError for `released_per_dataset` where the authors chose none."""
        o: PromptSRCOptions = self.options
        mean, deviation = o.average_mean, o.average_deviation
        if o.average == "released_per_dataset":
            if self.classes.dataset not in RELEASED or o.epochs != 50:
                raise CoopError(
                    f"average=released_per_dataset was asked for {self.classes.dataset or 'a dataset without a name'} "
                    f"and {o.epochs} epochs, but the authors chose for 50 epochs and {', '.join(RELEASED)}: "
                    "use average=gaussian"
                )
            mean, deviation = RELEASED[self.classes.dataset]
        epochs = range(1, (o.epochs or 0) + 1)
        logs = torch.tensor([-((i - mean) ** 2) / (2 * deviation**2) for i in epochs], dtype=torch.float64)
        return logs.softmax(dim=0)

    @torch.no_grad()
    def teacher_text(self) -> Float[Tensor, "c e"]:
        """Return t*, normalised."""
        if self._teacher is None:
            names = [readable_name(name) for name in self.classes.names]
            encoded = self.backbone.encode_texts([t.format(name) for t in TEACHER_TEMPLATES for name in names])
            self._teacher = F.normalize(encoded.view(len(TEACHER_TEMPLATES), len(names), -1).mean(dim=0), dim=-1)
        return self._teacher

    def terms(self, inputs: Shaped[Tensor, "b *row"], labels: Int[Tensor, " b"]) -> dict[str, Float[Tensor, ""]]:
        """Return the four terms of the loss: `ce`, `text`, `image`, `logits`."""
        o = self.options
        f, t = self.image_features(inputs), self.class_features()
        f_star, t_star = self.frozen_features(inputs), self.teacher_text()
        logits, teacher = self.cosine_logits(f, t), self.cosine_logits(f_star, t_star)
        log_p, log_q = logits.log_softmax(dim=1), teacher.log_softmax(dim=1)
        return {
            "ce": F.cross_entropy(logits, labels.to(logits.device)),
            "text": o.text_weight * (t - t_star).abs().mean(),
            "image": o.image_weight * (f - f_star).abs().mean(),
            "logits": o.logits_weight * F.kl_div(log_p, log_q, reduction="sum", log_target=True) / logits.numel(),
        }

    def loss(self, inputs: Shaped[Tensor, "b *row"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the sum of the four terms."""
        return torch.stack(list(self.terms(inputs, labels).values())).sum()

    @torch.no_grad()
    def after_epoch(self, epoch: int, val: Samples) -> None:
        """Add the parameters to the weighted sum."""
        weight = float(self.weights[epoch])
        for name, parameter in self.parameters().items():
            self._sums[name] = self._sums.get(name, 0) + weight * parameter.detach()

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Train, then take the average over the epochs (unless `average=none`)."""
        self._sums = {}
        result = super().fit(train, val)
        if self.options.average != "none" and self._sums:
            self.load_state(self._sums)
        return result

    def for_classes(self, classes: Classes) -> "PromptSRC":
        """Return the same prompts for other classes, of any dataset."""
        method = PromptSRC(self.backbone, classes, replace(self.options, average="none"), self.seed)
        method.load_state(self.state())
        return method
