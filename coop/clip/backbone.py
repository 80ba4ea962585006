"""An open_clip model as the toolkit sees it. The only file that loads weights."""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from jaxtyping import Float, UInt8
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from coop.clip.encode import PromptEncoder
from coop.clip.lit_lite import lit_lite_files
from coop.clip.prompts import Row, Tokenizer, Vocabulary, learned_rows, readable_name, template_rows, text_rows
from coop.clip.towers import TextTower, check_config
from coop.errors import CoopError, unknown
from coop.io import cache_folder

PRECISIONS = ("fp32", "bf16", "fp16")
LIT_LITE = "lit_lite"
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
        self._identity: str | None = None

    @property
    def identity(self) -> str:
        """A digest of all weights and of what the architecture computes with them (16 hexadecimal digits)."""
        if self._identity is None:
            digest = hashlib.sha256(repr(self.model).encode())
            for name, tensor in sorted(self.model.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
            self._identity = digest.hexdigest()[:16]
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
    def encode_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Return image features, not normalised, in float32."""
        images = images.to(self.device, self.dtype, non_blocking=True)
        return self.model.encode_image(images, normalize=False).float()

    @torch.no_grad()
    def encode_pre_projection(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p"]:
        """Return what `projection` maps to image features, in float32: the pooled state after the last norm.

        The tower runs with the identity in place of its projection. Raises CoopError if it ends in no projection.
        """
        weight, bias, transposed = self._projection
        tower = self.model.visual
        shape = tower.get_parameter(weight).shape
        identity = torch.eye(shape[1] if transposed else shape[0], device=self.device, dtype=self.dtype)
        replaced = {weight: identity} | ({bias: identity.new_zeros(len(identity))} if bias else {})
        images = images.to(self.device, self.dtype, non_blocking=True)
        return torch.func.functional_call(tower, replaced, (images,)).float()

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

    def prompt_encoder(self, rows: Sequence[Row]) -> PromptEncoder:
        """Return the class features of prompts as a function of their context."""
        return PromptEncoder(self.tower, rows, self.vocabulary.pad)

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
        return self.prompt_encoder(rows)()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n e"]:
        """Return the features, not normalised, of complete sentences. Raises CoopError for one that is too long."""
        rows = text_rows(self.vocabulary, texts, self.tower.context_length)
        starts = range(0, len(rows), TEXTS_AT_ONCE)
        parts = [self.prompt_encoder(rows[start : start + TEXTS_AT_ONCE])() for start in starts]
        return torch.cat(parts) if parts else torch.empty(0, self.joint_width, device=self.device)

    def encode_words(self, words: str) -> tuple[list[int], Float[Tensor, "m d"]]:
        """Return the token ids of `words` and their embeddings in float32. Raises CoopError if there are none."""
        (ids,) = self.vocabulary.body([readable_name(words)])
        if not ids:
            raise CoopError(f"ctx_init {words!r} holds no word: give words such as 'a photo of a', or leave it out")
        return ids, self.token_embedding[ids].float()


def load_backbone(
    architecture: str,
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> Backbone:
    """Load an open_clip model by name, with a pretrained tag, a checkpoint file, or (`None`) fixed random weights.

    `architecture` is one of `open_clip.list_models()`, a JSON config file (the model's configuration, or open_clip's
    `{"model_cfg": ..., "preprocess_cfg": ...}`), or `lit_lite`, the model that ships with the toolkit.
    Tags trained with QuickGELU get QuickGELU. Raises CoopError for unknown names, unsupported towers, a device that
    is not there, and checkpoints of another architecture.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    device = check_device(device)
    name, source, options, overrides = _resolve(architecture, pretrained)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)  # only random weights use it
            model, preprocess = _create(name, source, str(device), precision, options, overrides)
    except CoopError:
        raise
    except Exception as error:
        raise CoopError(_why_not_loaded(architecture, pretrained, error)) from error
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        raise CoopError(
            f"the tokenizer of '{architecture}' could not be loaded ({_first_line(error)}): "
            "it comes from the Hugging Face hub; connect once, or choose a model with CLIP's own tokenizer"
        ) from error
    return Backbone(model, preprocess, tokenizer, architecture, pretrained, precision)


def check_device(device: str | torch.device) -> torch.device:
    """Return the device asked for (`auto`: CUDA where there is one). Raises CoopError if it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise unknown("device", str(device), ["auto", "cpu", "cuda", "cuda:0"]) from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise CoopError(f"device={device} was asked for, but {torch.cuda.device_count()} CUDA devices were found")
    return found


def _resolve(architecture: str, pretrained: str | None) -> tuple[str, str | None, dict[str, Any], dict[str, Any]]:
    """Return open_clip's model name, the tag or file, options of its factory, and preprocessing overrides."""
    overrides: dict[str, Any] = {}
    if architecture == LIT_LITE:
        config_file, checkpoint = lit_lite_files(cache_folder())
        architecture, pretrained = str(config_file), pretrained or str(checkpoint)
    if architecture.endswith(".json"):
        architecture, overrides = _register(Path(architecture))
    if architecture not in open_clip.list_models():
        raise unknown("architecture", architecture, [LIT_LITE, *open_clip.list_models()])
    check_config(architecture, open_clip.get_model_config(architecture))
    if pretrained is None or Path(pretrained).is_file():
        return architecture, pretrained, {}, overrides
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    plain = architecture.removesuffix("-quickgelu")
    tags = tags or open_clip.list_pretrained_tags_by_model(plain)
    if pretrained not in tags:
        if "/" in pretrained or "." in pretrained:
            raise CoopError(f"pretrained={pretrained}: no such checkpoint file")
        raise unknown(f"pretrained tag of {architecture}", pretrained, tags)
    config = open_clip.get_pretrained_cfg(architecture, pretrained) or open_clip.get_pretrained_cfg(plain, pretrained)
    quick = bool(config.get("quick_gelu")) and not architecture.endswith("-quickgelu")
    return architecture, pretrained, {"force_quick_gelu": quick}, overrides


def _register(path: Path) -> tuple[str, dict[str, Any]]:
    """Make a JSON config known to open_clip; return its name and its preprocessing."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CoopError(f"architecture={path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CoopError(f"architecture={path} is not JSON: {_first_line(error)}") from error
    model = config.get("model_cfg", config) if isinstance(config, dict) else None
    towers = [model.get(key) for key in ("vision_cfg", "text_cfg")] if isinstance(model, dict) else []
    if "embed_dim" not in (model or ()) or not all(isinstance(tower, dict) for tower in towers):
        raise CoopError(f"architecture={path} lacks embed_dim, vision_cfg or text_cfg: it is no open_clip config")
    name = f"{path.stem}-{hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:8]}"
    open_clip.factory._MODEL_CONFIGS[name] = model
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
            f"the checkpoint {pretrained} does not fit the architecture '{architecture}' ({_first_line(error)}): "
            "name the architecture that it was made with"
        )
    return f"'{architecture}' with pretrained={pretrained} could not be loaded ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
