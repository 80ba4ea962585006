"""A view of open_clip's text towers: the one place, with `coop.clip.backbone`, that knows their insides.

Whether a tower can share prefixes is decided by what it is, not by its name: a causal mask, pooling at the
end-of-text token and standard residual blocks. Every other native tower runs its full sequences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import LayerScale, QuickGELU, ResidualAttentionBlock
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
        self.layers = len(self.transformer.resblocks)
        self.width: int = self.token_embedding.shape[1]
        self.dtype: torch.dtype = self.transformer.get_cast_dtype()
        self.device = self.token_embedding.device
        standard = all(type(block) is ResidualAttentionBlock for block in self.transformer.resblocks)
        self.shares_prefixes = self.attn_mask is not None and self.pool in ("argmax", "eos") and standard
        self.heads: int = self.transformer.resblocks[0].attn.num_heads
        self.blocks = [_open(block) for block in self.transformer.resblocks] if self.shares_prefixes else []

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
            return self.projection(x).float()
        return (x if self.projection is None else x @ self.projection.to(x.dtype)).float()

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


def _unsupported(model: str, kind: str) -> CoopError:
    return CoopError(
        f"'{model}' has a text tower of a kind that is not supported, {kind}: "
        "choose a CLIP, EVA, PE, MobileCLIP or SigLIP model with open_clip's own text tower"
    )


def layer_norm(x: Float[Tensor, "*b d"], norm: nn.LayerNorm, dtype: torch.dtype) -> Float[Tensor, "*b d"]:
    """Normalise in float32, whatever the tower's precision, and return `dtype`."""
    out = F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
    return out.to(dtype)


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
