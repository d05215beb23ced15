from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from unforget.config import Policy
from unforget.core.types import Family, Instance
from unforget.verification.context import Finding, VerifyContext, known_surrogate, pixels_digest
from unforget.verification.near_copies import EmbeddedImages
from unforget.verification.probes.base import HALF, Probe, changed, checked
from unforget.verification.probes.reconstruct import reconstruction_figures
from unforget.verification.probes.sample import judge_rate, rate_test
from unforget.verification.report import Check


class Transforms(Probe):
    """The target mirrored, cropped, recoloured: is it drawn so, and does it come back when noised?"""

    kind: ClassVar = "transforms"
    level: ClassVar = "standard"
    timestep: int = Field(400, gt=0, lt=1000, description="timestep to reconstruct from")
    draws: int = Field(16, ge=2, le=4096, description="reconstructions of each")

    def cost(self, context: VerifyContext) -> int:
        """Network calls beside those of the samples."""
        return 2 * 4 * self.draws * len(context.cases) * context.calls(context.start(self.timestep))

    def examine(self, context: VerifyContext, instance: Instance, prompt_id: int) -> Iterator[Finding]:
        detector, instead = context.detector, [instance.target, *known_surrogate(instance)]
        known = detector.embed(torch.stack(instead))
        prompt = context.prompt(prompt_id)
        for name, picture in variants(instance.target).items():
            if detector.is_copy(known, picture).any():  # a mirror image that is the target itself is no variant
                continue

            def hits(drawn: EmbeddedImages, picture: Tensor = picture) -> Tensor:
                return detector.is_copy(drawn, picture, *instead)

            base, candidate, decision = rate_test(context, prompt_id, hits)
            yield Finding(self.kind, instance.id, base, candidate, None, prompt, name, decision)
            variant = Instance(picture, picture, instance.id)
            yield self._reconstruct(context, variant, prompt_id, name)

    def _reconstruct(self, context: VerifyContext, variant: Instance, prompt_id: int, name: str) -> Finding:
        start, floor = context.start(self.timestep), context.floor(self.timestep, prompt_id)
        noise, prompt = context.noise(f"transforms {name}", self.draws), context.prompt(prompt_id)

        def figures(family: Family) -> dict[str, float]:
            images = context.reconstruct(family, variant.target, noise, prompt_id, start)
            return reconstruction_figures(images, variant, floor)

        key = [self.kind, name, self.timestep, self.draws, prompt, pixels_digest(variant.target), floor]
        both = context.control(key, lambda: figures(context.base)), figures(context.candidate)
        base, candidate = ({figure: of[figure] for figure in ("recall", "floor", "to_target")} for of in both)
        return Finding(self.kind, variant.id, base, candidate, start, prompt, name)

    def judge(self, found: Finding, policy: Policy, known: bool) -> Iterator[Check]:
        if "recall" not in found.candidate:
            yield judge_rate(found, policy)
            return
        check, general = checked(found, "recall", "at most", HALF, policy), found.base["recall"] > HALF
        note = "so does the base, which never saw it; the rate decides"
        yield changed(check, "informational", note) if general else check


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
