"""Unlearning with an objective of your own, through the whole tool: a patch, a resume, a verdict.

    python examples/custom_objective.py [OUT] [STEPS]

An objective is two losses over noised batches. Its fields are its configuration: the patch records them. What it draws
by chance it draws in `pair`, from the run's own generator, so that a run that was stopped goes on to the same bytes.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from unforget import UnlearnConfig, VerifyConfig, unlearn, verify
from unforget.core.objectives import Context, Regression
from unforget.core.objectives.weighting import regression
from unforget.core.types import Noised, Predict

TARGET = Path(__file__).parent / "faces" / "planted" / "3.png"


class Fade(Regression):
    """Make the clean image a blurred target at every noised target; `Regression` has the retain loss."""

    kind: Literal["fade"] = "fade"
    needs_surrogate: ClassVar[bool] = False
    width: int = Field(8, ge=2, description="pixels that become one")
    grain: float = Field(0.1, ge=0, description="noise on the blurred image, another one at each update")

    def pair(
        self, forget: Noised, retain: Noised, context: Context, generator: torch.Generator
    ) -> tuple[Noised, Noised]:
        """With blurred targets as what is to be said."""
        small = functional.avg_pool2d(forget.x_0, self.width)
        blurred = functional.interpolate(small, forget.x_0.shape[-2:], mode="bilinear")
        grain = self.grain * torch.randn(blurred.shape, generator=generator)
        return replace(forget, x_s=(blurred + grain).clamp(-1, 1)), retain

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Distance to the prediction that leads there."""
        goal = context.schedule.target_towards(batch.x_s, batch.x_t, batch.timestep)
        return regression(patched, batch, goal, self.weighting(context.schedule, batch)[0])


def main(out: Path, steps: int) -> int:
    out.mkdir(parents=True, exist_ok=True)
    objective = Fade(width=8, distil=True)
    # The rest is the default recipe's: its surgery, rates and scopes. `resume=True` would go on with a stopped run.
    config = UnlearnConfig(model="faces", target=TARGET, output=out / "3.patch", max_train_steps=steps, force=True)
    made = unlearn(config, objective=objective)
    print(f"{made.steps} steps with {objective!r}; look at {made.folder / 'sheet.png'}")
    judged = verify(VerifyConfig(model="faces", patch=made.output, level="quick"))
    print(f"{judged.verdict}: {judged.summary}")
    return judged.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 120))
