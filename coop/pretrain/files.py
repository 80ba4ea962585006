"""What pre-training reads and leaves: cached image features, and a model that open_clip loads."""

import json
import os
from pathlib import Path

import open_clip
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.clip.lit_lite import ASSETS, CHECKPOINT_FILE, CONFIG_FILE
from coop.data.images import open_rgb
from coop.errors import CoopError
from coop.io import track
from coop.pretrain.pairs import Pair

ENCODED_AT_ONCE = 64


def image_features(backbone: Backbone, pairs: list[Pair], path: Path, given: bool) -> Float[Tensor, "n e"]:
    """Return a feature per pair from `path` (key `features`), computed with the backbone first unless it is `given`."""
    if not given and not path.exists():
        starts = range(0, len(pairs), ENCODED_AT_ONCE)
        parts = []
        for start in track(starts, "encoding images", total=len(starts)):
            some = pairs[start : start + ENCODED_AT_ONCE]
            parts.append(backbone.encode_images(torch.stack([backbone.preprocess(open_rgb(p.image)) for p in some])))
        path.parent.mkdir(parents=True, exist_ok=True)
        _save({"features": torch.cat(parts).cpu()}, path)
    try:
        features = load_file(path)["features"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise CoopError(f"features={path}: expected a safetensors file with the tensor 'features' ({error})") from error
    width = backbone.model.encode_text(backbone.tokenizer(["a"]).to(backbone.device)).shape[1]
    if features.shape != (len(pairs), width):
        raise CoopError(
            f"features={path} has the shape {tuple(features.shape)}, but a row for each of {len(pairs)} pairs and the "
            f"joint width {width} were expected"
        )
    return features


def write_model(backbone: Backbone, folder: Path) -> None:
    """Write the weights, and open_clip's configuration of model and preprocessing, into `folder`.

    The folder loads in plain open_clip as `local-dir:FOLDER`.
    """
    config = {"model_cfg": _model_config(backbone), "preprocess_cfg": _preprocessing(backbone)}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.model.state_dict().items()}
    _save(state, folder / CHECKPOINT_FILE)


def _model_config(backbone: Backbone) -> dict[str, object]:
    """Return the model's configuration, from open_clip or a JSON file, with the activation that it really has."""
    name = backbone.architecture
    if name == "lit_lite":
        name = str(ASSETS / CONFIG_FILE)
    content = json.loads(Path(name).read_text()) if name.endswith(".json") else open_clip.get_model_config(name)
    config: dict[str, object] = dict(content.get("model_cfg", content))
    if any(type(module).__name__ == "QuickGELU" for module in backbone.model.modules()):
        config["quick_gelu"] = True
    return config


def _preprocessing(backbone: Backbone) -> dict[str, object]:
    """Return mean, std, interpolation and resizing as the model was loaded with."""
    config = backbone.model.visual.preprocess_cfg
    return {key: config[key] for key in ("mean", "std", "interpolation", "resize_mode")}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)
