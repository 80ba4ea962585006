"""Zero-shot CLIP: hand-written prompts, one or an ensemble (Radford et al. 2021), or with random words (WaffleCLIP)."""

import math
import random
import statistics
from functools import cache

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.clip.prompts import readable_name
from coop.io import track
from coop.methods.base import Classes, CosineClassifier
from coop.options import WaffleOptions, ZeroShotOptions


class ZeroShot(CosineClassifier):
    """logits = exp(logit scale) * f . w_c, with w_c the mean text feature of the class over the templates."""

    name = "zero_shot"
    Options = ZeroShotOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: ZeroShotOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.text = self.text_features()

    def class_features(self) -> Float[Tensor, "c e"]:
        """Return the hand-written prompts' features."""
        return self.text

    def for_classes(self, classes: Classes) -> "ZeroShot":
        """Return the same templates for other classes."""
        return self.moved(classes)


class Waffle(CosineClassifier):
    """WaffleCLIP: prompts "A photo of a {class}, which has {descriptor}." with random descriptors (Roth et al. 2023).

    w_c is the mean, not normalised again, of the unit features over `repetitions` pairs of descriptors, one of random
    words and one of random characters, the same for all classes: logits are the mean of the prompts' cosines, scaled.
    Descriptors have as many words as class names have on average, of their mean length; see `descriptors`.
    Departures from the released code: words are those of CLIP's vocabulary and characters the lower-case letters and
    digits, where it has a list of English words and the characters of descriptions by a language model; the random
    numbers are others; class names keep their descriptors when classes are added or moved, for all are drawn for the
    classes that the method was first made for.
    """

    name = "waffle"
    Options = WaffleOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: WaffleOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.descriptors = descriptors(classes.names, options.repetitions, options.descriptor_seed)
        self._mean: Tensor | None = None

    @torch.no_grad()
    def class_features(self) -> Float[Tensor, "c e"]:
        """Return the mean of the prompts' unit features."""
        if self._mean is None:
            total = torch.zeros(len(self.classes.names), self.backbone.joint_width, device=self.device)
            for text in track(self.descriptors, "encoding descriptors", len(self.descriptors)):
                template = with_descriptor(self.options.template, text)
                total += F.normalize(self.backbone.encode_template(template, self.classes.names), dim=-1)
            self._mean = total / len(self.descriptors)
        return self._mean

    def for_classes(self, classes: Classes) -> "Waffle":
        """Return the same descriptors for other classes."""
        method = Waffle(self.backbone, classes, self.options, self.seed)
        method.descriptors = self.descriptors
        return method


def with_descriptor(template: str, descriptor: str) -> str:
    """Return the template with ", which has {descriptor}" before its full stop.

    >>> with_descriptor("A photo of a {}.", "foot loud")
    'A photo of a {}, which has foot loud.'
    """
    return f"{template.removesuffix('.')}, which has {descriptor}."


def descriptors(class_names: tuple[str, ...], repetitions: int, seed: int) -> list[str]:
    """Return `repetitions` descriptors of random words and as many of random characters, in turn.

    A descriptor of words has the class names' mean number of words (rounded, at least 1), each cut to their words' mean
    length; one of characters has as many groups of letters and digits, separated by ", ", together just longer than
    the classes' longest words are on average.
    """
    draw = random.Random(seed)
    names = [readable_name(name).split() for name in class_names]
    n_words = max(round(statistics.mean(len(words) for words in names)), 1)
    length = max(round(statistics.mean(statistics.mean(len(word) for word in words) for words in names)), 1)
    longest = statistics.mean(max(len(word) for word in words) for words in names)
    group = math.ceil(longest) // n_words + 1
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    found = []
    for _ in range(repetitions):
        found.append(" ".join(draw.choice(vocabulary_words())[:length] for _ in range(n_words)))
        groups = ("".join(draw.choice(characters) for _ in range(group)) for _ in range(n_words))
        found.append(", ".join(groups))
    return found


@cache
def vocabulary_words() -> tuple[str, ...]:
    """Return the whole words of CLIP's vocabulary that are four letters or longer, in the vocabulary's order."""
    tokens = open_clip.SimpleTokenizer().encoder
    words = (token.removesuffix("</w>") for token in tokens if token.endswith("</w>"))
    return tuple(word for word in words if len(word) >= 4 and word.isascii() and word.isalpha())
