"""What the released codes of methods on image features compute (a tiny CLIP, float32), through the method classes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.features import Samples
from coop.methods import METHODS
from coop.methods.base import Classes
from coop.methods.gaussian import ALPHAS
from coop.options import OPTIONS
from coop.train import Batch
from tests.test_golden import tiny_clip

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def tiny(assets: Path) -> Backbone:
    return tiny_clip(assets / "golden")


@dataclass
class Case:
    """One recording: what the released code was given, what it computed, and the toolkit's method on the same."""

    name: str
    backbone: Backbone
    about: dict[str, Any]
    record: dict[str, Tensor]
    classes: Classes
    template: str | None
    losses: list[float] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)

    def features(self, images: str, tap: str = "final") -> Tensor:
        """Return the features of recorded images, once they are found equal to the recorded ones."""
        pixels = self.record[images].float()
        encode = self.backbone.encode_images if tap == "final" else self.backbone.encode_pre_projection
        ours = encode(pixels.flatten(0, -4)).unflatten(0, pixels.shape[:-3])
        kind = "features" if tap == "final" else "pre_features"
        recorded = kind if images == "images" else images.replace("images", kind)
        if recorded in self.record:
            close(ours, self.record[recorded], 1e-5)
        return ours

    def samples(self, part: str, tap: str = "final") -> Samples:
        """Return the training sample, with its views, or `val`."""
        if part == "train":
            views, labels = self.features("images", tap), self.record["labels"]
            views = views[None] if views.ndim == 2 else views
            return Samples(labels, views[0], views)
        if "val_images" not in self.record:
            return Samples(self.record["labels"][:0], torch.empty(0, 64), torch.empty(0, 0, 64))
        seen = self.features("val_images", tap)
        return Samples(self.record["val_labels"], seen, seen.new_empty(0, *seen.shape))

    def method(self, name: str, batches: Iterable[Batch] | None = None, **options: Any) -> Any:
        """Return the method, noting its losses and first gradients; `batches` replace those that it would draw."""
        case, kind = self, METHODS[name]

        class Noting(kind):  # type: ignore[misc, valid-type]
            def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
                loss: Tensor = super().backward(inputs, labels)
                case.losses.append(float(loss))
                if len(case.losses) == 1:
                    case.grads = {n: p.grad.clone() for n, p in self.parameters().items() if p.grad is not None}
                return loss

        if batches is not None:
            Noting.batches = lambda self, train_set: iter(batches)  # type: ignore[attr-defined]
        chosen = OPTIONS[name](**options).resolved(2, self.classes.dataset)
        return Noting(self.backbone, self.classes, chosen)


def case_of(golden: Path, name: str, backbone: Backbone, tmp_path: Path, scale: float | None = None) -> Case:
    """Load a recording. Several templates become a prompt file, unless they are ImageNet's."""
    family, _, kind = name.partition("-")
    about = json.loads((golden / f"cases-{family}.json").read_text())["cases"][kind]
    dataset = {"ImageNet": "imagenet"}.get(about.get("dataset", ""), "")
    names = tuple(about["class_names"][: about.get("base_classes")])
    template = None
    if len(about["templates"]) > 1 and not dataset:
        path = tmp_path / "prompts.json"
        path.write_text(json.dumps(sentences(about["class_names"], about["templates"])))
        template = f"file:{path}"
    classes = Classes(names, about["templates"][-1], dataset)
    if scale is not None:
        backbone = tiny_clip(golden)
        backbone.logit_scale = scale
    return Case(name, backbone, about, load_file(golden / f"{name}.safetensors"), classes, template)


def sentences(names: Iterable[str], templates: list[str]) -> dict[str, list[str]]:
    return {name: [template.format(name.replace("_", " ")) for template in templates] for name in names}


def close(ours: Tensor, theirs: Tensor, bar: float = 1e-4) -> None:
    """Compare by norms: that of the difference over that of the recording."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach().double(), theirs.double()
    error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
    assert error < bar, error


def cases(family: str) -> list[str]:
    found = {
        "taskres": ("pets", "imagenet", "decay"),
        "lpplus": ("balanced", "unequal"),
        "crossmodal": ("cross", "uni"),
        "clap": ("small-set", "batches"),
    }
    return [f"{family}-{case}" for case in found[family]]


@pytest.mark.parametrize("name", cases("taskres"))
def test_taskres(assets: Path, tiny: Backbone, tmp_path: Path, name: str) -> None:
    case = case_of(assets / "golden", name, tiny, tmp_path)
    a, r, train = case.about, case.record, case.samples("train")
    batches = [
        (train.views[epoch % len(train.views)][rows], train.labels[rows])
        for epoch, order in enumerate(r["order"])
        for rows in order.split(a["batch_size"])
    ]
    keys = ("epochs", "batch_size", "lr", "weight_decay", "warmup_epochs", "warmup_lr", "alpha")
    method = case.method("taskres", batches, **{key: a[key] for key in keys})
    close(method.text, r["text"], 1e-5)
    method.fit(train, case.samples("val"))
    close(torch.tensor(method.rates(len(batches) // a["epochs"])), r["lrs"], 1e-6)
    close(torch.tensor(case.losses), r["losses"])
    close(case.grads["residual"], r["grad.text_feature_residuals"])
    close(method.residual, r["final.text_feature_residuals"], 3e-4)
    close(method.text + a["alpha"] * method.residual, r["class_weights"], 3e-4)
    close(method.logits(case.features("test_images")), r["logits"])


@pytest.mark.parametrize("name", cases("lpplus"))
def test_lp_plus_plus(assets: Path, tiny: Backbone, tmp_path: Path, name: str) -> None:
    case = case_of(assets / "golden", name, tiny, tmp_path)
    a, r, train, val = case.about, case.record, case.samples("train"), case.samples("val")
    options = {key: a[key] for key in ("steps", "momentum", "alpha_every")} | {"template": case.template}
    test = case.features("test_images")
    for sample, logits in (
        (val, "logits"),
        (Samples(val.labels[:0], val.test_view[:0], val.views[:, :0]), "final_logits"),
    ):
        case.losses = []
        method = case.method("lp_plus_plus", **options)
        close(method.text, r["class_weights"], 1e-5)
        method.load_state({**method.state(), "bias": r["init.bias"]})
        notes = method.fit(train, sample)
        assert notes["lr"] == pytest.approx(float(r["lr_weight"]), rel=1e-4)
        assert notes["lr_alpha"] == pytest.approx(float(r["lr_alpha"]), rel=1e-4)
        close(torch.tensor(case.losses), r["losses"])
        close(case.grads["weight"], r["grad.weight"])
        close(case.grads["bias"], r["grad.bias"])
        close(method.logits(test), r[logits])
        if logits == "logits":
            assert notes["step"] - 1 == a["best_step"]
            assert 100 * notes["val_accuracy"] == pytest.approx(a["best_val_accuracy"])
        else:
            for key, value in method.state().items():
                close(value, r[f"final.{key}"], 3e-4)
            close(method.alpha, r["alphas"][-1])


def test_gda_few_shot(assets: Path, tmp_path: Path, tiny: Backbone) -> None:
    case = case_of(assets / "golden", "gda-few-shot", tiny, tmp_path, scale=100.0)
    a, r = case.about, case.record
    method = case.method("gda", template=case.template)
    close(method.text, r["class_weights"], 1e-5)
    notes = method.fit(case.samples("train"), case.samples("val"))
    assert list(ALPHAS) == a["alphas"]
    assert notes["alpha"] == a["chosen_alpha"]
    close(100 * torch.tensor(notes["val_accuracies"]), r["val_accuracies"])
    close(method.weight, r["w"], 3e-4)
    close(method.bias, r["b"], 3e-4)
    close(method.logits(case.features("test_images")), r["logits"])


def test_gda_base_to_new(assets: Path, tmp_path: Path, tiny: Backbone) -> None:
    case = case_of(assets / "golden", "gda-base-to-new", tiny, tmp_path, scale=100.0)
    a, r = case.about, case.record
    method = case.method("gda", template=case.template, covariance="per_class")
    close(method.text, r["class_weights"], 1e-5)
    notes = method.fit(case.samples("train"), case.samples("val"))
    assert notes["alpha"] == a["chosen_alpha"]
    close(100 * torch.tensor(notes["val_accuracies"]), r["val_accuracies"])
    close(method.weight, r["w"], 1e-3)
    close(method.bias, r["b"], 1e-3)
    close(method.logits(case.features("test_images")), r["logits"], 1e-3)
    new = method.for_classes(Classes(tuple(a["class_names"][a["base_classes"] :])))
    close(new.text, r["new_class_weights"], 1e-5)
    close(new.weight, r["new_w"], 1e-3)
    close(new.bias, r["new_b"], 1e-3)
    close(new.logits(case.features("new_images")), r["new_logits"], 1e-3)


@pytest.mark.parametrize("name", cases("crossmodal"))
def test_cross_modal(assets: Path, tmp_path: Path, tiny: Backbone, name: str) -> None:
    about = json.loads((assets / "golden" / "cases-crossmodal.json").read_text())["cases"]
    scale = float(torch.tensor(about[name.partition("-")[2]]["log_scale"]).exp())
    case = case_of(assets / "golden", name, tiny, tmp_path, scale)
    a, r, train, val = case.about, case.record, case.samples("train"), case.samples("val")
    given = {key: a[key] for key in ("lr", "weight_decay", "batch_size", "steps", "warmup_steps", "eval_every")}
    given |= {"warmup_lr": a["warmup_min_lr"], "texts": a["modality"] == "cross_modal", "template": case.template}
    prompts = case.method("cross_modal", **given)
    close(prompts.prompts, r["text"].transpose(0, 1).flatten(0, 1), 1e-5)
    close(prompts.weight, r["init.weight"], 1e-5)
    pool, labels = train.views.flatten(0, 1), train.labels.repeat(2)
    batches = [(pool[i], labels[i]) for i in r["image_draws"]]
    if a["text_batch"]:
        batches = [
            (torch.cat([x, prompts.prompts[t]]), torch.cat([y, prompts.prompt_labels[t]]))
            for (x, y), t in zip(batches, r["text_draws"], strict=True)
        ]
    test = case.features("test_images")
    none = Samples(val.labels[:0], val.test_view[:0], val.views[:, :0])
    for sample, wise_ft, weight, logits in (
        (val, None, "final.weight", "logits"),
        (val, 0.5, "wiseft.weight", "wiseft_logits"),
        (val, 0.3, None, "wiseft_03_logits"),
        (none, None, "last.weight", None),
    ):
        case.losses = []
        method = case.method("cross_modal", batches, **given, wise_ft=wise_ft)
        notes = method.fit(train, sample)
        close(torch.tensor(case.losses), r["losses"])
        close(case.grads["weight"], r["grad.weight"])
        close(torch.tensor(method.rates(1)), r["lrs"], 1e-6)
        if weight:
            close(method.weight, r[weight], 3e-4)
        if logits:
            close(method.logits(test), r[logits])
            assert notes["step"] - 1 == a["kept_step"]
            assert notes["val_accuracy"] == pytest.approx(a["kept_val_accuracy"])


@pytest.mark.parametrize("name", cases("clap"))
def test_clap(assets: Path, tiny: Backbone, tmp_path: Path, name: str) -> None:
    case = case_of(assets / "golden", name, tiny, tmp_path)
    a, r, train = case.about, case.record, case.samples("train")
    pool, labels = train.views.flatten(0, 1), train.labels.repeat(len(train.views))
    given = {
        key: a[key] for key in ("epochs", "batch_size", "lr", "momentum", "weight_decay", "warmup_epochs", "warmup_lr")
    }
    given |= {"constraint": a["constraint"] == "l2"}
    method = case.method("clap", [(pool[i], labels[i]) for i in r["draws"]], **given)
    close(method.text, r["text"], 1e-5)
    method.fit(train, case.samples("val"))
    close(method.strength, r["multipliers"], 1e-5)
    close(torch.tensor(method.rates(a["steps_per_epoch"])), r["lrs"], 1e-6)
    close(torch.tensor(case.losses), r["losses"])
    close(case.grads["weights"], r["grad.prototypes"])
    close(method.weights, r["final.prototypes"], 3e-4)
    close(method.logits(case.features("test_images")), r["logits"])
    own = case.method("clap", **given).batches(train)
    assert [len(y) for _, y in own] == [a["true_batch"]] * len(r["draws"])


@pytest.mark.parametrize("kind", ["projection", "projection-search", "adapter"])
def test_projections(assets: Path, tmp_path: Path, tiny: Backbone, kind: str) -> None:
    case = case_of(assets / "golden", f"prolip-{kind}", tiny, tmp_path, scale=100.0)
    a, r = case.about, case.record
    adapter = a["kind"] == "adapter"
    name, theirs, tap = (
        ("linear_adapter", "adapter.weight", "final") if adapter else ("prolip", "visual.proj", "pre_projection")
    )
    case.features("images", "pre_projection")
    train, val = case.samples("train", tap), case.samples("val", tap)
    method = case.method(name, steps=a["steps"], lr=a["lr"], penalty=float(a["lambda"]), template=case.template)
    close(method.text, r["class_weights"], 1e-5)
    close(method.map, r[f"init.{theirs}"], 1e-6)
    shown = [inputs for inputs, _ in method.batches(train)]
    assert all(torch.equal(x, train.views[v]) for x, v in zip(shown, r["view_of_step"], strict=True))
    method.fit(train, val)
    close(torch.tensor(method.rates(1)), r["lrs"], 1e-6)
    close(torch.tensor(case.losses), r["losses"])
    close(case.grads["map"], r[f"grad.{theirs}"])
    close(method.map, r[f"final.{theirs}"], 3e-4)
    test = case.features("test_images", tap)
    close(method.logits(test), r["logits"])
    if "search" in r:
        searched = case.method(name, steps=a["steps"], template=case.template)
        notes = searched.fit(train, val)
        assert (notes["lr"], notes["penalty"]) == (a["lr"], a["lambda"])
        close(torch.tensor([(lr, penalty, 100 * found) for lr, penalty, found in notes["search"]]), r["search"], 1e-6)
        close(searched.logits(test), r["logits"])
