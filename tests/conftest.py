"""What several test files need."""

import os
from pathlib import Path

import open_clip
import pytest
import torch

from coop.backbone import Backbone


@pytest.fixture(scope="session")
def assets() -> Path:
    """Return the folder of development assets; tests without it are skipped."""
    place = os.environ.get("COOP_TEST_ASSETS")
    if not place or not Path(place).is_dir():
        pytest.skip("COOP_TEST_ASSETS does not name the folder of development assets")
    return Path(place).resolve()


torch.set_num_threads(1)  # tests run side by side: more threads than cores make every one wait


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    """Return a small CLIP with random weights, strong enough that prompts and classes differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(
            embed_dim=32,
            vision_cfg={"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
            text_cfg={"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        )
        with torch.no_grad():
            for parameter in (model.token_embedding.weight, model.positional_embedding):
                parameter.mul_(10)
    return Backbone(model, lambda image: image, open_clip.SimpleTokenizer(), "tiny")
