"""What is read as an image, and what is refused."""

import os
import zlib
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from unforget.config.files import PICTURES
from unforget.errors import UsageError
from unforget.files import images

SHAPE = (3, 16, 16)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_a_png_survives_the_round_trip(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = images.read_image(tmp_path / "a.png", SHAPE)
    assert image.shape == SHAPE
    assert image.min() >= -1
    assert image.max() <= 1
    images.write_image(image, tmp_path / "b.png")
    assert (np.array(Image.open(tmp_path / "b.png")) == pixels).all()
    assert images.image_id(images.read_image(tmp_path / "b.png", SHAPE)) == images.image_id(image)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "LA", "P", "I;16", "1", "L"])
def test_other_modes_are_converted_and_said_so(tmp_path, pixels, mode):
    path, notes = tmp_path / "a.tiff", []
    grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    (grey if mode == "I;16" else Image.fromarray(pixels).convert(mode)).save(path)
    read = images.read_image(path, SHAPE, note=notes.append)
    assert read.shape == SHAPE
    assert bool(notes) == (mode != "L")
    if mode == "I;16":
        torch.testing.assert_close(read[0], torch.from_numpy(pixels[..., 0]).float() / 127.5 - 1)


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (images.read_image(tmp_path / "a.png", SHAPE) == 1).all()


def broken(tmp_path, name):
    path = tmp_path / name
    good = Image.new("RGB", (16, 16), "red")
    if name == "folder":
        path.mkdir()
    elif name == "empty.png":
        path.touch()
    elif name == "text.png":
        path.write_text("not a picture")
    elif name == "truncated.png":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif name == "frames.gif":
        good.save(path, save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")])
    elif name == "postscript.png":
        good.save(path, "EPS")
    elif name in ("range.tiff", "long.tiff"):
        Image.new("F" if name == "range.tiff" else "I", (16, 16)).save(path)
    elif name in ("pages.tiff", "moving.webp", "moving.png"):
        good.save(path, save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")])
    elif name == "wide.png":
        Image.new("RGB", (20_000, 4)).save(path)
    elif name == "many.gif":
        good.save(path, save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")], duration=[80, 90])
        content = path.read_bytes()
        last = content.rindex(b"\x21\xf9")
        path.write_bytes(content[:last] + content[last:-1] * 500_000 + b";")
    elif name == "vast.png":
        Image.new("L", (8192, 8192)).save(path)
    elif name == "long.webp":
        good.save(path)
        os.truncate(path, 2**40)
    elif name == "colours.png":  # of a palette that is not there
        Image.new("L", (16, 16)).save(path)
        content = bytearray(path.read_bytes())
        content[25] = 3
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        path.write_bytes(content)
    elif name == "large.png":
        Image.new("RGB", (64, 64)).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing.png", "there is no file"),
        ("folder", "is a folder"),
        ("empty.png", "is empty"),
        ("text.png", "is not an image of a kind that is read here"),
        ("postscript.png", "is not an image of a kind that is read here"),
        ("range.tiff", "holds numbers without a fixed range"),
        ("long.tiff", "holds numbers without a fixed range"),
        ("pages.tiff", "has several frames"),
        ("moving.webp", "has several frames"),
        ("moving.png", "has several frames"),
        ("truncated.png", "cannot be decoded"),
        ("many.gif", "has several frames"),
        ("vast.png", "is 8192x8192 pixels, more than 33,554,432 in all"),
        ("long.webp", "has more than 268435456 bytes"),
        ("colours.png", "cannot be decoded"),
        ("frames.gif", "has several frames"),
        ("wide.png", "is 20000x4 pixels, more than 8192"),
        ("large.png", "is 64x64 pixels, the model's images are 16x16"),
    ],
)
def test_what_is_no_picture_of_the_model_is_a_usage_error(tmp_path, name, sentence):
    with pytest.raises(UsageError, match=sentence) as caught:
        images.read_image(broken(tmp_path, name), SHAPE)
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "avif"])
def test_decoders_that_hold_several_copies_are_given_half_as_much(tmp_path, pixels, monkeypatch, kind):
    monkeypatch.setattr(images, "MAX_PIXELS", 2 * pixels.shape[0] * pixels.shape[1] - 1)
    if f".{kind}" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    Image.fromarray(pixels).save(tmp_path / f"a.{kind}")
    with pytest.raises(UsageError, match="more than 255 in all") if kind in ("webp", "avif") else nullcontext():
        images.read_image(tmp_path / f"a.{kind}", SHAPE)


def test_resize_on_request(tmp_path):
    assert images.read_image(broken(tmp_path, "large.png"), SHAPE, resize=True).shape == SHAPE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_as_its_camera_says(tmp_path, pixels, orientation):
    picture, exif, notes = Image.fromarray(np.concatenate([pixels, pixels[:, ::-1] // 2], 1)), Image.Exif(), []
    exif[images.ORIENTATION] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    shape = (3, 32, 16) if orientation > 4 else (3, 16, 32)
    meant = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert torch.equal(images.read_image(tmp_path / "a.png", shape, note=notes.append), images.from_pil(meant))
    assert bool(notes) == (orientation != 1)
    with pytest.raises(UsageError, match="the model's images are"):
        images.read_image(tmp_path / "a.png", (3, *shape[:0:-1]))


def wide_profile():
    """Of a display with other primaries: an sRGB profile whose red and green columns change places."""
    tags = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = (tags.index(name) + 4 for name in (b"rXYZ", b"gXYZ"))
    tags[red : red + 8], tags[green : green + 8] = tags[green : green + 8], tags[red : red + 8]
    return bytes(tags).replace("sRGB".encode("utf-16-be"), "Wide".encode("utf-16-be"))


KINDS = [
    ("RGB", "png"),
    ("RGBA", "png"),
    ("P", "png"),
    ("RGB", "tiff"),
    ("RGBA", "webp"),
    ("RGB", "webp"),
    ("P", "tiff"),
]


@pytest.mark.parametrize(("mode", "kind"), KINDS)
def test_colours_are_those_of_srgb(tmp_path, mode, kind):
    path, notes = tmp_path / f"a.{kind}", []
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert(mode)
    red.save(path, icc_profile=wide_profile(), **({"lossless": True} if kind == "webp" else {}))
    read = images.read_image(path, SHAPE, note=notes.append)
    assert read[1].min() > 0.9 > -0.9 > read[0].max(), "red and green changed places"
    assert any("to sRGB" in note for note in notes)
    red.save(path, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert images.read_image(path, SHAPE)[0].min() > 0.9
    red.save(path, icc_profile=b"no profile")
    assert images.read_image(path, SHAPE, note=notes.append)[0].min() > 0.9
    assert any("cannot be used" in note for note in notes)


def test_of_a_cameras_file_the_first_picture_counts(tmp_path, pixels):
    first, notes = Image.fromarray(pixels), []
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[first.resize((8, 8))], quality=95)
    first.save(tmp_path / "b.jpg", quality=95)
    read, alone = (images.read_image(tmp_path / name, SHAPE, note=notes.append) for name in ("a.jpg", "b.jpg"))
    assert torch.equal(read, alone)
    assert len(notes) == 1


def test_a_folder_says_what_is_read_and_what_is_not(tmp_path, pixels):
    picture, notes = Image.fromarray(pixels), []
    for name in ("b.png", "a.jpg", "c.tif", "cats/one.webp", "cats/deep/two.gif", "d.BMP", ".hidden/x.png", "._b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name) if name != "._b.png" else (tmp_path / name).write_text("of a Mac")
    (tmp_path / "cats" / "notes.txt").write_text("x")
    found = images.read_folder(tmp_path, SHAPE, note=notes.append)
    assert len(found) == 6
    assert "6 pictures" in notes[0]
    assert "2 of them in subfolders (cats)" in notes[0]
    assert "1 file(s) that are no pictures (notes.txt)" in notes[1]
    assert "1 of the pictures" in notes[2], "of the GIF, whose colours are a palette"


def test_the_configuration_knows_the_same_pictures():
    assert images.SUFFIXES == PICTURES


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(UsageError, match="not a folder with images"):
        images.read_folder(tmp_path, SHAPE)
