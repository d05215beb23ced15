from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, bfloat16, float16

from unforget.core.types import Family
from unforget.verification.context import Finding, VerifyContext
from unforget.verification.probes.reconstruct import Reconstruction, reconstruction_figures

Precision = Literal["fp16", "bf16", "int8"]
FLOATS = {"fp16": float16, "bf16": bfloat16}


class Quantization(Reconstruction):
    """The candidate's weights rounded to what releases come in: small changes vanish there, and the target is back."""

    kind: ClassVar = "quantization"
    level: ClassVar = "standard"
    precisions: tuple[Precision, ...] = ("fp16", "bf16", "int8")
    timesteps: tuple[int, ...] = Field((250, 400), description="timesteps to noise it to")
    draws: int = Field(16, ge=2, le=4096, description="reconstructions a timestep")

    def cost(self, context: VerifyContext) -> int:
        calls = sum(context.calls(context.start(timestep)) for timestep in self.timesteps)
        return calls * self.draws * (len(self.precisions) + 1) * len(context.cases)

    def __call__(self, context: VerifyContext) -> list[Finding]:
        before = self._figures(context, context.candidate)
        return [
            Finding(self.kind, target, before[place], after, context.start(timestep), context.prompt(prompt_id), kind)
            for kind in self.precisions
            for place, after in self._figures(context, quantized(context.candidate, kind)).items()
            for target, prompt_id, timestep in [place]
        ]

    def _figures(self, context: VerifyContext, family: Family) -> dict[tuple[str, int, int], dict[str, float]]:
        found = {}
        for instance, prompt_id in context.cases:
            for timestep in self.timesteps:
                start, floor = context.start(timestep), context.floor(timestep, prompt_id)
                noise = context.noise("cast", self.draws, fresh=True)
                images = context.reconstruct(family, instance.target, noise, prompt_id, start)
                found[instance.id, prompt_id, timestep] = reconstruction_figures(images, instance, floor)
        return found


def quantized(family: Family, precision: Precision) -> Family:
    """A copy of a model with its weights rounded."""
    twin = family.copy()
    state = twin.network.state_dict()
    twin.network.load_state_dict({n: rounded(w, precision) if w.is_floating_point() else w for n, w in state.items()})
    return twin


def rounded(weight: Tensor, precision: Precision) -> Tensor:
    """A weight through another precision and back; int8 is symmetric, with a scale for each output channel."""
    if precision != "int8":
        return weight.to(FLOATS[precision]).to(weight.dtype)
    if weight.ndim < 2:
        return weight
    scale = weight.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
    scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return (weight / scale).round().clamp(-127, 127) * scale
