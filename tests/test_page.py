"""What the page says: every number of a report, and where each comes from."""

import json
import os
import re
from pathlib import Path

import pytest

from coop.report.build import Report
from coop.report.detail import Detail
from coop.report.figures import Bars, Curves, Line, Panel
from coop.report.frame import Value
from coop.report.page import render_page, write_page
from coop.report.tables import Grid, shown
from coop.report.words import Words
from tests.page_parser import Page
from tests.page_sample import ALL, report


@pytest.fixture(scope="module")
def sample() -> Report:
    return report()


@pytest.fixture(scope="module")
def page(sample: Report) -> Page:
    return Page(render_page(sample))


def bare(*parts: Grid | Curves | Bars | Words | Detail) -> Report:
    return Report("name", "Title", "a paper", "about", (), (), 0, 0, 0, "now", (), parts)


def test_every_number_of_a_table_is_printed(page: Page, sample: Report) -> None:
    grid = next(part for part in sample.parts if isinstance(part, Grid))
    text = page.text("accuracy")
    for keys, values in grid.rows:
        assert all(shown("dataset", key) in text for key in keys)
        for value in values:
            if value is None or value.mean is None:
                continue
            assert f"{value.mean:.2f}" in text
            assert value.difference is None or f"{value.difference:+.2f}" in text.replace(" 0.00", " +0.00")
            assert value.std is None or f"±{value.std:.2f}" in text
            for one in value.published:
                assert (f"paper {one.value:.2f}" if one.verified else f"{one.value:.2f} UNVERIFIED") in text


def test_unverified_numbers_are_never_compared(page: Page, sample: Report) -> None:
    """A verified one is followed by ours minus theirs, an unverified one by the word and nothing else."""
    text = page.text("accuracy")
    assert re.search(r"paper \d+\.\d\d [+-]\d\.\d\d", text)
    assert not re.search(r"UNVERIFIED [+-]", text)


def test_states_are_said(page: Page) -> None:
    text = page.text("accuracy")
    assert "missing" in text and "failed" in text and "n 2/3" in text
    assert "UCF101 missing" in page.text("curves") and "24 of 26 points" in page.text("curves")


def test_every_run_can_be_traced(page: Page, sample: Report) -> None:
    """A cell's button leads to its record, and the record to the folders of its runs."""
    data = json.loads(max(page.scripts[:-1], key=len))
    grid = next(part for part in sample.parts if isinstance(part, Grid))
    values = {value for _, row in grid.rows for value in row if value is not None and value.runs}
    traced = {tuple(data["runs"][index] for index in record.get("runs", ())) for record in data["values"]}
    assert {value.runs for value in values} <= traced
    buttons = [attrs for attrs in page.all("button") if "data-n" in attrs]
    assert buttons and all(int(attrs["data-n"][1:]) < len(data["values"]) for attrs in buttons)


def test_every_point_is_drawn_where_its_value_is(page: Page, sample: Report) -> None:
    """Higher accuracy is higher up, and shots stand by doublings: 1 to 2 is as far as 8 to 16."""
    curves = next(part for part in sample.parts if isinstance(part, Curves))
    panel = next(panel for panel in curves.panels if panel.title == "caltech101")
    points = {}
    for attrs in page.all("path"):
        words = r"Caltech101, linear probe, shots (\d+): ([\d.]+) ± [\d.]+, n 3"
        found = re.fullmatch(words, attrs.get("aria-label", ""))
        if found:
            x, y = map(float, re.findall(r"[\d.]+", attrs["transform"]))
            points[int(found[1])] = (float(found[2]), x, y)
    line = next(line for line in panel.lines if line.label == "linear probe")
    assert {x: f"{value.mean:.1f}" for x, value in line.points} == {x: f"{p[0]:.1f}" for x, p in points.items()}
    steps = [points[b][1] - points[a][1] for a, b in ((1, 2), (2, 4), (4, 8), (8, 16))]
    assert max(steps) - min(steps) < 0.21
    slopes = [(points[b][2] - points[a][2]) / (points[b][0] - points[a][0]) for a, b in ((1, 16), (2, 8), (4, 16))]
    assert all(slope == pytest.approx(slopes[0], rel=0.03) and slope < 0 for slope in slopes)


def test_words_are_printed_with_their_distance(page: Page, sample: Report) -> None:
    text = page.text("words")
    for part in sample.parts:
        if isinstance(part, Words):
            for word, whole, distance in (near for row in part.vectors for near in row):
                assert f"{word if whole or word.startswith('<') else f'{word}-'} {distance:.2f}" in text


def test_details_say_every_class_error_and_confusion(page: Page, sample: Report) -> None:
    text = page.text("classes")
    for part in sample.parts:
        if isinstance(part, Detail):
            for one in part.classes:
                assert f"{one.name} {one.learned - one.baseline:+.1f} {one.baseline:.1f} → {one.learned:.1f}" in text
            for series, error, _ in part.reliability:
                assert f"{series} expected calibration error {error:.1f} %" in text
            for pair in part.confusions:
                assert f"{pair.label} {pair.predicted} {pair.learned:.1f} % {pair.baseline:.1f} %" in text


def test_endings(page: Page, sample: Report) -> None:
    for one in sample.missing:
        assert one.command in page.text("missing") and one.error in page.text("missing")
    for other in sample.reproductions:
        assert all(word in page.text("reproductions") for word in other.values())
    assert all(version in page.text("notes") for _, version in sample.versions)


def test_a_report_of_nothing(tmp_path: Path) -> None:
    """A study of which no run is done has a page: empty panels, no bars, words that only the paper knows."""
    parts = (
        Curves("c", "Curves", "shots", "accuracy (%)", (Panel("dtd", (Line("a", ((1.0, Value("missing")),)),)),)),
        Bars("b", "Bars", "points", (("dtd", Value("missing", planned=3)),)),
        Words("paper only", "", (), (("potd", 1.7136, False), ("that", None, False))),
        Detail("dtd", "a", "b", (), (), (), ()),
    )
    page = Page(render_page(bare(*parts)))
    assert "DTD missing" in page.text("c") and "DTD (missing)" in page.text("b") and "potd 1.71" in page.text("words")


@pytest.mark.slow
def test_a_full_study_is_under_two_megabytes() -> None:
    """Eleven datasets of 200 classes (2191 in truth) with details and images."""
    assert len(render_page(report(ALL, 200)).encode()) < 2_000_000


def test_writing_replaces_the_page_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_page(bare(), path)
    write_page(bare(Bars("b", "Second", "points", ())), path)
    assert "Second" in path.read_text(encoding="utf-8") and os.listdir(path.parent) == ["report.html"]
