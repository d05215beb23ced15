"""How `unlearn` ends: by what comes back from noise, and by what is drawn under the given prompts."""

import shlex
from pathlib import Path

import pytest
from rich.console import Console
from test_config import command

from unforget import UnlearnConfig
from unforget.api.unlearning import Unlearned, judged
from unforget.cli import console
from unforget.config import ModelConfig, VerifyConfig
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


def test_a_row_names_its_prompt_and_what_it_is_judged_by():
    table = judged([reconstructed(1.0), reconstructed(0.0, prompt="")], [])["table"]
    shown = Console(width=120)
    with shown.capture() as capture:
        shown.print(console.before_after(table))
    under, bare = (line for line in capture.get().splitlines() if "400" in line)
    assert "a flag" in under and "0% to 100%" in under and "\u2265 50%" in under
    assert "none" in bare and "not judged" in bare


@pytest.mark.parametrize("given", [
    {}, {"device": "cpu", "t5": False, "seed": 3, "force": True, "cpu_offload": True},
    {"resolution": 512, "guidance": 2.5, "text_encoder": ["a b.safetensors", "c"]},
])  # fmt: skip
def test_the_next_command_opens_the_model_in_the_same_way(given):
    """It parses to the same settings of the model, whatever characters are in paths."""
    config = UnlearnConfig(model="my model/x", target="t.png", output="it's.patch", **given)
    program, name, *args = shlex.split(console.verify_command(config))
    assert (program, name) == ("unforget", "verify")
    parsed = command("verify").make_context("verify", args).params
    assert parsed["patch"] == [config.output] and parsed["html"].name == "it's.html"
    for field in ModelConfig.model_fields.keys() - {"seed", "force"}:
        wanted = getattr(config, field) if field in config.model_fields_set else None
        if wanted is not None:
            again = VerifyConfig(**{"model": "x", "patch": "y", field: parsed[field]})
            assert getattr(again, field) == wanted, field
