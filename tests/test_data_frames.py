"""UCF101's middle frames, from videos that say in each frame which one it is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coop.errors import CoopError
from experiments.ucf101_frames import extract_frames, middle_frame

av = pytest.importorskip("av", reason="PyAV is not installed")


def write_video(path: Path, frames: int) -> None:
    """Write a video whose frame i is grey of brightness 10 i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


@pytest.mark.parametrize("frames, middle", [(1, 0), (2, 1), (9, 4), (20, 10)])
def test_frame_n_over_2(tmp_path: Path, frames: int, middle: int) -> None:
    write_video(tmp_path / "v.avi", frames)
    assert abs(np.asarray(middle_frame(tmp_path / "v.avi")).mean() - 10 * middle) < 4


def test_frames_of_a_folder_by_coops_names(tmp_path: Path) -> None:
    write_video(tmp_path / "UCF-101/YoYo/v_YoYo_g01_c01.avi", 5)
    write_video(tmp_path / "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", 3)
    (tmp_path / "UCF-101/YoYo/v_YoYo_g01_c02.avi").write_bytes(b"no video")
    faults = extract_frames(tmp_path / "UCF-101", tmp_path / "images")
    assert [Path(video).name for video in faults] == ["v_YoYo_g01_c02.avi"]
    assert "cannot decode the video" in next(iter(faults.values()))
    assert sorted(str(path.relative_to(tmp_path / "images")) for path in (tmp_path / "images").rglob("*.*")) == [
        "Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c01.jpg",
        "Yo_Yo/v_YoYo_g01_c01.jpg",
    ]
    with Image.open(tmp_path / "images/Yo_Yo/v_YoYo_g01_c01.jpg") as image:
        assert image.size == (64, 48)


def test_a_folder_without_videos(tmp_path: Path) -> None:
    with pytest.raises(CoopError, match="has no videos"):
        extract_frames(tmp_path, tmp_path / "images")
