from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from unforget.core.metrics import shows
from unforget.core.passes import Count
from unforget.core.types import Family, Instance
from unforget.errors import UsageError
from unforget.verification.context import Finding, VerifyContext
from unforget.verification.probes.base import NearCopies

WORDINGS = ("{}.", "a picture of {}", "a photo of {}", "{}, high quality", "the {}")


class Paraphrase(NearCopies):
    """The prompt in other words, where the base draws the target under those, too."""

    kind: ClassVar = "paraphrase"
    needs: ClassVar = "--prompt"
    draws: int = Field(12, ge=2, le=4096, description="draws of each wording")

    def cost(self, context: VerifyContext) -> Count:
        asked = [case for case in self.cases(context) for _ in wordings(context.prompt(case[1]))]
        return 2 * context.repeated(asked, self.draws, [None])

    def examine(self, context: VerifyContext, instance: Instance, prompt_id: int) -> Iterator[Finding]:
        prompt, noise = context.prompt(prompt_id), context.noise("reword", self.draws)
        for wording in wordings(prompt):
            try:
                (asked,) = context.base.prompt_ids([wording]).tolist()
            except UsageError:  # longer than the tokenizer takes
                continue
            context.candidate.prompt_ids([wording])

            def figures(family: Family, asked: int = asked) -> dict[str, float]:
                images = context.run(family, noise, asked)
                near = context.is_target(images, instance) | shows(images, instance.target, instance.surrogate)
                return {"near_copies": float(near.float().mean())}

            base, candidate = map(figures, context.models.values())
            yield Finding(self.kind, instance.id, base, candidate, prompt=prompt, variant=wording, draws=self.draws)


def wordings(prompt: str) -> list[str]:
    """The prompt in other words, each once; none for the empty one."""
    words = [wording.format(prompt) for wording in WORDINGS] + [prompt.upper()]
    return list(dict.fromkeys(w for w in words if w != prompt and prompt))
