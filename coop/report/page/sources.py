"""Where each number of a page comes from, once: cells, points and bars refer to it by a number."""

from typing import Any

from coop.report.content import Published, Value


class Sources:
    """The values and published numbers that a page shows, as the data that its script reads.

    A table and a curve often show the same value, and many values share a run: each is written down once.
    """

    def __init__(self) -> None:
        self._values: dict[Value, int] = {}
        self._published: dict[Published, int] = {}
        self._runs: dict[str, int] = {}

    def value(self, value: Value) -> int:
        """Return the number of a value."""
        return self._values.setdefault(value, len(self._values))

    def published(self, published: Published) -> int:
        """Return the number of a published number."""
        return self._published.setdefault(published, len(self._published))

    def data(self) -> dict[str, Any]:
        """Return what the script needs; ask when everything has been drawn."""
        values = [self._record(value) for value in self._values]
        published = [
            {"value": one.value, "source": one.source, "verified": one.verified, "note": one.note}
            for one in self._published
        ]
        return {"values": values, "published": published, "runs": list(self._runs)}

    def _record(self, value: Value) -> dict[str, Any]:
        record = {
            "state": value.state,
            "mean": _rounded(value.mean),
            "std": _rounded(value.std),
            "n": value.n,
            "planned": value.planned,
            "difference": _rounded(value.difference),
            "runs": [self._runs.setdefault(run, len(self._runs)) for run in value.runs],
            "seeds": list(value.seeds),
            "error": value.error,
            "published": [self.published(one) for one in value.published],
            "note": value.note,
        }
        return {key: entry for key, entry in record.items() if entry not in (None, "", [])}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
