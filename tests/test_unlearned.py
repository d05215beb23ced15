"""How `unlearn` ends: by what comes back from noise, and by what is drawn under the given prompts."""

from pathlib import Path

import pytest

from unforget.api.unlearning import Unlearned, judged
from unforget.cli import console
from unforget.errors import ExitCode
from unforget.verification.context import Finding

CLOSE = {"to_target": 0.5, "to_surrogate": 0.1}


def reconstructed(share, prompt="a flag"):
    base = {"to_target": 0.1, "to_surrogate": 0.5, "nearer_surrogate": 0.0}
    return Finding("reconstruct", "t", base, {**CLOSE, "nearer_surrogate": share}, timestep=400, prompt=prompt)


def drawn(target, surrogate, before=1.0):
    base = {"target": before, "surrogate": 0.0, "something_else": 1 - before}
    after = {"target": target, "surrogate": surrogate, "something_else": 1 - target - surrogate}
    return Finding("replaced", "t", base, after, prompt="a flag")


@pytest.mark.parametrize(
    ("findings", "shown", "forgotten", "replaced"),
    [
        ([reconstructed(1.0)], [drawn(0, 1.0)], True, True),
        ([reconstructed(1.0)], [drawn(0, 0.5)], True, False),  # gone, but half is something else
        ([reconstructed(1.0)], [drawn(0.0625, 0.9375)], False, True),  # one of sixteen is still the target
        ([reconstructed(0.2)], [drawn(0, 1.0)], False, True),
        ([reconstructed(1.0)], [drawn(0, 0.0, before=0.25)], True, True),  # the base seldom drew it: nothing is known
        ([reconstructed(1.0), reconstructed(0.0, prompt="")], [drawn(0, 1.0)], True, True),
        ([reconstructed(1.0, prompt="")], [], True, True),  # no prompt, nothing to draw under
    ],
)
def test_it_ends_well_only_if_the_surrogate_is_what_is_drawn(findings, shown, forgotten, replaced):
    said = judged(findings, shown)
    assert (said["forgotten"], said["replaced"]) == (forgotten, replaced)
    ended = Unlearned(Path("x.patch"), Path("x.run"), steps=1, stopped="budget", margin=None, drift={}, **said)
    assert ended.code == (ExitCode.OK if forgotten and replaced else ExitCode.FAILED)


def test_the_user_is_told_what_is_drawn():
    (row,) = judged([], [drawn(0.0, 0.75)])["drawn"]
    assert console.drawn(row) == "under 'a flag' it draws: 75% surrogate, 25% something else"
