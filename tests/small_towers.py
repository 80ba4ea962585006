"""One small random model for each family of open_clip's text towers, and the plain way to compute its prompts."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import open_clip
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor

from coop.clip.backbone import Backbone

TOKENIZER = open_clip.SimpleTokenizer()  # one for all tests: making it takes 0.05 s
NAMES = ("forest", "annual crop land", "great white shark", "abbey", "yin_yang", "pond")
VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}


@dataclass(frozen=True)
class Words:
    """A tokenizer that gives every word a number; `head`, `tail` and `pad` as the family's own has them."""

    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    pad: int = 0
    length: int = 64

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        length = context_length or self.length
        words = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in texts]
        rows = [[*self.head, *(10 + zlib.crc32(w.encode()) % 900 for w in row), *self.tail] for row in words]
        return torch.tensor([(row + [self.pad] * length)[:length] for row in rows])


@dataclass(frozen=True)
class Family:
    """`shares`: whether the tower is one that can share prefixes."""

    text: dict[str, Any]
    shares: bool = True
    custom: bool = True  # CustomTextCLIP, not CLIP
    tokenizer: Any = TOKENIZER
    model: dict[str, Any] = field(default_factory=dict)


# scaled_cosine_attn is missing: open_clip 3.3 itself fails on it
CUSTOM_BLOCKS = ("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
SIGLIP = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "vocab_size": 1000}
SIGLIP_EPS = {"norm_kwargs": {"eps": 1e-2}}  # larger than SigLIP's 1e-6, so that forgetting it shows
BIASED = {"init_logit_bias": -10.0}

FAMILIES = {
    "CLIP with QuickGELU": Family({}, custom=False, model={"quick_gelu": True}),
    "CLIP with GELU": Family({}, custom=False),
    "CLIP pooled at eos": Family({"pool_type": "eos", "eos_id": 49407}, custom=False),
    "CustomTextCLIP (EVA)": Family({}),
    "short context (PE)": Family({"context_length": 32}),
    "LayerScale": Family({"ls_init_value": 0.3}),
    "norm_kwargs": Family(SIGLIP_EPS),
    "GELU's tanh": Family({"act_kwargs": {"approximate": "tanh"}}),
    "mlp_ratio": Family({"mlp_ratio": 2.5}),
    "no projection": Family({"proj_type": "none"}),
    "projection with bias": Family({"proj_bias": True}),
    "no causal mask (MobileCLIP)": Family({"no_causal_mask": True}, shares=False),
    "padding mask": Family({"no_causal_mask": True, "use_pad_mask": True}, shares=False),
    "SigLIP 16": Family({**SIGLIP, **SIGLIP_EPS, "context_length": 16}, False, tokenizer=Words(pad=1), model=BIASED),
    "SigLIP 64": Family({**SIGLIP, "context_length": 64}, False, tokenizer=Words(pad=1), model=BIASED),
    "SigLIP 2": Family({**SIGLIP, "context_length": 64}, False, tokenizer=Words(tail=(1,)), model=BIASED),
    "CLIPA": Family(
        {"context_length": 32, "pool_type": "last", "no_causal_mask": True, "vocab_size": 1000},
        False, False, Words(head=(101,)),
    ),
    "pooled at the first token": Family({"pool_type": "first", "no_causal_mask": True}, shares=False),
    "causal, pooled last": Family({"pool_type": "last"}, shares=False),
    **{name: Family({name: True}, shares=False) for name in CUSTOM_BLOCKS},
}  # fmt: skip


def small_backbone(family: Family, dtype: torch.dtype | None = None) -> Backbone:
    """Return the family's model, two layers and 32 wide; no text weight is left at its initial 0 or 1."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, **family.text}
    use_pad_mask = text.pop("use_pad_mask", False)
    kind = open_clip.CustomTextCLIP if family.custom else open_clip.CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(32, VISION, text, cast_dtype=dtype, **family.model)
        if use_pad_mask:  # open_clip's configurations cannot ask for it
            model.text = TextTransformer(**{**text, "output_dim": 32, "use_pad_mask": True})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "embedding" in name:
                    parameter.mul_(10)
                elif not name.startswith(("visual", "logit")):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    if dtype is not None:
        open_clip.convert_weights_to_lp(model, dtype)
    return Backbone(model, lambda image: image, family.tokenizer)


def plain_features(backbone: Backbone, ctx: Tensor, position: str, names: Sequence[str] = NAMES) -> Tensor:
    """Return class features by open_clip's own `encode_text`, full length, with `ctx` put in as the original does.

    `ctx` is (m, d), or (c, m, d) class-specific. The tokens of "X X .. X name." go in; their embeddings are replaced.
    """
    m = ctx.shape[-2]
    model: Any = backbone.model
    text: Any = getattr(model, "text", model)
    readable_name = [name.replace("_", " ") for name in names]
    head, pad = len(backbone.vocabulary.head), backbone.vocabulary.pad
    alone = (backbone.tokenizer(readable_name) != pad).sum(dim=1) - (backbone.tokenizer([""]) != pad).sum()

    def substitute(module: Any, inputs: Any, embedded: Tensor) -> Tensor:
        rows = []
        for i, row in enumerate(embedded):
            own = ctx[i] if ctx.ndim == 3 else ctx
            name, rest = row[head + m :].tensor_split([int(alone[i])])
            first, second = own.tensor_split([{"end": m, "middle": m // 2, "front": 0}[position]])
            rows.append(torch.cat([row[:head], first, name, second, rest]))
        return torch.stack(rows)

    prompts = [" ".join(["X"] * m) + f" {name}." for name in readable_name]
    hook = text.token_embedding.register_forward_hook(substitute)
    try:
        ids = backbone.tokenizer(prompts, context_length=text.context_length)
        return model.encode_text(ids.to(backbone.device)).float()
    finally:
        hook.remove()
