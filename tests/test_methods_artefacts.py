"""Every method, saved as a run saves it and loaded as `coop predict` loads it, answers exactly as before."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.learned import Learned, load_method
from coop.methods import METHODS
from coop.methods.base import Classes, Method
from coop.options import OPTIONS
from tests.methods_plain import CLASSES, sample

ON_FEATURES = [name for name, options in OPTIONS.items() if options.reads != "pixels"]  # others: test_methods_towers
MOVE = {"zero_shot", "waffle", "coop", "cocoop", "kgcoop", "prograd", "clip_adapter", "prompt_ensemble"}
MOVE |= {"prolip", "linear_adapter", "gda", "deep_text", "tcp"}
SHORT = {"epochs": 2, "batch_size": 4, "steps": 4, "eval_every": 2, "C": 1.0, "depth": 2, "layer": 1, "repetitions": 2}


def fitted(name: str, backbone: Backbone, folder: Path) -> Method:
    options: dict[str, Any] = {f.name: SHORT[f.name] for f in fields(OPTIONS[name]) if f.name in SHORT}
    if name == "prompt_ensemble":
        Learned.of(fitted("coop", backbone, folder)).save(folder / "member.safetensors")
        options = {"runs": [str(folder / "member.safetensors")]}
    method = METHODS[name](backbone, CLASSES, METHODS[name].Options(**options), seed=2)
    if method.options.trains:
        method.fit(sample(backbone, shots=2, views=3), sample(backbone, shots=2, seed=1))
    return method


@pytest.mark.parametrize("name", ON_FEATURES)
def test_loads_to_identical_logits(name: str, tiny_backbone: Backbone, tmp_path: Path) -> None:
    method, f = fitted(name, tiny_backbone, tmp_path), sample(tiny_backbone, shots=2, seed=5).test_view
    Learned.of(method).save(tmp_path / "learned.safetensors")
    again = load_method(tmp_path, backbone=tiny_backbone)
    assert type(again) is type(method)
    assert torch.equal(again.logits(f), method.logits(f))
    fresh = METHODS[name](tiny_backbone, CLASSES, method.options, seed=2)
    if method.options.trains:
        assert not torch.equal(fresh.logits(f), method.logits(f))


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_FEATURES)
def test_moves_to_new_classes_or_says_why_not(name: str, tiny_backbone: Backbone, tmp_path: Path) -> None:
    """`for_classes` is asked before anything is trained, and after."""
    method, f = fitted(name, tiny_backbone, tmp_path), sample(tiny_backbone, shots=2, seed=5).test_view
    new = Classes(("river", "abbey"))
    untrained = METHODS[name](tiny_backbone, CLASSES, method.options, seed=2)
    if name in MOVE:
        assert untrained.for_classes(new).logits(f).shape == (len(f), 2)
        moved = method.for_classes(new).logits(f)
        same = method.for_classes(CLASSES).logits(f)
        torch.testing.assert_close(same, method.logits(f), rtol=1e-5, atol=1e-5)
        if name == "gda":  # its new classes get their means and covariance from text, the learned ones from images
            return
        torch.testing.assert_close(moved[:, 1], same[:, CLASSES.names.index("abbey")], rtol=1e-4, atol=1e-4)
    else:
        for stage in (untrained, method):
            with pytest.raises(CoopError, match=f"method={name} .* cannot be moved to other classes"):
                stage.for_classes(new)
