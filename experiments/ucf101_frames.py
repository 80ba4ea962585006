"""Take the middle frame of every video of UCF101, for where `coop data prepare ucf101` cannot fetch CoOp's own frames.

    python -m experiments.ucf101_frames data/ucf101/UCF-101 data/ucf101/UCF-101-midframes

CoOp publishes its frames, not how it took them: for its exact pixels use its own archive. Needs PyAV
(`pip install 'coop-clip[video]'`). Frames that exist are kept, so an interrupted call can be repeated.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from coop.data.annotations import action_name
from coop.errors import CoopError, first_line
from coop.io import track

VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm")


def extract_frames(videos: Path, images: Path) -> dict[str, str]:
    """Write images/<Action_Name>/<video>.jpg for every videos/<ActionName>/<video>; return {video: what went wrong}.

    Images that exist are kept, so an interrupted call can be repeated; none is ever half-written.
    """
    jobs = [(video, images / action_name(video.parent.name) / f"{video.stem}.jpg") for video in _videos(videos)]
    if not jobs:
        raise CoopError(f"{videos} has no videos: expected folders by action with {', '.join(VIDEO_SUFFIXES)} files")
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        results = track(threads.map(_write_frame, *zip(*jobs, strict=True)), "taking middle frames", total=len(jobs))
        return {str(video): fault for (video, _), fault in zip(jobs, results, strict=True) if fault}


def middle_frame(video: Path) -> Image.Image:
    """Return frame n // 2 of a video's n frames, counted by decoding; CoopError if it cannot be decoded."""
    try:
        import av
    except ImportError as error:
        raise CoopError("taking frames from videos needs PyAV: pip install 'coop-clip[video]'") from error
    try:
        with av.open(str(video)) as container:  # what the file says of its length is not always true
            count = sum(1 for _ in container.decode(video=0))
        with av.open(str(video)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number == count // 2:
                    return frame.to_image()
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise CoopError(f"cannot decode the video {video}: {first_line(error)}") from error
    raise CoopError(f"the video {video} has no frames")


def _videos(folder: Path) -> Iterator[Path]:
    for action in sorted(folder.iterdir()):
        if action.is_dir():
            yield from (file for file in sorted(action.iterdir()) if file.suffix.lower() in VIDEO_SUFFIXES)


def _write_frame(video: Path, image: Path) -> str | None:
    if image.exists():
        return None
    try:
        frame = middle_frame(video)
    except CoopError as error:
        return str(error)
    image.parent.mkdir(parents=True, exist_ok=True)
    partial = image.with_suffix(".partial")
    frame.save(partial, format="JPEG", quality=95)
    os.replace(partial, image)
    return None


def main() -> int:
    """Write the frames; 1 if some videos cannot be decoded."""
    parser = argparse.ArgumentParser(description="the middle frame of every video of UCF101")
    parser.add_argument("videos", type=Path, help="folder of the videos, in folders by action")
    parser.add_argument("images", type=Path, help="folder to write into")
    args = parser.parse_args()
    try:
        faults = extract_frames(args.videos, args.images)
    except CoopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for fault in faults.values():
        print(f"FAILED: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
