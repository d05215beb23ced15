"""What steps from noise to an image: a family's own sampler, another of diffusers, or steps along a trajectory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unforget.core.schedule import Schedule
from unforget.core.types import Trajectory
from unforget.errors import UsageError
from unforget.families.spec import FamilySpec


class Step(NamedTuple):
    """What a step makes, as diffusers' schedulers name it."""

    prev_sample: Tensor


class Along:
    """Steps of the schedule along a trajectory, deterministic or ancestral; pixels are clipped, as stock samplers do.

    Each image of a batch has a generator of its own, so that it does not depend on the others.
    """

    def __init__(self, schedule: Schedule, trajectory: Trajectory, clipped: bool) -> None:
        self.schedule, self.timesteps, self.clipped = schedule, trajectory.timesteps, clipped
        seeds = [] if trajectory.seeds is None else trajectory.seeds.tolist()
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def step(self, answer: Tensor, t: Tensor, x_t: Tensor) -> Step:
        """From timestep `t` to the following one, or to x_0 from the last."""
        timestep, *then = (level.expand(len(x_t)) for level in self.timesteps[self.timesteps <= t][:2])
        x_0, noise = self.schedule.split(x_t, answer, timestep)
        x_0 = x_0.clamp(-1, 1) if self.clipped else x_0
        if not then:
            return Step(x_0)
        drawn = [torch.randn(x_t.shape[1:], generator=generator) for generator in self.generators]
        return Step(self.schedule.step(x_0, noise, timestep, then[0], torch.stack(drawn).to(x_t) if drawn else None))


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
