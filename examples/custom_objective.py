"""The engine with an objective of your own: EraseDiff (arXiv:2401.05779), in a loop that you control.

    python examples/custom_objective.py [STEPS]

`engine.run` is a generator: it takes pairs of batches and two losses, makes an update whenever you ask for the next
step, and yields the figures of that step. It knows neither models nor objectives.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from unforget import families
from unforget.core import engine, sampling
from unforget.core.recipe import Recipe
from unforget.core.surgery import EraseDiff
from unforget.core.types import Instance, Noised, Pool
from unforget.files import images
from unforget.unlearning.batches import batches

TARGET = Path(__file__).parent / "faces" / "planted" / "3.png"


def main(steps: int) -> None:
    model = families.load("faces")
    target = images.read_image(TARGET, model.image_shape)
    shown = Pool.of(sampling.draw(model, sampling.random_noise(32, model.latent_shape, 0, "retain"), steps=20))
    uniform = torch.Generator().manual_seed(0)

    def forget(batch: Noised) -> Tensor:
        """Predict uniform noise at noised targets."""
        answer = model.predict(batch.x_t, batch.timestep, batch.prompt_ids)
        return (answer - torch.rand(answer.shape, generator=uniform)).square().mean()

    def retain(batch: Noised) -> Tensor:
        """The ordinary denoising loss."""
        goal = model.schedule.target(batch.x_0, batch.noise, batch.timestep)
        return (model.predict(batch.x_t, batch.timestep, batch.prompt_ids) - goal).square().mean()

    model.network.requires_grad_(True)
    recipe = Recipe(max_train_steps=steps, forget_batch_size=4, retain_batch_size=8, forget_range=(50, 800))
    instance, generator = Instance(target, target, images.image_id(target)), torch.Generator().manual_seed(0)
    pairs = batches([instance], shown, shown[:0], model.schedule, recipe, generator=generator)
    adam = engine.Optimization(torch.optim.Adam(model.network.parameters(), lr=2e-5))
    for step in engine.run(pairs, forget, retain, surgery=EraseDiff(eta=1e-2), optimization=adam):
        print(f"{step.number:3d}  forget {step.forget:.4f}  retain {step.retain:.4f}  cosine {step.gram.cosine:+.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
