"""ImageNet and the four sets that test its shifts: class folders of WordNet ids, or V2's numbered folders.

Labels count the sorted folders that are there, as in the original: ImageNet-A and -R have 200 classes, not 1000.
"""

from pathlib import Path

from coop.data.class_names import read_keyed_names
from coop.data.content import Content
from coop.data.dataset import EMPTY, Split
from coop.data.description import Description
from coop.data.listing import class_folders, list_images
from coop.errors import CoopError

NAMES_FILE = "classnames.txt"
TRAIN_REMEDY = "expected train/ and val/ with one folder per class, e.g. val/n01440764 (valprep.sh sorts a flat val/)"


def keyed_names(folder: Path) -> dict[str, str]:
    """Return {WordNet id: class name} from the dataset's classnames.txt, or ImageNet's beside it."""
    places = (folder / NAMES_FILE, folder.parent / "imagenet" / NAMES_FILE)
    for place in places:
        if place.is_file():
            return read_keyed_names(place)
    raise CoopError(f"{NAMES_FILE} is missing (looked for {places[0]} and {places[1]}): CoOp's DATASETS.md links to it")


def _names(folders: list[str], names: dict[str, str], place: Path) -> list[str]:
    if not folders:
        raise CoopError(f"{place} has no class folders: expected one folder per WordNet id, e.g. n01440764")
    strange = [name for name in folders if name not in names]
    if strange:
        raise CoopError(f"{place} has the folder '{strange[0]}', which {NAMES_FILE} does not name")
    return [names[name] for name in folders]


def read_imagenet(description: Description, folder: Path) -> Content:
    """Read images/{train,val}/n*; the official validation images are both val and test, as in the original."""
    root = folder / description.images
    if not (root / "val").is_dir() or not class_folders(root / "val"):
        raise CoopError(f"{root} is not laid out as ImageNet: {TRAIN_REMEDY}")
    test = list_images(root, "val")
    names = _names(test.folders, keyed_names(folder), root / "val")
    train, notes = EMPTY, ["no train folder: this can only be tested on"]
    if (root / "train").is_dir():
        listing = list_images(root, "train")
        if listing.folders != test.folders:
            odd = sorted(set(listing.folders) ^ set(test.folders))
            raise CoopError(f"{root}/train and {root}/val differ in {len(odd)} class folders, first '{odd[0]}'")
        train, notes = listing.split, []
    parts = {"train": train, "val": test.split, "test": test.split}
    source = "official: train, val (val is also the test part)"
    return Content(names, parts, source, notes, follow_links=True, val_is_test=True)


def read_wordnet_folders(description: Description, folder: Path) -> Content:
    """Read ImageNet-Sketch, -A or -R: folders of WordNet ids, to test on."""
    root = folder / description.images
    listing = list_images(root, folders=class_folders(root, description.ignore))
    return _target(_names(listing.folders, keyed_names(folder), root), listing.split)


def read_imagenet_v2(description: Description, folder: Path) -> Content:
    """Read ImageNetV2: folder i holds the class on line i of classnames.txt, counted from 0."""
    root = folder / description.images
    names = list(keyed_names(folder).values())
    found = set(class_folders(root))
    wanted = [str(label) for label in range(len(names))]
    odd = sorted(found ^ set(wanted))
    if odd:
        raise CoopError(
            f"{root} should have the folders 0 to {len(names) - 1}, one per line of {NAMES_FILE}; "
            f"'{odd[0]}' is {'too much' if odd[0] in found else 'missing'}"
        )
    return _target(names, list_images(root, folders=wanted).split)


def _target(names: list[str], test: Split) -> Content:
    return Content(names, {"test": test}, "official: all images are test", follow_links=True)
