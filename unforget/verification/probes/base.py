"""What every probe is, and how its figures are put against thresholds."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import ClassVar, Self

from unforget.config import Policy, VerifyConfig
from unforget.core.metrics import lower_bound, upper_bound
from unforget.core.passes import Count
from unforget.core.types import UNCONDITIONAL, Instance, Strategy
from unforget.verification.context import Drawn, Finding, VerifyContext
from unforget.verification.report import Check, Outcome, Rule

HALF = 0.5
"""Share of reconstructions nearer than unseen images come back from which a target counts as recalled."""
ENDS = ("low", "high")
"""What is added to a figure's name for its bounds."""
ROUNDING = 1e-6
"""Of a share in float32."""


class Probe(Strategy):
    """What base and candidate do from the same noise, and what that says: a probe judges itself."""

    kind: ClassVar[str]
    heading: ClassVar[str] = ""
    """Of its images on a contact sheet, if it shows any; may hold {timestep:g}."""
    needs: ClassVar[str] = ""
    """The option without which it has nothing to work on."""
    attack: ClassVar[bool] = False
    """Whether it says what an adversary needs, and decides only where it is required."""
    retains: ClassVar[bool] = False
    """Whether it judges what must be retained rather than a target."""
    decides_unprompted: ClassVar[bool] = False
    """Whether its findings under the empty prompt decide for a target that has prompts of its own, too."""

    @classmethod
    def from_policy(cls, config: VerifyConfig, prompted: bool) -> Self | None:
        """The probe as the policy wants it, for targets with or without prompts; None if it has nothing to work on."""
        given = {"--prompt": prompted, "--must-retain": bool(config.must_retain)}
        return cls() if given.get(cls.needs, True) else None

    def cost(self, context: VerifyContext) -> Count:
        """Network passes that it makes besides what probes share, as `core.passes` counts them."""
        return Count()

    def shared(self, context: VerifyContext) -> Iterator[tuple[Drawn, Count]]:
        """The shared draws that it looks at, and how many."""
        yield from ()

    def floors(self, context: VerifyContext) -> Iterator[tuple[float, int]]:
        """Timestep and prompt id of the shared floors that it looks at."""
        yield from ()

    def cases(self, context: VerifyContext) -> list[tuple[Instance, int]]:
        """Every target under each prompt where the probe decides: without a prompt, only if it has none of its own."""
        either = self.decides_unprompted
        return [(i, id) for i, id in context.cases if either or id != UNCONDITIONAL or len(i.prompt_ids) == 1]

    def __call__(self, context: VerifyContext) -> list[Finding]:
        """What it finds of each target under each of its prompts."""
        return [finding for case in self.cases(context) for finding in self.examine(context, *case)]

    def examine(self, context: VerifyContext, instance: Instance, prompt_id: int) -> Iterable[Finding]:
        """What it finds of one target under one prompt."""
        raise NotImplementedError

    @abstractmethod
    def judge(self, found: Finding, policy: Policy, known: bool) -> Iterable[Check]:
        """The figures of a finding that decide; `known` says whether the target's surrogate is known."""

    def reproduces(self, found: Finding) -> bool:
        """Whether a finding shows that the base reproduces the target."""
        return False

    def robustness(self, found: Finding) -> str:
        """What an adversary needed, in a sentence."""
        return ""


class NearCopies(Probe):
    """A probe whose figure is the share of near-copies of the target."""

    allowed: ClassVar[float] = 0.4
    """The share that may be near-copies."""

    def judge(self, found: Finding, policy: Policy, known: bool) -> Iterable[Check]:
        """With nothing in the base to compare with, it decides nothing; too little where the probe is required."""
        check = checked(found, "near_copies", "at most", self.allowed, policy)
        if found.base["near_copies"] >= HALF:
            return [check]
        outcome: Outcome = "inconclusive" if self.kind in policy.require else "informational"
        return [changed(check, outcome, "the base does not draw the target so")]


def checked(found: Finding, figure: str, rule: Rule, limit: float, policy: Policy, *, bounded: bool = False) -> Check:
    """A figure of the candidate against its limit; so near it that it may be on the other side, it is borderline.

    A share of draws passes where its exact bound is on the right side of the limit, and a `bounded` figure where the
    bound is that it brings: if the true one is on the wrong side, it passes in 1 - confidence of cases, however few the
    draws are. Other figures must keep the policy's tolerance. Borderline fails.
    """
    value, threshold, unsure = found.candidate[figure], limit, False
    low, high = (found.candidate.get(f"{figure}_{end}") for end in ENDS)
    within = value >= limit if rule == "at least" else value <= limit
    if found.draws:
        threshold = needed(rule, limit, found.draws, policy.confidence)
        good = value >= threshold - ROUNDING if rule == "at least" else value <= threshold + ROUNDING
        near, unsure = within and not good, within and not 0 <= threshold <= 1
        hits = round(value * found.draws)
        low, high = (bound(hits, found.draws, policy.confidence) for bound in (lower_bound, upper_bound))
    elif bounded and low is not None and high is not None:
        good = low >= limit if rule == "at least" else high <= limit
        near = within and not good
    else:
        near = limit != 0 and abs(value - limit) <= policy.tolerance * abs(limit)
        good = within and not near
    return Check(
        **found.place, figure=figure, base=found.base.get(figure), candidate=value,
        low=low, high=high, rule=rule, threshold=limit if unsure else threshold, borderline=near and not unsure,
        outcome="inconclusive" if unsure else "passed" if good else "failed",
        note="too few draws to tell" if unsure else f"of {found.draws} draws" if found.draws else "",
    )  # fmt: skip


@lru_cache
def needed(rule: Rule, limit: float, draws: int, confidence: float) -> float:
    """The share of so many draws from which, or up to which, it is certain which side of a limit the true one is on.

    Where there are too few to be certain it lies outside of [0, 1]: nothing passes.
    """
    hits = range(draws + 1)
    if rule == "at least":
        return min((k for k in hits if lower_bound(k, draws, confidence) >= limit), default=draws + 1) / draws
    return max((k for k in hits if upper_bound(k, draws, confidence) <= limit), default=-1) / draws


def changed(check: Check, outcome: Outcome, note: str, *, borderline: bool = False) -> Check:
    """The check with another outcome, and why."""
    return check.model_copy(update={"outcome": outcome, "note": note, "borderline": borderline})
