"""The random surrogate of arXiv:2603.10445, its variant with a dagger; SalUn's other label is the same thing here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from unforget.core.objectives.surrogate import Redirection

if TYPE_CHECKING:
    import torch

    from unforget.core.objectives import Context
    from unforget.core.types import Noised


class RandomSurrogate(Redirection):
    """Make the clean image a random retain image at every noised target, another one at each update."""

    kind: Literal["random-surrogate"] = "random-surrogate"
    needs_surrogate: ClassVar[bool] = False

    def pair(
        self, forget: Noised, retain: Noised, context: Context, generator: torch.Generator
    ) -> tuple[Noised, Noised]:
        """With retain images in the place of the surrogates."""
        import torch  # not above: a recipe is made without torch

        others = torch.randint(len(context.retain), (len(forget.x_0),), generator=generator)
        return super().pair(replace(forget, x_s=context.retain.x_0[others]), retain, context, generator)
