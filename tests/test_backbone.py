"""Loading open_clip models by name and file, refusing what is not supported, and freezing all of it."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import Conv2dSame

from coop.clip.backbone import Backbone, _resolve, load_backbone
from coop.clip.folding import folded_tower
from coop.errors import CoopError
from coop.methods.coop import CoOp, CoOpOptions
from tests.methods_plain import CLASSES, sample
from tests.small_towers import TOKENIZER

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]


def tiny_model(seed: int = 3, **changed: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.CLIP(**TINY, **changed).eval()


def written(folder: Path, config: dict[str, Any], name: str = "tiny.json") -> str:
    (folder / name).write_text(json.dumps(config))
    return str(folder / name)


@pytest.fixture
def tiny_json(tmp_path: Path) -> str:
    return written(tmp_path, TINY)


def test_training_changes_nothing_frozen(tiny_backbone: Backbone) -> None:
    model: Any = tiny_backbone.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method = CoOp(tiny_backbone, CLASSES, CoOpOptions(epochs=3, n_ctx=3, batch_size=4, lr=0.1))
    start = method.learner.ctx.detach().clone()
    method.fit(sample(tiny_backbone, shots=2, views=2), sample(tiny_backbone, shots=1))
    assert not torch.equal(start, method.learner.ctx.detach())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("architecture, tag, quick", [
    *((a, "openai", True) for a in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")),
    *((a, "openai", True) for a in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")),
    ("ViT-B-16", "dfn2b", True), ("ViT-B-32", "metaclip_400m", True), ("RN50", "yfcc15m", True),
    ("ViT-B-32", "laion2b_s34b_b79k", False), ("ViT-B-16", "datacomp_xl_s13b_b90k", False),
    ("ViT-B-32-quickgelu", "openai", False), ("ViT-B-16-SigLIP", "webli", False),
])  # fmt: skip
def test_weights_trained_with_quickgelu_get_it(architecture: str, tag: str | None, quick: bool) -> None:
    """What open_clip is asked for beside the name (a "-quickgelu" architecture has it already); nothing is loaded."""
    name, source, options, _ = _resolve(architecture, tag)
    assert (name, source) == (architecture, tag)
    assert options.get("force_quick_gelu", False) == quick


def foreign(name: str, **text: Any) -> dict[str, Any]:
    return {**TINY, "text_cfg": {**TINY["text_cfg"], **text}, **({"multimodal_cfg": {}} if name == "CoCa" else {})}


@pytest.mark.parametrize("architecture, kind", [
    ("coca_ViT-B-32", "CoCa"), ("roberta-ViT-B-32", "Hugging Face"), ("nllb-clip-base-siglip", "Hugging Face"),
    (foreign("CoCa"), "CoCa"), (foreign("", hf_model_name="roberta-base"), "Hugging Face"),
    (foreign("", embed_cls=True), "CoCa"),
])  # fmt: skip
def test_foreign_text_towers_are_refused(architecture: Any, kind: str, tmp_path: Path) -> None:
    name = architecture if isinstance(architecture, str) else written(tmp_path, architecture)
    with pytest.raises(CoopError, match=rf"not supported, .*{kind}.*: choose a CLIP, EVA") as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments, said", [
    (("ViT-B32",), "unknown architecture 'ViT-B32': did you mean 'ViT-B-32'"),
    (("litlite",), "unknown architecture 'litlite': did you mean 'lit_lite'"),
    (("ViT-B-32", "opnai"), "unknown pretrained tag of ViT-B-32 'opnai': did you mean 'openai'"),
    (("ViT-B-32", "weights/mine.pt"), "pretrained=weights/mine.pt: no such checkpoint file"),
    (("missing/model.json",), "architecture=missing/model.json: No such file"),
    (("RN50", None, "gpu"), "unknown device 'gpu'"),
    (("RN50", None, "meta"), "unknown device 'meta'"),
    (("RN50", None, "cuda:63"), r"device=cuda:63 was asked for, but \d+ CUDA devices were found"),
    (("RN50", None, "cpu", "fp61"), "unknown precision 'fp61': did you mean 'fp16'"),
])  # fmt: skip
def test_unknown_names(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(CoopError, match=said):
        load_backbone(*arguments)


@pytest.mark.parametrize("text, said", [
    ("{", "is not JSON"), ("[1]", "lacks embed_dim, vision_cfg or text_cfg"), ('{"embed_dim": 8}', "lacks embed_dim"),
    (json.dumps({**TINY, "text_cfg": {"widht": 3}}), "could not be loaded .*widht"),
    (json.dumps({**TINY, "text_cfg": 3}), "lacks embed_dim, vision_cfg or text_cfg"),
])  # fmt: skip
def test_json_that_is_no_model(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(CoopError, match=said) as caught:
        load_backbone(str(tmp_path / "broken.json"), "random")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", "nested.pt"])
@pytest.mark.parametrize("form", ["plain", "model_cfg"])
def test_own_configuration_and_checkpoint(suffix: str, form: str, tmp_path: Path) -> None:
    model, preprocess = tiny_model(), {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    config = TINY if form == "plain" else {"model_cfg": TINY, "preprocess_cfg": preprocess}
    checkpoint = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), checkpoint)
    else:
        torch.save({"state_dict": model.state_dict()} if "nested" in suffix else model.state_dict(), checkpoint)
    backbone = load_backbone(written(tmp_path, config), str(checkpoint))
    loaded, state = backbone.model.state_dict(), model.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)

    image = Image.effect_noise((40, 20), 60).convert("RGB")
    options = {} if form == "plain" else {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    pixels = open_clip.image_transform(16, is_train=False, **options)(image)
    assert torch.equal(backbone.preprocess(image), pixels)
    torch.testing.assert_close(backbone.encode_images(pixels[None]), model.encode_image(pixels[None]).detach())
    assert backbone.logit_scale == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_of_another_architecture(suffix: str, tiny_json: str, tmp_path: Path) -> None:
    state = open_clip.CLIP(**{**TINY, "embed_dim": 24}).state_dict()
    checkpoint = tmp_path / f"other{suffix}"
    save_file(state, checkpoint) if suffix == ".safetensors" else torch.save(state, checkpoint)
    with pytest.raises(CoopError, match=r"other\S+ does not fit the architecture '.*tiny.json'") as caught:
        load_backbone(tiny_json, str(checkpoint))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors", "empty.pt", "other.pt"])
def test_a_file_that_is_no_checkpoint(name: str, tiny_json: str, tmp_path: Path) -> None:
    if name == "other.pt":
        torch.save({"weights": [1, 2]}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"not a checkpoint")
    with pytest.raises(CoopError, match=f"the checkpoint .*{name}") as caught:
        load_backbone(tiny_json, str(tmp_path / name))
    assert "\n" not in str(caught.value) and "arbitrary code" not in str(caught.value)  # torch's advice


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision(precision: str, dtype: torch.dtype, tiny_json: str) -> None:
    """The towers are half, what is learned and what comes out are float32, and close to the float32 model's."""
    full, half = load_backbone(tiny_json, "random"), load_backbone(tiny_json, "random", precision=precision)
    assert half.model.transformer.resblocks[0].mlp.c_fc.weight.dtype == half.dtype == dtype
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity
    encoded = half.encode_images(images)
    assert encoded.dtype == torch.float32 and cosine(encoded, full.encode_images(images)).min() > 0.999
    methods = [CoOp(b, CLASSES, CoOpOptions(epochs=5, n_ctx=4, batch_size=4, lr=0.01)) for b in (full, half)]
    data = sample(full, shots=3)
    for method in methods:
        method.fit(data, data)
    learned = [method.learner.ctx for method in methods]
    assert learned[1].dtype == torch.float32 and half.identity != full.identity
    assert cosine(learned[0].flatten(), learned[1].flatten(), dim=0) > 0.99
    assert not torch.equal(learned[1], learned[1].to(dtype).float())  # kept in float32 throughout


def test_identity_tells_weights_and_architecture_apart(tiny_json: str, tmp_path: Path) -> None:
    def identity(model: Any) -> str:
        return Backbone(model, lambda image: image, TOKENIZER).identity

    changed, checkpoint = tiny_model(), tmp_path / "weights.pt"
    torch.save(changed.state_dict(), checkpoint)
    first = identity(tiny_model())
    assert identity(tiny_model()) == first == load_backbone(tiny_json, str(checkpoint)).identity
    with torch.no_grad():
        changed.visual.proj[3, 5] += 1e-6
    assert len({first, identity(changed), identity(tiny_model(4)), identity(tiny_model(quick_gelu=True))}) == 4


@pytest.mark.parametrize("architecture, tag", [("ViT-B-32", "laion"), ("EVA02-B-16", "merged2b_s8b_b131k"), ("", "")])
def test_random_weights_must_be_asked_for(architecture: str, tag: str, tiny_json: str) -> None:
    with pytest.raises(CoopError, match=f"without weights: give pretrained .*{tag}.*pretrained=random"):
        load_backbone(architecture or tiny_json)


@pytest.mark.slow
def test_weights_that_are_not_here_and_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One try, and where to put the file by hand; a file there is taken."""
    monkeypatch.setenv("COOP_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(CoopError, match=r"'openai' of RN50 .*open_clip_model.safetensors from http") as caught:
        load_backbone("RN50", "openai")
    by_hand = tmp_path / "weights" / "RN50-openai.safetensors"
    assert str(by_hand) in str(caught.value) and "lit_lite" in str(caught.value) and "\n" not in str(caught.value)
    by_hand.parent.mkdir()
    by_hand.write_bytes(b"no weights")
    with pytest.raises(CoopError, match="RN50-openai.safetensors does not fit|could not be loaded"):
        load_backbone("RN50", "openai")


@pytest.mark.parametrize("fault", ["NaN", "zero"])
def test_damaged_weights_are_refused(fault: str, tiny_json: str, tmp_path: Path) -> None:
    state = tiny_model().state_dict()
    if fault == "NaN":
        state["visual.conv1.weight"][3, 1, 2, 2] = torch.nan
    else:
        state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save(state, tmp_path / "bad.pt")
    match = "visual.conv1.weight holds NaN" if fault == "NaN" else "bad.pt.* are all zero"
    with pytest.raises(CoopError, match=match):
        load_backbone(tiny_json, str(tmp_path / "bad.pt"))


def test_features_that_are_no_features_are_refused() -> None:
    """Where they arise: an image that makes NaN, and a text tower that makes zeros."""
    backbone = Backbone(tiny_model(), lambda image: image, TOKENIZER, "tiny")
    images = torch.randn(3, 3, 16, 16)
    images[1, 0, 0, 0] = torch.inf
    with pytest.raises(CoopError, match="feature of image 'b.png' is not finite: the weights of 'tiny'"):
        backbone.encode_images(images, ["a.png", "b.png", "c.png"])
    with torch.no_grad():
        backbone.model.visual.proj.mul_(1e25)  # finite, but its length is not: normalised, it would be 0
        backbone.model.text_projection.zero_()
    with pytest.raises(CoopError, match="feature of image 'a.png' is too large"):
        backbone.encode_images(images[:1], ["a.png"])
    with pytest.raises(CoopError, match="feature of class 'forest' is all zero"):
        backbone.encode_template("a {}.", ["forest"])


@torch.no_grad()
@pytest.mark.parametrize("vision, folds", [
    ({"layers": [1, 2, 1, 1], "width": 8, "head_width": 16, "image_size": 32}, True),
    ({"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}, True),
    ({"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear", "image_size": 48}, True),
    ({"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear", "image_size": 45}, True),
    (TINY["vision_cfg"], False),
])  # fmt: skip
def test_folded_tower_computes_the_same(vision: dict[str, Any], folds: bool) -> None:
    """All batch norms of a ResNet and of timm's towers go, and TensorFlow's padding; the model itself keeps its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = open_clip.CustomTextCLIP(16, vision, TINY["text_cfg"]).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.copy_(torch.rand_like(tensor) - 0.3)
                module.running_var.uniform_(0.5, 2)
    size = vision["image_size"]
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    tower = folded_tower(model.visual, images[:1])
    assert (tower is not model.visual) == folds
    assert not any(isinstance(module, torch.nn.BatchNorm2d | Conv2dSame) for module in tower.modules())
    expected = model.visual(images)
    backbone = Backbone(model, lambda image: image, TOKENIZER)
    torch.testing.assert_close(
        backbone.encode_images(images), expected, rtol=0, atol=4e-6 * float(expected.abs().max())
    )
    torch.testing.assert_close(model.encode_image(images), expected, rtol=0, atol=0)
    if "timm_model_name" in vision:  # reads images of any size: the copy is made again for another one
        larger = torch.nn.functional.interpolate(images, size=(size + 6, size + 1))
        torch.testing.assert_close(backbone.encode_images(larger), model.visual(larger), rtol=0, atol=1e-5)


def test_random_weights_are_fixed_and_leave_global_randomness_alone(tiny_json: str) -> None:
    state = torch.get_rng_state()
    first = load_backbone(tiny_json, "random").identity
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(1)
    assert load_backbone(tiny_json, "random").identity == first


@torch.no_grad()
@pytest.mark.parametrize("vision, width", [
    (TINY["vision_cfg"], 32), ({**TINY["vision_cfg"], "final_ln_after_pool": True, "pool_type": "avg"}, 32),
    ({"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}, 256),
    ({"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}, 256),
    ({"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160}, 64),
])  # fmt: skip
def test_pre_projection(vision: dict[str, Any], width: int) -> None:
    """ViT, ResNet, timm with a head and timm's classifier: projecting gives open_clip's features; pre is before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = open_clip.CustomTextCLIP(16, vision, TINY["text_cfg"]).eval()
    size = vision["image_size"]
    backbone = Backbone(model, lambda image: image, TOKENIZER)
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pre = backbone.encode_pre_projection(images)
    assert pre.shape == (3, width) and backbone.projection.weight.shape == (width, 16)
    torch.testing.assert_close(backbone.project(pre), model.encode_image(images), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    if "patch_size" in vision and "pool_type" not in vision:
        tokens: list[torch.Tensor] = []
        hook = model.visual.ln_post.register_forward_hook(lambda *call: tokens.append(call[2]))
        model.encode_image(images)
        hook.remove()
        torch.testing.assert_close(pre, tokens[0][:, 0])


def test_a_tower_without_a_projection_has_no_pre_projection_features() -> None:
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "none", "image_size": 160}
    model = open_clip.CustomTextCLIP(64, vision, TINY["text_cfg"])
    with pytest.raises(CoopError, match="ends in no linear projection"):
        _ = Backbone(model, lambda image: image, TOKENIZER).projection
