"""A field is the option, the TOML key and the Python keyword, by one name; and a wrong one is refused at once."""

import json
import shlex
import subprocess
import sys
import typing

import pytest
from conftest import PLANTED

from unforget import config as configs
from unforget.api import editor_of, recipe_of, resolve_recipe
from unforget.cli import options
from unforget.config import EditConfig, ExportConfig, RecipeOptions, UnlearnConfig, VerifyConfig, build
from unforget.config.base import RENAMED, item, option_of, plain, spelled
from unforget.core import objectives, surgery
from unforget.core.recipe import Recipe
from unforget.core.types import Scope
from unforget.errors import UsageError
from unforget.families import FAMILIES
from unforget.surrogate import editors
from unforget.verification import similarity

COMMANDS = {
    "edit-surrogate": EditConfig, "unlearn": UnlearnConfig, "verify": VerifyConfig, "export": ExportConfig,
}  # fmt: skip
FIELDS = [(c, m, n) for c, m in COMMANDS.items() for n, f in m.model_fields.items() if not option_of(f).hidden]
TARGET = PLANTED / "0.png"
GIVEN = {"model": "faces", "target": TARGET, "output": "x.patch"}


def kinds(union) -> tuple[str, ...]:
    return tuple(k.model_fields["kind"].default for k in typing.get_args(typing.get_args(union)[0]))


def command(name):
    import typer

    return typer.main.get_command(options_app(name))


def options_app(name):
    import typer

    app = typer.Typer(add_completion=False)
    app.command(name, context_settings=options.SETTINGS)(options._generated(*options.BODIES[name]))
    return app


PARAMS = {name: {p.name: p for p in command(name).params} for name in COMMANDS}


@pytest.mark.parametrize(("name", "model", "field"), FIELDS, ids=lambda v: v if isinstance(v, str) else "")
def test_option_key_and_keyword_are_one(name, model, field):
    param, said = PARAMS[name][field], model.model_fields[field]
    assert param.opts[0] == spelled(field)
    assert param.help.startswith(said.description)
    assert said.description.endswith(".") and len(said.description) > 10
    default_shows = param.default is not None or isinstance(param.show_default, str)
    assert default_shows or said.is_required()
    assert option_of(said).of[:1] in ((), *((n,) for n in model.model_fields))


@pytest.mark.parametrize(("model", "field"), [(m, n) for _, m, n in FIELDS], ids=lambda x: getattr(x, "COMMAND", x))
def test_no_number_is_without_end(model, field):
    """Libraries crash on what no machine word holds, and 20,000 threads end a process with the code of a verdict."""
    known = model.model_fields[field].annotation
    if (item(known) or plain(known)) is int:
        with pytest.raises(UsageError, match=rf"\b{field}(\.0)?: input should be less than"):
            model(**{field: 10**30})


def test_there_are_no_other_options():
    beside = {"config", "as_json", "dry_run", "policy", "quiet", "verbose"}
    for name, model in COMMANDS.items():
        assert set(PARAMS[name]) - set(model.model_fields) <= beside


def test_choices_are_the_kinds_of_the_strategies():
    def choices(model, field):
        return set(typing.get_args(plain(model.model_fields[field].annotation)))

    for field, union in (
        ("objective", objectives.Objective), ("weighting", objectives.Weighting), ("surgery", surgery.Surgery),
    ):  # fmt: skip
        assert choices(UnlearnConfig, field) == set(kinds(union))
    assert choices(UnlearnConfig, "train") == set(typing.get_args(Scope))
    assert choices(EditConfig, "method") == set(kinds(editors.Editor))
    assert set(configs.verify.SIMILARITY) == set(kinds(similarity.Backend))


def test_options_of_strategies_are_the_fields_of_their_classes():
    """What `of` says in a torch-free field is what the classes have."""
    from unforget.api.common import FIELDS as CALLED

    homes = {"objective": objectives.Objective, "weighting": objectives.Weighting, "surgery": surgery.Surgery}
    for which, union in homes.items():
        said = {
            (kind, CALLED.get(n, n))
            for n, f in RecipeOptions.model_fields.items()
            for kind in option_of(f).of[1:]
            if option_of(f).of[0] == which
        }
        classes = typing.get_args(typing.get_args(union)[0])
        has = {(c.model_fields["kind"].default, n) for c in classes for n in c.model_fields}
        assert said == {(k, n) for k, n in has if n not in ("kind", "weighting")}
    own = {CALLED.get(n, n) for n, f in RecipeOptions.model_fields.items() if option_of(f).of[:1] in ((), ("train",))}
    assert own - {"recipe", "weighting"} == set(Recipe.model_fields)


def test_flags_beat_the_file_which_takes_the_flags_names(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'target = "{TARGET}"\nmax_train_steps = 5\nretain-batch-size = 3\nforget-range = [50, 650]\n')
    made = build(UnlearnConfig, {"model": "faces", "max_train_steps": 6}, file)
    assert (made.max_train_steps, made.retain_batch_size, made.forget_range) == (6, 3, (50, 650))
    assert (made.target, made.output.name) == ((TARGET,), "0.patch")


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("max_train_step = 5", "no option 'max_train_step', did you mean 'max_train_steps'"),
        ("nonsense = 5", "there is no option 'nonsense'"),
        ("lr = 1e-4", "no option 'lr', did you mean 'learning_rate'"),
        ("preview = 5\nnum_validation_images = 4", "given twice, by two of its names"),
        ("take_off = true", "is gone"),
        ("recipe = { rank = 8 }", "write its options flat"),
        ("forget_range = [650, 50]", "0 < low < high"),
        ("scale = [1]", "0 patch(es) but 1 scale(s)"),
        ("resume_from_checkpoint = 'other.run'", "is not the run of"),
    ],
)
def test_a_wrong_key_is_refused_by_a_sentence(tmp_path, key, sentence):
    file = tmp_path / "run.toml"
    file.write_text(key)
    with pytest.raises(UsageError) as error:
        build(UnlearnConfig, GIVEN, file)
    assert sentence in error.value.message


@pytest.mark.parametrize("old", ["--forget-batch-size=4", "--forget_batch_size=4"])
def test_an_old_option_is_the_new_one_and_says_so(cli, old):
    said = cli("unlearn", "--model", "faces", "-t", TARGET, old, "--dry-run", "--json")
    assert "--forget-batch-size is now --train-batch-size" in said.stderr
    assert json.loads(said.stdout)["recipe"]["forget_batch_size"] == 4


@pytest.mark.parametrize("old", [n for n, new in RENAMED.items() if new in UnlearnConfig.model_fields])
def test_an_old_name_is_the_new_one(old):
    with pytest.warns(FutureWarning, match=f"{old} is now {RENAMED[old]}"):
        assert getattr(UnlearnConfig(**GIVEN, **{old: 4}), RENAMED[old]) == 4


def test_old_keys_of_a_policy_are_the_new_ones(tmp_path):
    policy = tmp_path / "unforget.toml"
    policy.write_text('[verify]\nnoise_levels = [400]\nfalse_alarm = 0.005\nrequire = ["cast"]\n')
    with pytest.warns(FutureWarning, match="noise_levels is now timestep"):
        made = configs.resolve({"model": "faces", "patch": "x.patch"}, None, policy)
    assert (made.timestep, made.false_positive_rate, made.require) == ((400,), 0.005, ("quantization",))


def test_what_is_gone_is_refused(cli):
    said = cli("verify", "--model", "faces", "--take-off", "3")
    assert said.exit_code == 2
    assert "is gone: " in said.stderr


def test_a_delta_is_gone(cli):
    said = cli("export", "--model", "faces", "--patch", "x", "-o", "y", "--format", "delta")
    assert said.exit_code == 2
    assert "a LoRA comes off by itself" in said.stderr


def test_underscores_are_dashes(cli):
    shown = cli("unlearn", "--model", "faces", "-t", TARGET, "--max_train_steps", 7, "--learning_rate=0.5",
                "--dry-run", "--json")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    said = json.loads(shown.stdout)
    assert (said["recipe"]["max_train_steps"], said["recipe"]["learning_rate"]) == (7, 0.5)
    assert said["output"] == "0.patch"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_two_examples_and_says_defaults_and_choices(cli, name):
    page = cli(name, "--help").output
    examples = page.partition("  Examples:\n")[2].splitlines()[:2]
    assert all(example.startswith(f"    unforget {name}") for example in examples)
    assert "\u2026" not in page, "nothing is cut"
    assert all(param.help for param in PARAMS[name].values() if param.name != "ctx")
    optional = [f for f in COMMANDS[name].model_fields.values() if not (f.is_required() or option_of(f).hidden)]
    assert " ".join(page.split()).count("[default: ") >= len(optional)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_the_help_are_commands(cli, name):
    examples = cli(name, "--help").output.partition("  Examples:\n")[2].splitlines()[:2]
    for _, _, *args in map(shlex.split, examples):
        context = command(name).make_context(name, args)
        sources = {n: context.get_parameter_source(n) for n in COMMANDS[name].model_fields if n in context.params}
        given = [n for n, source in sources.items() if source.name == "COMMANDLINE"]
        assert COMMANDS[name](**{n: context.params[n] for n in given})


def test_help_keeps_brackets_and_shows_choices_and_completes(cli):
    page = " ".join(cli("unlearn", "--help").output.split())
    assert "owner/name[@revision]" in page
    assert "[clean-space|linear|uniform]" in page
    assert "[sum|project|pcgrad|" in page
    assert "[default: (the recipe's)]" in page
    assert "Seed of every random draw. [default: 0]" in page
    complete = PARAMS["unlearn"]["surgery"].shell_complete
    context = command("unlearn").make_context("unlearn", [], resilient_parsing=True)
    assert [c.value for c in complete(context, "p")] == ["project", "pcgrad"]


@pytest.mark.parametrize(
    "args",
    [
        ["unlearn", "--model", "faces"],
        ["unlearn", "--model", "faces", "--target", "no.png"],
        ["unlearn", "--model", "faces", "-t", TARGET, "--lr", "-1"],
        ["unlearn", "--model", "faces", "-t", TARGET, "--surgery", "magic"],
        ["unlearn", "--model", "faces", "-t", TARGET, "-o", "no/a.patch"],
        ["verify", "--model", "faces", "--patch", "x", "--similarity", "magic"],
        ["verify", "--model", "faces", "--candidate", "x", "--require", "magic"],
        ["verify", "--model", "faces", "--patch", "x", "--must-retain", "y.png"],
        ["export", "--model", "faces", "--patch", "no.patch", "-o", "x"],
        ["edit-surrogate", "--model", "faces", "--target", "no.png"],
    ],
    ids=lambda args: " ".join(str(a) for a in args[:1] + args[-2:]),
)
def test_a_usage_error_imports_nothing_heavy(args, tmp_path):
    code = (
        "import sys\n"
        "from unforget.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 2\n"
        "assert not {'torch', 'diffusers', 'numpy', 'huggingface_hub'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: ")


def test_options_of_another_strategy_are_refused():
    for given, sentence in (
        ({"surgery": "sum", "surgery_eta": 1}, "--surgery-eta belongs to --surgery erasediff, not to sum"),
        ({"objective": "surrogate", "taper": "5,9"}, "--taper belongs to --objective posterior-swap"),
        ({"weighting": "linear", "retain_weight": 1}, "--retain-weight belongs to --weighting clean-space or uniform"),
        ({"train": "full", "rank": 4}, "--rank belongs to --train lora"),
        ({"objective": "siss", "nearest": 4}, "--nearest belongs to --objective retrack, not to siss"),
        (
            {"objective": "retrack", "one_noise": True},
            "--one-noise belongs to --objective surrogate or random-surrogate",
        ),
        ({"objective": "posterior-swap", "distil": True}, "--distil belongs to --objective surrogate or random-surr"),
    ):
        with pytest.raises(UsageError, match=sentence):
            build(UnlearnConfig, {**GIVEN, **given})
    with pytest.raises(UsageError, match="--donor belongs to --method donor, not to blur"):
        build(EditConfig, {**GIVEN, "method": "blur", "donor": "x.png"})


RECIPES = {spec.name: spec.recipes for spec in FAMILIES}


def resolved(family="ddpm", **changes):
    return resolve_recipe(RECIPES[family], UnlearnConfig(**GIVEN, **changes))


def test_a_recipe_begins_with_the_familys_own():
    for family, recipes in RECIPES.items():
        for name, recipe in recipes.items():
            assert resolved(family, recipe=name) == recipe
    swap = resolved("sd3", retain_weight=3, objective="posterior-swap").objective
    assert (swap.weighting.retain, swap.weighting.cap, swap.taper) == (3, 1.0, (710, 790))


def test_strategies_and_their_options():
    assert resolved(surgery="erasediff", surgery_eta=0.5).surgery == surgery.EraseDiff(eta=0.5)
    assert resolved(surgery="fixed-norm").surgery == surgery.FixedNorm()
    assert resolved(objective="surrogate", distil=True).objective == objectives.Surrogate(distil=True)
    weighted = resolved(objective="surrogate", weighting="clean-space", weighting_cap=20, retain_weight=12)
    assert weighted.objective == objectives.Surrogate(weighting=objectives.CleanSpace(cap=20, retain=12))
    assert resolved(weighting="uniform", target_prior=5).objective.target_prior == 5
    assert resolved(train_batch_size=3, max_grad_norm=2).forget_batch_size == 3
    for changes, sentence in (
        ({"surgery_eta": 1}, "belongs to --surgery erasediff, not to project"),
        ({"recipe": "paper", "target_prior": 3}, "belongs to --objective posterior-swap, not to surrogate"),
        ({"rank": 3}, "belongs to --train lora, not to bottleneck"),
        ({"recipe": "magic"}, "there is no recipe 'magic'"),
        ({"recipe": "siss", "distil": True}, "nothing would move"),
    ):
        with pytest.raises(UsageError, match=sentence):
            resolved(**changes)


@pytest.mark.parametrize(("recipe", "given", "found"), [
    ("siss", {"mixture": 0.3}, ("objective", "mixture", 0.3)),
    ("retrack", {"nearest": 3}, ("objective", "nearest", 3)),
    ("esd", {"negative_guidance": 2}, ("objective", "negative_guidance", 2)),
    ("erasediff", {"surgery_eta": 0.5}, ("surgery", "eta", 0.5)),
    ("salun", {"saliency": 0.1}, ("", "saliency", 0.1)),
    ("paper", {"one_noise": False}, ("objective", "one_noise", False)),
    ("paper", {"sequential": False}, ("", "sequential", False)),
    ("naive", {"distil": True}, ("objective", "distil", True)),
])  # fmt: skip
def test_every_option_of_a_baseline_can_be_given(recipe, given, found):
    made = resolved("sd3", recipe=recipe, **given)
    part, name, value = found
    assert getattr(getattr(made, part) if part else made, name) == value
    plain = resolved("sd3", recipe=recipe)
    assert getattr(getattr(plain, part) if part else plain, name) != value


@pytest.mark.parametrize("targets", [1, 3])
def test_more_targets_have_more_updates_unless_all_are_said(targets):
    def updates(**given):
        target = [f"{k}.png" for k in range(targets)]
        return recipe_of(UnlearnConfig(model="faces", target=target, output="x.patch", **given)).max_train_steps

    assert updates(recipe="paper") == 240 * targets
    assert updates(recipe="paper", max_train_steps=90) == 90
    assert updates(recipe="siss") == 60
    assert updates() == 120 * targets
    assert updates(max_train_steps=90) == 90


@pytest.mark.parametrize("model", ["faces", "flags"])
def test_what_needs_no_surrogate_is_shown_none_and_stops_by_none(model):
    """The default recipes show surrogates or stop by them; with another objective there may be none."""

    def made(**given):
        recipe = recipe_of(UnlearnConfig(model=model, target="x.png", output="x.patch", objective="siss", **given))
        return recipe.surrogate_share, recipe.stop_margin

    ours = RECIPES["ddpm" if model == "faces" else "sd3"]["default"]
    assert made() == (0, None)
    assert made(stop_margin=0.3) == (0, 0.3)
    assert made(surrogate="s.png") == (ours.surrogate_share, ours.stop_margin)
    with pytest.raises(UsageError, match="surrogate_share needs a surrogate, and none is given"):
        made(surrogate_share=0.5)


@pytest.mark.parametrize("recipe", ["esd", "concept-ablation"])
def test_what_forgets_a_prompt_needs_one(cli, monkeypatch, recipe):
    monkeypatch.setattr("unforget.families.load", lambda *a, **k: 1 / 0)
    said = cli("unlearn", "--model", "flags", "-t", TARGET, "--recipe", recipe)
    assert said.exit_code == 2
    assert f"{recipe} forgets a prompt, and none is given" in said.stderr
    assert cli("unlearn", "--model", "faces", "-t", TARGET, "--recipe", recipe).exit_code == 2


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_scope_that_the_family_lacks_is_refused_before_anything_is_loaded(cli, monkeypatch, tiny_folder, more):
    monkeypatch.setattr("unforget.families.load", lambda *a, **k: 1 / 0)
    monkeypatch.setattr("unforget.families.memory.blueprint", lambda *a, **k: 1 / 0)
    said = cli("unlearn", "--model", tiny_folder, "-t", TARGET, "--train", "lora", *more)
    assert said.exit_code == 2
    assert "Give --train bottleneck or full." in said.stderr
    with pytest.raises(UsageError, match="lora"):
        recipe_of(UnlearnConfig(model=str(tiny_folder), target=TARGET, train="lora"))


def test_an_editor_from_flat_options():
    def made(**given):
        return editor_of(build(EditConfig, {**GIVEN, **given}))

    assert made() == editors.SDEdit()
    assert made(strength=[0.5, 0.6], candidates=3, editor_steps=4) == editors.SDEdit(
        strengths=(0.5, 0.6), seeds=3, steps=4
    )
    assert made(donor="d.png") == editors.Donor()
    assert made(mask="m.png") == made(box="1,2,3,4") == editors.Inpaint()
    assert made(instruction="older") == editors.Instruct(instruction="older")
    assert made(method="pixelate", mask="m.png") == editors.Pixelate()
    assert build(EditConfig, {**GIVEN, "box": "1,2,3,4"}).box == (1, 2, 3, 4)


def test_fields_that_repeat_take_one_value():
    made = VerifyConfig(model="faces", patch="x.patch", timestep=300, require="replay", replay_seed=0)
    assert (made.timestep, made.require) == ((300,), ("replay",))
    assert item(VerifyConfig.model_fields["timestep"].annotation) is int


def test_a_rate_by_its_effect_takes_the_place_of_a_given_one_and_gives_way_to_it():
    """The default of SD3 has the first, that of DDPM the second."""
    from unforget.api import recipe_of

    def rates(model, **given):
        recipe = recipe_of(UnlearnConfig(model=model, target="x.png", **given))
        return recipe.learning_rate, recipe.update_share

    assert rates("flags")[0] is None
    assert rates("flags", learning_rate=1e-3)[0] == 1e-3
    assert rates("faces")[0] == 1.5e-4
    assert rates("faces", update_share=0.02) == (None, 0.02)
