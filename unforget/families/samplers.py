"""What steps from noise to an image: a family's own sampler, another of diffusers, or steps along a trajectory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unforget.core.schedule import Schedule
from unforget.core.types import Trajectory
from unforget.errors import UsageError
from unforget.families.spec import FamilySpec

STEEPEST = 0.5
"""How far the last two predictions lead a step on at most, in their difference: as far as with steps of one length."""


class Step(NamedTuple):
    """What a step makes, as diffusers' schedulers name it."""

    prev_sample: Tensor


class Along:
    """Second-order steps along a trajectory: DPM-Solver++(2M), or SDE-DPM-Solver++(2M) (arXiv:2211.01095), each written
    as a step of the schedule, DDIM's or an ancestral one, to the image that the last two predictions lead to.

    Pixels are clipped, as stock samplers do. Each image of a batch has a generator of its own, so that it does not
    depend on the others.
    """

    def __init__(self, schedule: Schedule, trajectory: Trajectory, clipped: bool) -> None:
        self.schedule, self.timesteps, self.clipped = schedule, trajectory.timesteps, clipped
        self.levels: list[float] = schedule.half_log_snr(trajectory.timesteps).tolist()
        self.before: Tensor | None = None
        seeds = [] if trajectory.seeds is None else trajectory.seeds.tolist()
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def step(self, answer: Tensor, t: Tensor, x_t: Tensor) -> Step:
        """From timestep `t` to the following one, or to x_0 from the last."""
        at = int((self.timesteps > t).sum())
        timestep, *then = (level.expand(len(x_t)) for level in self.timesteps[at : at + 2])
        x_0, _ = self.schedule.split(x_t, answer, timestep)
        x_0 = x_0.clamp(-1, 1) if self.clipped else x_0
        if not then:
            return Step(x_0)
        ahead = x_0 if self.before is None else x_0 + self._slope(at) * (x_0 - self.before)
        drawn = [torch.randn(x_t.shape[1:], generator=generator) for generator in self.generators]
        self.before = x_0
        return Step(self.schedule.step(ahead, x_t, timestep, then[0], torch.stack(drawn).to(x_t) if drawn else None))

    def _slope(self, at: int) -> float:
        """Half of this step over the last one, in the logarithm of the signal; bounded, where a long one follows."""
        last, here, then = self.levels[at - 1 : at + 2]
        return min(STEEPEST, (then - here) / (here - last) / 2)


def sampler(
    spec: FamilySpec, config: Any, steps: int, latent_shape: tuple[int, int, int], name: str | None = None
) -> Any:
    """The family's sampler for a scheduler's configuration, or diffusers' scheduler of that name.

    UsageError if there is none that fits.
    """
    import diffusers

    options, name = {} if name else spec.sampler_options, name or spec.sampler
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise UsageError(f"diffusers has no scheduler '{name}'", "Give a class name, such as DDIMScheduler.")
    try:
        made: Any = kind.from_config(config, **options)  # type: ignore[attr-defined]
        spec.timesteps(made, steps, latent_shape)
    except Exception as error:  # whatever a library makes of a configuration that is none
        raise UsageError(f"the scheduler '{name}' does not fit this model: {error}"[:300], "Give another.") from error
    return made
