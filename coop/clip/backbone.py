"""An open_clip model as the toolkit sees it. The only file that loads weights."""

import hashlib
import json
import logging
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import huggingface_hub
import open_clip
import torch
from jaxtyping import Float, UInt8
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from coop.clip.encode import TextEncoder
from coop.clip.encode_full import prompt_encoder
from coop.clip.folding import folded_tower
from coop.clip.lit_lite import lit_lite_files
from coop.clip.prompts import Row, Tokenizer, Vocabulary, learned_rows, readable_name, template_rows, text_rows
from coop.clip.towers import TextTower, check_config
from coop.clip.words import remember_embeddings
from coop.errors import CoopError, first_line, unknown
from coop.io import cache_folder, read_file
from coop.options import PRECISIONS

LIT_LITE = "lit_lite"
RANDOM = "random"  # the name of weights that are none
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # in a repository that names no file
CONNECT_SECONDS = 5
TEXTS_AT_ONCE = 4096  # sentences that one encoder holds


class Projection(NamedTuple):
    """The image tower's last linear map: final = pre @ weight + bias."""

    weight: Float[Tensor, "p e"]
    bias: Float[Tensor, " e"] | None


class Backbone:
    """A frozen open_clip model: encodes images and prompts, and changes in nothing.

    `preprocess` maps a PIL image to a (3, h, w) tensor; `tokenizer` is open_clip's for the model. Every parameter
    loses its `requires_grad` and the model is put into evaluation mode. `architecture`, `pretrained` and `precision`
    are names for results; `identity` is a digest of the weights themselves.
    """

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Any], Tensor],
        tokenizer: Tokenizer,
        architecture: str = "custom",
        pretrained: str | None = None,
        precision: str = "fp32",
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.architecture, self.pretrained, self.precision = architecture, pretrained, precision
        self.tower = TextTower(model)
        self.vocabulary = Vocabulary.of(tokenizer)
        self.device = self.tower.device
        self.dtype = self.tower.dtype
        scale, bias = self.model.logit_scale, getattr(self.model, "logit_bias", None)
        self.logit_scale = float(scale.detach().exp())
        self.logit_bias = 0.0 if bias is None else float(bias.detach())
        self.weights_file: Path | None = None  # where `load_backbone` found them
        self._identity: str | None = None
        self._folded: tuple[torch.Size, nn.Module] | None = None  # the image size that it is for, the tower

    @property
    def identity(self) -> str:
        """A digest of all weights and of what the architecture computes with them (16 hexadecimal digits)."""
        if self._identity is None:
            digest = hashlib.sha256(repr(self.model).encode())
            for name, tensor in sorted(self.model.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
            self._identity = digest.hexdigest()[:16]
            if self.weights_file is not None:
                remember_embeddings(self, self.weights_file)
        return self._identity

    @property
    def width(self) -> int:
        """The text tower's width d, that of a context vector."""
        return self.tower.width

    @property
    def joint_width(self) -> int:
        """The width e of image and class features."""
        return self.tower.joint_width

    @property
    def token_embedding(self) -> Float[Tensor, "vocabulary d"]:
        """The frozen table of token embeddings."""
        return self.tower.token_embedding.detach()

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "b 3 h w"], names: Sequence[object] = ()) -> Float[Tensor, "b e"]:
        """Return image features, not normalised, in float32.

        Raises CoopError for a feature that is not finite or all zero, with the image's name where `names` has it.
        """
        tower, images = self._image_tower(images)
        return self._checked(tower(images).float(), names, "image")

    @torch.no_grad()
    def encode_pre_projection(
        self, images: Float[Tensor, "b 3 h w"], names: Sequence[object] = ()
    ) -> Float[Tensor, "b p"]:
        """Return what `projection` maps to image features, in float32: the pooled state after the last norm.

        The tower runs with the identity in place of its projection. Raises CoopError if it ends in no projection.
        """
        weight, bias, transposed = self._projection
        tower, images = self._image_tower(images)
        shape = tower.get_parameter(weight).shape
        identity = torch.eye(shape[1] if transposed else shape[0], device=self.device, dtype=self.dtype)
        replaced = {weight: identity} | ({bias: identity.new_zeros(len(identity))} if bias else {})
        features = torch.func.functional_call(tower, replaced, (images,)).float()
        return self._checked(features, names, "image")

    def _image_tower(self, images: Tensor) -> tuple[nn.Module, Tensor]:
        """Return the tower that computes features, and images as it reads them: in float32 on a CPU a folded copy."""
        images = images.to(self.device, self.dtype, non_blocking=True)
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return self.model.visual, images
        size = images.shape[1:]
        if self._folded is None or self._folded[0] != size:
            self._folded = size, folded_tower(self.model.visual, images[:1])
        tower = self._folded[1]
        folded = tower is not self.model.visual
        return tower, images.contiguous(memory_format=torch.channels_last) if folded else images

    def _checked(self, features: Tensor, names: Sequence[object], kind: str) -> Tensor:
        """Raise CoopError where a feature has no direction: its length is not finite, or 0."""
        lengths = features.norm(dim=1)
        wrong = ~lengths.isfinite() | (lengths == 0)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            name = f"'{names[i]}'" if i < len(names) else f"{i + 1} of {len(features)}"
            fault = "all zero" if lengths[i] == 0 else "too large" if features[i].isfinite().all() else "not finite"
            raise CoopError(
                f"the feature of {kind} {name} is {fault}: the weights of '{self.architecture}' (pretrained="
                f"{self.pretrained}) are damaged, or too large for precision={self.precision} (use fp32)"
            )
        return features

    @property
    def projection(self) -> Projection:
        """The frozen projection from `pre_projection` to `final` features, in float32; CoopError if there is none."""
        weight, bias, transposed = self._projection
        tower = self.model.visual
        w = tower.get_parameter(weight).detach().float()
        return Projection(w.T if transposed else w, tower.get_parameter(bias).detach().float() if bias else None)

    def project(self, pre: Float[Tensor, "*b p"]) -> Float[Tensor, "*b e"]:
        """Return final features, not normalised, of pre-projection features."""
        weight, bias = self.projection
        out = pre.to(weight.device).float() @ weight
        return out if bias is None else out + bias

    def state_with_projection(self, projection: Projection) -> dict[str, Tensor]:
        """Return a copy of the model's state_dict with another projection in place of its own."""
        weight, bias, transposed = self._projection
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        state[f"visual.{weight}"].copy_(projection.weight.T if transposed else projection.weight)
        if bias is not None and projection.bias is not None:
            state[f"visual.{bias}"].copy_(projection.bias)
        return state

    @cached_property
    def _projection(self) -> tuple[str, str | None, bool]:
        """Return the names of the projection's weight and bias in the image tower, and whether it is (e, p)."""
        tower = self.model.visual
        names = dict(tower.named_parameters())
        if isinstance(tower, VisionTransformer) and "proj" in names:
            return "proj", None, False
        last = {"attnpool": "attnpool.c_proj", "head": "head.proj", "trunk": "trunk.head"}  # ResNet, timm, timm's own
        for layer in last.values():
            if f"{layer}.weight" in names and names[f"{layer}.weight"].ndim == 2:
                return f"{layer}.weight", f"{layer}.bias" if f"{layer}.bias" in names else None, True
        raise CoopError(
            f"the image tower of '{self.architecture}' ({type(tower).__name__}) ends in no linear projection and "
            "has no pre-projection features: choose a CLIP ViT or ResNet, or a method that reads final features"
        )

    @property
    def splits_preprocessing(self) -> bool:
        """Whether `preprocess` ends in torchvision's ToTensor and Normalize, so that `pixel_transform` is there."""
        steps = list(getattr(self.preprocess, "transforms", []))
        return (
            len(steps) >= 2
            and isinstance(steps[-2], transforms.ToTensor)
            and isinstance(steps[-1], transforms.Normalize)
        )

    @cached_property
    def pixel_transform(self) -> Callable[[Any], UInt8[Tensor, "3 h w"]]:
        """The test transform up to its 8-bit pixels: RGB image -> (3, h, w).

        `normalise_pixels` does the rest. Raises CoopError for a preprocessing that does not end in torchvision's
        ToTensor and Normalize.
        """
        if not self.splits_preprocessing:
            raise CoopError(
                f"random views and pixels need a preprocessing that ends in torchvision's ToTensor and Normalize, and "
                f"that of '{self.architecture}' does not: use augment.views=0 and a method that reads final features"
            )
        steps: Any = self.preprocess
        return transforms.Compose([*steps.transforms[:-2], transforms.PILToTensor()])

    def normalise_pixels(self, pixels: UInt8[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
        """Return what the image tower reads, in float32 on the backbone's device.

        Equal to the test transform's output bit by bit: it too makes 8-bit pixels of the crop before it divides by 255.
        """
        assert self.splits_preprocessing
        steps: Any = self.preprocess
        return steps.transforms[-1](pixels.to(self.device, non_blocking=True).float().div(255))

    @cached_property
    def image_size(self) -> tuple[int, int]:
        """The height and width of what the image tower reads."""
        height, width = self.preprocess(Image.new("RGB", (8, 8))).shape[-2:]
        return height, width

    def prompt_encoder(self, rows: Sequence[Row]) -> TextEncoder:
        """Return the class features of prompts as a function of their context."""
        return prompt_encoder(self.tower, rows, self.vocabulary.pad)

    def learned_rows(
        self, class_names: Sequence[str], n_ctx: int, ctx_position: str, class_specific: bool
    ) -> list[Row]:
        """Return the layout of prompts with learned context; see `coop.clip.prompts.learned_rows`."""
        length = self.tower.context_length
        return learned_rows(self.vocabulary, class_names, n_ctx, ctx_position, class_specific, length)

    @torch.no_grad()
    def encode_template(
        self, template: str, class_names: Sequence[str], underscores: bool = False
    ) -> Float[Tensor, "c e"]:
        """Return the features, not normalised, of a hand-written template filled with each class name.

        Underscores of class names become spaces unless `underscores` keeps them.
        """
        rows = template_rows(self.vocabulary, template, class_names, self.tower.context_length, underscores)
        return self._checked(self.prompt_encoder(rows)(), class_names, "class")

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n e"]:
        """Return the features, not normalised, of complete sentences. Raises CoopError for one that is too long."""
        rows = text_rows(self.vocabulary, texts, self.tower.context_length)
        starts = range(0, len(rows), TEXTS_AT_ONCE)
        parts = [self.prompt_encoder(rows[start : start + TEXTS_AT_ONCE])() for start in starts]
        features = torch.cat(parts) if parts else torch.empty(0, self.joint_width, device=self.device)
        return self._checked(features, texts, "text")

    def encode_words(self, words: str) -> tuple[list[int], Float[Tensor, "m d"]]:
        """Return the token ids of `words` and their embeddings in float32. Raises CoopError if there are none."""
        (ids,) = self.vocabulary.body([readable_name(words)])
        if not ids:
            raise CoopError(f"ctx_init {words!r} holds no word: give words such as 'a photo of a', or leave it out")
        return ids, self.token_embedding[ids].float()


def check_finite(values: Tensor, message: str) -> Tensor:
    """Return `values`. Raises CoopError with `message` if one of them is NaN or infinite."""
    if not values.isfinite().all():
        raise CoopError(message)
    return values


def load_backbone(
    architecture: str,
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> Backbone:
    """Load an open_clip model by name, with a pretrained tag, a checkpoint file, or `random` for fixed random weights.

    `architecture` is one of `open_clip.list_models()`, a JSON config file (the model's configuration, or open_clip's
    `{"model_cfg": ..., "preprocess_cfg": ...}`), or `lit_lite`, the model that ships with the toolkit (the only one
    that needs no `pretrained`). Tags trained with QuickGELU get QuickGELU. Weights are looked for on this machine
    first; a download is tried once. Raises CoopError for unknown names, missing weights, unsupported towers, a device
    that is not there, checkpoints of another architecture, and weights that are not finite or all zero.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    device = check_device(device)
    name, source, options, overrides = _resolve(architecture, pretrained)
    if source is not None and not Path(source).is_file():
        config = _tag_config(name, source)
        overrides = {key: config[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in config}
        source = str(pretrained_file(name, source))
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _quiet():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)  # only random weights use it
            model, preprocess = _create(name, source, str(device), precision, options, overrides)
    except Exception as error:
        raise CoopError(_why_not_loaded(architecture, pretrained, error)) from error
    _check_weights(model, architecture, pretrained)
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        raise CoopError(
            f"the tokenizer of '{architecture}' could not be loaded ({first_line(error)}): "
            "it comes from the Hugging Face hub; connect once, or choose a model with CLIP's own tokenizer"
        ) from error
    backbone = Backbone(model, preprocess, tokenizer, architecture, pretrained, precision)
    backbone.weights_file = Path(source) if source is not None else None
    return backbone


def check_model(architecture: str, pretrained: str | None) -> None:
    """Raise CoopError for names that `load_backbone` would refuse; nothing is loaded."""
    _resolve(architecture, pretrained)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's messages about random weights, which are asked for by name, off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _check_weights(model: nn.Module, architecture: str, pretrained: str | None) -> None:
    source = f"'{architecture}' (pretrained={pretrained})"
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            check_finite(tensor, f"the weights of {source} are damaged: {name} holds NaN or infinite values")
    if not any(parameter.any() for parameter in model.parameters()):
        raise CoopError(f"the weights of {source} are all zero: give a checkpoint that holds a trained model")


def check_device(device: str | torch.device) -> torch.device:
    """Return the device asked for (`auto`: CUDA where there is one). Raises CoopError if it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(found.type)
    except RuntimeError as error:
        raise unknown("device", str(device), ["auto", "cpu", "cuda", "cuda:0"]) from error
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise CoopError(f"device={device} was asked for, but PyTorch finds none here")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise CoopError(f"device={device} was asked for, but {torch.cuda.device_count()} CUDA devices were found")
    return found


def _resolve(architecture: str, pretrained: str | None) -> tuple[str, str | None, dict[str, Any], dict[str, Any]]:
    """Return open_clip's model name, the tag or file, options of its factory, and preprocessing overrides."""
    overrides: dict[str, Any] = {}
    shown = architecture
    if architecture == LIT_LITE:
        config_file, checkpoint = lit_lite_files(cache_folder())
        architecture, pretrained = str(config_file), pretrained or str(checkpoint)
    if architecture.endswith(".json"):
        architecture, overrides = _register(Path(architecture))
    elif os.sep in architecture:
        raise CoopError(f"architecture={architecture}: give a name, or an open_clip config file that ends in .json")
    if architecture not in open_clip.list_models():
        raise unknown("architecture", architecture, [LIT_LITE, *open_clip.list_models()])
    check_config(architecture, open_clip.get_model_config(architecture))
    if pretrained == RANDOM:
        return architecture, None, {}, overrides
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    tags = tags or open_clip.list_pretrained_tags_by_model(architecture.removesuffix("-quickgelu"))
    if pretrained is None:
        some = f"one of its tags ({', '.join(tags[:3])}{', ...' if tags[3:] else ''}), " if tags else ""
        raise CoopError(
            f"'{shown}' was asked for without weights: give pretrained {some}a checkpoint file, or pretrained={RANDOM} "
            "for random weights"
        )
    if Path(pretrained).is_file():
        return architecture, pretrained, {}, overrides
    if "/" in pretrained or "." in pretrained:
        raise CoopError(f"pretrained={pretrained}: no such checkpoint file")
    if not tags:
        leave = "leave pretrained out" if shown == LIT_LITE else "give a checkpoint file"
        raise CoopError(f"pretrained={pretrained}: '{shown}' has no pretrained tags; {leave}, or use {RANDOM}")
    if pretrained not in tags:
        raise unknown(f"pretrained tag of {architecture}", pretrained, tags)
    quick = bool(_tag_config(architecture, pretrained).get("quick_gelu")) and not architecture.endswith("-quickgelu")
    return architecture, pretrained, {"force_quick_gelu": quick}, overrides


def _tag_config(architecture: str, tag: str) -> dict[str, Any]:
    plain = architecture.removesuffix("-quickgelu")
    config: dict[str, Any] = open_clip.get_pretrained_cfg(architecture, tag) or open_clip.get_pretrained_cfg(plain, tag)
    return config


def pretrained_file(architecture: str, tag: str) -> Path:
    """Return the file with a tag's weights: placed by hand, downloaded earlier, or downloaded now, tried once.

    By hand: COOP_CACHE/weights/ARCHITECTURE-TAG.safetensors (or .bin, .pt). Raises CoopError where it cannot be had.
    """
    config = _tag_config(architecture, tag)
    by_hand = cache_folder() / "weights" / f"{architecture}-{tag}.safetensors"
    repository, _, filename = str(config.get("hf_hub", "")).rpartition("/")
    names = [filename.rsplit(".", 1)[0] + ".safetensors", filename] if filename else list(HUB_FILES)
    url = str(config.get("url", ""))
    candidates = [by_hand.with_suffix(suffix) for suffix in (".safetensors", ".bin", ".pt")]
    if repository:
        found = (huggingface_hub.try_to_load_from_cache(repository, name) for name in names)
        candidates += [Path(path) for path in found if isinstance(path, str)]
    if url:
        candidates.append(Path.home() / ".cache" / "clip" / url.rsplit("/", 1)[1])
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    page = f"{huggingface_hub.constants.ENDPOINT}/{repository}" if repository else url
    try:
        _reach(page)
        return Path(open_clip.download_pretrained(config))
    except Exception as error:
        what = f"{names[0]} from {page}" if repository else page
        raise CoopError(
            f"the weights '{tag}' of {architecture} are not on this machine and cannot be downloaded "
            f"({first_line(error)}): put {what} at {by_hand}, or try backbone={LIT_LITE}, which needs no download"
        ) from error


def _reach(url: str) -> None:
    """Raise OSError unless a server answers within seconds: the hub's client would try for a minute."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answers; what is missing, the download says


def _register(path: Path) -> tuple[str, dict[str, Any]]:
    """Make a JSON config known to open_clip; return its name and its preprocessing."""
    try:
        config = json.loads(read_file(path))
    except OSError as error:
        raise CoopError(f"architecture={path}: {first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CoopError(f"architecture={path} is not JSON: {first_line(error)}") from error
    model = config.get("model_cfg", config) if isinstance(config, dict) else None
    towers = [model.get(key) for key in ("vision_cfg", "text_cfg")] if isinstance(model, dict) else []
    if "embed_dim" not in (model or ()) or not all(isinstance(tower, dict) for tower in towers):
        raise CoopError(f"architecture={path} lacks embed_dim, vision_cfg or text_cfg: it is no open_clip config")
    name = f"{path.stem}-{hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:8]}"
    with TemporaryDirectory() as folder:  # open_clip reads it once and remembers it
        (Path(folder) / f"{name}.json").write_text(json.dumps(model), encoding="utf-8")
        open_clip.add_model_config(Path(folder) / f"{name}.json")
    return name, config.get("preprocess_cfg", {}) if model is not config else {}


def _create(
    name: str, pretrained: str | None, device: str, precision: str, options: dict[str, Any], overrides: dict[str, Any]
) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    keys = {"mean": "image_mean", "std": "image_std", "interpolation": "image_interpolation"}
    image = {keys[k]: tuple(v) if isinstance(v, list) else v for k, v in overrides.items() if k in keys}
    if "resize_mode" in overrides:
        image["image_resize_mode"] = overrides["resize_mode"]
    model, _, preprocess = open_clip.create_model_and_transforms(
        name, pretrained, device=device, precision=precision, pretrained_hf=False, **options, **image
    )
    return model, preprocess


def _why_not_loaded(architecture: str, pretrained: str | None, error: Exception) -> str:
    if pretrained and Path(pretrained).is_file():
        return (
            f"the checkpoint {pretrained} does not fit the architecture '{architecture}' ({first_line(error)}): "
            "name the architecture that it was made with"
        )
    return f"'{architecture}' with pretrained={pretrained} could not be loaded ({first_line(error)})"
