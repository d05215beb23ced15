"""The verdict as an in-toto statement, for a pipeline to sign (cosign, sigstore): nothing here signs.

The predicate is SLSA's verification summary (https://slsa.dev/spec/v1.1/verification_summary): what was verified, by
what, under which policy, and whether it passed. The subjects are the files that were judged, by name and SHA-256.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unforget.verification.report import Report

STATEMENT = "https://in-toto.io/Statement/v1"
SUMMARY = "https://slsa.dev/verification_summary/v1"
VERIFIER = "https://pypi.org/project/unforget-diffusion/"


def attestation(report: Report, judged: Sequence[Path]) -> str:
    """The statement as JSON, of a report and the files and folders that it is about."""
    found = {name: file for path in judged for name, file in _files(path)}
    told: dict[str, Any] = {
        "verifier": {"id": VERIFIER, "version": report.versions},
        "timeVerified": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "resourceUri": f"urn:unforget:candidate:{report.candidate_digest}",
        "policy": {
            "uri": f"urn:unforget:policy:{report.level}",
            "digest": _sha256(json.dumps(report.settings, sort_keys=True)),
        },
        "inputAttestations": [{"uri": "urn:unforget:report", "digest": _sha256(report.text() + "\n")}],
        "verificationResult": "PASSED" if report.passed else "FAILED",
        "verifiedLevels": [f"UNFORGET_{report.level.upper()}" if report.passed else "FAILED"],
        "slsaVersion": "1.1",
    }
    subjects = [{"name": name, "digest": _digest(file)} for name, file in sorted(found.items())]
    return (
        json.dumps({"_type": STATEMENT, "subject": subjects, "predicateType": SUMMARY, "predicate": told}, indent=2)
        + "\n"
    )


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """A file, or those of a folder that are not hidden, by their names within it."""
    if not path.is_dir():
        yield path.name, path
    for place, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(place, name) for name in names if not name.startswith(".")):
            yield file.relative_to(path.parent).as_posix(), file


def _digest(file: Path) -> dict[str, str]:
    with file.open("rb") as opened:
        return {"sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _sha256(text: str) -> dict[str, str]:
    return {"sha256": hashlib.sha256(text.encode()).hexdigest()}
