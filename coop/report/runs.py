"""What the report reads from the run folders themselves, each file once."""

from pathlib import Path
from typing import Any

from torch import Tensor

from coop.io import read_json
from coop.runs.store import RESULT, read_predictions


class Runs:
    """The finished runs below a results folder, by their folders' names in it."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self._results: dict[str, dict[str, Any]] = {}
        self._predictions: dict[str, dict[str, dict[str, Tensor]]] = {}

    def folder(self, run: str) -> Path:
        """Return a run's folder."""
        return self.results / run

    def result(self, run: str) -> dict[str, Any]:
        """Return what a run's result.json says."""
        if run not in self._results:
            self._results[run] = read_json(self.folder(run) / RESULT)
        return self._results[run]

    def predictions(self, run: str, target: str) -> dict[str, Tensor] | None:
        """Return `label`, `predicted` and `confidence` (n) of a test set's images, or None if they were not kept."""
        if run not in self._predictions:
            self._predictions[run] = read_predictions(self.folder(run))
        return self._predictions[run].get(target)

    def unofficial(self, run: str) -> bool:
        """Whether a run used a split file that is not the official one, though it says that it is."""
        return "not the official" in str(self.result(run).get("split_source", ""))

    def versions(self, runs: list[str]) -> tuple[tuple[str, str], ...]:
        """Return the versions that runs were made with: (name, all of its versions)."""
        found: dict[str, dict[str, None]] = {}
        for run in runs:
            for name, version in self.result(run).get("versions", {}).items():
                found.setdefault(name, {})[str(version)] = None
        return tuple((name, ", ".join(some)) for name, some in found.items())
