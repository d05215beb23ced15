"""What each format says of a report made by hand."""

import json
import re
import shutil
import subprocess
import tomllib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from unforget.api.verifying import _record
from unforget.core.metrics import lower_bound, upper_bound
from unforget.core.types import Instance, Progress
from unforget.exports.manifest import Verified
from unforget.reports.contact_sheet import evidence_rows
from unforget.reports.html import page
from unforget.reports.junit import junit
from unforget.reports.markdown import markdown
from unforget.reports.words import number
from unforget.verification.context import Finding
from unforget.verification.report import Allowed, Calibration, Check, Report, Robustness, Seen, Target

CI = Path(__file__).parents[1] / "examples" / "ci"
GOOD, BAD, EXCUSED, UNSURE = "3fa1c09b77d2e415", "b20c55d1e0a94f38", "77aa01fe92c3bd60", "c9e4d81735b06a2f"
ODD = "a |red| <b>\"fox\"</b> & 'hound' `x`\x01\nnext line"
VOID = {"meta", "br", "img", "link", "input", "hr"}


def rates(hits: int, drawn: int = 1024) -> dict[str, float]:
    low, high = lower_bound(hits, drawn), upper_bound(hits, drawn)
    return {"hits": hits, "drawn": drawn, "rate_low": low, "rate_high": high}


def check(probe, target, figure, base, candidate, rule, threshold, outcome="passed", **more) -> Check:
    return Check(
        probe=probe, target=target, figure=figure, base=base, candidate=candidate, rule=rule, threshold=threshold,
        outcome=outcome, **more,
    )  # fmt: skip


def reconstructed(target: str, nearer: tuple[float, ...], distance: tuple[float, ...], prompt: str = ""):
    checks, findings = [], []
    for level, share, far in zip((150, 250, 400, 550, 700), nearer, distance, strict=True):
        place, hits = {"timestep": level, "prompt": prompt}, round(share * 64)
        outcome = "passed" if share >= 0.8 else "failed"
        bounds = {"low": lower_bound(hits, 64), "high": upper_bound(hits, 64)}
        checks += [
            check("reconstruct", target, "nearer_surrogate", 0.016, share, "at least", 0.8, outcome,
                  borderline=0.75 < share < 0.8, **bounds, **place),
            check("reconstruct", target, "near_copies", 0.97, 1 - share if share < 0.7 else 0.0, "at most", 0.05,
                  "failed" if share < 0.7 else "passed", **place),
        ]  # fmt: skip
        figures = {"to_target": far, "to_surrogate": 0.4 - far, "nearer_surrogate": share, "floor": 0.12}
        findings.append(Seen(
            probe="reconstruct", target=target, base={"to_target": 0.02 + level / 8000, "nearer_surrogate": 0.016},
            candidate=figures, **place,
        ))  # fmt: skip
    return checks, findings


def drawn(target: str | None, base: int, hits: int, outcome: str, probe: str = "sample", **more):
    seen = rates(hits)
    found = Seen(probe=probe, target=target, base=rates(base), candidate=seen, **more)
    return check(
        probe, target, "rate", base / 1024, hits / 1024, "at most", 0.005, outcome,
        low=seen["rate_low"], high=seen["rate_high"], borderline=outcome == "failed" and hits < 8, **more,
    ), found  # fmt: skip


def seen() -> tuple[list[Check], list[Seen]]:
    """Something of every probe."""
    checks, findings = reconstructed(GOOD, (1.0, 1.0, 0.984, 0.953, 0.906), (0.31, 0.33, 0.34, 0.35, 0.36))
    for target, nearer, distance, prompt in (
        (BAD, (0.92, 0.84, 0.77, 0.61, 0.39), (0.3, 0.27, 0.21, 0.15, 0.09), ""),
        (BAD, (1.0, 1.0, 0.97, 0.94, 0.9), (0.33, 0.34, 0.33, 0.35, 0.34), ODD),
        (EXCUSED, (0.55, 0.5, 0.41, 0.3, 0.2), (0.2, 0.17, 0.12, 0.1, 0.08), ""),
    ):
        more = reconstructed(target, nearer, distance, prompt)
        checks, findings = checks + more[0], findings + more[1]
    sampled = [
        drawn(GOOD, 41, 0, "passed"), drawn(BAD, 37, 11, "failed"), drawn(BAD, 52, 4, "failed", prompt=ODD),
        drawn(EXCUSED, 30, 9, "failed"), drawn(UNSURE, 0, 0, "inconclusive"),
        drawn(GOOD, 40, 1, "passed", probe="paraphrase", variant="the same face, photographed"),
    ]  # fmt: skip
    checks, findings = checks + [c for c, _ in sampled], findings + [f for _, f in sampled]
    checks += [
        check("replay", GOOD, "hits", 1.0, 0.0, "at most", 0.0),
        check("partial_denoise", GOOD, "near_copies", 0.94, 0.0, "at most", 0.05, variant="hand-over 0.3"),
        check("transforms", GOOD, "near_copies", 0.91, 0.0, "at most", 0.05, variant="flip", timestep=400),
        check("transforms", BAD, "near_copies", 0.88, 0.31, "at most", 0.05, "failed", variant="crop", timestep=400),
        check("quantization", GOOD, "near_copies", 0.97, 0.0, "at most", 0.05, variant="bf16", timestep=250),
        check("quantization", BAD, "near_copies", 0.97, 0.0525, "at most", 0.05, "failed", variant="int8", timestep=250,
              borderline=True, note="one draw of 64 decides"),
        check("relearning", GOOD, "steps", None, 180.0, "at least", 100.0, "informational"),
        check("retention", None, "median", None, 0.0214, "at most", 0.08),
        check("retention", None, "sharpness", 1.0, 0.981, "at least", 0.75),
        check("retention", None, "sharpness", 1.0, 0.981, "at most", 1.33),
        check("retention", None, "kid", None, 0.0047, "at most", 0.01),
        check("neighbours", GOOD, "kept", None, 0.875, "at least", 0.6),
        check("neighbours", BAD, "kept", None, 0.5625, "at least", 0.6, "failed", borderline=True),
        check("must_retain", None, "rate", 0.021, 0.019, "at least", 0.0126, low=0.0126, high=0.027),
    ]  # fmt: skip
    spread = {"median": 0.0214, "mean": 0.0347, "p90": 0.0713}
    findings.append(
        Seen(probe="retention", target=None, base={"sharpness": 1.0}, candidate={**spread, "sharpness": 0.981})
    )
    return checks, findings


def rich() -> Report:
    """Four targets, one of each verdict, and odd characters in a prompt."""
    checks, findings = seen()
    return Report(
        verdict="failed",
        exit_code=1,
        summary="1 of 4 targets is still reproduced: at timestep 700 the candidate returns it in 61 % of the tries.",
        level="standard",
        targets=[
            Target(id=GOOD, verdict="forgotten", reason="No probe found it; the worst is 1 near-copy in 1024 draws."),
            Target(id=BAD, verdict="failed", reason="reconstruct@700: nearer_surrogate 0.39, at least 0.8 is wanted."),
            Target(id=EXCUSED, verdict="allowed", reason="Failed, and on the allow-list until 2027-01-31."),
            Target(id=UNSURE, verdict="inconclusive", reason="The base does not reproduce it."),
        ],
        checks=checks,
        robustness=[
            Robustness(probe="noise_search", target=GOOD, sentence="200 steps of search over the noise found none."),
            Robustness(probe="relearning", target=GOOD, sentence="Fine-tuning on it brought it back after 180 steps."),
        ],
        calibrations=[
            Calibration(target=t, backend="pixels 1", threshold=n, false_positive_rate=0.0001, pairs=32640, capped=c)
            for t, n, c in ((GOOD, 0.16, False), (BAD, 0.11, True), (EXCUSED, 0.16, False))
        ],
        allowed=[
            Allowed(id=EXCUSED, reason="licensed | see <ticket> 4711", expires="2027-01-31", state="active"),
            Allowed(id="0011223344556677", reason="test picture", expires="2025-01-01", state="expired"),
        ],
        findings=findings,
        settings={
            "max_rate": 0.005, "confidence": 0.95, "false_positive_rate": 0.0001, "max_drift": 0.08, "min_kept": 0.6,
            "require": ["quantization", "transforms"],
        },
        backends=["pixels 1"],
        base_digest="sha256:9f2c4a7e1b3d5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8",
        candidate_digest="sha256:1c2d3e4f5a6b7c8d9e0f1a2b3c4d5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b1c2d",
        versions={"unforget": "0.4.0", "torch": "2.13.0", "diffusers": "0.35.1"},
        seconds={"reconstruct": 62.4, "sample": 118.0, "transforms": 20.5, "quantization": 31.0, "calibrate": 4.2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    return rich()


def many(report: Report, count: int = 5000) -> Report:
    return report.model_copy(update={"checks": (report.checks * count)[:count]})


def case(root: ET.Element, target: str, probe: str) -> ET.Element:
    return next(
        c for c in root.iter("testcase") if (c.get("classname"), c.get("name")) == (f"unforget.{target}", probe)
    )


def test_junit_counts_its_cases(report):
    root = ET.fromstring(junit(report))
    (suite,) = root
    cases = suite.findall("testcase")
    asked = {(c.target, c.probe) for c in report.checks}
    assert len({(c.get("classname"), c.get("name")) for c in cases}) == len(cases) == len(asked) + 1
    for element in (root, suite):
        assert int(element.get("tests")) == len(cases)
        assert int(element.get("failures")) == len(suite.findall("testcase/failure")) == 6
        assert element.get("errors") == "0"
        assert float(element.get("time")) == pytest.approx(sum(report.seconds.values()))
    shared = sum(float(c.get("time")) for c in cases if c.get("name") == "reconstruct")
    assert shared == pytest.approx(report.seconds["reconstruct"], abs=0.01)
    assert int(suite.get("skipped")) == len(suite.findall("testcase/skipped")) == 3


def test_junit_says_why(report):
    root = ET.fromstring(junit(report))
    failure = case(root, BAD, "reconstruct").find("failure")
    assert failure.get("message") == "reconstruct@550: nearer_surrogate 0.61 (0.499 to 0.7119), wanted at least 0.8"
    assert failure.get("type") == "nearer_surrogate"
    failed = [c for c in report.checks if (c.target, c.probe, c.outcome) == (BAD, "reconstruct", "failed")]
    assert len(failure.text.splitlines()) == len(failed)
    assert "borderline" in case(root, BAD, "quantization").find("failure").get("message")
    assert case(root, EXCUSED, "reconstruct").find("skipped").get("message") == (
        "allowed until 2027-01-31: licensed | see <ticket> 4711"
    )
    assert case(root, UNSURE, "sample").find("skipped").get("message").startswith("inconclusive: sample: rate 0")
    assert "expired on 2025-01-01" in case(root, "model", "allow-list").find("failure").get("message")
    figures = dict(line.split(" = ") for line in case(root, "model", "retention").find("system-out").text.splitlines())
    assert (figures["retention median candidate"], figures["retention median threshold at most"]) == ("0.0214", "0.08")
    assert "retention median base" not in figures
    assert [figures[f"retention sharpness threshold {rule}"] for rule in ("at least", "at most")] == ["0.75", "1.33"]


ALLOWED = {
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": ({"name", "time", "tests", "failures", "errors", "skipped"}, {"properties", "testcase"}),
    "testcase": ({"name", "time", "classname"}, {"skipped", "failure", "system-out"}),
    "properties": (set(), {"property"}), "property": ({"name", "value"}, set()), "system-out": (set(), set()),
    "failure": ({"message", "type"}, set()), "skipped": ({"message", "type"}, set()),
}  # fmt: skip
"""Of the schema of Jenkins' xUnit plugin, junit-10.xsd, what is used here."""


def test_junit_has_what_jenkins_allows(report):
    for element in ET.fromstring(junit(report)).iter():
        attributes, children = ALLOWED[element.tag]
        assert set(element.attrib) <= attributes
        assert {child.tag for child in element} <= children


def test_junit_of_nothing_wrong_fails_nothing(report):
    good = report.model_copy(
        update={"allowed": [], "checks": [c for c in report.checks if c.target == GOOD], "targets": report.targets[:1]}
    )
    assert [ET.fromstring(junit(good))[0].get(name) for name in ("failures", "skipped")] == ["0", "0"]


def test_junit_loses_no_target_without_checks(report):
    root = ET.fromstring(junit(report.model_copy(update={"checks": []})))
    assert case(root, GOOD, "verdict").find("failure") is None
    assert case(root, BAD, "verdict").find("failure").get("message").startswith("failed: reconstruct@700")
    assert (
        case(root, UNSURE, "verdict").find("skipped").get("message") == "inconclusive: The base does not reproduce it."
    )
    assert case(root, EXCUSED, "verdict").find("skipped").get("message").startswith("allowed until 2027-01-31")


def test_markdown_starts_with_the_verdict(report):
    said = markdown(report)
    assert said.startswith("## unforget verify: ❌ failed\n\n1 of 4 targets")
    for mark in ("✅ forgotten", "❌ failed", "⚠️ inconclusive", "⚠️ allowed"):
        assert said.index("### Targets") < said.index(mark, said.index("### Targets")) < said.index("### What is wrong")
    everything = said[said.index("<summary>All checks") :]
    assert everything.count("\n| ") - 2 == len(report.checks)
    assert said.count("<details>") == said.count("</details>") == 2
    assert all(r.sentence in said for r in report.robustness)


def test_markdown_holds_no_markup_of_a_prompt(report):
    said = markdown(report)
    assert "<b>" not in said and "<ticket>" not in said and "`" not in said and "\x01" not in said
    assert "a &#124;red&#124; &#60;b&#62;" in said
    tables = [line for line in said.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {3, 4, 5, 6, 9}
    assert all(line.endswith(" |") for line in tables)


@pytest.mark.parametrize("limit", [pytest.param(1_000_000, marks=pytest.mark.slow), 100_000, 4_000, 300])
def test_markdown_keeps_to_its_limit(report, limit):
    said = markdown(many(report), limit)
    assert len(said.encode()) <= limit
    assert said.startswith("## unforget verify: ❌ failed")
    if 4_000 < limit < 1_000_000:
        assert GOOD in said[: said.index("### What is wrong")]
        (dropped,) = set(re.findall(r"(\d+) of 5000 left out", said))
        kept = said[said.index("<summary>All checks") :].count("\n| ") - 2
        assert int(dropped) + kept == 5000
        assert said.count("<details>") == said.count("</details>") == 2


class Reader(HTMLParser):
    """Keeps the text, the tags by name, and what is left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.text, self.tags = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_page_is_sound_and_needs_nothing_else(report):
    html = page(report)
    read = Reader(html)
    assert read.open == []
    assert "://" not in html and "@import" not in html and "url(" not in html
    assert not read.all("script") and not read.all("link") and not read.all("img")
    assert all(a["href"].startswith("#target-") for a in read.all("a"))
    assert {a["href"][1:] for a in read.all("a")} == {a["id"] for a in read.all("article")}
    policy = next(m["content"] for m in read.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert [tag for tag, _ in read.tags].count("h1") == 1
    assert all(s.get("aria-label") for s in read.all("svg") if s.get("role") == "img")
    assert "--save-images" in "".join(read.text)


def test_page_says_every_figure(report):
    text = "".join(Reader(page(report)).text)
    for c in report.checks:
        assert c.figure in text and number(c.candidate) in text and f"{c.rule} {number(c.threshold)}" in text
        assert c.low is None or f"{number(c.low)} to {number(c.high)}" in text
    for said in (report.summary, report.base_digest, *(t.reason for t in report.targets), *report.versions.values()):
        assert said in text
    assert text.count("borderline") == sum(c.borderline for c in report.checks)


def test_page_holds_no_markup_of_a_prompt(report):
    html = page(report, [(ODD, [(torch.zeros(3, 8, 8), ODD)])])
    assert "<b>" not in html and "<ticket>" not in html and "\x01" not in html
    assert "a |red| &lt;b&gt;&quot;fox&quot;&lt;/b&gt; &amp; &#x27;hound&#x27; `x`\\u0001" in html
    assert Reader(html).open == []


def test_page_shows_pictures_only_where_they_are_given(report):
    rows = [("noised and back", [(torch.full((3, 32, 32), -0.5), "base")]), ("", [(torch.zeros(1, 200, 256), "new")])]
    html = page(report, rows)
    small, large = Reader(html).all("img")
    assert [i["alt"] for i in (small, large)] == [f"{n}: noised and back, image 1 of 1" for n in ("base", "new")]
    assert (small["class"], "class" in large) == ("small", False)
    assert all(i["src"].startswith("data:image/png;base64,iVBOR") for i in (small, large))
    assert html.count("<h2>Noised and back</h2>") == 1
    assert "--save-images" not in html


def test_charts_show_every_level_and_mark_what_failed(report):
    read = Reader(page(report))
    labels = [s["aria-label"] for s in read.all("svg") if s.get("role") == "img"]
    levels = [c for c in report.checks if c.probe == "reconstruct"]
    assert len(labels) == len(report.checks) + len(levels)  # each check in its table; levels in a curve too
    worst = "reconstruct@700: nearer_surrogate 0.39 (0.2881 to 0.501), wanted at least 0.8; base 0.016"
    assert labels.count(worst) == 2
    marks = [p for p in read.all("path") if p["class"] == "dot failed"]
    assert len(marks) == sum(c.outcome == "failed" for c in [*report.checks, *levels])


def test_charts_stay_inside_their_box(report):
    odd = [
        check("sample", GOOD, "rate", None, 2.0, "at most", 0.0, "failed", low=-1.0),
        check("relearning", GOOD, "steps", 0.0, float("nan"), "at least", 0.0),
        *(check("reconstruct", GOOD, "recall", None, 7.0, "at most", 0.5, timestep=t) for t in (999.0, 1.5)),
    ]
    for checks in (report.checks, odd):
        html = page(report.model_copy(update={"checks": checks}))
        places = [float(n) for n in re.findall(r'"(-?[\d.]+|nan|inf)%"', html)]
        assert len(places) > 20
        assert all(0 <= place <= 100 for place in places)


def test_the_first_screen_says_what_when_and_how_often(report):
    known = {"model": "faces", "patches": ["f00d" * 16], "date": "2026-11-27 02:39 UTC"}
    rate = "0 of 900 draws were near-copies (base: 8 of 256): rate below 0.5 % at 95 % confidence"
    targets = [report.targets[0].model_copy(update={"rate": rate})]
    new = report.model_copy(update={**known, "targets": targets})
    web, text = "".join(Reader(page(new)).text), markdown(new)
    for first in (web[: web.index("In the charts")], text[: text.index("### Targets")]):
        for said in ("faces", "f00df00df00d", known["date"], "standard", "failed", rate):
            assert said.lower() in first.lower()
        assert first.count(rate) == 1
    assert json.loads(new.text())["targets"][0]["rate"] == rate


@pytest.mark.parametrize("outcome", ["passed", "informational"])
@pytest.mark.parametrize("known", [True, False])
def test_base_and_candidate_are_one_above_the_other(known, outcome):
    target, other = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    made = {"base": target.expand(6, 3, 8, 8), "candidate": other.expand(6, 3, 8, 8)}
    findings = [
        Finding("reconstruct", GOOD, {}, {}, timestep=250, images=made), Finding("retention", None, {}, {}, images=made)
    ]  # fmt: skip
    checks = [check("reconstruct", GOOD, "recall", 1, 0, "at most", 0.5, outcome, timestep=250)]
    rows = evidence_rows([Instance(target, other if known else target, GOOD)], findings, checks)
    aside = " (does not decide)" if outcome == "informational" else ""
    assert [(heading, [caption for _, caption in cells]) for heading, cells in rows] == [
        ("target 1 and its surrogate", ["target", "surrogate"]) if known else ("target 1", ["target"]),
        (f"noised to t = 250 and back{aside}", ["base"] * 4), ("", ["candidate"] * 4),
        ("same seeds", ["base"] * 6), ("", ["candidate"] * 6),
    ]  # fmt: skip


def test_page_says_all_that_was_measured(report):
    text = "".join(Reader(page(report)).text)
    for found in report.findings:
        assert all(name in text and number(value) in text for name, value in (found.base | found.candidate).items())
        assert all(number(value) in text for value in found.base.values())


@pytest.mark.parametrize("show", [page, markdown, junit])
def test_no_text_of_a_report_is_markup(report, show):
    text = "x <i>y</i> \u202e {{ 7 * 7 }} {% endif %} | `z` ]]> \x0b"

    def spoil(value, key=""):
        if isinstance(value, dict):
            odd = key in ("versions", "seconds", "settings")
            return {k + text if odd else k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v, key) for v in value]
        fixed = ("verdict", "outcome", "rule", "state", "schema_version")
        return value + text if isinstance(value, str) and key not in fixed else value

    said = show(Report.model_validate(spoil(report.model_dump())))
    assert "<i>" not in said and "\u202e" not in said and "\x0b" not in said and "{{ 7" in said
    if show is junit:
        assert len(ET.fromstring(said).findall(".//testcase")) > 10
    elif show is page:
        assert Reader(said).open == []
    else:
        assert "`" not in said
        assert {line.count("|") for line in said.splitlines() if line.startswith("|")} == {3, 4, 5, 6, 9}


def test_an_empty_report_has_every_format():
    empty = rich().model_copy(
        update={name: [] for name in ("targets", "checks", "robustness", "calibrations", "allowed", "findings")}
    )
    assert ET.fromstring(junit(empty)).get("tests") == "1"
    assert markdown(empty).startswith("## unforget verify: ❌ failed")
    assert Reader(page(empty)).open == []


@pytest.mark.parametrize("name", ["github.yml", "gitlab.yml", "Jenkinsfile"])
def test_ci_examples_keep_the_reports(name):
    text = (CI / name).read_text()
    assert name == "Jenkinsfile" or yaml.safe_load(text)
    assert "unforget verify --no-cache --model models/base --patch patches/face.patch --policy unforget.toml" in text
    assert all(file in text for file in ("report.json", "junit.xml", "report.html"))


def test_the_example_policy_is_what_its_comments_say():
    policy = tomllib.loads((CI / "unforget.toml").read_text())["verify"]
    assert policy["require"] == ["quantization", "transforms"]
    assert policy["allow"][0]["expires"].isoformat() == "2027-01-31"


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 130])
def test_the_gate_publishes_on_zero_alone(tmp_path, code):
    sh = shutil.which("sh")
    subprocess.run([sh, "-n", CI / "gate.sh"], check=True)
    (tmp_path / "unforget").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "unforget").chmod(0o755)
    ran = subprocess.run(
        [sh, CI / "gate.sh", "faces", "face.patch", "echo", "PUBLISHED"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == code
    assert ("PUBLISHED" in ran.stdout) == (code == 0)


def test_the_record_of_a_patch_is_that_of_the_strongest_level(tmp_path):
    path, notes = tmp_path / "verify.json", []

    def after(level, **changes):
        _record(rich().model_copy(update={"level": level, **changes}), path, Progress(note=notes.append))
        return Verified.of(path)

    assert after("quick").level == "quick"
    assert after("standard", summary="first").level == "standard"
    assert after("quick").level == "standard"
    assert "its verdict" in notes.pop() and not notes
    assert after("standard", summary="second").summary == "second", "of one level the last run counts"
    assert after("deep").level == "deep"
    assert after("standard").level == "deep"
    assert after("quick", candidate_digest="of other weights").level == "quick"
    path.write_text("damaged")
    assert after("quick").level == "quick"
