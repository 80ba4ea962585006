"""Prompt ensembles against the mean of their runs' features, from saved artefacts."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.learned import FILE, Learned
from coop.methods.base import Classes, Method
from coop.methods.cocoop import CoCoOp, CoCoOpOptions
from coop.methods.coop import CoOp, CoOpOptions
from coop.methods.prompt_ensemble import PromptEnsemble, PromptEnsembleOptions
from coop.methods.regularised import KgCoOp, KgCoOpOptions
from tests.methods_plain import CLASSES, sample, with_context


def saved(method: Method, folder: Path) -> str:
    Learned.of(method).save(folder / FILE)
    return str(folder)


@pytest.fixture
def members(tiny_backbone: Backbone) -> list[CoOp]:
    return [
        CoOp(tiny_backbone, CLASSES, CoOpOptions(n_ctx=4), seed=1),
        CoOp(tiny_backbone, CLASSES, CoOpOptions(n_ctx=8), seed=2),
        KgCoOp(tiny_backbone, CLASSES, KgCoOpOptions(ctx_init=None, n_ctx=4), seed=3),
    ]


def test_averages_the_runs_class_features(tiny_backbone: Backbone, members: list[CoOp], tmp_path: Path) -> None:
    runs = [saved(method, tmp_path / str(i)) for i, method in enumerate(members)]
    ensemble = PromptEnsemble(tiny_backbone, CLASSES, PromptEnsembleOptions(runs))
    f = F.normalize(sample(tiny_backbone, shots=2).test_view, dim=1)
    for classes in (CLASSES, Classes(("river", "abbey"))):
        w = sum(with_context(tiny_backbone, method.state()["ctx"], classes.names) for method in members)
        theirs = tiny_backbone.logit_scale * f @ (w / w.norm(dim=1, keepdim=True)).T
        ours = ensemble if classes is CLASSES else ensemble.for_classes(classes)
        torch.testing.assert_close(ours.logits(f), theirs, rtol=1e-4, atol=1e-4)


def test_what_is_saved_needs_no_runs(tiny_backbone: Backbone, members: list[CoOp], tmp_path: Path) -> None:
    options = PromptEnsembleOptions([saved(members[0], tmp_path / "a")])
    method, f = PromptEnsemble(tiny_backbone, CLASSES, options), sample(tiny_backbone, shots=2).test_view
    state, logits = method.state(), method.logits(f)
    (tmp_path / "a" / FILE).unlink()
    again = PromptEnsemble(tiny_backbone, CLASSES, options)
    again.load_state(state)
    assert torch.equal(again.logits(f), logits)


def test_refusals(tiny_backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(CoopError, match=r"runs=\[FOLDER,FOLDER\]"):
        PromptEnsemble(tiny_backbone, CLASSES, PromptEnsembleOptions())
    run = saved(CoCoOp(tiny_backbone, CLASSES, CoCoOpOptions()), tmp_path / "b")
    with pytest.raises(CoopError, match="is a run of method=cocoop"):
        PromptEnsemble(tiny_backbone, CLASSES, PromptEnsembleOptions([run])).class_features()
    with pytest.raises(CoopError, match="No such file"):
        PromptEnsemble(tiny_backbone, CLASSES, PromptEnsembleOptions([str(tmp_path)])).class_features()
