"""What is read as an image, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

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
    elif name == "wide.png":
        Image.new("RGB", (20_000, 4)).save(path)
    elif name == "large.png":
        Image.new("RGB", (64, 64)).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing.png", "there is no file"),
        ("folder", "is a folder"),
        ("empty.png", "is empty"),
        ("text.png", "is not an image"),
        ("truncated.png", "cannot be decoded"),
        ("frames.gif", "has 2 frames"),
        ("wide.png", "is 20000x4 pixels, more than 8192"),
        ("large.png", "is 64x64 pixels, the model's images are 16x16"),
    ],
)
def test_what_is_no_picture_of_the_model_is_a_usage_error(tmp_path, name, sentence):
    with pytest.raises(UsageError, match=sentence) as caught:
        images.read_image(broken(tmp_path, name), SHAPE)
    assert caught.value.hint


def test_resize_on_request(tmp_path):
    assert images.read_image(broken(tmp_path, "large.png"), SHAPE, resize=True).shape == SHAPE


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(UsageError, match="not a folder with images"):
        images.read_folder(tmp_path, SHAPE)
