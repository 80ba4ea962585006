"""The original CoCoOp's and CLIP-Adapter's recorded trajectories, reproduced from their initial weights and order."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coop.clip.backbone import Backbone
from coop.methods.base import TrainedMethod
from coop.methods.clip_adapter import ClipAdapter, ClipAdapterOptions
from coop.methods.cocoop import CoCoOp, CoCoOpOptions
from coop.train import Batch, learning_rates, sgd, train
from tests.test_golden import golden_classes, image_features, tiny_clip

Record = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def golden(assets: Path) -> Path:
    return assets / "golden"


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Backbone:
    return tiny_clip(golden)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def follow(method: TrainedMethod, tiny: Backbone, record: Record, ours: dict[str, str], batch_size: int) -> None:
    """Train as recorded, comparing first gradient, losses, final parameters and logits; `ours` maps their names."""
    parameters = method.parameters()
    initial = {ours[name[5:]]: tensor for name, tensor in record.items() if name.startswith("init.")}
    method.load_state({**method.state(), **initial})
    features, labels = image_features(tiny, record), record["labels"]
    batches: list[Batch] = [
        (features[chosen], labels[chosen]) for epoch in record["order"] for chosen in epoch.split(batch_size)
    ]
    method.loss(*batches[0]).backward()
    for theirs, name in ours.items():
        grad = parameters[name].grad
        assert grad is not None
        close(grad, record[f"grad.{theirs}"])
    epochs = len(record["order"])
    rates = learning_rates(epochs, len(batches) // epochs)
    torch.testing.assert_close(torch.tensor(rates), record["lrs"].float(), rtol=1e-6, atol=0)
    losses = train(sgd(method.trainable(), method.options), method.backward, batches, rates)
    method.reset_cache()
    close(torch.tensor(losses), record["losses"])
    for theirs, name in ours.items():
        close(parameters[name].detach(), record[f"final.{theirs}"])
    close(method.logits(features), record["logits"])


@pytest.mark.assets
@pytest.mark.parametrize(
    ("case", "batch_size", "n_ctx", "words"),
    [("m4-batch1", 1, 4, None), ("m16-batch4", 4, 16, None), ("photo-batch4", 4, 4, "a photo of a")],
)
def test_cocoop(golden: Path, tiny: Backbone, case: str, batch_size: int, n_ctx: int, words: str | None) -> None:
    record = load_file(golden / f"cocoop-{case}.safetensors")
    options = CoCoOpOptions(epochs=3, batch_size=batch_size, n_ctx=n_ctx, ctx_init=words)
    method = CoCoOp(tiny, golden_classes(golden), options)
    if words:
        torch.testing.assert_close(method.state()["ctx"], record["init.ctx"])
    follow(method, tiny, record, {name: name for name in method.state()}, batch_size)


@pytest.mark.assets
def test_clip_adapter(golden: Path, tiny: Backbone) -> None:
    record = load_file(golden / "clip-adapter.safetensors")
    method = ClipAdapter(tiny, golden_classes(golden), ClipAdapterOptions(epochs=4, batch_size=8))
    close(method.text, torch.nn.functional.normalize(record["text"], dim=-1))
    ours = {"fc.0.weight": "visual.down.weight", "fc.2.weight": "visual.up.weight"}
    follow(method, tiny, record, ours, batch_size=8)
