"""CoOp: learned context vectors in place of hand-written words (Zhou et al., IJCV 2022)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.methods.base import Classes, CosineClassifier, Method, TrainedMethod, generator
from coop.options import CoOpOptions


class PromptLearner(nn.Module):
    """Learned context vectors for a list of classes.

    The context `ctx` is (m, d) when unified and (c, m, d) when class-specific, always float32. It starts normally
    distributed with deviation 0.02 (from `generator`), or as the embeddings of `ctx_init`'s BPE tokens, whose number
    then is `n_ctx` (the original counts words separated by spaces, cutting words of several tokens short, and ignores
    `class_specific` when words are given; here each class gets its own copy).
    Raises CoopError for a prompt that does not fit the text tower.
    """

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        n_ctx: int = 16,
        ctx_position: str = "end",
        class_specific: bool = False,
        ctx_init: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not class_names:
            raise CoopError("there are no class names: give at least one")
        if ctx_init is not None:
            _, words = backbone.encode_words(ctx_init)
            n_ctx = len(words)
        if n_ctx < 1:
            raise CoopError(f"n_ctx={n_ctx}: give at least 1 context vector")
        self.backbone = backbone
        self.class_names, self.n_ctx = tuple(class_names), n_ctx
        self.ctx_position, self.class_specific, self.ctx_init = ctx_position, class_specific, ctx_init
        rows = backbone.learned_rows(class_names, n_ctx, ctx_position, class_specific)
        self.encoder = backbone.prompt_encoder(rows)
        copies = (len(class_names),) if class_specific else ()
        if ctx_init is None:
            start = torch.randn(*copies, n_ctx, backbone.width, generator=generator) * 0.02
        else:
            start = words.expand(*copies, -1, -1).clone()
        self.ctx = nn.Parameter(start.to(backbone.device, torch.float32))

    def class_features(self) -> Float[Tensor, "c e"]:
        """Return L2-normalised text features, differentiable in `ctx`."""
        return F.normalize(self.encoder(self.ctx.flatten(0, -2)), dim=-1)


class CoOp(CosineClassifier, TrainedMethod):
    """p(y = i | x) = softmax_i(exp(logit scale) * cos(f(x), g(t_i))), t_i = [V]_1 .. [V]_M [CLASS_i]; V is learned.

    Trained by cross-entropy with the protocol's SGD. Departures from the released code: the context and its optimiser
    are float32 in every precision, and image features come from the cache (`augment.views`).
    """

    name = "coop"
    Options = CoOpOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: CoOpOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.learner = self._learner(classes)

    def _learner(self, classes: Classes) -> PromptLearner:
        o = self.options
        return PromptLearner(
            self.backbone,
            classes.names,
            o.n_ctx or 0,
            o.ctx_position,
            o.class_specific,
            o.ctx_init,
            generator(self.seed),
        )

    def class_features(self) -> Float[Tensor, "c e"]:
        """Return the learned prompts' normalised features."""
        return self.learner.class_features()

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Train the context; the last epoch is the result (`val` is not used)."""
        return {"n_ctx": self.learner.n_ctx, **super().fit(train, val)}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `ctx`, (m, d) or (c, m, d)."""
        return {"ctx": self.learner.ctx}

    def for_classes(self, classes: Classes) -> Method:
        """Return the same context before other class names; a class-specific one does not move."""
        if self.options.class_specific:
            raise CoopError(
                "a class-specific context belongs to the classes that it was learned for and cannot be moved to "
                "others: learn a unified one (class_specific=false)"
            )
        return self.moved(classes)
