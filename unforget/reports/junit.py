"""The report as JUnit XML: a test case for every target and probe."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from unforget.reports.words import number, one_line, printable, sentence, worst_first
from unforget.verification.report import Check, Report

_COUNTS = {
    "tests": "testcase",
    "failures": "testcase/failure",
    "errors": "testcase/error",
    "skipped": "testcase/skipped",
}


def junit(report: Report) -> str:
    """One suite, in which a case fails if any check of it does; inconclusive and allowed ones are skipped."""
    root = ET.Element("testsuites", name="unforget")
    suite = ET.SubElement(root, "testsuite", name=f"unforget verify {printable(report.level)}")
    _properties(
        suite,
        {
            "verdict": report.verdict,
            "summary": report.summary,
            "base": report.base_digest,
            "candidate": report.candidate_digest,
            **{f"version of {name}": version for name, version in report.versions.items()},
        },
    )
    groups = _groups(report)
    probes = [probe for _, probe in groups]
    for (target, probe), checks in groups.items():
        # Targets share the time of a probe, so that the cases add up to no more than the suite.
        case = _case(suite, target, probe, report.seconds.get(probe, 0.0) / probes.count(probe))
        _judge(case, report, target, checks)
    _allow_list(suite, report)
    for element in (root, suite):
        for name, path in _COUNTS.items():
            element.set(name, str(len(suite.findall(path))))
        element.set("time", f"{sum(report.seconds.values()):.3f}")
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _groups(report: Report) -> dict[tuple[str | None, str], list[Check]]:
    """The checks by target and probe; a target without any is there with none."""
    groups: dict[tuple[str | None, str], list[Check]] = {}
    for check in report.checks:
        groups.setdefault((check.target, check.probe), []).append(check)
    checked = {target for target, _ in groups}
    return groups | {(t.id, "verdict"): [] for t in report.targets if t.id not in checked}


def _case(suite: ET.Element, target: str | None, probe: str, seconds: float) -> ET.Element:
    name = {"classname": f"unforget.{printable(target or 'model')}", "name": printable(probe)}
    return ET.SubElement(suite, "testcase", {**name, "time": f"{seconds:.3f}"})


def _properties(element: ET.Element, values: dict[str, str]) -> None:
    properties = ET.SubElement(element, "properties")
    for name, value in values.items():
        ET.SubElement(properties, "property", name=one_line(name), value=one_line(value))


def _judge(case: ET.Element, report: Report, target: str | None, checks: Sequence[Check]) -> None:
    """The figures of a case, and what they come to."""
    if checks:
        _properties(
            case,
            {
                f"{check.name} {check.figure} {name}": number(value)
                for check in checks
                for name, value in (
                    ("base", check.base),
                    ("candidate", check.candidate),
                    (f"threshold {check.rule}", check.threshold),
                )
                if value is not None
            },
        )
    wrong = [check for check in worst_first(checks) if check.outcome in ("failed", "inconclusive")]
    failed = [check for check in wrong if check.outcome == "failed"]
    verdict, reason = next(((t.verdict, t.reason) for t in report.targets if t.id == target), ("", ""))
    if verdict == "allowed":
        entry = next((entry for entry in report.allowed if entry.id == target), None)
        message = f"allowed until {entry.expires}: {entry.reason}" if entry else f"allowed: {reason}"
        _end(case, "skipped", message, wrong)
    elif failed:
        _end(case, "failure", sentence(failed[0]), failed).set("type", failed[0].figure)
    elif wrong:
        _end(case, "skipped", f"inconclusive: {sentence(wrong[0])}", wrong)
    elif not checks and verdict != "forgotten":
        element = _end(case, "failure" if verdict == "failed" else "skipped", f"{verdict}: {reason}", ())
        element.set("type", verdict)


def _end(case: ET.Element, tag: str, message: str, checks: Sequence[Check]) -> ET.Element:
    element = ET.SubElement(case, tag, message=one_line(message, 1000))
    element.text = "\n".join(map(sentence, checks)) or None
    return element


def _allow_list(suite: ET.Element, report: Report) -> None:
    """A case of its own: an entry that expired fails before anyone asks for its target."""
    case = _case(suite, None, "allow-list", 0.0)
    expired = [entry for entry in report.allowed if entry.state == "expired"]
    if expired:
        lines = [f"{entry.id} expired on {entry.expires}: {entry.reason}" for entry in expired]
        failure = ET.SubElement(case, "failure", message=one_line(lines[0], 1000), type="expired")
        failure.text = "\n".join(map(one_line, lines))
