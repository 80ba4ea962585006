"""UCF101 as images: the middle frame of every video."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL.Image import Image

from coop.data.readers.annotations import action_name
from coop.errors import CoopError
from coop.io import track

SUFFIXES = (".avi", ".mp4", ".mkv", ".webm")


def middle_frame(video: Path) -> Image:
    """Return frame n // 2 of a video's n frames, counted by decoding; CoopError if it cannot be decoded.

    CoOp publishes its frames, not how it took them: for its exact pixels use its own archive.
    """
    try:
        import av
    except ImportError as error:
        raise CoopError("taking frames from videos needs PyAV: pip install 'coop-clip[video]'") from error
    try:
        count = _frame_count(video)
        with av.open(str(video)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number == count // 2:
                    return frame.to_image()
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise CoopError(f"cannot decode the video {video}: {error}") from error
    raise CoopError(f"the video {video} has no frames")


def _frame_count(video: Path) -> int:
    """Return how many frames can be decoded; what the file says of itself is not always true."""
    import av

    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def extract_frames(videos: Path, images: Path) -> dict[str, str]:
    """Write images/<Action_Name>/<video>.jpg for every videos/<ActionName>/<video>; return {video: what went wrong}.

    Images that exist are kept, so an interrupted call can be repeated; none is ever half-written.
    """
    jobs = [(video, images / action_name(video.parent.name) / f"{video.stem}.jpg") for video in _videos(videos)]
    if not jobs:
        raise CoopError(f"{videos} has no videos: expected folders by action with {', '.join(SUFFIXES)} files")
    faults: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        results = threads.map(_write_frame, *zip(*jobs, strict=True))
        for (video, _), fault in zip(jobs, track(results, "taking middle frames", total=len(jobs)), strict=True):
            if fault:
                faults[str(video)] = fault
    return faults


def _videos(folder: Path) -> Iterator[Path]:
    for action in sorted(folder.iterdir()):
        if action.is_dir():
            yield from (file for file in sorted(action.iterdir()) if file.suffix.lower() in SUFFIXES)


def _write_frame(video: Path, image: Path) -> str | None:
    if image.exists():
        return None
    try:
        frame = middle_frame(video)
    except CoopError as error:
        return str(error)
    image.parent.mkdir(parents=True, exist_ok=True)
    partial = image.with_suffix(".part")
    frame.save(partial, format="JPEG", quality=95)
    os.replace(partial, image)
    return None
