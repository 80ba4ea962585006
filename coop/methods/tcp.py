"""TCP: textual-based class-aware prompt tuning (Yao et al., CVPR 2024)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.clip.prompts import expand_template, template_rows
from coop.clip.towers import Change, Changes, quick_gelu
from coop.errors import CoopError
from coop.methods.base import Classes, generator, linear
from coop.methods.tower_method import TowerMethod, with_context
from coop.options import TcpOptions

# By dataset, as released: the frozen features' template, and the learned prompt's ("X": a token that is learned).
TEMPLATES: Mapping[str, tuple[str, str]] = {
    "oxford_pets": ("a photo of a {}, a type of pet.", "X X X X {}, a type of pet."),
    "oxford_flowers": ("a photo of a {}, a type of flower.", "X X X X {}, a type of flower."),
    "fgvc_aircraft": ("a photo of an aircraft {}.", "X X X X {}, a type of aircraft."),
    "dtd": ("a photo of a {}, a type of texture.", "X X X X {} texture."),
    "eurosat": ("a centered satellite photo of {}.", "X X X X {}."),
    "stanford_cars": ("a photo of a {}.", "X X X X {}, a type of car"),
    "food101": ("a photo of a {}, a type of food.", "X X X X {}, a type of food."),
    "ucf101": ("a photo of a person doing {}.", "a photo of a person doing {}."),
}
WIDTH_RATIO = 4  # joint width over the hidden width


class TCP(TowerMethod):
    """Shared context and, at the input of one text block, class tokens T_c = W_2 quickgelu(W_1 t*_c + b_1) + b_2.

    t*_c is the frozen unit feature of the class's hand-written prompt; T_c takes the place of the first tokens of the
    context. Loss: CE + 8 (1 - mean_c cos(t_c, t*_c)). Adam with eps 1e-3, as the authors ask for. Below the block all
    classes share their prefix; from it on, only the start token. New classes get T_c from their own t*_c.
    Departures from the released code: learned tensors are float32, and the number of class-aware tokens is an option
    of its own. As released: the context starts at random; the weight W of the configuration does not exist.
    """

    name = "tcp"
    Options = TcpOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: TcpOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        o, random, d, e = options, generator(seed), backbone.width, backbone.joint_width
        blocks = len(backbone.tower.blocks)
        if blocks and o.layer >= blocks:
            raise CoopError(
                f"method=tcp: layer={o.layer} is beyond the text tower: give layer={8 * blocks // 12}, as deep in its "
                f"{blocks} blocks as the released 8 in 12, or another up to {blocks - 1}"
            )
        if o.n_ctx > backbone.tower.context_length:
            raise CoopError(f"n_ctx={o.n_ctx}: the text tower reads {backbone.tower.context_length} tokens")
        teacher, prompt = TEMPLATES.get(classes.dataset, (None, "X X X X {}."))
        prompt = (o.prompt_template or prompt).replace("X X X X", " ".join("X" * o.n_ctx))
        vocabulary, head = backbone.vocabulary, len(backbone.vocabulary.head)
        (before,) = vocabulary.body([prompt[: prompt.find("{}")] if "{}" in prompt else ""])
        if len(before) < max(o.n_ctx, o.class_tokens):
            raise CoopError(
                f"prompt_template={prompt!r} has {len(before)} tokens before the class name, but n_ctx={o.n_ctx} and "
                f"class_tokens={o.class_tokens} are learned there: put an X for each"
            )
        rows = template_rows(vocabulary, prompt, classes.names, backbone.tower.context_length)
        self.prompts = self.encoder(with_context(rows, head, o.n_ctx), class_tokens=(o.layer, o.class_tokens))
        (self.template,) = expand_template(o.template or teacher, classes.template, classes.dataset)[:1]
        self.teacher = F.normalize(backbone.encode_template(self.template, classes.names), dim=-1)
        start = torch.randn(o.n_ctx, d, generator=random) * 0.02
        if o.ctx_init is not None:
            _, words = backbone.encode_words(o.ctx_init)
            if len(words) != o.n_ctx:
                raise CoopError(
                    f"ctx_init={o.ctx_init!r} has {len(words)} tokens, but n_ctx={o.n_ctx}: make them equal"
                )
            start = words.clone()
        self.ctx = nn.Parameter(start.to(backbone.device))
        hidden = max(e // WIDTH_RATIO, 1)
        layers = {
            "linear1": linear(e, hidden, generator=random),
            "linear2": linear(hidden, o.class_tokens * d, generator=random),
        }
        self.meta_net = nn.ModuleDict(layers).to(backbone.device)

    def class_tokens(self) -> Float[Tensor, "c m d"]:
        """Return T, differentiable in the meta-net."""
        hidden = quick_gelu(self.meta_net["linear1"](self.teacher))
        return self.meta_net["linear2"](hidden).view(len(hidden), self.options.class_tokens, -1)

    def text_changes(self) -> Changes:
        """Return the context at the input and T at the input of block `layer`."""
        return Changes(self.ctx, blocks={self.options.layer: Change(tokens=self.class_tokens())})

    def terms(self, features: Float[Tensor, "b e"], labels: Int[Tensor, " b"]) -> dict[str, Float[Tensor, ""]]:
        """Return the two terms of the loss: `ce` and `text`."""
        t = self.class_features()
        logits = self.cosine_logits(self.image_features(features), t)
        near = (t * self.teacher).sum(dim=1).mean()
        return {"ce": F.cross_entropy(logits, labels.to(t.device)), "text": self.options.text_weight * (1 - near)}

    def loss(self, features: Float[Tensor, "b e"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the sum of the terms."""
        terms = self.terms(features, labels)
        return terms["ce"] + terms["text"]

    def optimizer(self) -> torch.optim.Optimizer:
        """Return Adam, with weight decay in its L2 form."""
        o = self.options
        return torch.optim.Adam(self.trainable(), lr=o.lr, eps=o.eps, weight_decay=o.weight_decay)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `ctx` (m, d) and the meta-net's layers, named as in the released code."""
        return {"ctx": self.ctx} | {f"meta_net.{name}": p for name, p in self.meta_net.named_parameters()}
