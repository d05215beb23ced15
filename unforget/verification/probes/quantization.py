from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unforget.core.passes import Count
from unforget.core.types import Family, Instance
from unforget.verification.context import Finding, VerifyContext
from unforget.verification.probes.reconstruct import Reconstruction, reconstruction_figures

Precision = Literal["fp16", "bf16", "int8"]
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Quantization(Reconstruction):
    """The candidate's weights rounded to what releases come in: small changes vanish there, and the target is back."""

    kind: ClassVar = "quantization"
    precisions: tuple[Precision, ...] = ("fp16", "bf16", "int8")
    timesteps: tuple[int, ...] = Field((250, 400), description="timesteps to noise it to")
    draws: int = Field(32, ge=2, le=4096, description="reconstructions a timestep")

    def cost(self, context: VerifyContext) -> Count:
        return (len(self.precisions) + 1) * context.repeated(self.cases(context), self.draws, self.timesteps)

    def floors(self, context: VerifyContext) -> Iterator[tuple[float, int]]:
        yield from ((timestep, id) for _, id in self.cases(context) for timestep in self.timesteps)

    def __call__(self, context: VerifyContext) -> list[Finding]:
        places = [(*case, timestep) for case in self.cases(context) for timestep in self.timesteps]
        before, found = [self._figures(context, context.candidate, *place) for place in places], []
        for precision in self.precisions:
            twin = quantized(context.candidate, precision)
            for base, (instance, prompt_id, timestep) in zip(before, places, strict=True):
                after = self._figures(context, twin, instance, prompt_id, timestep)
                start, prompt = context.start(timestep), context.prompt(prompt_id)
                found.append(Finding(self.kind, instance.id, base, after, start, prompt, precision, draws=self.draws))
        return found

    def _figures(
        self, context: VerifyContext, family: Family, instance: Instance, prompt_id: int, timestep: int
    ) -> dict[str, float]:
        noise = context.noise("cast", self.draws, fresh=True)
        images = context.reconstruct(family, instance.target, noise, prompt_id, timestep)
        return reconstruction_figures(images, instance, context.floor(timestep, prompt_id))


def quantized(family: Family, precision: Precision) -> Family:
    """A copy of a model with its weights rounded."""
    twin = family.copy()
    with torch.no_grad():
        for weight in twin.network.state_dict().values():  # one at a time: another whole copy need not fit
            if weight.is_floating_point():
                weight.copy_(rounded(weight, precision))
    return twin


def rounded(weight: Tensor, precision: Precision) -> Tensor:
    """A weight through another precision and back; int8 is symmetric, with a scale for each output channel."""
    if precision != "int8":
        return weight.to(FLOATS[precision]).to(weight.dtype)
    if weight.ndim < 2:
        return weight
    scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round().clamp(-127, 127) * scale
