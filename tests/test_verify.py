"""`unforget verify` as a pipeline calls it: exit codes, reports, privacy, determinism, bad input."""

import hashlib
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save_file

from unforget.api import verifying
from unforget.files import images
from unforget.verification import probes
from unforget.verification.context import Finding
from unforget.verification.probes.base import Probe
from unforget.verification.report import Report

NONCE = verifying._nonce
SMALL = """
[verify]
level = "quick"
max_rate = 0.2
paired = 16
controls = 8
draws = 2
timestep = [400]
sampler_steps = 3
similarity = ["pixels"]
"""


@pytest.fixture
def here(cli, tmp_path, tiny_folder):
    """An empty folder with a policy, a target, a surrogate, and another model of the same architecture."""
    (tmp_path / "unforget.toml").write_text(SMALL)
    for name, seed in (("target", 1), ("surrogate", 2)):
        picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        images.write_image(picture, tmp_path / f"{name}.png")
    shutil.copytree(tiny_folder, tmp_path / "base")
    other = DDPMPipeline.from_pretrained(tiny_folder)
    with torch.no_grad():
        for p in other.unet.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    other.save_pretrained(tmp_path / "other")
    return tmp_path


@pytest.fixture
def verify(cli, here):
    def run(*args, candidate="base", target="target.png"):
        common = ["--model", "base", "--candidate", candidate, "--target", target]
        return cli("verify", *common, *args)

    return run


def said(result) -> str:
    return " ".join(result.output.split())


def test_every_report_says_the_same(verify, here):
    result = verify(
        "--surrogate", "surrogate.png", "--report", "r.json", "--junit", "r.xml", "--html", "r.html",
        "--summary", "r.md", "--json", candidate="other",
    )  # fmt: skip
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    report = Report.model_validate_json((here / "r.json").read_text())
    assert result.exit_code == report.exit_code == 1, said(result)
    assert json.loads(result.stdout) == json.loads((here / "r.json").read_text())
    assert report.verdict == "failed"
    suite = ElementTree.parse(here / "r.xml").getroot()
    failed = {c.probe for c in report.checks if c.outcome == "failed"}
    assert {case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None} == failed
    assert "failed" in (here / "r.md").read_text()
    assert "Failed" in (here / "r.html").read_text()


def test_a_verdict_is_printed_with_its_rate_and_what_it_is_of(verify):
    verdict, rate, facts = verify(candidate="other").stdout.splitlines()
    assert verdict.startswith("failed: ")
    assert re.fullmatch(r"\d+ of \d+ draws were near-copies \(base: \d+ of \d+\): .* 20 % at 95 % confidence", rate)
    assert re.fullmatch(r"model base, date \d{4}-\d\d-\d\d \d\d:\d\d UTC, policy quick", facts)


def test_a_job_summary_is_written_where_github_wants_it(verify, here, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(here / "summary.md"))
    (here / "summary.md").write_text("earlier\n")
    verify()
    text = (here / "summary.md").read_text()
    assert text.startswith("earlier\n")
    assert "unforget verify" in text


def test_the_same_command_writes_the_same_bytes_but_for_the_seconds(verify, here):
    for name in ("a.json", "b.json", "c.json"):
        verify("--report", name, *(["--no-cache"] if name == "c.json" else []))
    differs = r'"seconds": \{[^}]*\}|"(checksum|date)": "[^"]*"'
    texts = [re.sub(differs, "", (here / n).read_text()) for n in ("a.json", "b.json", "c.json")]
    assert texts[0] == texts[1] == texts[2]


def test_nobody_knows_the_noise_before_and_a_nonce_repeats_it(verify, here, monkeypatch):
    monkeypatch.setattr(verifying, "_nonce", NONCE)
    verify("--report", "a.json")
    verify("--report", "b.json")
    one, other = (json.loads((here / f"{n}.json").read_text()) for n in "ab")
    assert len(one["nonce"]) == 32 == len(other["nonce"])
    assert one["nonce"] != other["nonce"]
    assert one["findings"] != other["findings"]
    verify("--report", "c.json", "--nonce", one["nonce"])
    again = json.loads((here / "c.json").read_text())
    assert {k for k in one if one[k] != again[k]} <= {"seconds", "checksum", "date"}


def test_a_pipeline_can_sign_the_verdict(verify, here):
    result = verify("--report", "r.json", "--attestation", "r.intoto.json", candidate="other")
    said, report = (json.loads((here / name).read_text()) for name in ("r.intoto.json", "r.json"))
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["predicateType"] == "https://slsa.dev/verification_summary/v1"
    files = {s["name"]: s["digest"]["sha256"] for s in said["subject"]}
    written = [f for f in (here / "other").rglob("*") if f.is_file()]
    assert files == {f.relative_to(here).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in written}
    predicate = said["predicate"]
    assert (predicate["verificationResult"], predicate["verifiedLevels"]) == ("FAILED", ["FAILED"])
    assert result.exit_code == 1
    (reported,) = predicate["inputAttestations"]
    assert reported["digest"]["sha256"] == hashlib.sha256((here / "r.json").read_bytes()).hexdigest()
    assert predicate["resourceUri"].endswith(report["candidate_digest"])
    assert str(here) not in json.dumps(said)


def test_pictures_leave_only_when_asked(verify, here):
    verify("--report", "r.json", "--junit", "r.xml", "--html", "r.html", "--summary", "r.md")
    page = (here / "r.html").read_text()
    assert "data:image" not in page
    for name in ("r.json", "r.xml", "r.html", "r.md"):
        text = (here / name).read_text()
        assert str(here) not in text
        assert "target.png" not in text
    verify("--html", "s.html", "--save-images", "shown")
    assert "data:image" in (here / "s.html").read_text()
    assert (here / "shown" / "sheet.png").is_file()


def test_ids_are_salted(verify, here, monkeypatch):
    def ids():
        verify("--report", "r.json", "--force")
        return [t.id for t in Report.model_validate_json((here / "r.json").read_text()).targets]

    first = ids()
    assert first != [images.image_id(images.read_image(here / "target.png", (3, 16, 16)))]
    assert ids() == first
    monkeypatch.setenv("UNFORGET_SALT", "secret")
    assert ids() != first


def test_a_target_that_the_base_never_draws_is_inconclusive_and_says_so(cli, here):
    import unforget

    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    images.write_image(picture, here / "noise.png")
    faces = unforget.__path__[0] + "/families/models/faces"
    result = cli("verify", "--model", "faces", "--candidate", faces, "--target", "noise.png")
    assert result.exit_code == 4, said(result)
    assert "the base does not reproduce it" in said(result)


def test_too_few_samples_are_inconclusive(verify, here):
    verify("--samples", "5", "--report", "r.json")
    (check,) = [c for c in json.loads((here / "r.json").read_text())["checks"] if c["probe"] == "sample"]
    assert check["outcome"] == "inconclusive"
    assert "raise --samples" in check["note"]


def test_the_plan_and_its_cost_are_said_first(verify):
    assert re.search(
        r"quick: parts, reconstruct, sample, retention, neighbours; 21 draws when none hits, "
        r"\d+ in the mean at half of --max-rate, \d+ at most",
        said(verify()),
    )


def break_weights(folder, value):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = value
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_candidate_with_broken_weights_cannot_be_judged(verify, here, value):
    break_weights(here / "other", value)
    result = verify(candidate="other")
    assert result.exit_code == 3
    assert "NaN or infinite" in said(result)


def test_a_candidate_of_another_architecture_or_resolution_cannot_be_judged(verify, here):
    from conftest import tiny_pipeline

    tiny_pipeline(size=8).save_pretrained(here / "small")
    result = verify(candidate="small")
    assert result.exit_code == 3
    assert "another architecture" in said(result)
    result = verify(candidate="faces")
    assert result.exit_code == 3
    assert "another architecture" in said(result)


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["--samples", "0"], 2, "samples"),
        (["--level", "thorough"], 2, "'quick', 'standard' or 'deep'"),
        (["--policy", "no.toml"], 2, "cannot read"),
        (["--report", "no/r.json"], 2, "there is no folder"),
        (["--junit", "target.png"], 2, "would replace 'target.png', which is read"),
        (["--html", "no/r.html"], 2, "there is no folder"),
        (["--save-images", "no/x"], 2, "there is no folder"),
        (["--summary", "no/x"], 2, "there is no folder"),
        (["--similarity", "magic"], 2, "no similarity backend"),
        (["--similarity", "sscd=no.onnx"], 3, "sscd"),
        (["--require", "magic"], 2, "no probe 'magic'"),
        (["--require", "replay"], 2, "--replay-seed"),
        (["--require", "paraphrase"], 2, "needs --prompt"),
        (["--require", "must_retain"], 2, "needs --must-retain"),
        (["--replay-seed", "1", "--replay-scheduler", "Magic"], 2, "no scheduler 'Magic'"),
        (["--prompt", "a cat"], 2, "takes no prompts"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(verify, here, args, code, sentence):
    before = sorted(here.rglob("*"))
    result = verify(*args)
    assert result.exit_code == code, said(result)
    assert sentence in said(result)
    assert "Traceback" not in said(result)
    assert sorted(here.rglob("*")) == before


class Registered(Probe):
    """A probe as somebody may add one; not of a target, or the allow-list excused it."""

    kind = "registered"
    retains = True

    def __call__(self, context):
        return []

    def judge(self, found, policy, known):
        return []


class Stray(Registered):
    """Its finding has a kind that nobody knows."""

    def __call__(self, context):
        return [Finding("other", None, {}, {})]


class Unmade(Registered):
    """It has nothing to work on."""

    needs = "--something"

    @classmethod
    def from_policy(cls, config, prompted):
        return None


class Broken(Registered):
    """It cannot be made."""

    seed: int


@pytest.fixture
def passing(verify, here):
    """A command that passes: its one target is on the allow-list."""
    verify("--report", "r.json")
    (target,) = json.loads((here / "r.json").read_text())["targets"]
    entry = f'[[verify.allow]]\nid = "{target["id"]}"\nreason = "ticket 7"\nexpires = 2999-01-01\n'
    (here / "unforget.toml").write_text(SMALL + entry)
    assert verify().exit_code == 0
    return verify


@pytest.mark.parametrize(
    ("probe", "required", "code"),
    [(Registered, True, 4), (Stray, True, 3), (Unmade, True, 2), (Broken, True, 3),
     (Registered, False, 0), (Stray, False, 3), (Unmade, False, 0), (Broken, False, 3)],
)  # fmt: skip
def test_the_gate_stays_shut_for_a_probe_that_decides_nothing(passing, monkeypatch, here, probe, required, code):
    """Whoever requires a probe that yields no check, has a stray kind or cannot be made does not pass."""
    known = probes.load()
    monkeypatch.setattr(probes, "KINDS", (*probes.KINDS, "registered"))
    monkeypatch.setitem(probes.LEVELS, "quick", (*probes.LEVELS["quick"], "registered"))
    monkeypatch.setattr(probes, "load", lambda: (*known, probe))
    result = passing(*(["--require", "registered"] if required else []), "--report", "s.json")
    assert result.exit_code == code, said(result)
    assert (here / "s.json").exists() == (code in (0, 4))


def test_an_allowed_target_passes_until_the_entry_expires(verify, here):
    verify("--report", "r.json", candidate="base")
    (target,) = json.loads((here / "r.json").read_text())["targets"]
    entry = '[[verify.allow]]\nid = "{}"\nreason = "ticket 7"\nexpires = {}\n'
    (here / "unforget.toml").write_text(SMALL + entry.format(target["id"], "2999-01-01"))
    result = verify("--report", "a.json")
    report = json.loads((here / "a.json").read_text())
    assert report["targets"][0]["verdict"] == "allowed"
    assert result.exit_code == 0, said(result)
    (here / "unforget.toml").write_text(SMALL + entry.format(target["id"], "2020-01-01"))
    assert verify("--report", "b.json").exit_code == 1
    assert json.loads((here / "b.json").read_text())["allowed"][0]["state"] == "expired"


def test_the_shipped_schema_is_that_of_the_report():
    from importlib.resources import files

    shipped = json.loads((files("unforget.verification") / "report.schema.json").read_text())
    assert shipped == Report.model_json_schema(), "run `python docs/generate.py`"
