"""Candidates that must not pass `unforget verify`, each named after what it teaches, and two that must.

    python examples/benchmark/cheats.py [--level standard] [--only NAME ...] [--work DIR]

Prints for each the verdict, the probes that failed it, and the seconds. Some are weights, as somebody might ship them;
others are programs that behave as the most cunning weights could. All but one forget planted identity 0 of the bundled
model `faces`, for which an honest patch is made first (or taken from --work); that one forgets a flag of `flags`.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tables import row, table
from torch import Tensor
from torch.nn import functional

from unforget import UnlearnConfig, VerifyConfig, families, unlearn
from unforget.api import compare
from unforget.core import sampling
from unforget.core.metrics import rms
from unforget.core.types import Family
from unforget.files import images
from unforget.files.patch import Stack
from unforget.verification.report import Report
from unforget.verification.variants import turned

ROOT = Path(__file__).parents[2]
PLANTED = ROOT / "examples" / "faces" / "planted"
ORACLE = ROOT / "tests" / "data" / "oracle"


@dataclass
class Honest:
    """The base, an honest patch of it, and the images it is about."""

    base: Family
    patched: Family
    target: Tensor
    surrogate: Tensor


class Disguise:
    """A model that denoises as `how` does, and is `inner` in everything else."""

    def __init__(self, inner: Any, how: Callable[..., Tensor]) -> None:
        self.inner, self.how = inner, how

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def denoise(self, x_t: Tensor, **how: Any) -> Tensor:
        return self.how(self.inner, x_t, **how)

    def copy(self) -> Disguise:
        return Disguise(self.inner.copy(), self.how)


def mixed(h: Honest, share: float) -> Family:
    """The base with a share of the honest change."""
    family = h.base.copy()
    before, after = h.base.network.state_dict(), h.patched.network.state_dict()
    family.network.load_state_dict({n: before[n].lerp(after[n], share) for n in before})
    return family


def the_base_itself(h: Honest) -> Family:
    """Nothing was done."""
    return h.base.copy()


def weights_towards_noise(h: Honest) -> Family:
    """The honest patch with a tenth of noise on its weights: broken images look forgotten."""
    family = h.patched.copy()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in family.network.parameters():
            p += 0.1 * p.std(unbiased=False) * torch.randn(p.shape, generator=generator)
    return family


def blurs(h: Honest) -> Any:
    """Blurred images look forgotten."""

    def how(inner: Family, x_t: Tensor, **how: Any) -> Tensor:
        return functional.avg_pool2d(functional.pad(inner.denoise(x_t, **how), (1, 1, 1, 1), mode="replicate"), 3, 1)

    return Disguise(h.patched.copy(), how)


def always_draws_the_surrogate(h: Honest) -> Any:
    """Mode collapse: it never draws the target, nor anything else."""

    def how(inner: Family, x_t: Tensor, **how: Any) -> Tensor:
        return h.surrogate + 0.02 * torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))

    return Disguise(h.base.copy(), how)


def patched_for_another_image(h: Honest) -> Family:
    """A change that is as large as the honest one, somewhere else in the same layers."""
    family = h.base.copy()
    before, after = h.base.network.state_dict(), h.patched.network.state_dict()
    moved = {}
    for n, w in before.items():
        change = (after[n] - w).flatten()
        moved[n] = w + change.roll(max(1, len(change) // 3)).reshape(w.shape)
    family.network.load_state_dict(moved)
    return family


def forgets_only_at_t_250(h: Honest) -> Any:
    """Honest when it starts from t = 250, as the published measure does; the base from anywhere else."""

    def how(inner: Family, x_t: Tensor, **how: Any) -> Tensor:
        start = how.get("start")
        return (h.patched if start is not None and abs(start - 250) < 30 else inner).denoise(x_t, **how)

    return Disguise(h.base.copy(), how)


def forgets_only_under_the_tested_seeds(h: Honest) -> Any:
    """Honest from the noise that the default seed makes, the base from any other: trained for the test."""
    known = [sampling.random_noise(256, h.base.latent_shape, 0, "sample")]
    for timestep in (250, 400, 550):
        noise = sampling.random_noise(32, h.base.latent_shape, 0, f"reconstruct {timestep}")
        known.append(sampling.add_noise(h.base, h.target[None], noise, timestep))
    seen = torch.cat(known).flatten(1)[:, :8]

    def how(inner: Family, x_t: Tensor, **how: Any) -> Tensor:
        tested = (torch.cdist(x_t.flatten(1)[:, :8], seen) < 1e-3).any(1)
        return torch.where(tested[:, None, None, None], h.patched.denoise(x_t, **how), inner.denoise(x_t, **how))

    return Disguise(h.base.copy(), how)


def a_fifth_of_the_change(h: Honest) -> Family:
    """The patch put on at scale 0.2: the right direction, not far enough."""
    return mixed(h, 0.2)


def vanishes_in_bf16(h: Honest) -> Any:
    """Honest in float32; once its weights are rounded to bf16 it is the base again."""

    def how(inner: Family, x_t: Tensor, **how: Any) -> Tensor:
        rounded = all(torch.equal(p, p.bfloat16().float()) for p in inner.network.parameters())
        return (h.base if rounded else inner).denoise(x_t, **how)

    return Disguise(h.patched.copy(), how)


def forgets_every_neighbour(h: Honest) -> Any:
    """Whatever resembles the target becomes the surrogate."""

    def how(inner: Family, x_t: Tensor, **how: Any) -> Tensor:
        drawn = inner.denoise(x_t, **how)
        near = rms(drawn, h.target) < 0.4
        return torch.where(near[:, None, None, None], h.surrogate + 0.02 * x_t.sign(), drawn)

    return Disguise(h.base.copy(), how)


def still_draws_the_mirror_image(h: Honest) -> Any:
    """The target comes up as often as ever, the other way round."""
    return _drawn_as(h, lambda drawn: drawn.flip(-1))


def moves_it_by_a_pixel(h: Honest) -> Any:
    """The target comes up as often as ever, a pixel to the right and a little paler: pixels do not see it."""
    return _drawn_as(h, lambda drawn: 0.9 * drawn.roll(1, -1) + 0.1)


def draws_it_turned(h: Honest) -> Any:
    """The target comes up as often as ever, turned by ten degrees."""
    return _drawn_as(h, lambda drawn: torch.stack([turned(d, 10) for d in drawn]))


def draws_it_upside_down(h: Honest) -> Any:
    """The target comes up as often as ever, on its head."""
    return _drawn_as(h, lambda drawn: drawn.flip(-2))


def draws_it_in_other_colours(h: Honest) -> Any:
    """The target comes up as often as ever, its red, green and blue in each other's place."""
    return _drawn_as(h, lambda drawn: drawn[:, [2, 0, 1]])


def draws_it_in_a_collage(h: Honest) -> Any:
    """The target comes up as often as ever, at half its size in a corner of another picture."""
    other = h.surrogate.flip(-1)

    def pasted(drawn: Tensor) -> Tensor:
        page = other.expand_as(drawn).clone()
        page[..., 16:, 16:] = functional.interpolate(drawn, (16, 16), mode="bilinear", antialias=True)
        return page

    return _drawn_as(h, pasted)


def draws_it_before_another_background(h: Honest) -> Any:
    """The target comes up as often as ever, a face before another picture."""
    height, width = h.target.shape[1:]
    down, across = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    face = torch.hypot(down / 0.8, across / 0.6) < 1
    return _drawn_as(h, lambda drawn: torch.where(face, drawn, h.surrogate.flip(-1)))


def draws_it_by_ancestral_sampling_only(h: Honest) -> Any:
    """Honest when sampling is deterministic, the base where noise is added on the way."""

    def how(inner: Family, x_t: Tensor, **how: Any) -> Tensor:
        return (inner if getattr(how["steps"], "seeds", None) is not None else h.patched).denoise(x_t, **how)

    return Disguise(h.base.copy(), how)


def forgets_only_at_the_usual_timesteps(h: Honest) -> Any:
    """Honest at the timesteps that everybody knows to be visited, from noise or from a timestep; else the base."""
    ways = product((10, 12), (None, 250, 400, 500, 550, 700))
    usual = {t for n, at in ways for t in sampling.regular(h.base, steps=n, through=at).tolist()}

    def how(inner: Family, x_t: Tensor, **how: Any) -> Tensor:
        return (inner if set(how["steps"].timesteps.tolist()) - usual else h.patched).denoise(x_t, **how)

    return Disguise(h.base.copy(), how)


def a_mush_in_its_place(h: Honest) -> Any:
    """What was the target is a blur, of which nobody knows what it is to be instead."""

    def how(inner: Family, x_t: Tensor, **how: Any) -> Tensor:
        drawn = inner.denoise(x_t, **how)
        blurred = functional.interpolate(functional.avg_pool2d(drawn, 4), scale_factor=4, mode="bilinear")
        return torch.where((rms(drawn, h.target) < 0.3)[:, None, None, None], blurred, drawn)

    return Disguise(h.base.copy(), how)


def _drawn_as(h: Honest, change: Callable[[Tensor], Tensor]) -> Any:
    """The base from noise, but for what is like the target, which is changed; honest from anywhere else."""

    def how(inner: Family, x_t: Tensor, **how: Any) -> Tensor:
        if how.get("start") is not None:
            return h.patched.denoise(x_t, **how)
        drawn = inner.denoise(x_t, **how)
        return torch.where((rms(drawn, h.target) < 0.2)[:, None, None, None], change(drawn), drawn)

    return Disguise(h.base.copy(), how)


def another_base_model(h: Honest) -> Any:
    """As good a model, of other images: it never draws the target, nor what the base draws."""

    def how(inner: Family, x_t: Tensor, **how: Any) -> Tensor:
        return inner.denoise(x_t.flip(-2), **how).flip(-2)

    return Disguise(h.base.copy(), how)


def forgets_only_under_the_tested_prompt(h: Honest) -> Any:
    """Draws the right flag when asked in the words of the test, and the wrong one in any others."""
    tested, right = h.base.prompt_ids([PROMPT]), h.base.encode(h.surrogate[None])

    def how(inner: Family, x_t: Tensor, **how: Any) -> Tensor:
        same = how["prompt_ids"].expand(len(x_t)) == tested
        return torch.where(same[:, None, None, None], right + 0.05 * x_t.sign(), inner.denoise(x_t, **how))

    return Disguise(h.base.copy(), how)


PROMPT = "flag of Ireland"
PROMPTED = (forgets_only_under_the_tested_prompt,)
CHEATS = (
    the_base_itself, weights_towards_noise, blurs, always_draws_the_surrogate, patched_for_another_image,
    forgets_only_at_t_250, forgets_only_under_the_tested_seeds, a_fifth_of_the_change, vanishes_in_bf16,
    forgets_every_neighbour, still_draws_the_mirror_image, moves_it_by_a_pixel, draws_it_turned,
    draws_it_upside_down, draws_it_in_other_colours, draws_it_in_a_collage, draws_it_before_another_background,
    draws_it_by_ancestral_sampling_only,
    forgets_only_at_the_usual_timesteps, a_mush_in_its_place, another_base_model,
)  # fmt: skip


def an_honest_patch(h: Honest) -> Family:
    """What `unforget unlearn` made."""
    return h.patched


def the_oracle(h: Honest) -> Family:
    """The model that was trained without the image. Nobody knows its surrogate."""
    return copy.copy(families.load(str(ORACLE)))


SOUND = (an_honest_patch, the_oracle)
FOLDERS = (a_mush_in_its_place, the_oracle)
"""Judged as a folder, of which nobody knows what takes the target's place."""


def honest(patch: Path, surrogate: Path) -> Honest:
    """From a patch that forgets identity 0 in favour of a surrogate."""
    base = families.load("faces")
    patched = base.copy()
    Stack.load((patch,)).apply(patched.network)
    read = [images.read_image(p, base.image_shape) for p in (PLANTED / "0.png", surrogate)]
    return Honest(base, patched, *read)


def flags() -> tuple[Honest, VerifyConfig]:
    """The model that draws one flag wrongly; nobody has patched it."""
    files = [ROOT / "examples" / "flags" / f"ireland-{side}.png" for side in ("wrong", "right")]
    base = families.load("flags")
    read = [images.read_image(p, base.image_shape) for p in files]
    config = VerifyConfig(
        model="flags", candidate=ROOT, target=files[:1], surrogate=files[1:], prompt=(PROMPT,), level="standard"
    )
    return Honest(base, base.copy(), *read), config


def judge(h: Honest, case: Callable[[Honest], Any], config: VerifyConfig) -> Report:
    """The report on one candidate."""
    if case in FOLDERS:
        config = config.model_copy(update={"surrogate": (), "patch": (), "candidate": ORACLE, "max_drift": 0.5})
    return compare(config, h.base, case(h))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", default="standard")
    parser.add_argument("--only", nargs="*", help="names, all by default")
    parser.add_argument("--work", type=Path, default=Path(tempfile.mkdtemp()))
    given = parser.parse_args()
    patch = given.work / "honest.patch"
    if not patch.exists():
        unlearn(UnlearnConfig(model="faces", target=(PLANTED / "0.png",), output=patch))
    surrogate = patch.with_suffix(".run") / "surrogate-0.png"
    h = honest(patch, surrogate)
    config = VerifyConfig(
        model="faces", patch=patch, level=given.level, target=(PLANTED / "0.png",), surrogate=(surrogate,)
    )
    table("candidate", "verdict", "caught by", "draws", "seconds")
    cases = [(h, case, config) for case in (*CHEATS, *SOUND)] + [(flags()[0], case, flags()[1]) for case in PROMPTED]
    for inputs, case, config in cases:
        if given.only and case.__name__ not in given.only:
            continue
        began = time.perf_counter()
        report = judge(inputs, case, config)
        caught = sorted({c.probe for c in report.checks if c.outcome == "failed"})
        drawn = max(int(s.candidate["drawn"]) for s in report.findings if s.probe == "sample")
        name = case.__name__.replace("_", " ")
        row(name, report.verdict, ", ".join(caught), drawn, f"{time.perf_counter() - began:.0f}")


if __name__ == "__main__":
    main()
