"""The original code's recorded trajectories (a tiny CLIP, float32), reproduced from its initial context and order."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from coop.clip.backbone import Backbone
from coop.methods.base import Classes, scaled_cosine
from coop.methods.coop import CoOp, CoOpOptions
from coop.train import learning_rates, sgd, train
from tests.golden.make import tiny_model

CASES = [
    f"{position}-{kind}-m{m}" for position in ("end", "middle", "front") for kind in ("unified", "csc") for m in (4, 16)
] + ["end-unified-photo", "middle-unified-photo"]


@pytest.fixture(scope="module")
def golden(assets: Path) -> Path:
    return assets / "golden"


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Backbone:
    return tiny_clip(golden)


def tiny_clip(golden: Path) -> Backbone:
    return Backbone(tiny_model(golden), lambda image: image, open_clip.get_tokenizer("ViT-B-32"))


def image_features(tiny: Backbone, record: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what the image tower gives; most of the shipped recordings hold it, as open_clip computed it."""
    return record["features"] if "features" in record else tiny.encode_images(record["images"])


def golden_classes(golden: Path) -> Classes:
    return Classes(tuple(json.loads((golden / "cases.json").read_text())["class_names"]))


@pytest.mark.assets
@pytest.mark.parametrize("name", CASES)
def test_trajectory(golden: Path, tiny: Backbone, name: str) -> None:
    about = json.loads((golden / "cases.json").read_text())
    case, record = about["cases"][name], load_file(golden / f"{name}.safetensors")
    assert set(about["cases"]) == set(CASES)
    options = CoOpOptions(
        epochs=about["epochs"],
        batch_size=about["batch_size"],
        n_ctx=case["n_ctx"],
        ctx_position=case["position"],
        class_specific=case["class_specific"],
        ctx_init=case["ctx_init"] or None,
    )
    method = CoOp(tiny, Classes(tuple(about["class_names"])), options)
    ctx = method.learner.ctx
    if case["ctx_init"]:
        torch.testing.assert_close(ctx.detach(), record["ctx0"])
    method.load_state({"ctx": record["ctx0"]})

    def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-4, atol=1e-4 * scale)

    close(method.learner.encoder(ctx.flatten(0, -2)).detach(), record["text0"])

    features, labels = image_features(tiny, record), record["labels"].long()
    batches = [
        (features[chosen], labels[chosen])
        for epoch in record["order"].long()
        for chosen in epoch.split(options.batch_size)
    ]
    method.loss(*batches[0]).backward()
    close(ctx.grad, record["grad0"])

    rates = learning_rates(options.epochs, len(batches) // options.epochs, options.lr)
    torch.testing.assert_close(torch.tensor(rates), record["lrs"].float(), rtol=1e-6, atol=0)
    losses = train(sgd([ctx], options), method.backward, batches, rates)
    close(torch.tensor(losses), record["losses"])
    close(ctx.detach(), record["ctx"])
    close(scaled_cosine(tiny, features, method.learner.class_features()).detach(), record["logits"])
