"""Opening images of any mode as RGB, and finding out early that some cannot be."""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageCms

from coop.data.archives import extract
from coop.data.dataset import leaves
from coop.errors import CoopError, first_line, one_line
from coop.io import cache_folder, check_has_end, track

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SHOWN = 10  # broken files named in one error


def open_rgb(path: str | Path) -> Image.Image:
    """Open an image as RGB, decoded in full; whatever a decoder raises is one CoopError with the path.

    Conversion comes before any resizing, as in CoOp (OpenAI's CLIP converts after the crop). Transparency is
    dropped and EXIF orientation ignored, as in CoOp. Greyscale of more than 8 bits is scaled, where PIL would clip.
    """
    try:
        check_has_end(Path(path))
        with Image.open(path) as image:
            if image.format == "EPS":
                raise CoopError("it is a PostScript program, and images are not executed")
            return _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise a dozen types on damaged files, PyCMSError and struct.error among them
        raise CoopError(f"cannot read the image {path}: {first_line(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image.copy()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None  # None is for in-place conversion only
        return converted
    if image.mode in ("P", "PA", "La", "RGBa"):  # straight to RGB warns about the transparent colour, or cannot
        image = image.convert("RGBA")
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Scale integer or float greyscale to 0..255 by the smallest usual range that holds it: 1 (floats), 8 or 16 bits.

    Anything else - negative values, more than 16 bits - is stretched from its smallest to its largest value.
    """
    values = np.nan_to_num(grey.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    sixteen_bits = grey.dtype.itemsize == 2
    if low < 0 or high > 65535:
        values = (values - low) * (255 / ((high - low) or 1.0))
    elif grey.dtype.kind == "f" and high <= 1:
        values = values * 255
    elif sixteen_bits or high > 255:
        values = values / 257
    return np.round(values).astype(np.uint8)


def read_error(path: str | Path) -> str | None:
    """Return why the image cannot be decoded in full, or None."""
    try:
        open_rgb(path)
    except CoopError as error:
        return str(error)
    return None


def file_fault(root: str, path: str, follow_links: bool) -> str | None:
    """Return what is wrong with the file, without opening it, or None."""
    full = os.path.join(root, path)
    try:
        status = os.lstat(full)
        if os.path.islink(full):
            if not follow_links and leaves(os.path.realpath(root), full):
                return "a symbolic link out of the image folder"
            status = os.stat(full)
    except OSError:
        return "missing"
    if not os.path.isfile(full):
        return "not a file"
    return "empty" if status.st_size == 0 else None


def file_faults(root: Path, paths: Sequence[str], follow_links: bool = False) -> dict[str, str]:
    """Return {path: fault} for the files that are missing, empty, no files or links out of `root`."""
    faults: dict[str, str] = {}
    for path in track(paths, "looking for images", total=len(paths)):
        fault = file_fault(str(root), path, follow_links)
        if fault:
            faults[path] = fault
    return faults


def check_images(root: Path, paths: Sequence[str], follow_links: bool = False) -> None:
    """Raise one CoopError that lists the files that are not there; nothing is decoded, so many files cost little."""
    faults = file_faults(root, paths, follow_links)
    if faults:
        shown = "; ".join(f"{one_line(path)} ({fault})" for path, fault in list(faults.items())[:SHOWN])
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise CoopError(f"{len(faults)} of {len(paths)} images under {root} cannot be used: {shown}{more}")


def unpacked_images(archive: Path) -> Path:
    """Unpack a ZIP file of images into the cache, once, and return the folder.

    The folder is named by the archive's content, and files have the times that the archive gives, so that features of
    them stay cached. Raises CoopError as `extract` does.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            content = repr([(member.filename, member.CRC, member.file_size) for member in zipped.infolist()])
        name = f"{archive.parent.name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        place = cache_folder() / "images" / name
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            fresh = place.with_name(f"{name}.tmp")
            with FileLock(place.with_name(f"{name}.lock")):
                if not place.is_dir():
                    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed; the lock is ours
                    extract(archive, fresh)
                    os.rename(fresh, place)
    except (OSError, zipfile.BadZipFile) as error:
        raise CoopError(f"cannot unpack {archive} into {cache_folder()}: {first_line(error)}") from error
    return place
