"""Numbers and sizes at their ends: a finite result, or a sentence that says what is wrong."""

import math
from pathlib import Path

import torch

from experiments.campaign.fuzz import impossible_results
from experiments.campaign.place import TRAINED, World, tiny_model
from experiments.campaign.trial import Trial

METHODS = {
    "zero_shot": ("method=zero_shot",),
    "coop": TRAINED,
    "linear_probe": ("method=linear_probe", "shots=2"),
    "tip_adapter": ("method=tip_adapter", "shots=2", "search_step=[10,5]"),
}
CLASSES = 5000


def cases() -> list[tuple[str, str, str]]:
    """Return (kind, value, method) of every trial."""
    values = {
        "weights": ("nan", "inf", "0", "1e30", "1e-30"),
        "logit_scale": ("-inf", "0", "nan", "9.21", "100"),  # 9.21 = log 1e4
        "precision": ("bf16", "fp16"),
        "lr": ("0", "1e30", "1e-30"),
        "images": ("one class", "equal", "one each", f"{CLASSES} classes"),
    }
    return [
        (kind, value, method)
        for kind, some in values.items()
        for value in some
        for method in METHODS
        if kind != "lr" or method == "coop"
    ]


def trial(world: World, seed: int) -> Trial:
    """Try the case `seed`, counted round."""
    kind, value, method = cases()[seed % len(cases())]
    case = world.case()
    words = [*METHODS[method], "results=results"]
    if kind in ("weights", "logit_scale"):
        model = tiny_model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if (name == "logit_scale") == (kind == "logit_scale"):
                    number = float(value)
                    if kind == "weights" and math.isfinite(number) and number:
                        parameter.mul_(number)
                    else:
                        parameter.fill_(number)
        torch.save(model.state_dict(), case / "weights.pt")
        words.append("backbone.pretrained=weights.pt")
    elif kind == "images":
        words += _images(world, case, value)
    else:
        words.append(f"{kind}={value}")
    outcome = world.run(world.run_words(*words), case)
    found = Trial("extremes", seed, f"{kind} {value}, {method}", outcome.complaints())
    found.complaints += impossible_results(case)
    if outcome.code == 0:
        table = world.run(["table", "results", "--format", "csv"], case)
        found.complaints += table.complaints(codes=(0,))
    return found


def _images(world: World, case: Path, kind: str) -> list[str]:
    """Write images of a kind into the case; return the overrides that name them."""
    image = next((world.base / "images" / "test").rglob("*.png")).read_bytes()
    if kind.endswith("classes"):
        lines = [f"x.png,{label},class {label},{part}" for part in ("train", "val", "test") for label in range(CLASSES)]
        (case / "own").mkdir()
        (case / "own" / "x.png").write_bytes(image)
        (case / "own.csv").write_text("\n".join(["path,label,class name,split", *lines]))
        return ["dataset=csv", "dataset.file=own.csv", "dataset.root=own", "dataset.name=many", "shots=1"]
    names, count = (["only"], 4) if kind == "one class" else (["a", "b", "c"], 1 if kind == "one each" else 4)
    for part in ("train", "val", "test"):
        for name in names:
            folder = case / "own" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(image)
    return ["dataset.root=own", "shots=1"]
