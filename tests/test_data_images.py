"""Every image mode becomes RGB; broken and missing files are found and named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from coop.data import check_images, open_rgb, read_error
from coop.errors import CoopError

GREY = np.array([[0, 64], [128, 255]], np.uint8)


def saved(tmp_path: Path, image: Image.Image, suffix: str = ".png") -> Path:
    path = tmp_path / f"image{suffix}"
    image.save(path)
    return path


def opened(path: Path) -> np.ndarray:
    image = open_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_eight_bit_modes_are_pils_own_conversion(tmp_path: Path, mode: str) -> None:
    path = saved(tmp_path, Image.fromarray(GREY).convert("RGBA" if mode == "LA" else "L").convert(mode))
    with Image.open(path) as image:
        assert image.mode == mode
        assert np.array_equal(opened(path), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "F", "I"])
def test_tiff_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "LAB":
        image = Image.merge("LAB", [Image.fromarray(GREY), *[Image.new("L", (2, 2), 128)] * 2])
    else:
        image = (Image.fromarray(GREY).convert("RGB") if mode in ("CMYK", "YCbCr") else Image.fromarray(GREY)).convert(
            mode
        )
    pixels = opened(saved(tmp_path, image, ".tif"))
    assert np.abs(pixels.astype(int).mean(axis=-1) - GREY).max() < (25 if mode == "LAB" else 3)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert np.array_equal(opened(saved(tmp_path, deep))[..., 0], GREY)


def test_dark_sixteen_bit_images_stay_dark(tmp_path: Path) -> None:
    assert opened(saved(tmp_path, Image.fromarray(np.full((2, 2), 200, np.uint16)))).max() == 1


@pytest.mark.parametrize("values", [GREY / 255, GREY.astype(float), GREY * 300.0 - 20.0])
def test_float_greyscale_of_any_usual_range(tmp_path: Path, values: np.ndarray) -> None:
    assert np.array_equal(opened(saved(tmp_path, Image.fromarray(values.astype(np.float32)), ".tif"))[..., 0], GREY)


def test_palette_with_transparency_gives_the_colours_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png", transparency=bytes([0, 128]))
    assert opened(tmp_path / "p.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_truncated_and_foreign_files_are_one_clear_error(tmp_path: Path) -> None:
    whole = saved(tmp_path, Image.effect_noise((64, 64), 50), ".jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    assert read_error(tmp_path / "image.jpg") is None
    for name in ("cut.jpg", "text.jpg", "absent.jpg"):
        with pytest.raises(CoopError, match=f"cannot read the image .*{name}"):
            open_rgb(tmp_path / name)


def test_whatever_a_decoder_raises_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    lab = Image.merge("LAB", [Image.effect_noise((64, 64), 50)] * 3)
    whole = saved(tmp_path, lab, ".tif").read_bytes()
    dds = b"DDS " + (124).to_bytes(4, "little") + bytes(12) + bytes(108)  # a header whose flags name no known format
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n/Helvetica findfont\n%%EOF\n"
    files = {"lab.tif": whole[: len(whole) // 2], "flags.dds": dds, "noise.tif": whole[:8] + bytes(range(256)) * 4}
    files["program.png"] = program  # which Pillow would hand to an interpreter
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        error = read_error(tmp_path / name)
        assert error and error.startswith(f"cannot read the image {tmp_path / name}: "), name
        assert "\n" not in error and len(error) < 500 and ("PostScript" in error) is (content == program)


def test_exif_orientation_is_ignored_as_in_the_original(tmp_path: Path) -> None:
    """A camera's note "turned by 90 degrees" is not followed: the pixels are taken as the file stores them."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    with Image.open(tmp_path / "turned.jpg") as image:
        assert ImageOps.exif_transpose(image).size == (16, 32), "the note is there"
    found = opened(tmp_path / "turned.jpg")
    assert found.shape == (16, 32, 3) and np.abs(found.astype(int) - pixels).max() < 3


def test_all_bad_files_are_listed_in_one_error(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "folder.jpg").mkdir(parents=True)
    (root / "empty.jpg").touch()
    (root / "good.jpg").write_bytes(b"image")
    (tmp_path / "secret.jpg").write_bytes(b"image")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "inner.jpg").symlink_to(root / "good.jpg")
    check_images(root, ["good.jpg", "inner.jpg"])
    missing = [f"{i}.jpg" for i in range(20)]
    with pytest.raises(CoopError) as error:
        check_images(root, ["good.jpg", "folder.jpg", "empty.jpg", "link.jpg", *missing])
    sentence = str(error.value)
    assert sentence.startswith(
        f"23 of 24 images under {root} cannot be used: folder.jpg (not a file); empty.jpg (empty)"
    )
    assert "link.jpg (a symbolic link out of the image folder)" in sentence
    assert "6.jpg (missing); and 13 more" in sentence and "7.jpg" not in sentence
    check_images(root, ["link.jpg"], follow_links=True)
