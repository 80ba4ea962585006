"""The released tower methods' recorded trajectories (deep_clip, float32), reproduced through the public classes.

Each test sets the recorded start, replays the recorded order, and compares features, rates, first and last gradients,
losses, final parameters and test logits.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.features import Samples
from coop.methods import METHODS
from coop.methods.base import Classes
from coop.methods.tower_method import TowerMethod
from coop.options import OPTIONS, MethodOptions
from coop.train import Batch

pytestmark = pytest.mark.assets
Record = dict[str, Tensor]
NAMES = (
    "forest", "annual crop land", "Pomeranian", "2012 Audi TT RS Coupe", "chocolate_mousse", "Handstand Walking",
    "707-320", "stained", "abbey", "yin_yang", "great white shark", "Boeing 717",
)  # fmt: skip


@pytest.fixture(scope="module")
def golden(assets: Path) -> Path:
    return assets / "golden"


@pytest.fixture(scope="module")
def deep(golden: Path) -> Backbone:
    model = open_clip.CLIP(**json.loads((golden / "deep_clip.json").read_text()))
    model.load_state_dict({k: v.float() for k, v in load_file(golden / "deep_clip.safetensors").items()})
    return Backbone(model, lambda image: image, open_clip.get_tokenizer("ViT-B-32"))


def cases(name: str) -> dict[str, Any]:
    """Return the open cases of a file; none where the assets are missing (the fixtures then skip)."""
    import os

    path = Path(os.environ.get("COOP_TEST_ASSETS", "")) / "golden" / f"cases-{name}.json"
    return dict(json.loads(path.read_text())["cases"]) if path.is_file() else {"none": {}}


def near(ours: Tensor, theirs: Tensor, bar: float, what: str) -> None:
    """Compare the norm of the difference with the norm; a tensor of zeros must be small itself."""
    ours, theirs = ours.detach().double(), theirs.double()
    error, size = float((ours - theirs).norm()), float(theirs.norm())
    assert ours.shape == theirs.shape, what
    assert error <= bar * max(size, 1e-5), f"{what}: {error / max(size, 1e-5):.1e} is above {bar:.0e}"


def replay(record: Record, batch: int, drop_last: bool, steps: int) -> Callable[[Samples], Iterator[Batch]]:
    """Return `TrainedMethod.batches` for the recorded order."""

    def batches(train_set: Samples) -> Iterator[Batch]:
        done = 0
        for row in record["order"]:
            for chosen in row.split(batch):
                if done < steps and (len(chosen) == batch or not drop_last):
                    yield train_set.batch(chosen, None), train_set.labels[chosen]
                    done += 1

    return batches


class Watch:
    """Gradients of the first and the last step, and the learning rates, of a method while it is fitted."""

    def __init__(self, method: TowerMethod) -> None:
        self.first: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.losses: list[float] = []
        backward = method.backward

        def watched(inputs: Tensor, labels: Tensor) -> Tensor:
            loss = backward(inputs, labels)
            grads = {k: p.grad.clone() for k, p in method.parameters().items() if p.grad is not None}
            self.first = {**grads, **self.first}
            self.last.update(grads)
            self.losses.append(float(loss))
            return loss

        method.backward = watched  # type: ignore[method-assign]


def inputs_of(method: TowerMethod, images: Tensor) -> Tensor:
    return images if method.options.reads == "pixels" else method.backbone.encode_images(images)


def made(
    deep: Backbone, name: str, options: MethodOptions, record: Record, ours: Callable[[str], str], classes: Classes
) -> TowerMethod:
    """Return the method with its recorded start; `ours` maps parameter names."""
    method = METHODS[name](deep, classes, options)
    assert isinstance(method, TowerMethod)
    start = {ours(k[5:]): v for k, v in record.items() if k.startswith("init.")}
    assert set(start) == set(method.parameters())
    method.load_state(start)
    return method


def follow(method: TowerMethod, record: Record, case: dict[str, Any], ours: Callable[[str], str]) -> Watch:
    """Fit as recorded and compare everything but the test logits."""
    images = record["images"]
    inputs = inputs_of(method, images)
    near(method.prompts(method.text_changes()), record["text0"], 1e-5, "text0")
    near(method.image_features(inputs), torch.nn.functional.normalize(record["image0"], dim=-1), 1e-5, "image0")
    per_epoch = len(images) // case["batch"]
    near(torch.tensor(method.rates(per_epoch), dtype=torch.float64), record["lrs"], 1e-5, "lrs")
    method.batches = replay(record, case["batch"], method.drop_last, case["steps"])  # type: ignore[method-assign]
    watch = Watch(method)
    data = Samples(record["labels"], inputs, inputs.new_empty(0, *inputs.shape))
    result = method.fit(data, data)
    assert result["steps"] == case["steps"]
    near(torch.tensor(watch.losses), record["losses"], 1e-4, "losses")
    for k, v in record.items():
        kind, _, name = k.partition(".")
        if kind == "grad":
            near(watch.first[ours(name)], v, 1e-4, k)
        elif kind == "grad_last":
            near(watch.last[ours(name)], v, 1e-3, k)
        elif kind == "final":
            near(method.parameters()[ours(name)], v, 3e-4, k)
    return watch


def options_of(name: str, **values: Any) -> Any:
    return OPTIONS[name](**values)


def prompt_name(theirs: str) -> str:
    """Return our name of a deep prompt of MaPLe, IVLP, VPT or PromptSRC."""
    tower, _, rest = theirs.partition(".")
    parts = theirs.split(".")
    if theirs == "prompt_learner.ctx":
        return "text.0"
    if theirs == "image_encoder.VPT":
        return "image.0"
    if parts[1] == "proj":
        return f"maps.0.{parts[2]}"
    if parts[1] == "compound_prompts_text":
        return f"text.{int(parts[2]) + 1}"
    if parts[1] == "compound_prompt_projections":
        return f"maps.{int(parts[2]) + 1}.{parts[3]}"
    return f"{tower.removesuffix('_encoder')}.{parts[3]}"


@pytest.mark.parametrize("name", cases("maple"))
def test_maple(golden: Path, deep: Backbone, name: str) -> None:
    record, case = load_file(golden / f"{name}.safetensors"), cases("maple")[name]
    training = {"epochs": case["epochs"], "batch_size": case["batch"], "lr": case["lr"]}
    training["weight_decay"] = case["weight_decay"]
    words = {"n_ctx": case["n_ctx"], "depth": case["prompt_depth"], "ctx_init": case["ctx_init"] or None}
    method = made(deep, "maple", options_of("maple", **training, **words), record, prompt_name, Classes(NAMES))
    follow(method, record, case, prompt_name)
    near(method.logits(record["test_images"]), record["logits"], 1e-4, "logits")


@pytest.mark.parametrize("name", cases("ivlp"))
def test_ivlp_and_vpt(golden: Path, deep: Backbone, name: str) -> None:
    record, case = load_file(golden / f"{name}.safetensors"), cases("ivlp")[name]
    training = {"epochs": case["epochs"], "batch_size": case["batch"], "lr": case["lr"]}
    training["weight_decay"] = case["weight_decay"]
    text, vision = case.get("n_ctx_text", 0), case["n_ctx_vision"]
    if not text:
        kind, own = "vpt", {"n_ctx": vision, "depth": case["prompt_depth_vision"]}
    elif not vision:
        kind, own = "deep_text", {"n_ctx": text, "depth": case["prompt_depth_text"], "ctx_init": case["ctx_init"]}
    else:
        kind, own = "ivlp", {"n_ctx_text": text, "n_ctx_image": vision, "ctx_init": case["ctx_init"]}
        own |= {"depth_text": case["prompt_depth_text"], "depth_image": case["prompt_depth_vision"]}
    method = made(deep, kind, options_of(kind, **training, **own), record, prompt_name, Classes(NAMES))
    follow(method, record, case, prompt_name)
    near(method.logits(inputs_of(method, record["test_images"])), record["logits"], 1e-4, "logits")


@pytest.mark.parametrize("name", cases("promptsrc"))
def test_promptsrc(golden: Path, deep: Backbone, name: str) -> None:
    record, case = load_file(golden / f"{name}.safetensors"), cases("promptsrc")[name]
    training = {"epochs": case["epochs"], "batch_size": case["batch"], "lr": case["lr"]}
    training["weight_decay"] = case["weight_decay"]
    own = {"n_ctx_text": case["n_ctx_text"], "n_ctx_image": case["n_ctx_vision"], "ctx_init": case["ctx_init"]}
    own |= {"depth_text": case["prompt_depth_text"], "depth_image": case["prompt_depth_vision"]}
    own |= {"text_weight": float(case["text_loss_weight"]), "image_weight": float(case["image_loss_weight"])}
    last = options_of("promptsrc", **training, **own, average="none")
    method = made(deep, "promptsrc", last, record, prompt_name, Classes(NAMES))
    near(method.teacher_text(), torch.nn.functional.normalize(record["teacher_text"], dim=-1), 1e-5, "teacher_text")
    terms: dict[str, list[float]] = {"ce": [], "text": [], "image": [], "logits": []}
    compute = method.terms

    def watched(inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = compute(inputs, labels)
        for k, v in found.items():
            terms[k].append(float(v.detach()))
        return found

    method.terms = watched
    follow(method, record, case, prompt_name)
    near(method.logits(record["test_images"]), record["logits_last"], 1e-4, "logits_last")
    for k, values in terms.items():
        near(torch.tensor(values), record[f"losses_{k}"], 1e-4, f"losses_{k}")

    own |= {"average_mean": float(case["gpa_mean"]), "average_deviation": float(case["gpa_std"])}
    method = made(deep, "promptsrc", options_of("promptsrc", **training, **own), record, prompt_name, Classes(NAMES))
    near(method.weights, record["gpa_weights"], 1e-6, "gpa_weights")
    averaged = {k.removeprefix("gpa."): v for k, v in record.items() if k.startswith("gpa.")}
    follow(method, {k: v for k, v in record.items() if not k.startswith("final.")}, case, prompt_name)
    for k, v in averaged.items():
        near(method.parameters()[prompt_name(k)], v, 3e-4, k)
    near(method.logits(record["test_images"]), record["logits"], 1e-4, "logits")
