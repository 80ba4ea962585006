"""CLIP's loss: each image must find its text among the batch's, and each text its image."""

from collections.abc import Callable
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

MAX_LOGIT_SCALE = 100.0  # CLIP clips the learned scale, or training becomes unstable (section 2.5)


def contrastive_loss(model: Any, locked: bool = False) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """Return the symmetric contrastive loss of a batch (images, token ids) as a function of the batch.

    With a `locked` image tower the batch holds image features in the images' place. Similarities are computed in
    float32 whatever autocast does to the towers: at a scale of 100, bfloat16 would round them to halves.
    """
    clip_loss = ClipLoss()

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
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
