"""Every method is registered once, has valid defaults, and stands in docs/."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from coop.errors import CoopError
from coop.methods import METHODS
from coop.methods.base import Classes
from coop.options import OPTIONS, Training, method_options
from tests.test_methods_towers import CLASSES, SETTINGS, backbone_of, pixels
from tests.test_towers import small_clip

OWN_CLASSES_ONLY = {  # they learn something for each class: no base-to-new
    "linear_probe", "taskres", "lp_plus_plus", "clap", "cross_modal", "tip_adapter", "tip_adapter_f", "ape", "ape_t",
}  # fmt: skip
DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_methods_and_options_have_the_same_names() -> None:
    assert list(METHODS) == list(OPTIONS)
    assert all(METHODS[name].name == name and METHODS[name].Options is OPTIONS[name] for name in METHODS)


@pytest.mark.parametrize("name", OPTIONS)
def test_defaults_come_back_from_plain_values_and_are_resolved_once(name: str) -> None:
    options = OPTIONS[name]()
    assert method_options(OPTIONS[name], asdict(options)) == options
    resolved = options.resolved(4, "dtd")
    assert resolved.resolved(16, "eurosat") == resolved.resolved(4, "dtd") == resolved
    assert not isinstance(resolved, Training) or resolved.epochs is not None
    assert isinstance(resolved.uses_validation, bool) and resolved.epoch_views >= 0


@pytest.mark.parametrize("name", OPTIONS)
def test_a_method_has_a_card(name: str) -> None:
    """A heading of the documentation names it."""
    pages = [page.read_text() for page in DOCS.glob("methods*.md")]
    headings = [line for page in pages for line in page.splitlines() if line.startswith(("## ", "### "))]
    assert any(re.search(rf"\b{name}\b", heading) for heading in headings)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "prompt_ensemble"])
def test_base_to_new_works_or_is_refused_before_training_in_one_sentence(name: str) -> None:
    """A method without anything learned moves to new classes, with a score for each, or says why not."""
    backbone = backbone_of(small_clip())
    method = METHODS[name](backbone, CLASSES, OPTIONS[name](**SETTINGS.get(name, {})))
    new = Classes(("river", "yin_yang"))
    if name in OWN_CLASSES_ONLY:
        with pytest.raises(CoopError, match="cannot be moved to other classes") as caught:
            method.for_classes(new)
        assert "\n" not in str(caught.value) and name in str(caught.value)
        return
    moved = method.for_classes(new)
    assert type(moved) is type(method) and moved.classes == new
    if name != "gda":  # it takes new classes from base features
        reads = {"pixels": pixels(3), "final": torch.randn(3, 24), "pre_projection": torch.randn(3, 48)}
        assert moved.logits(reads[OPTIONS[name].reads]).shape == (3, 2)
