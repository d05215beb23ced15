"""Original key layouts of single-file checkpoints: where each tensor of diffusers lies in one, both ways."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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
    width: int = 1  # how many of those equal parts it is, from `index` on


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
    """Refuses a text encoder, by part and tensors, or the `network`, that stock loaders would not read back."""
    prefix: str = ""  # of the network's names, left out in a file of the network alone; empty if there are no such
    kohya: str = ""  # what trains a LoRA under these names in kohya's scripts; empty if that uses diffusers' names

    def is_alone(self, held: Iterable[str]) -> bool:
        """Whether a file with the names `held` is of the network alone."""
        return bool(self.prefix) and any(n.startswith(self.mark.removeprefix(self.prefix)) for n in held)

    def is_in(self, held: Iterable[str]) -> bool:
        """Whether a file with the names `held` is in this layout."""
        held = list(held)
        return any(n.startswith(self.mark) for n in held) or self.is_alone(held)

    def pieces(self, names: Iterable[str], held: Iterable[str] = ()) -> dict[str, Piece]:
        """The network's, as they are named in a file with the names `held`."""
        found = self.network(names)
        if self.is_alone(held):
            return {n: replace(p, original=p.original.removeprefix(self.prefix)) for n, p in found.items()}
        return found


def grouped(layout: Mapping[str, Piece]) -> dict[str, list[str]]:
    """Every name of the original, copies included, with the names in diffusers that make it up, in order of part."""
    found: dict[str, list[str]] = {}
    for name, piece in sorted(layout.items(), key=lambda item: item[1].part[0]):
        for original in (piece.original, *piece.copies):
            found.setdefault(original, []).append(name)
    return found


def _part(tensor: Tensor, index: int, count: int, width: int, name: str) -> Tensor:
    """The `width` parts from `index` on, of `count` equal ones along dim 0, as a view."""
    if len(tensor) % count:
        raise CannotRun(f"'{name}' {tuple(tensor.shape)} is not {count} equal parts", "Get the checkpoint again.")
    one = len(tensor) // count
    return tensor[index * one : (index + width) * one]


def _swap(tensor: Tensor, name: str) -> Tensor:
    return torch.cat([_part(tensor, index, 2, 1, name) for index in (1, 0)])


def to_diffusers(piece: Piece, tensor: Tensor) -> Tensor:
    """diffusers' tensor, a view where it can be, of the original's whole `tensor`, named `piece.original`."""
    index, count = piece.part
    if count > 1:
        tensor = _part(tensor, index, count, piece.width, piece.original)
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
    held = [(p.original, (p.part[0] + i, p.part[1])) for p, _ in pieces for i in range(p.width)]
    if held != [(name, (i, count)) for i in range(count)]:
        raise CannotRun(f"'{name}' needs {count} parts, each once", "Give a model that is complete.")
    if count > 1 and len({(len(t) / p.width, t.shape[1:], t.dtype) for p, t in pieces}) > 1:
        raise CannotRun(f"the parts of '{name}' differ in shape or dtype", "Give a model of one precision.")
    parts = [_swap(t, name) if p.swapped else t for p, t in pieces]
    parts = [t[..., None, None] if p.convolution else t for (p, _), t in zip(pieces, parts, strict=True)]
    parts = [t.T if p.transposed else t for (p, _), t in zip(pieces, parts, strict=True)]
    return torch.cat(parts) if count > 1 else parts[0].contiguous()


def from_original(tensors: Mapping[str, Lazy], layout: Mapping[str, Piece]) -> dict[str, Lazy]:
    """The tensors of diffusers that a file in the original layout holds."""

    def one(whole: Lazy, piece: Piece) -> Lazy:
        shape = (whole.shape[0] * piece.width // piece.part[1], *whole.shape[1:]) if whole.shape else ()
        shape = shape[:2] if piece.convolution else shape[::-1] if piece.transposed else shape
        return Lazy(whole.dtype, shape, lambda: to_diffusers(piece, whole.make()))

    return {n: one(tensors[p.original], p) for n, p in layout.items() if p.original in tensors}


def originals(tensors: Mapping[str, Lazy], layout: Mapping[str, Piece]) -> dict[str, Lazy]:
    """The tensors under the original's names; q, k and v are put together when they are wanted."""

    def one(names: list[str]) -> Lazy:
        first, piece = tensors[names[0]], layout[names[0]]
        shape = (sum(tensors[n].shape[0] for n in names), *first.shape[1:]) if first.shape else ()
        shape = (*shape, 1, 1) if piece.convolution else shape[::-1] if piece.transposed else shape
        return Lazy(first.dtype, shape, lambda: to_original([(layout[n], tensors[n].make()) for n in names]))

    return {name: one(names) for name, names in grouped(layout).items()}
