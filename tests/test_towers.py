"""The views of the towers against open_clip's own forward passes, unchanged and changed by hooks on its modules."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.clip.encode_deep import DeepPromptEncoder
from coop.clip.prompts import context_slot
from coop.clip.towers import Change, Changes, ImageTower, LowRank, TextTower
from coop.errors import CoopError
from tests.small_towers import FAMILIES, NAMES, TOKENIZER, small_backbone

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
VISION = {"image_size": 16, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16}
VISIONS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean of the patches": {"pool_type": "avg"},
    "mean, then norm": {"pool_type": "avg", "final_ln_after_pool": True},
    "no ln_pre": {"no_ln_pre": True},
    "LayerScale": {"ls_init_value": 0.3},
    "sine positions": {"pos_embed_type": "sin_cos_2d"},
}


def small_clip(custom: bool = False, dtype: torch.dtype = torch.float32, **vision: Any) -> Any:
    """Return a model of three layers a tower, no weight of which is left at its initial 0 or 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        model = kind(24, {**VISION, **vision}, dict(TEXT), quick_gelu=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim:
                    parameter.mul_(10) if "embedding" in name else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def backbone_of(model: Any) -> Backbone:
    return Backbone(model, lambda image: image, TOKENIZER)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(count: int = 3) -> Tensor:
    return random(count, 3, 16, 16, seed=5)


def rows_of(backbone: Backbone, n_ctx: int = 0) -> list[tuple[int, ...]]:
    """Return the prompts "a photo of a NAME.", the first words being context."""
    bodies = backbone.vocabulary.body([f"a photo of a {name}." for name in NAMES])
    slots = [context_slot(k) for k in range(n_ctx)]
    return [backbone.vocabulary.close([*slots, *body[n_ctx:]]) for body in bodies]


def writes(blocks: Any, tokens: dict[int, Tensor], start: int, stack: ExitStack) -> None:
    """Let open_clip's blocks find `tokens[i]` at positions `start` on (from the end, if negative) of their input."""

    def hook(new: Tensor) -> Callable[..., Any]:
        def write(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0].clone()
            first = x.shape[1] + start if start < 0 else start
            x[:, first : first + new.shape[-2]] = new
            return (x, *args[1:])

        return write

    for i, new in tokens.items():
        handle = blocks[i].register_forward_pre_hook(hook(new))
        stack.callback(handle.remove)


@pytest.mark.parametrize("name", VISIONS)
def test_unchanged_image_tower(name: str) -> None:
    model = small_clip(**VISIONS[name])
    tower, pixels = ImageTower(model), images()
    expected = model.encode_image(pixels)
    for block in range(-1, 3):
        states = tower.run(tower.frozen(pixels, block), Changes(), block, keep=1)
        torch.testing.assert_close(tower.project(tower.pool(states)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_unchanged_text_tower(name: str) -> None:
    backbone = small_backbone(FAMILIES[name])
    rows = rows_of(backbone)
    if FAMILIES[name].text.keys() & {"qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"} or (
        "use_pad_mask" in FAMILIES[name].text
    ):
        with pytest.raises(CoopError):
            DeepPromptEncoder(backbone.tower, rows, backbone.vocabulary.pad)
        return
    encoder = DeepPromptEncoder(backbone.tower, rows, backbone.vocabulary.pad)
    model: Any = backbone.model
    text = [f"a photo of a {name}." for name in NAMES]
    ids = backbone.tokenizer(text, context_length=backbone.tower.context_length)
    torch.testing.assert_close(encoder(Changes()), model.encode_text(ids), rtol=1e-5, atol=1e-5)
    at_input = Changes(embedding=lambda x: 0 * x)
    torch.testing.assert_close(encoder(at_input), model.encode_text(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("custom", [False, True])
def test_deep_text_prompts(custom: bool) -> None:
    """Features and gradients with tokens at three blocks, against hooks on open_clip's blocks and full sequences."""
    model = small_clip(custom)
    backbone = backbone_of(model)
    text: Any = getattr(model, "text", model)
    tokens = [random(2, 32, seed=i).requires_grad_() for i in range(3)]
    encoder = DeepPromptEncoder(backbone.tower, rows_of(backbone, n_ctx=2))
    ours = encoder(Changes(tokens[0], blocks={i: Change(tokens=tokens[i]) for i in (1, 2)}))
    weight = random(*ours.shape, seed=9)
    found = torch.autograd.grad((ours * weight).sum(), tokens)

    def first(_: Any, __: Any, embedded: Tensor) -> Tensor:
        return torch.cat([embedded[:, :1], tokens[0].expand(len(embedded), -1, -1), embedded[:, 3:]], dim=1)

    with ExitStack() as stack:
        stack.callback(text.token_embedding.register_forward_hook(first).remove)
        writes(text.transformer.resblocks, {1: tokens[1], 2: tokens[2]}, 1, stack)
        expected = model.encode_text(backbone.tokenizer([f"a photo of a {name}." for name in NAMES]))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for ours_grad, theirs in zip(found, torch.autograd.grad((expected * weight).sum(), tokens), strict=True):
        torch.testing.assert_close(ours_grad, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["class token", "mean of the patches"])
def test_deep_visual_prompts(name: str) -> None:
    """Tokens after the patches before ln_pre, replaced at two blocks, against hooks; pooling sees patches only."""
    model = small_clip(**VISIONS[name])
    tower, visual = ImageTower(model), model.visual
    tokens = [random(2, 48, seed=i).requires_grad_() for i in range(3)]
    changes = Changes(tokens[0], blocks={i: Change(tokens=tokens[i]) for i in (1, 2)})
    states = tower.run(tower.frozen(images(), -1), changes, -1, keep=1)
    ours = tower.project(tower.pool(states))
    weight = random(*ours.shape, seed=9)
    found = torch.autograd.grad((ours * weight).sum(), tokens)

    def appended(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.cat([args[0], tokens[0].expand(len(args[0]), -1, -1)], dim=1),)

    def cut(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][:, :-2],)

    with ExitStack() as stack:
        stack.callback(visual.ln_pre.register_forward_pre_hook(appended).remove)
        stack.callback(visual.ln_post.register_forward_pre_hook(cut).remove)
        writes(visual.transformer.resblocks, {1: tokens[1], 2: tokens[2]}, -2, stack)
        expected = model.encode_image(images())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for ours_grad, theirs in zip(found, torch.autograd.grad((expected * weight).sum(), tokens), strict=True):
        torch.testing.assert_close(ours_grad, theirs, rtol=1e-4, atol=1e-5)


def plain_blocks(tower: TextTower, x: Tensor, start: int, stop: int) -> Tensor:
    """Return full sequences after some of open_clip's own blocks, under a causal mask."""
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
    for block in list(tower.transformer.resblocks)[start:stop]:
        x = block(x, attn_mask=mask)
    return x


def full_states(backbone: Backbone) -> tuple[Tensor, list[int]]:
    """Return the padded input of the first block and each class's end."""
    rows = rows_of(backbone)
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    return backbone.token_embedding[ids] + backbone.tower.positional_embedding[:length], [len(row) - 1 for row in rows]


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_tokens_of_each_class(block: int, share_prefix: bool) -> None:
    """Class-aware tokens at one block, from which on only the start token is shared."""
    backbone = backbone_of(small_clip())
    tokens = random(len(NAMES), 3, 32).requires_grad_()
    rows = rows_of(backbone)
    encoder = DeepPromptEncoder(backbone.tower, rows, class_tokens=(block, 3), share_prefix=share_prefix)
    ours = encoder(Changes(blocks={block: Change(tokens=tokens)}))
    x, ends = full_states(backbone)
    x = plain_blocks(backbone.tower, x, 0, block)
    x = plain_blocks(backbone.tower, torch.cat([x[:, :1], tokens, x[:, 4:]], dim=1), block, 3)
    expected = backbone.tower.project(x[torch.arange(len(x)), ends])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    weight = random(*ours.shape, seed=9)
    (found,), (theirs,) = (torch.autograd.grad((y * weight).sum(), tokens) for y in (ours, expected))
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [0, 1])
def test_inserted_tokens(block: int) -> None:
    """Tokens inserted after the start and class token at one block, replaced at the next."""
    model = small_clip()
    backbone, image_tower = backbone_of(model), ImageTower(model)
    tokens = [random(2, 32, seed=i) for i in range(2)]
    encoder = DeepPromptEncoder(backbone.tower, rows_of(backbone), insert=(block, 2))
    changes = {block + i: Change(tokens=t, insert=i == 0) for i, t in enumerate(tokens)}
    x, ends = full_states(backbone)
    x = plain_blocks(backbone.tower, x, 0, block)
    x = torch.cat([x[:, :1], tokens[0].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    x = plain_blocks(backbone.tower, x, block, block + 1)
    x = torch.cat([x[:, :1], tokens[1].expand(len(x), -1, -1), x[:, 3:]], dim=1)
    x = plain_blocks(backbone.tower, x, block + 1, 3)
    expected = backbone.tower.project(x[torch.arange(len(x)), torch.tensor(ends) + 2])
    torch.testing.assert_close(encoder(Changes(blocks=changes)), expected, rtol=1e-5, atol=1e-5)

    tokens = [random(2, 48, seed=i) for i in range(2)]
    changes = {block + i: Change(tokens=t, insert=i == 0) for i, t in enumerate(tokens)}
    states = image_tower.run(image_tower.frozen(images(), block), Changes(blocks=changes), block, keep=3)
    x = image_tower.frozen(images(), 0)
    for i, module in enumerate(model.visual.transformer.resblocks):
        if i in (block, block + 1):
            rest = x[:, 1 if i == block else 3 :]
            x = torch.cat([x[:, :1], tokens[i - block].expand(len(x), -1, -1), rest], dim=1)
        x = module(x)
    torch.testing.assert_close(states, x[:, :3], rtol=1e-5, atol=1e-5)


def test_weights_norms_and_adapters() -> None:
    """Low-rank updates, LayerNorms and adapters, against a model whose own tensors are changed."""
    model, changed = small_clip(), small_clip()
    backbone, tower = backbone_of(model), ImageTower(model)
    updates = {name: LowRank(random(2, 48, seed=i), random(48, 2, seed=9 + i), 0.1) for i, name in enumerate("qkvo")}
    gain_bias = random(48, seed=20), random(48, seed=21)
    block = changed.visual.transformer.resblocks[1]
    with torch.no_grad():
        for name, part in zip("qkv", block.attn.in_proj_weight.chunk(3), strict=True):
            part.add_(updates[name].weight())
        block.attn.out_proj.weight.add_(updates["o"].weight())
        block.ln_2.weight.copy_(gain_bias[0])
        block.ln_2.bias.copy_(gain_bias[1])
    change = Change(low_rank=updates, ln_2=gain_bias, adapter=lambda h: h.sin())
    block.register_forward_hook(lambda module, args, out: out + module.ln_1(args[0]).sin())
    states = tower.run(tower.frozen(images(), 1), Changes(blocks={1: change}), 1, keep=1)
    torch.testing.assert_close(tower.project(tower.pool(states)), changed.encode_image(images()), rtol=1e-5, atol=1e-5)
    assert backbone.identity == backbone_of(small_clip()).identity


def test_recomputed_activations_give_the_same_gradients() -> None:
    backbone = backbone_of(small_clip())
    tokens = [random(2, 32, seed=i).requires_grad_() for i in range(3)]
    found = []
    for budget in (10**12, 1):
        encoder = DeepPromptEncoder(backbone.tower, rows_of(backbone, n_ctx=2), budget=budget)
        features = encoder(Changes(tokens[0], blocks={i: Change(tokens=tokens[i]) for i in (1, 2)}))
        found.append(torch.autograd.grad(features.square().sum(), tokens))
    for kept, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=1e-6, atol=1e-7)


def test_low_precision_towers_keep_float32_gradients() -> None:
    model = small_clip()
    reference = backbone_of(model)
    tokens = random(2, 32).requires_grad_()
    encoder = DeepPromptEncoder(reference.tower, rows_of(reference, n_ctx=2))
    (exact,) = torch.autograd.grad(F.normalize(encoder(Changes(tokens)), dim=-1)[:, 0].sum(), tokens)
    low = small_clip()
    open_clip.convert_weights_to_lp(low, torch.bfloat16)
    backbone = backbone_of(low)
    assert backbone.tower.dtype is torch.bfloat16
    encoder = DeepPromptEncoder(backbone.tower, rows_of(backbone, n_ctx=2))
    features = encoder(Changes(tokens))
    (rounded,) = torch.autograd.grad(F.normalize(features, dim=-1)[:, 0].sum(), tokens)
    assert features.dtype is rounded.dtype is torch.float32
    assert float((rounded - exact).norm() / exact.norm()) < 0.05
    tower = ImageTower(low)
    states = tower.run(tower.frozen(images(), -1), Changes(random(2, 48)), -1, keep=1)
    assert tower.project(tower.pool(states)).dtype is torch.float32


@pytest.mark.parametrize(
    "vision",
    [
        {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
        {"attentional_pool": True, "attn_pooler_heads": 2},
        {"block_type": "custom", "qk_norm": True},
    ],
    ids=["ResNet", "attention pool", "custom blocks"],
)
def test_image_towers_without_known_tokens_are_refused(vision: dict[str, Any]) -> None:
    model = open_clip.CLIP(24, {**VISION, **vision}, dict(TEXT))
    with pytest.raises(CoopError):
        ImageTower(model)
