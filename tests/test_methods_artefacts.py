"""Every method, saved as a run saves it and loaded as `coop predict` loads it, answers exactly as before."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.learned import Learned, load_method
from coop.methods import METHODS
from coop.methods.base import Classes, Method
from coop.options import Training
from tests.methods_plain import CLASSES, sample

MOVE = {"zero_shot", "waffle", "coop", "cocoop", "kgcoop", "prograd", "clip_adapter", "prompt_ensemble"}
MOVE |= {"prolip", "linear_adapter"}
ESTIMATED = {"gda"}  # other classes get weights of their own, estimated from the learned classes' images
SHORT: dict[str, dict[str, Any]] = {
    "lp_plus_plus": {"steps": 12},
    "cross_modal": {"steps": 3, "warmup_steps": 0, "batch_size": 4},
    "prolip": {"steps": 3, "lr": 0.01},
    "linear_adapter": {"steps": 3, "lr": 0.01},
}


def fitted(name: str, backbone: Backbone, folder: Path) -> Method:
    trained = issubclass(METHODS[name].Options, Training)
    options: dict[str, Any] = {"epochs": 2, "batch_size": 4} if trained else SHORT.get(name, {})
    if name == "prompt_ensemble":
        Learned.of(fitted("coop", backbone, folder)).save(folder / "member.safetensors")
        options = {"runs": [str(folder / "member.safetensors")]}
    method = METHODS[name](backbone, CLASSES, METHODS[name].Options(**options), seed=2)
    if method.options.trains:
        method.fit(sample(backbone, shots=2, views=3), sample(backbone, shots=2, seed=1))
    return method


@pytest.mark.parametrize("name", METHODS)
def test_loads_to_identical_logits(name: str, tiny_backbone: Backbone, tmp_path: Path) -> None:
    method, f = fitted(name, tiny_backbone, tmp_path), sample(tiny_backbone, shots=2, seed=5).test_view
    Learned.of(method).save(tmp_path / "learned.safetensors")
    again = load_method(tmp_path, backbone=tiny_backbone)
    assert type(again) is type(method)
    assert torch.equal(again.logits(f), method.logits(f))
    fresh = METHODS[name](tiny_backbone, CLASSES, method.options, seed=2)
    if method.options.trains:
        assert not torch.equal(fresh.logits(f), method.logits(f))


@pytest.mark.parametrize("name", METHODS)
def test_moves_to_new_classes_or_says_why_not(name: str, tiny_backbone: Backbone, tmp_path: Path) -> None:
    """`for_classes` is asked before anything is trained, and after."""
    method, f = fitted(name, tiny_backbone, tmp_path), sample(tiny_backbone, shots=2, seed=5).test_view
    new = Classes(("river", "abbey"))
    untrained = METHODS[name](tiny_backbone, CLASSES, method.options, seed=2)
    if name in MOVE | ESTIMATED:
        assert untrained.for_classes(new).logits(f).shape == (len(f), 2)
        moved = method.for_classes(new).logits(f)
        same = method.for_classes(CLASSES).logits(f)
        torch.testing.assert_close(same, method.logits(f), rtol=1e-5, atol=1e-5)
        if name in MOVE:
            torch.testing.assert_close(moved[:, 1], same[:, CLASSES.names.index("abbey")], rtol=1e-4, atol=1e-4)
    else:
        for stage in (untrained, method):
            with pytest.raises(CoopError, match=f"method={name} .* cannot be moved to other classes"):
                stage.for_classes(new)
