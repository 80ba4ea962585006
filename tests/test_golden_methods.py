"""The original CoCoOp's and CLIP-Adapter's recorded trajectories, reproduced from their initial weights and order."""

import json
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coop.clip.backbone import Backbone
from coop.features import Samples
from coop.methods import tip_adapter
from coop.methods.base import Classes, TrainedMethod, accuracy
from coop.methods.clip_adapter import ClipAdapter
from coop.methods.cocoop import CoCoOp
from coop.methods.tip_adapter import Ape, ApeT, TipAdapterF
from coop.options import ApeOptions, ApeTOptions, Augment, ClipAdapterOptions, CoCoOpOptions, TipAdapterFOptions
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


def scaled(tiny: Backbone, scale: float) -> Backbone:
    """Return the backbone with another logit scale."""
    other = copy(tiny)
    other.logit_scale = scale
    return other


def recorded_batches(views: torch.Tensor, labels: torch.Tensor, order: torch.Tensor, batch_size: int) -> list[Batch]:
    """Return the recorded batches: one view for each epoch."""
    return [
        (view[chosen], labels[chosen])
        for view, row in zip(views, order, strict=True)
        for chosen in row.split(batch_size)
    ]


def labelled(record: Record, part: str) -> Samples:
    features = record[f"{part}_features"]
    return Samples(record[f"{part}_labels"], features, features.new_empty(0, *features.shape))


def close_final(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=3e-4, atol=3e-4 * theirs.abs().max().item())


@pytest.mark.assets
def test_tip_adapter_f(golden: Path, tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    record = load_file(golden / "tipf-unequal.safetensors")
    case = json.loads((golden / "cases-tipf.json").read_text())["cases"]["unequal"]
    close(tiny.encode_images(record["images"].flatten(0, 1).float()), record["features"].flatten(0, 1))
    shots = Samples(record["labels"], record["features"][0], record["features"], fresh=True)
    options = TipAdapterFOptions(
        epochs=case["epochs"],
        batch_size=case["batch_size"],
        augment=Augment("epochs"),
        key_views=case["views"],
        train_alpha=case["alpha"],
        train_beta=case["beta"],
        search_scale=[float(end) for end in case["search_scale"]],
        search_step=case["search_step"],
    )
    train_views = record["features"][case["views"] :]
    batches = recorded_batches(train_views, record["labels"], record["order"], case["batch_size"])
    monkeypatch.setattr(TipAdapterF, "batches", lambda self, shots: iter(batches))
    seen: list[float] = []
    monkeypatch.setattr(tip_adapter, "accuracy", lambda *a: seen.append(accuracy(*a)) or seen[-1])
    classes, backbone = Classes(tuple(case["class_names"])), scaled(tiny, case["scale"])

    last = TipAdapterF(backbone, classes, replace(options, alpha=case["alpha"], beta=case["beta"]))
    close(last.text, record["class_weights"])
    last.fill_cache(shots)
    close(last.keys.detach(), record["init.keys"])
    last.set_numbers(case["alpha"], case["beta"])
    close(last.logits(record["test_features"]), record["training_free_logits"])
    found = last.search(labelled(record, "val"))
    assert (found.alpha, found.beta) == pytest.approx(
        (case["training_free_searched_alpha"], case["training_free_searched_beta"])
    )
    last.loss(*batches[0]).backward()
    close(last.keys.grad, record["grad.keys"])
    close(torch.tensor(last.rates(3)), record["lrs"])
    losses = last.run_training(shots, labelled(record, "val"))
    close(torch.tensor(losses), record["losses"])
    close_final(last.keys.detach(), record["last.keys"])
    close_final(last.logits(record["test_features"]), record["logits"])

    best = TipAdapterF(backbone, classes, replace(options, keep="best"))
    notes = best.fit(shots, labelled(record, "test"))  # the released code chooses the epoch on the test set
    assert seen[:3] == pytest.approx([percent / 100 for percent in record["test_accuracies"].tolist()])
    assert notes["best_epoch"] == case["best_epoch"]
    close_final(best.keys.detach(), record["best.keys"])
    searched = best.choose(labelled(record, "val"))
    assert (searched["alpha"], searched["beta"]) == pytest.approx((case["searched_alpha"], case["searched_beta"]))
    close_final(best.logits(record["test_features"]), record["best_logits_searched"])


@pytest.mark.assets
def test_ape(golden: Path, tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = load_file(golden / "ape-12x2.safetensors")
    case = json.loads((golden / "cases-ape.json").read_text())["cases"]["12x2"]
    (tmp_path / "prompts.json").write_text(json.dumps(case["sentences"]))
    template = f"{case['templates'][0]}+file:{tmp_path / 'prompts.json'}"
    classes, backbone = Classes(tuple(case["class_names"])), scaled(tiny, case["scale"])
    cache = Samples(record["labels"], record["features"][0], record["features"][: case["views"]])
    kept = {"channels": case["kept_features"] / 64, "template": template}
    given = {"alpha": case["alpha"], "beta": case["beta"], "gamma": case["gamma"]}
    weights = {"similarity_weight": case["w"][0], "variance_weight": case["w"][1]}
    ape = Ape(backbone, classes, ApeOptions(**given, **kept, **weights))
    close(ape.text, record["class_weights"])
    ape.fit(cache, labelled(record, "val"))
    close(ape.keys.detach(), record["keys"])
    assert torch.equal(ape.channels, record["indices"])
    close(ape.divergence, record["divergence"])
    close(ape.logits(record["test_features"]), record["logits"])
    grid = {"search_scale": [float(end) for end in case["search_scale"]], "search_step": case["search_step"]}
    searched = Ape(backbone, classes, ApeOptions(**kept, **weights, **grid))
    notes = searched.fit(cache, labelled(record, "val"))
    assert [notes[name] for name in ("alpha", "beta", "gamma")] == pytest.approx(
        [case[f"searched_{name}"] for name in ("alpha", "beta", "gamma")]
    )
    close(searched.logits(record["test_features"]), record["searched_logits"])

    about = case["train"]
    options = ApeTOptions(
        epochs=about["epochs"],
        batch_size=about["batch_size"],
        lr=about["lr"],
        eps=about["eps"],
        weight_decay=about["weight_decay"],
        augment=Augment("epochs"),
        key_views=case["views"],
        train_alpha=about["alpha"],
        train_beta=about["beta"],
        alpha=about["alpha"],
        beta=about["beta"],
        channels=about["kept_features"] / 64,
        similarity_weight=about["w"][0],
        variance_weight=about["w"][1],
        template=template,
    )
    method = ApeT(backbone, classes, options)
    train_views = record["features"][case["views"] :]
    batches = recorded_batches(train_views, record["labels"], record["train.order"], about["batch_size"])
    monkeypatch.setattr(ApeT, "batches", lambda self, shots: iter(batches))
    shots = replace(cache, views=record["features"], fresh=True)
    method.fill_cache(shots)
    method.set_numbers(about["alpha"], about["beta"])
    assert torch.equal(method.channels, record["train.indices"])
    method.loss(*batches[0]).backward()
    close(method.residual.grad, record["train.grad.res"])
    close(method.value_weights.grad, record["train.grad.value_weights"][:, 0])
    notes = method.fit(shots, labelled(record, "val"))
    assert notes["steps"] == len(record["train.losses"])
    assert notes["first_loss"] == pytest.approx(float(record["train.losses"][0]), rel=1e-4)
    assert notes["last_loss"] == pytest.approx(float(record["train.losses"][-1]), rel=1e-4)
    close(torch.tensor(method.rates(3)), record["train.lrs"])
    close_final(method.residual.detach(), record["train.final.res"])
    close_final(method.value_weights.detach(), record["train.final.value_weights"][:, 0])
    close_final(method.logits(record["test_features"]), record["train.logits"])
