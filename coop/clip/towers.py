"""Views of open_clip's towers: the one place, with `coop.clip.backbone`, that knows their insides.

Whether a text tower can share prefixes is decided by what it is, not by its name: a causal mask, pooling at the
end-of-text token and standard residual blocks. Every other native tower runs its full sequences.

A method that changes a tower never touches its weights: it hands a `Changes` to the loop over the blocks, which stands
in `ImageTower.run` for images and in `coop.clip.encode_deep` for prompts; both run `run_block`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import LayerScale, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from coop.errors import CoopError


@dataclass(frozen=True)
class Block:
    """The frozen tensors of one residual attention block; linear weights are (out, in)."""

    ln_1: nn.LayerNorm
    qkv_weight: Tensor
    qkv_bias: Tensor
    out: nn.Linear
    ln_2: nn.LayerNorm
    c_fc: nn.Linear
    activation: Callable[[Tensor], Tensor]
    c_proj: nn.Linear
    scale_1: Tensor | None
    scale_2: Tensor | None


class TextTower:
    """The text half of a `CLIP` or `CustomTextCLIP`, opened up.

    Raises CoopError for towers that are not open_clip's own (CoCa, Hugging Face text models).
    """

    def __init__(self, model: Any) -> None:
        name = type(model).__name__
        if name == "CoCa" or hasattr(model, "text_decoder"):
            raise _unsupported(name, "CoCa")
        text = model.text if hasattr(model, "text") else model
        if not hasattr(text, "token_embedding") or not hasattr(getattr(text, "transformer", None), "resblocks"):
            raise _unsupported(name, f"{type(text).__name__} (Hugging Face)")
        if getattr(text, "cls_emb", None) is not None:
            raise _unsupported(name, "appended class embedding (CoCa)")
        self.transformer = text.transformer
        self.token_embedding: Tensor = text.token_embedding.weight
        self.positional_embedding: Tensor = text.positional_embedding
        self.attn_mask: Tensor | None = text.attn_mask
        self.ln_final: nn.LayerNorm = text.ln_final
        self.projection: nn.Linear | Tensor | None = text.text_projection
        self.pool: str = text.text_pool_type if hasattr(text, "text_pool_type") else text.pool_type
        self.pad_mask: Callable[..., Tensor] | None = (
            text._build_additive_mask if getattr(text, "use_pad_mask", False) else None
        )
        self.context_length: int = text.context_length
        self.prefix = "text." if text is not model else ""  # of the names of its tensors
        self.layers = len(self.transformer.resblocks)
        self.width: int = self.token_embedding.shape[1]
        self.dtype: torch.dtype = self.transformer.get_cast_dtype()
        self.device = self.token_embedding.device
        standard = all(type(block) is ResidualAttentionBlock for block in self.transformer.resblocks)
        self.shares_prefixes = self.attn_mask is not None and self.pool in ("argmax", "eos") and standard
        self.heads: int = self.transformer.resblocks[0].attn.num_heads
        self.blocks = [_open(block) for block in self.transformer.resblocks] if standard else []

    @property
    def joint_width(self) -> int:
        """The width e of what `project` returns."""
        if self.projection is None:
            return self.width
        if isinstance(self.projection, nn.Linear):
            return self.projection.out_features
        return self.projection.shape[1]

    def project(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """Return the final layer norm and projection of pooled states, in float32."""
        x = layer_norm(x, self.ln_final, self.dtype)
        if isinstance(self.projection, nn.Linear):
            return wide(self.projection(x))
        return wide(x if self.projection is None else x @ self.projection.to(x.dtype))

    def run_full(self, x: Float[Tensor, "c l d"], ids: Tensor, pooled: Tensor) -> Float[Tensor, "c d"]:
        """Return the state at position `pooled[i]` of each full sequence, by the tower's own blocks.

        `ids` (c, l) are the token ids, any non-padding id standing for a context vector: padding masks need them.
        """
        mask = self.attn_mask
        if self.pad_mask is not None:
            mask = self.pad_mask(ids, ids.shape[1], self.dtype)
        x = self.transformer(x.to(self.dtype), attn_mask=mask)
        return x[torch.arange(len(x), device=x.device), pooled].float()


def check_config(architecture: str, config: Mapping[str, Any]) -> None:
    """Raise CoopError for an open_clip configuration with a text tower that is not supported: nothing is loaded."""
    if "multimodal_cfg" in config or config["text_cfg"].get("embed_cls"):
        raise _unsupported(architecture, "CoCa")
    if config["text_cfg"].get("hf_model_name"):
        raise _unsupported(architecture, "Hugging Face")


@dataclass(frozen=True)
class LowRank:
    """An update of a weight: W h + b + scale * up @ down @ drop(h), with `down` (r, d) and `up` (d, r)."""

    down: Float[Tensor, "r d"]
    up: Float[Tensor, "d r"]
    scale: float = 1.0
    drop: Callable[[Tensor], Tensor] | None = None

    def __call__(self, h: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Return the update of the output, in the precision of `h`."""
        h = h if self.drop is None else self.drop(h)
        return F.linear(F.linear(h, self.down.to(h.dtype)), self.up.to(h.dtype)) * self.scale

    def weight(self) -> Float[Tensor, "d d"]:
        """Return what the update adds to W where nothing is dropped."""
        return self.scale * self.up @ self.down


@dataclass(frozen=True)
class Change:
    """What a method changes in one block; everything left out stays as it is.

    `tokens` (m, d), or (c, m, d) in prompts where each class has its own, take the place of others at the block's
    input, or with `insert` come between; `low_rank` updates the weights of "q", "k", "v" or "o"; `ln_1` and `ln_2`
    are gains and biases; `adapter` is added to the block's output, as a function of ln_1 of its input.
    """

    tokens: Float[Tensor, "*c m d"] | None = None
    insert: bool = False
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    ln_1: tuple[Tensor, Tensor] | None = None
    ln_2: tuple[Tensor, Tensor] | None = None
    adapter: Callable[[Tensor], Tensor] | None = None


UNCHANGED = Change()


@dataclass(frozen=True)
class Changes:
    """What a method changes in one tower, in one pass.

    `context` (m, d) are tokens at the input: in prompts the rows of the context table, in images tokens after the
    patches and before ln_pre. `embedding` is added to the token embeddings before positions (prompts), or to ln_pre's
    output (images), as a function of them. `blocks` counts from 0.
    """

    context: Float[Tensor, "m d"] | None = None
    embedding: Callable[[Tensor], Tensor] | None = None
    blocks: Mapping[int, Change] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """The block whose input is still the frozen tower's; -1 if the tower's own input is changed."""
        if self.context is not None or self.embedding is not None:
            return -1
        return min(self.blocks, default=10**9)


def _unsupported(model: str, kind: str) -> CoopError:
    return CoopError(
        f"'{model}' has a text tower of a kind that is not supported, {kind}: "
        "choose a CLIP, EVA, PE, MobileCLIP or SigLIP model with open_clip's own text tower"
    )


def wide(x: Tensor) -> Tensor:
    """Return `x` in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(
    x: Float[Tensor, "*b d"],
    norm: nn.LayerNorm,
    dtype: torch.dtype,
    gain_bias: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "*b d"]:
    """Normalise in float32 at least, whatever the tower's precision, and return `dtype`; `gain_bias` replaces both."""
    gain, bias = gain_bias or (norm.weight, norm.bias)
    x = wide(x)
    return F.layer_norm(x, norm.normalized_shape, gain.to(x.dtype), bias.to(x.dtype), norm.eps).to(dtype)


def quick_gelu(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """X * sigmoid(1.702 x), written as the fused silu: one saved tensor instead of three."""
    return F.silu(x * 1.702) * (1 / 1.702)


def _open(block: ResidualAttentionBlock) -> Block:
    activation = block.mlp.gelu
    return Block(
        ln_1=block.ln_1,
        qkv_weight=block.attn.in_proj_weight,
        qkv_bias=block.attn.in_proj_bias,
        out=block.attn.out_proj,
        ln_2=block.ln_2,
        c_fc=block.mlp.c_fc,
        activation=quick_gelu if isinstance(activation, QuickGELU) else activation,
        c_proj=block.mlp.c_proj,
        scale_1=block.ls_1.gamma if isinstance(block.ls_1, LayerScale) else None,
        scale_2=block.ls_2.gamma if isinstance(block.ls_2, LayerScale) else None,
    )


def run_block(
    block: Block,
    x: Float[Tensor, "*b d"],
    change: Change,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    dtype: torch.dtype,
    select: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "*b2 d"]:
    """Return x + attention + MLP (+ adapter) of one residual block, with what `change` changes (its tokens excepted).

    `x` is the float32 stream, weights and products have `dtype`. `attend` maps queries, keys and values, all (*b, d),
    to the heads' outputs. With `select`, which takes some rows of a (*b, d), only those rows are returned.
    """
    normed = layer_norm(x, block.ln_1, dtype, change.ln_1)
    asking = normed if select is None else select(normed)
    d, weight, bias = x.shape[-1], block.qkv_weight, block.qkv_bias
    if select is None:
        q, k, v = F.linear(normed, weight, bias).split(d, dim=-1)
    else:
        q = F.linear(asking, weight[:d], bias[:d])
        k, v = F.linear(normed, weight[d:], bias[d:]).split(d, dim=-1)
    update = change.low_rank
    q = q + update["q"](asking) if "q" in update else q
    k = k + update["k"](normed) if "k" in update else k
    v = v + update["v"](normed) if "v" in update else v
    heads = attend(q, k, v)
    out = F.linear(heads, block.out.weight, block.out.bias)
    out = out + update["o"](heads) if "o" in update else out
    x = (x if select is None else select(x)) + (out if block.scale_1 is None else out * block.scale_1)
    hidden = F.linear(layer_norm(x, block.ln_2, dtype, change.ln_2), block.c_fc.weight, block.c_fc.bias)
    out = F.linear(block.activation(hidden), block.c_proj.weight, block.c_proj.bias)
    x = x + (out if block.scale_2 is None else out * block.scale_2)
    return x if change.adapter is None else x + change.adapter(asking)


class ImageTower:
    """The image half of a model whose image tower is open_clip's own vision transformer, opened up.

    Raises CoopError for every other image tower (ResNets, timm models, attention pooling): it has no visual tokens
    that a method could add to, or none in blocks that are known here.
    """

    def __init__(self, model: Any) -> None:
        visual = model.visual
        blocks = list(getattr(getattr(visual, "transformer", None), "resblocks", ()))
        known = type(visual) is VisionTransformer and all(type(block) is ResidualAttentionBlock for block in blocks)
        if not known or visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            raise CoopError(
                f"the image tower is a {type(visual).__name__} whose blocks cannot be changed: choose a backbone with "
                "open_clip's own vision transformer (ViT-B-32, ViT-B-16, ViT-L-14), or a method that reads features"
            )
        self.visual = visual
        self.layers = len(blocks)
        self.width: int = visual.conv1.out_channels
        self.heads: int = blocks[0].attn.num_heads
        self.blocks = [_open(block) for block in blocks]
        self.dtype: torch.dtype = visual.conv1.weight.dtype
        self.device = visual.conv1.weight.device
        self.patches: int = visual.positional_embedding.shape[0] - 1
        self.projection: Tensor | None = visual.proj

    @torch.no_grad()
    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b l d"]:
        """Return class token and patches with positions, before ln_pre: frozen under every method."""
        v = self.visual
        x = wide(v.conv1(images.to(self.device, self.dtype)).flatten(2).transpose(1, 2))
        first = wide(v.class_embedding).expand(len(x), 1, -1)
        return torch.cat([first, x], dim=1) + wide(v.positional_embedding)

    def normalise(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Return ln_pre of token states."""
        return x if isinstance(self.visual.ln_pre, nn.Identity) else wide(layer_norm(x, self.visual.ln_pre, x.dtype))

    @torch.no_grad()
    def frozen(self, images: Float[Tensor, "b 3 h w"], block: int) -> Float[Tensor, "b l d"]:
        """Return the unchanged tower's states at the input of `block`, or for -1 those of `embed`."""
        x = self.embed(images)
        return x if block < 0 else self._run(self.normalise(x), Changes(), 0, block, None)

    def run(
        self, x: Float[Tensor, "b l d"], changes: Changes, block: int = -1, keep: int | None = None
    ) -> Float[Tensor, "b k d"]:
        """Return the states after the last block, of the first `keep` tokens, from those that `frozen` gave.

        `block` is the one that `x` is the input of; it must not lie above the first change. `keep` is cut short
        by the tower where its pooling needs more.
        """
        assert block <= changes.first, "the first change lies below the cached states"
        if block < 0:
            if changes.context is not None:
                x = torch.cat([x, wide(changes.context).expand(len(x), -1, -1)], dim=1)
            x = self.normalise(x)
            if changes.embedding is not None:
                x = x + changes.embedding(x.to(self.dtype))
        if self.visual.pool_type == "avg":
            keep = None
        return self._run(x, changes, max(block, 0), self.layers, keep)

    def _run(self, x: Tensor, changes: Changes, start: int, stop: int, keep: int | None) -> Tensor:
        for i in range(start, stop):
            change = changes.blocks.get(i, UNCHANGED)
            if change.tokens is not None:
                x = self._with_tokens(x, change.tokens, change.insert, changes)
            last = i == self.layers - 1 and keep is not None
            x = run_block(
                self.blocks[i], x, change, self._attend, self.dtype, (lambda y: y[:, :keep]) if last else None
            )
        return x

    def _with_tokens(self, x: Tensor, tokens: Tensor, insert: bool, changes: Changes) -> Tensor:
        """Insert tokens after the class token, or replace those that stand there or, of `context`, at the end."""
        m = tokens.shape[-2]
        tokens = wide(tokens).expand(len(x), -1, -1)
        if changes.context is not None:
            return torch.cat([x[:, :-m], tokens], dim=1)
        return torch.cat([x[:, :1], tokens, x[:, 1 if insert else 1 + m :]], dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def pool(self, x: Float[Tensor, "b l d"], inserted: int = 0) -> Float[Tensor, "b d"]:
        """Return the pooled state, after ln_post, of `run`'s result with `inserted` tokens behind the class token."""
        if self.visual.pool_type == "tok":
            return self.post_norm(x[:, 0])
        patches = x[:, 1 + inserted : 1 + inserted + self.patches]
        if self.visual.final_ln_after_pool:
            return self.post_norm(patches.mean(dim=1))
        return self.post_norm(patches).mean(dim=1)

    def post_norm(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Return ln_post of states."""
        return layer_norm(x, self.visual.ln_post, self.dtype)

    def project(self, x: Float[Tensor, "b d"], projection: Float[Tensor, "d e"] | None = None) -> Float[Tensor, "b e"]:
        """Return image features, not normalised, of pooled states; `projection` takes the place of the tower's."""
        projection = self.projection if projection is None else projection
        return wide(x if projection is None else x @ projection.to(x.dtype))
