"""Small folders in datasets' true layouts, and short names for looking at what was read."""

from pathlib import Path

from coop.data import Dataset, load_description, read_dataset


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"image")


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def read(name: str, data_root: Path, /, **overrides: object) -> Dataset:
    return read_dataset(load_description(name, **overrides), data_root)


def counts(dataset: Dataset) -> tuple[int, int, int]:
    return len(dataset.train), len(dataset.val), len(dataset.test)


def name_of(dataset: Dataset) -> dict[str, str]:
    """Return {path: class name} over all parts."""
    parts = (dataset.train, dataset.val, dataset.test)
    return {
        path: dataset.class_names[label] for part in parts for path, label in zip(part.paths, part.labels, strict=True)
    }


def make_class_folders(root: Path, names: list[str], images: int = 10) -> None:
    touch(root, *(f"{name}/{name}_{number:04d}.jpg" for name in names for number in range(images)))
