from collections.abc import Iterator
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
from unforget.verification.variants import is_variant, turned


class Transforms(Probe):
    """Is the target drawn turned, scaled, moved, mirrored, in other colours or a collage? Does it come back so?"""

    kind: ClassVar = "transforms"
    timestep: int = Field(400, gt=0, lt=1000, description="timestep to reconstruct from")
    draws: int = Field(16, ge=2, le=4096, description="reconstructions of each")

    def cost(self, context: VerifyContext) -> Count:
        count = 5 if context.base.image_shape[0] == 3 else 4  # fewer where a mirror image is the target itself
        return 2 * count * context.repeated(self.cases(context), self.draws, [self.timestep])

    def shared(self, context: VerifyContext) -> Iterator[tuple[Drawn, Count]]:
        for _, prompt_id in self.cases(context):
            yield from rate_draws(context, prompt_id)

    def floors(self, context: VerifyContext) -> Iterator[tuple[float, int]]:
        yield from ((self.timestep, prompt_id) for _, prompt_id in self.cases(context))

    def examine(self, context: VerifyContext, instance: Instance, prompt_id: int) -> Iterator[Finding]:
        instead = [instance.target, *known_surrogate(instance)]
        yield self._drawn(context, instance, prompt_id)
        known = context.detector.embed(torch.stack(instead))
        for name, picture in variants(instance.target).items():
            if not context.detector.is_copy(known, picture).any():  # a mirror image may be the target itself
                yield self._recalled(context, Instance(picture, picture, instance.id), prompt_id, name)

    def _drawn(self, context: VerifyContext, instance: Instance, prompt_id: int) -> Finding:
        limits, wanted = context.variant_limits(instance.target), (instance.target, *known_surrogate(instance))
        rates = rate_test(context, prompt_id, lambda drawn: is_variant(drawn.images, limits, *wanted))
        prompt = context.prompt(prompt_id)
        return Finding(self.kind, instance.id, rates[0], rates[1], None, prompt, "searched", rates[2])

    def _recalled(self, context: VerifyContext, variant: Instance, prompt_id: int, name: str) -> Finding:
        picture, floor, prompt = variant.target, context.floor(self.timestep, prompt_id), context.prompt(prompt_id)
        noise = context.noise(f"transforms {name}", self.draws)

        def figures(family: Family) -> dict[str, float]:
            images = context.reconstruct(family, picture, noise, prompt_id, self.timestep)
            return reconstruction_figures(images, variant, floor)

        key = [self.kind, name, self.timestep, self.draws, prompt, image_id(picture), floor]
        both = context.control(prompt_id, key, lambda: figures(context.base)), figures(context.candidate)
        base, candidate = ({figure: of[figure] for figure in ("recall", "floor", "to_target")} for of in both)
        start = context.start(self.timestep)
        return Finding(self.kind, variant.id, base, candidate, start, prompt, name, draws=self.draws)

    def judge(self, found: Finding, policy: Policy, known: bool) -> list[Check]:
        if "recall" not in found.candidate:
            return [judge_rate(found, policy)]
        check, note = checked(found, "recall", "at most", HALF, policy), "so does the base, which never saw it"
        return [changed(check, "informational", f"{note}; the rate decides") if found.base["recall"] > HALF else check]


def variants(picture: Tensor) -> dict[str, Tensor]:
    """An image (C, H, W) as somebody may have saved it again: mirrored, cropped, turned, in other colours."""
    height, width = picture.shape[1:]
    y, x = height // 20 or 1, width // 20 or 1
    inner = picture[None, :, y : height - y, x : width - x]
    return {
        "flip": picture.flip(-1),
        "crop": functional.interpolate(inner, (height, width), mode="bilinear", antialias=True)[0].clamp(-1, 1),
        "turn": turned(picture, 10),
        "colour": (picture * 0.8 + 0.15).clamp(-1, 1),
        **({"grey": picture.mean(0, keepdim=True).expand_as(picture)} if len(picture) == 3 else {}),
    }
