"""A page's source as elements and texts, and how well colours can be told apart."""

from collections.abc import Sequence
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """The elements of a page, its text by section, and whether every tag is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.scripts: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {key: value or "" for key, value in attrs}
        self.elements.append((tag, known))
        if tag not in VOID:
            self._open.append((tag, known.get("id", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "script":
            self.scripts.append(data)
        for tag, id_ in self._open:
            if tag == "section" and id_:
                self.texts.setdefault(id_, []).append(data)

    def text(self, section: str) -> str:
        return " ".join(" ".join(self.texts[section]).split()).replace("\u2212", "-")

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]


def contrast(a: Sequence[float], b: Sequence[float]) -> float:
    """Return WCAG 2.2's contrast ratio of two colours, each red, green and blue from 0 to 255."""
    lights = []
    for colour in (a, b):
        parts = [part / 255 for part in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)
