"""The report as JUnit XML: a test case for every target and probe.

It has only what the schema of Jenkins' xUnit plugin (junit-10.xsd) allows: no properties in a case, for one.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence

from unforget.reports.words import facts, number, one_line, sentence, worst_first
from unforget.verification.report import Check, Report


def junit(report: Report) -> str:
    """One suite, in which a case fails if any check of it does; inconclusive and allowed ones are skipped."""
    root = ET.Element("testsuites", name="unforget")
    suite = _add(root, "testsuite", name=f"unforget verify {report.level}")
    known = {"verdict": report.verdict, "summary": report.summary, **facts(report)}
    known |= {"base": report.base_digest, "candidate": report.candidate_digest}
    known |= {f"version of {name}": version for name, version in report.versions.items()}
    properties = _add(suite, "properties")
    for name, value in known.items():
        _add(properties, "property", name=name, value=value)
    groups: dict[tuple[str | None, str], list[Check]] = {}
    for check in report.checks:
        groups.setdefault((check.target, check.probe), []).append(check)
    checked = {target for target, _ in groups}
    groups |= {(t.id, "verdict"): [] for t in report.targets if t.id not in checked}
    probes = [probe for _, probe in groups]
    for (target, probe), checks in groups.items():
        # Targets share the time of a probe, so that the cases add up to no more than the suite.
        case = _case(suite, target, probe, report.seconds.get(probe, 0.0) / probes.count(probe))
        _judge(case, report, target, checks)
    # The allow-list is a case of its own: an entry that expired fails before anyone asks for its target.
    case = _case(suite, None, "allow-list", 0.0)
    expired = [f"{a.id} expired on {a.expires}: {a.reason}" for a in report.allowed if a.state == "expired"]
    if expired:
        _end(case, "failure", "expired", expired[0], map(one_line, expired))
    for element in (root, suite):
        element.set("time", f"{sum(report.seconds.values()):.3f}")
        element.set("tests", str(len(suite.findall("testcase"))))
        for name, tag in (("failures", "failure"), ("errors", "error")):
            element.set(name, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _judge(case: ET.Element, report: Report, target: str | None, checks: Sequence[Check]) -> None:
    """The figures of a case, and what they come to."""
    figures: dict[str, float | None] = {}
    for c in checks:
        name = f"{c.name} {c.figure}"
        figures |= {f"{name} base": c.base, f"{name} candidate": c.candidate, f"{name} threshold {c.rule}": c.threshold}
    said = [f"{one_line(name, 1000)} = {number(value)}" for name, value in figures.items() if value is not None]
    wrong = [check for check in worst_first(checks) if check.outcome in ("failed", "inconclusive")]
    failed = [check for check in wrong if check.outcome == "failed"]
    verdict, reason = next(((t.verdict, t.reason) for t in report.targets if t.id == target), ("", ""))
    if verdict == "allowed":
        until = next((f" until {a.expires}: {a.reason}" for a in report.allowed if a.id == target), f": {reason}")
        _end(case, "skipped", verdict, f"allowed{until}", map(sentence, wrong))
    elif failed:
        _end(case, "failure", failed[0].figure, sentence(failed[0]), map(sentence, failed))
    elif wrong:
        _end(case, "skipped", "inconclusive", f"inconclusive: {sentence(wrong[0])}", map(sentence, wrong))
    elif not checks and verdict != "forgotten":
        _end(case, "failure" if verdict == "failed" else "skipped", verdict, f"{verdict}: {reason}")
    if said:
        _add(case, "system-out").text = "\n".join(said)


def _add(parent: ET.Element, tag: str, **attributes: str) -> ET.Element:
    return ET.SubElement(parent, tag, {name: one_line(value, 1000) for name, value in attributes.items()})


def _case(suite: ET.Element, target: str | None, probe: str, seconds: float) -> ET.Element:
    return _add(suite, "testcase", classname=f"unforget.{target or 'model'}", name=probe, time=f"{seconds:.3f}")


def _end(case: ET.Element, tag: str, kind: str, message: str, lines: Iterable[str] = ()) -> None:
    _add(case, tag, message=message, type=kind).text = "\n".join(lines) or None
