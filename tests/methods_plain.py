"""What the tests of methods share: CLIP's text tower in plain steps, and samples of features."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.features import Samples
from coop.methods.base import Classes

NAMES = ("forest", "annual crop land", "great white shark", "abbey", "yin_yang")
CLASSES = Classes(NAMES, "a photo of a {}.")


def encode(backbone: Backbone, prompts: Sequence[str], ctx: Tensor | None = None) -> Tensor:
    """Return text features, not normalised, of whole 77-token sequences; `ctx` replaces the slots after SOT."""
    model: Any = backbone.model
    tokens = backbone.tokenizer(list(prompts))
    x = model.token_embedding(tokens)
    if ctx is not None:
        x = torch.cat([x[:, :1], ctx.expand(len(x), -1, -1), x[:, 1 + ctx.shape[-2] :]], dim=1)
    x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
    x = model.ln_final(x)
    return x[torch.arange(len(x)), tokens.argmax(dim=1)] @ model.text_projection


def with_context(backbone: Backbone, ctx: Tensor, names: Sequence[str] = NAMES) -> Tensor:
    """Return the normalised features of learned prompts, the context before the name."""
    words = " ".join(["X"] * ctx.shape[-2])
    return F.normalize(encode(backbone, [f"{words} {name.replace('_', ' ')}." for name in names], ctx), dim=-1)


@torch.no_grad()
def hand_written(backbone: Backbone, template: str = CLASSES.template, names: Sequence[str] = NAMES) -> Tensor:
    """Return the normalised features of one template."""
    return F.normalize(encode(backbone, [template.format(name.replace("_", " ")) for name in names]), dim=-1)


def sample(backbone: Backbone, shots: int, views: int = 0, seed: int = 0, spread: float = 1.0) -> Samples:
    """Return noisy features around each class's hand-written text feature: learnable, not yet learned."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(NAMES)).repeat_interleave(shots)
    centres = hand_written(backbone)
    directions = F.normalize(centres - centres.mean(dim=0), dim=-1)

    def draw(*size: int) -> Tensor:
        noise = torch.randn(*size, centres.shape[1], generator=random) / centres.shape[1] ** 0.5
        return 3 * (directions[labels] + spread * noise)

    n = len(labels)
    return Samples(labels, draw(n), draw(views, n))


def leaf(tensor: Tensor) -> Tensor:
    """Return a copy that gathers a gradient."""
    return tensor.detach().clone().requires_grad_()
