"""The text tower computed once per distinct token, against open_clip's `encode_text` on whole sequences."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.clip.encode_full import prompt_encoder
from coop.errors import CoopError
from coop.methods.coop import PromptLearner
from tests.small_towers import FAMILIES, NAMES, plain_features, small_backbone

POSITIONS = ("end", "middle", "front")
TEMPLATES = ("a photo of a {}.", "{}", "{}, seen by a satellite")


@pytest.fixture(scope="module")
def clip() -> Backbone:
    return small_backbone(FAMILIES["CLIP with QuickGELU"])


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def context(backbone: Backbone, *size: int) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return (torch.randn(*size, backbone.width, generator=random) * 0.3).to(backbone.device).requires_grad_()


def with_gradient(features: Tensor, ctx: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features and the gradient of a fixed random function of them."""
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(2)).to(features.device)
    (gradient,) = torch.autograd.grad((features * direction).sum(), ctx)
    return features.detach(), gradient


def encoder(
    backbone: Backbone, m: int, position: str, names: tuple[str, ...] = NAMES, csc: bool = False, **budget: int
) -> Any:
    rows = backbone.learned_rows(names, m, position, csc)
    return prompt_encoder(backbone.tower, rows, backbone.vocabulary.pad, **budget)


def compare(backbone: Backbone, m: int, position: str, csc: bool, tolerance: float = 1e-5, **budget: int) -> None:
    ctx = context(backbone, *((len(NAMES), m) if csc else (m,)))
    encode = encoder(backbone, m, position, csc=csc, **budget)
    ours = with_gradient(encode(ctx.flatten(0, -2)), ctx)
    theirs = with_gradient(plain_features(backbone, ctx, position), ctx)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        close(a, b, tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_encode_text(family: str) -> None:
    """Hand-written prompts, and learned ones with their gradient; whether prefixes are shared is told by the tower."""
    backbone = small_backbone(FAMILIES[family])
    length = backbone.tower.context_length
    for template in TEMPLATES:
        prompts = [template.format(name.replace("_", " ")) for name in NAMES]
        with torch.no_grad():
            expected = backbone.model.encode_text(backbone.tokenizer(prompts, context_length=length))
        close(backbone.encode_template(template, NAMES), expected)
        close(backbone.encode_texts(prompts), expected)
    assert backbone.joint_width == expected.shape[1]
    compare(backbone, 3, "end", csc=False)
    compare(backbone, 3, "middle", csc=True, budget=1)
    assert backbone.tower.shares_prefixes == FAMILIES[family].shares


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("csc", [False, True], ids=["unified", "csc"])
def test_learned_prompts_equal_the_full_computation(clip: Backbone, m: int, position: str, csc: bool) -> None:
    compare(clip, m, position, csc)


@pytest.mark.parametrize("position, shared", [("end", 5), ("middle", 3), ("front", 1)])
def test_no_token_is_computed_twice(clip: Backbone, position: str, shared: int) -> None:
    """M = 4: SOT and the context before the names once, then each name, the context after it, '.' and EOT."""
    lengths = [len(clip.tokenizer.encode(name.replace("_", " "))) + 1 + 4 + 2 for name in NAMES]
    assert encoder(clip, 4, position).tokens == shared + sum(length - shared for length in lengths)


def test_many_recomputed_chunks_equal_one_and_keep_less(clip: Backbone) -> None:
    ctx = context(clip, 4)
    kept: dict[str, int] = {}
    results = {}
    for kind, encode in {"one": encoder(clip, 4, "end"), "many": encoder(clip, 4, "end", budget=1)}.items():
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = encode(ctx)
        kept[kind] = sum(sizes)
        results[kind] = with_gradient(features, ctx)
    assert (len(encoder(clip, 4, "end").chunks), len(encoder(clip, 4, "end", budget=1).chunks)) == (1, len(NAMES))
    assert kept["many"] < kept["one"] / 4
    for a, b in zip(results["many"], results["one"], strict=True):
        close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["CLIP with QuickGELU", "no causal mask (MobileCLIP)"])
@pytest.mark.parametrize("budget", [2**31, 60_000, 1])
def test_contexts_of_many_images_equal_one_by_one(family: str, budget: int) -> None:
    backbone = small_backbone(FAMILIES[family])
    ctx = context(backbone, 5, 4)
    ours = with_gradient(encoder(backbone, 4, "end", budget=budget)(ctx), ctx)
    theirs = with_gradient(torch.stack([plain_features(backbone, one, "end") for one in ctx]), ctx)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


@pytest.mark.parametrize("names", [("forest",), ("forest", "abbey"), ("yin_yang", "yin yang"), ("pond", *NAMES[:3])])
@pytest.mark.parametrize("position", POSITIONS)
def test_few_and_equally_long_and_equal_prompts(clip: Backbone, names: tuple[str, ...], position: str) -> None:
    ctx = context(clip, 2)
    for budget in (2**31, 1):
        ours = with_gradient(encoder(clip, 2, position, names, budget=budget)(ctx), ctx)
        for a, b in zip(ours, with_gradient(plain_features(clip, ctx, position, names), ctx), strict=True):
            close(a, b)


@pytest.mark.parametrize("position", POSITIONS)
def test_many_classes_fill_several_blocks(clip: Backbone, position: str) -> None:
    """More tokens than one block of the packed computation takes, also in several chunks of several blocks."""
    words = ("sea", "old red tower", "dog", "very large grey cat", "blue sky")
    names = tuple(map(" ".join, itertools.product(words, repeat=3)))
    ctx = context(clip, 3)
    theirs = with_gradient(plain_features(clip, ctx, position, names), ctx)
    for budget, chunks in ((2**31, 1), (12 * 32 * 2 * 4 * 800, 3)):
        encode = encoder(clip, 3, position, names, budget=budget)
        assert len(encode.chunks) >= chunks and len(encode.chunks[0].mask) > 1
        for a, b in zip(with_gradient(encode(ctx), ctx), theirs, strict=True):
            close(a, b)


def test_prompt_learner_normalises(clip: Backbone) -> None:
    learner = PromptLearner(clip, NAMES, n_ctx=4, ctx_position="middle", class_specific=True)
    expected = torch.nn.functional.normalize(plain_features(clip, learner.ctx, "middle"), dim=-1)
    close(learner.class_features().detach(), expected.detach())
    assert list(learner.parameters()) == [learner.ctx]


def test_context_starts_at_random_or_at_words(clip: Backbone) -> None:
    """Deviation 0.02 from a generator of its own; words are counted in tokens, each class having its own copy."""
    state = torch.get_rng_state()
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, same, other = (PromptLearner(clip, NAMES, 16, class_specific=True, generator=g).ctx for g in seeds)
    assert torch.equal(state, torch.get_rng_state())
    assert first.shape == (len(NAMES), 16, clip.width) and torch.equal(first, same) and not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.02, rel=0.05) and abs(first.mean().item()) < 0.002
    words = "a photomicrograph of"  # the original would take three tokens and cut the second word short
    ids = clip.tokenizer.encode(words)
    assert len(ids) > 3
    for csc in (False, True):
        learner = PromptLearner(clip, NAMES, 16, class_specific=csc, ctx_init=words)
        embedded = clip.model.token_embedding(torch.tensor(ids))
        assert learner.n_ctx == len(ids) and torch.equal(learner.ctx, embedded.expand_as(learner.ctx))
        expected = clip.encode_template(f"{words} {{}}.", NAMES)
        close(learner.class_features().detach(), torch.nn.functional.normalize(expected, dim=-1))


@pytest.mark.parametrize("wrong, said", [
    ({"class_names": ()}, "there are no class names"), ({"n_ctx": 0}, "n_ctx=0: give at least 1"),
    ({"ctx_init": " "}, "ctx_init ' ' holds no word"), ({"ctx_position": "fornt"}, "did you mean 'front'"),
    ({"n_ctx": 73}, "'annual crop land' is 79 tokens long with n_ctx=73.* reads 77: use n_ctx=71 or less"),
    ({"ctx_init": "word " * 80}, "is 86 tokens long with n_ctx=80"),
])  # fmt: skip
def test_prompts_that_cannot_be(clip: Backbone, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(CoopError, match=said):
        PromptLearner(clip, **{"class_names": NAMES, **wrong})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(clip: Backbone, dtype: torch.dtype) -> None:
    """The tower in half precision, the context and its gradient in float32."""
    half = small_backbone(FAMILIES["CLIP with QuickGELU"], dtype)
    assert half.tower.dtype == dtype
    ctx = context(clip, 4)
    ours = with_gradient(encoder(half, 4, "middle")(ctx), ctx)
    theirs = with_gradient(plain_features(clip, ctx, "middle"), ctx)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda(family: str) -> None:
    backbone = small_backbone(FAMILIES[family])
    backbone = Backbone(backbone.model.cuda(), backbone.preprocess, backbone.tokenizer)
    for position in POSITIONS:
        compare(backbone, 3, position, csc=False, tolerance=1e-3)  # TF32 where the device uses it
        compare(backbone, 3, position, csc=True, tolerance=1e-3, budget=1)
