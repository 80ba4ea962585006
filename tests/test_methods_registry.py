"""Every method is registered once, has valid defaults, and stands in docs/."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from coop.methods import METHODS
from coop.options import OPTIONS, Training, method_options

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
