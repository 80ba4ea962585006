"""CLIP's contrastive training of an open_clip model: its loss, its batches, and the files that are read and written."""

import json
from collections.abc import Callable, Iterator
from math import log
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from coop.clip.backbone import Backbone
from coop.clip.lit_lite import ASSETS, CHECKPOINT_FILE, CONFIG_FILE
from coop.data.images import open_rgb
from coop.errors import CoopError
from coop.io import atomic_write, track, write_json
from experiments.pretrain.loop import Schedule, fit
from experiments.pretrain.pairs import Pair, PairDataset, batch_keys

Batch = tuple[Tensor, Tensor]
MAX_LOGIT_SCALE = 100.0  # CLIP clips the learned scale, or training becomes unstable (section 2.5)
ENCODED_AT_ONCE = 64


def contrastive_loss(model: Any, locked: bool = False) -> Callable[[Batch], Tensor]:
    """Return the symmetric contrastive loss of a batch (images, token ids) as a function of the batch.

    Each image must find its text among the batch's, and each text its image. With a `locked` image tower the batch
    holds image features in the images' place. Similarities are computed in float32 whatever autocast does to the
    towers: at a scale of 100, bfloat16 would round them to halves.
    """
    clip_loss = open_clip.ClipLoss()

    def loss(batch: Batch) -> Tensor:
        images, texts = batch
        with torch.no_grad():
            model.logit_scale.clamp_(0, log(MAX_LOGIT_SCALE))
        image_features = images if locked else model.encode_image(images)
        text_features = model.encode_text(texts)
        with torch.autocast(texts.device.type, enabled=False):
            image_features = F.normalize(image_features.float(), dim=-1)
            text_features = F.normalize(text_features.float(), dim=-1)
            bias = getattr(model, "logit_bias", None)
            value: Tensor = clip_loss(image_features, text_features, model.logit_scale.exp(), bias)
        return value

    return loss


def train(
    backbone: Backbone,
    pairs: list[Pair],
    schedule: Schedule,
    batch: int,
    folder: Path,
    features: Tensor | None = None,
    workers: int = 0,
) -> list[float]:
    """Train the backbone's model in place, with `features` its text half only; return the losses of the steps run."""
    model, device = backbone.model.train().requires_grad_(True), backbone.device
    if features is not None:
        model.visual.eval().requires_grad_(False)
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=True)
    dataset = PairDataset(pairs, transform, backbone.tokenizer, schedule.seed, features)

    def batches(start: int) -> Iterator[Batch]:
        loader = DataLoader(
            dataset,
            batch_sampler=batch_keys(len(pairs), batch, schedule.seed, start),
            num_workers=0 if features is not None else workers,
            pin_memory=device.type == "cuda",
        )
        try:
            for images, texts in loader:
                yield images.to(device, non_blocking=True), texts.to(device, non_blocking=True)
        except CoopError as error:  # from a worker process it comes with the traceback in its text
            raise CoopError(str(error).strip().splitlines()[-1].removeprefix("coop.errors.CoopError: ")) from error

    losses = fit(model, batches, contrastive_loss(model, locked=features is not None), schedule, folder, "pre-training")
    model.eval().requires_grad_(False)
    return losses


def image_features(backbone: Backbone, pairs: list[Pair], path: Path, given: bool) -> Float[Tensor, "n e"]:
    """Return a feature per pair from `path` (key `features`), computed with the backbone first unless it is `given`."""
    if not given and not path.exists():
        starts = range(0, len(pairs), ENCODED_AT_ONCE)
        parts = []
        for start in track(starts, "encoding images", total=len(starts)):
            some = pairs[start : start + ENCODED_AT_ONCE]
            parts.append(backbone.encode_images(torch.stack([backbone.preprocess(open_rgb(p.image)) for p in some])))
        save_tensors({"features": torch.cat(parts).cpu()}, path)
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
    if not features.isfinite().all():
        raise CoopError(f"features={path} holds numbers that are not finite: compute them again")
    return features


def write_model(backbone: Backbone, folder: Path) -> None:
    """Write the weights, and open_clip's configuration of model and preprocessing, into `folder`.

    The folder loads in plain open_clip as `local-dir:FOLDER`.
    """
    preprocessing = backbone.model.visual.preprocess_cfg
    kept = ("mean", "std", "interpolation", "resize_mode")
    config = {"model_cfg": model_config(backbone), "preprocess_cfg": {key: preprocessing[key] for key in kept}}
    write_json(folder / CONFIG_FILE, config)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.model.state_dict().items()}
    save_tensors(state, folder / CHECKPOINT_FILE)


def model_config(backbone: Backbone) -> dict[str, object]:
    """Return the model's configuration, from open_clip or a JSON file, with the activation that it really has."""
    name = backbone.architecture
    if name == "lit_lite":
        name = str(ASSETS / CONFIG_FILE)
    content = json.loads(Path(name).read_text()) if name.endswith(".json") else open_clip.get_model_config(name)
    config: dict[str, object] = dict(content.get("model_cfg", content))
    if any(type(module).__name__ == "QuickGELU" for module in backbone.model.modules()):
        config["quick_gelu"] = True
    return config


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file atomically."""
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)
