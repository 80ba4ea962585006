"""The page needs nothing else, runs nothing but its own script, and can be read: without a browser."""

import re
from pathlib import Path

import pytest

from coop.report.build import Report
from coop.report.detail import Bin, ClassGain, Confusion, Detail, Example
from coop.report.figures import COLOURS, Bars, Curves, Line, Panel
from coop.report.frame import Published, Value
from coop.report.page import render_page
from coop.report.summary import Missing
from coop.report.tables import Grid
from coop.report.words import Words
from tests.page_parser import Page, contrast
from tests.page_sample import NASTY, report

REPORT = Path(__file__).resolve().parents[1] / "coop" / "report"


@pytest.fixture(scope="module")
def source() -> str:
    return render_page(report())


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_nothing_is_loaded(page: Page, source: str) -> None:
    loads = {"src", "srcset", "poster", "data", "action", "background", "cite", "ping"}
    for tag, attrs in page.elements:
        for key, value in attrs.items():
            if key in loads:
                assert value.startswith("data:image/"), (tag, key, value)
            if key in ("href", "xlink:href"):
                assert value.startswith("#") or value == "data:,", (tag, key, value)
        assert not any(key.startswith("on") for key in attrs), (tag, attrs)
    assert "url(" not in source and "@import" not in source
    code = (REPORT / "page.js").read_text(encoding="utf-8")
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|innerHTML|eval\(|https?:", code)


def test_links_within_the_page_have_their_target(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = [attrs["href"][1:] for tag, attrs in page.elements if tag in ("a", "use")]
    named += [attrs["aria-labelledby"] for _, attrs in page.elements if "aria-labelledby" in attrs]
    assert set(named) <= {*ids, "source-title"}  # the dialog's title comes with its content


def test_policy_allows_only_the_pages_own_script(page: Page) -> None:
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "img-src data:" in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]+'", policy)


def test_texts_stay_texts(page: Page, source: str) -> None:
    """The sample's class names and errors hold a tag, quotes and the end of a script."""
    assert [attrs for attrs in page.all("img") if not attrs["src"].startswith("data:image/jpeg")] == []
    assert len(page.all("script")) == 2 and source.count("</script>") == 2
    for section in ("summary", "accuracy", "classes", "missing"):
        assert NASTY in page.text(section)


def everywhere(text: str) -> Report:
    """Return a report that says `text` wherever a text can stand."""
    theirs = Published(1.0, text, False, text)
    failed = Value("failed", planned=1, error=text, note=text, published=(theirs,))
    done = Value("done", 1.0, None, 1, 1, 0.0, (text,), (1,), note=text)
    panels = (Panel(text, (Line(text, ((0.0, done),), ((0.0, theirs),), star=True),)), Panel(text, ()))
    gain = ClassGain(text, 1.0, 2.0, 3, (Example("data:image/jpeg;base64,", text, text, text),))
    bins = (Bin(0.0, 50.0, 3, 20.0, 30.0),)
    parts = (
        Grid(text, text, (text, text), (text,), (((text, text), (failed,)), ((text, text), (done,))), (text,)),
        Curves(text, text, text, text, panels, notes=(text,)),
        Bars(text, text, text, ((text, done),), ((text, theirs),)),
        Words(text, text, (((text, False, 1.0),),), ((text, 1.0, False),)),
        Detail(text, text, text, (text,), (gain,), ((text, 1.0, bins),), (Confusion(text, text, 1.0, 2.0, 3),), text),
    )
    missing, other = Missing(text, 1, 1, text, text), dict.fromkeys(("what", "published", "reproduced", "source", "note"), text)
    pair = ((text, text),)
    return Report(
        text, text, text, text, pair, (text,), 1, 1, 1, text, pair, parts, (other,), (missing,), pair, (text,)
    )


@pytest.mark.parametrize("text", ['"><script>alert(1)</script>', "'><i x='", "</style><b>", "{{ 7 * 7 }}", "&amp;"])
def test_every_text_of_a_report_is_escaped(text: str) -> None:
    """A text that looks like code makes the same elements as one that does not, and is read as it was written."""
    nasty, plain = Page(render_page(everywhere(text))), Page(render_page(everywhere("plain")))
    assert [(tag, sorted(attrs)) for tag, attrs in nasty.elements] == [(t, sorted(a)) for t, a in plain.elements]
    said, tame = (
        sum(" ".join(page.texts[key]).count(word) for key in page.texts)
        for page, word in ((nasty, text), (plain, "plain"))
    )
    assert said == tame > 30


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_from_the_paper(mode: int) -> None:
    """Text 4.5 : 1, marks and bars 3 : 1 (WCAG 1.4.3 and 1.4.11)."""
    pairs = re.findall(r"--(\w+): light-dark\(#(\w{6}), #(\w{6})\)", (REPORT / "page.css").read_text(encoding="utf-8"))
    colours = {name: list(bytes.fromhex(pair[mode])) for name, *pair in pairs}
    for name in ("ink", "muted", "link", "up", "down", "grey"):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name
    for pair in COLOURS:
        assert contrast(list(bytes.fromhex(pair[mode][1:])), colours["paper"]) >= 3, pair
    assert contrast(colours["edge"], colours["paper"]) >= 3
