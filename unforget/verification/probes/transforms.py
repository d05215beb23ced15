from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from unforget.config import Policy
from unforget.core.passes import Count
from unforget.core.types import Family, Instance
from unforget.files.images import image_id
from unforget.verification.context import Drawn, Finding, VerifyContext, known_surrogate
from unforget.verification.probes.base import HALF, Probe, changed, checked
from unforget.verification.probes.reconstruct import reconstruction_figures
from unforget.verification.probes.sample import judge_rate, rate_draws, rate_test
from unforget.verification.report import Check


class Transforms(Probe):
    """The target mirrored, cropped, recoloured: is it drawn so, and does it come back when noised?"""

    kind: ClassVar = "transforms"
    timestep: int = Field(400, gt=0, lt=1000, description="timestep to reconstruct from")
    draws: int = Field(16, ge=2, le=4096, description="reconstructions of each")

    def cost(self, context: VerifyContext) -> Count:
        count = 4 if context.base.image_shape[0] == 3 else 3  # fewer where a mirror image is the target itself
        return 2 * count * context.repeated(self.cases(context), self.draws, [self.timestep])

    def shared(self, context: VerifyContext) -> Iterator[tuple[Drawn, Count]]:
        for _, prompt_id in self.cases(context):
            yield from rate_draws(context, prompt_id)

    def floors(self, context: VerifyContext) -> Iterator[tuple[float, int]]:
        yield from ((self.timestep, prompt_id) for _, prompt_id in self.cases(context))

    def examine(self, context: VerifyContext, instance: Instance, prompt_id: int) -> Iterator[Finding]:
        instead = [instance.target, *known_surrogate(instance)]
        known = context.detector.embed(torch.stack(instead))
        for name, picture in variants(instance.target).items():
            if not context.detector.is_copy(known, picture).any():  # a mirror image may be the target itself
                yield from self._found(context, Instance(picture, picture, instance.id), prompt_id, name, instead)

    def _found(
        self, context: VerifyContext, variant: Instance, prompt_id: int, name: str, instead: Sequence[Tensor]
    ) -> Iterator[Finding]:
        picture, floor, prompt = variant.target, context.floor(self.timestep, prompt_id), context.prompt(prompt_id)
        noise = context.noise(f"transforms {name}", self.draws)

        def figures(family: Family) -> dict[str, float]:
            images = context.reconstruct(family, picture, noise, prompt_id, self.timestep)
            return reconstruction_figures(images, variant, floor)

        rates = rate_test(context, prompt_id, lambda drawn: context.detector.is_copy(drawn, picture, *instead))
        yield Finding(self.kind, variant.id, rates[0], rates[1], None, prompt, name, rates[2])
        key = [self.kind, name, self.timestep, self.draws, prompt, image_id(picture), floor]
        both = context.control(prompt_id, key, lambda: figures(context.base)), figures(context.candidate)
        base, candidate = ({figure: of[figure] for figure in ("recall", "floor", "to_target")} for of in both)
        yield Finding(self.kind, variant.id, base, candidate, context.start(self.timestep), prompt, name)

    def judge(self, found: Finding, policy: Policy, known: bool) -> list[Check]:
        if "recall" not in found.candidate:
            return [judge_rate(found, policy)]
        check, note = checked(found, "recall", "at most", HALF, policy), "so does the base, which never saw it"
        return [changed(check, "informational", f"{note}; the rate decides") if found.base["recall"] > HALF else check]


def variants(picture: Tensor) -> dict[str, Tensor]:
    """An image (C, H, W) as somebody may have saved it again: mirrored, cropped by a tenth, in other colours."""
    height, width = picture.shape[1:]
    y, x = height // 20 or 1, width // 20 or 1
    inner = picture[None, :, y : height - y, x : width - x]
    return {
        "flip": picture.flip(-1),
        "crop": functional.interpolate(inner, (height, width), mode="bilinear", antialias=True)[0].clamp(-1, 1),
        "colour": (picture * 0.8 + 0.15).clamp(-1, 1),
        **({"grey": picture.mean(0, keepdim=True).expand_as(picture)} if len(picture) == 3 else {}),
    }
