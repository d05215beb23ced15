"""Original key layouts of single-file checkpoints: where each tensor of diffusers lies in one, both ways."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unforget.errors import CannotRun
from unforget.files.storage import Lazy


@dataclass(frozen=True)
class Piece:
    """Where a tensor of diffusers lies in the original; no bit is lost either way."""

    original: str  # the name there
    part: tuple[int, int] = (0, 1)  # (index, count) of equal parts along dim 0, as of fused q, k and v
    swapped: bool = False  # halves along dim 0 change places: (shift, scale) there, (scale, shift) in diffusers
    convolution: bool = False  # a 1x1 convolution there, (out, in, 1, 1), a linear layer in diffusers, (out, in)
    transposed: bool = False  # (in, out) there, (out, in) in diffusers
    copies: tuple[str, ...] = ()  # further names there under which the same tensor is stored again


@dataclass(frozen=True)
class Layout:
    """The names in the original single file of a family: pieces, by the names of tensors in diffusers."""

    mark: str  # how the names of some of the network's tensors begin, and no other family's
    vae_prefix: str  # how the names of the autoencoder's begin
    text_encoders: Mapping[str, str]  # how the names of theirs begin, by part
    network: Callable[[Iterable[str]], dict[str, Piece]]
    vae: Callable[[Iterable[str]], dict[str, Piece]]
    text_encoder: Callable[[str, Iterable[str]], dict[str, Piece]]
    check: Callable[[str, Mapping[str, Lazy]], None]
    """Refuses a text encoder, by part and tensors, that stock loaders would not read back from the file."""


def grouped(layout: Mapping[str, Piece]) -> dict[str, list[str]]:
    """Every name of the original, copies included, with the names in diffusers that make it up, in order of part."""
    found: dict[str, list[str]] = {}
    for name, piece in sorted(layout.items(), key=lambda item: item[1].part[0]):
        for original in (piece.original, *piece.copies):
            found.setdefault(original, []).append(name)
    return found


def _parts(tensor: Tensor, count: int, name: str) -> tuple[Tensor, ...]:
    """Equal parts along dim 0: (count n, ...) as `count` times (n, ...)."""
    if len(tensor) % count:
        raise CannotRun(f"'{name}' {tuple(tensor.shape)} is not {count} equal parts", "Get the checkpoint again.")
    return tensor.reshape(count, len(tensor) // count, *tensor.shape[1:]).unbind()


def _swap(tensor: Tensor, name: str) -> Tensor:
    return torch.cat(_parts(tensor, 2, name)[::-1])


def to_diffusers(piece: Piece, tensor: Tensor) -> Tensor:
    """diffusers' tensor, a view where it can be, of the original's whole `tensor`, named `piece.original`."""
    index, count = piece.part
    if count > 1:
        tensor = _parts(tensor, count, piece.original)[index]
    if piece.swapped:
        tensor = _swap(tensor, piece.original)
    tensor = tensor.T.contiguous() if piece.transposed else tensor
    return tensor.reshape(tensor.shape[:2]) if piece.convolution else tensor


def to_original(pieces: Sequence[tuple[Piece, Tensor]]) -> Tensor:
    """The original's tensor, contiguous, of all of diffusers' that share its name, in any order.

    CannotRun if a part is missing, or parts differ in shape or precision: they would not be what they were.
    """
    pieces = sorted(pieces, key=lambda item: item[0].part[0])
    name, count = pieces[0][0].original, pieces[0][0].part[1]
    if [(p.original, p.part) for p, _ in pieces] != [(name, (i, count)) for i in range(count)]:
        raise CannotRun(f"'{name}' needs {count} parts, each once", "Give a model that is complete.")
    if len({(t.shape, t.dtype) for _, t in pieces}) > 1:
        raise CannotRun(f"the parts of '{name}' differ in shape or dtype", "Give a model of one precision.")
    parts = [_swap(t, name) if p.swapped else t for p, t in pieces]
    parts = [t[..., None, None] if p.convolution else t for (p, _), t in zip(pieces, parts, strict=True)]
    parts = [t.T if p.transposed else t for (p, _), t in zip(pieces, parts, strict=True)]
    return torch.cat(parts) if count > 1 else parts[0].contiguous()


def from_original(tensors: Mapping[str, Lazy], layout: Mapping[str, Piece]) -> dict[str, Lazy]:
    """The tensors of diffusers that a file in the original layout holds."""

    def one(whole: Lazy, piece: Piece) -> Lazy:
        shape = (whole.shape[0] // piece.part[1], *whole.shape[1:]) if whole.shape else ()
        shape = shape[:2] if piece.convolution else shape[::-1] if piece.transposed else shape
        return Lazy(whole.dtype, shape, lambda: to_diffusers(piece, whole.make()))

    return {n: one(tensors[p.original], p) for n, p in layout.items() if p.original in tensors}


def originals(tensors: Mapping[str, Lazy], layout: Mapping[str, Piece]) -> dict[str, Lazy]:
    """The tensors under the original's names; q, k and v are put together when they are wanted."""

    def one(names: list[str]) -> Lazy:
        first, piece = tensors[names[0]], layout[names[0]]
        shape = (first.shape[0] * len(names), *first.shape[1:]) if first.shape else ()
        shape = (*shape, 1, 1) if piece.convolution else shape[::-1] if piece.transposed else shape
        return Lazy(first.dtype, shape, lambda: to_original([(layout[n], tensors[n].make()) for n in names]))

    return {name: one(names) for name, names in grouped(layout).items()}
