"""Getting a dataset: what its description lists is fetched, checked and unpacked; what cannot be is said in words."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from coop.data.description import Description, Download, dataset_folder
from coop.data.download import check_sum, download
from coop.data.extract import extract, is_archive
from coop.data.frames import extract_frames
from coop.data.idx import unpack_idx
from coop.errors import CoopError

WORK = ".prepare"  # folder in the dataset's own, so that renaming never crosses a file system


def prepare(description: Description, data_root: Path, say: Callable[[str], None]) -> bool:
    """Bring the dataset's folder as far as possible, saying each step; return whether nothing is left to do.

    What is there is not touched. A download that fails is said, with the way by hand, and the others go on.
    """
    folder = dataset_folder(description, data_root)
    work = folder / WORK
    failures = 0
    with _alone(work):
        frame_faults = _frames(description, folder, say)
        for item in wanted(description):
            try:
                say(_obtain(item, folder, work))
            except CoopError as error:
                failures += 1
                say(f"FAILED: {error}. By hand: put {file_name(item)} into {folder} and run this again")
        if description.idx and not failures and not is_complete(description, folder):
            unpack_idx(description, folder)
            say(f"{description.images}: written from the files in {description.idx}")
    done = is_complete(description, folder)
    if description.manual and not done:
        say(f"By hand, in {folder}: {description.manual}")
    return not failures and not frame_faults and done


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Make the work folder and keep other calls out of it; remove it again unless parts of downloads are kept there."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock", timeout=0):
            yield
        if [child.name for child in work.iterdir()] == ["lock"]:
            shutil.rmtree(work)
            if not any(work.parent.iterdir()):
                work.parent.rmdir()
    except Timeout as error:
        raise CoopError(f"another 'coop data prepare' is at work in {work.parent}") from error
    except OSError as error:
        raise CoopError(f"cannot write {error.filename or work}: {error.strerror}") from error


def wanted(description: Description) -> list[Download]:
    """Return the description's downloads, and its official split file."""
    split = description.official_split
    if split is None or not split.url:
        return description.downloads
    own = Download(url=split.url, creates=split.file, sha256=split.sha256, filename=split.file)
    return [*description.downloads, own]


def is_complete(description: Description, folder: Path) -> bool:
    """Tell whether everything that the description needs and downloads is there, by name."""
    needed = [folder / path for path in description.needs or [description.images]]
    return all(map(_has_content, needed)) and all(_is_there(item, folder) for item in wanted(description))


def file_name(item: Download) -> str:
    """Return the name that the downloaded file has on disk."""
    return item.filename or Path(unquote(urlsplit(item.url).path)).name


def _is_there(item: Download, folder: Path) -> bool:
    return _has_content(folder / (item.done_when or item.creates))


def _has_content(place: Path) -> bool:
    return any(place.iterdir()) if place.is_dir() else place.exists()


def _obtain(item: Download, folder: Path, work: Path) -> str:
    """Fetch one item unless it is there, and put it into its place; return what was done."""
    if _is_there(item, folder):
        return f"{item.done_when or item.creates}: there"
    by_hand = folder / file_name(item)
    if by_hand.is_file():
        check_sum(by_hand, item.md5, item.sha256, str(by_hand))
        file = by_hand
    else:
        file = work / file_name(item)
        if not file.is_file():
            download(item.url, file, item.md5, item.sha256)
    if not is_archive(file):
        place = folder / item.creates
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
        return f"{item.creates}: fetched"
    try:
        _unpack(file, item.member, item, folder, work)
    except CoopError:
        if file != by_hand and not (item.md5 or item.sha256):
            file.unlink()  # nobody knows whether it is what it should be
        raise
    if file != by_hand:
        file.unlink()
    return f"{item.done_when or item.creates}: unpacked from {file.name}"


def _unpack(archive: Path, member: str, item: Download, folder: Path, work: Path) -> None:
    """Unpack an archive beside its place and move what is wanted there; an archive in the archive is unpacked too."""
    inside = member or ("" if item.creates == "." else item.creates)
    fresh = work / f"{archive.name}.unpacked"
    shutil.rmtree(fresh, ignore_errors=True)  # of a call that was killed
    try:
        extract(archive, fresh, inside)
        found = fresh / inside
        if not found.exists():
            raise CoopError(f"{archive} has no '{inside}': it is another archive than {item.url} used to be")
        if found.is_file() and is_archive(found) and not is_archive(Path(item.creates)):
            _unpack(found, "", item, folder, work)
        else:
            _move(found, folder, item)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _move(found: Path, folder: Path, item: Download) -> None:
    """Move what was unpacked to its place; what proves that it is there comes last."""
    whole = {found: folder / item.creates}
    if item.creates == ".":
        children = sorted(found.iterdir(), key=lambda child: child.name == item.done_when)
        whole = {child: folder / child.name for child in children}
    for fresh, place in whole.items():
        if not _has_content(place):
            if place.is_dir():
                place.rmdir()
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(fresh, place)


def _frames(description: Description, folder: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Take the middle frames if the videos are there; return those that failed."""
    if not description.frames or not (folder / description.frames).is_dir():
        return {}
    faults = extract_frames(folder / description.frames, folder / description.images)
    say(f"{description.images}: middle frames taken")
    for fault in list(faults.values())[:10]:
        say(f"FAILED: {fault}")
    if len(faults) > 10:
        say(f"FAILED: {len(faults) - 10} more videos")
    return faults
