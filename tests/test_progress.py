"""What is said of how far a command is, where stderr is no terminal and where it is a narrow one."""

import io
from itertools import pairwise

import pytest
from rich.console import Console

from unforget import ConsoleProgress
from unforget.cli import progress as shown
from unforget.cli.progress import LONGEST, SHORTEST, _Lines


def said(work, *, verbose=False, seconds=600):
    """(second, line) of all that is said while `work(lines, second)` goes on."""
    lines, found = _Lines(verbose), []
    lines._said = start = 0.0  # else 30 s are less by a rounding where the clock passes a power of two
    for second in range(1, seconds + 1):
        work(lines, second)
        if text := lines.look(start + second):
            found.append((second, text))
    return found


def one_stage(total, every):
    def work(lines, second):
        if second == 1:
            lines.stage("unlearn", total)
        if second % every == 0:
            lines.advance(1, loss=0.5, forget=0.25)

    return work


@pytest.mark.parametrize(("total", "every"), [(0, 1000), (10, 1000), (10, 50), (10_000, 1), (600, 1), (3, 200)])
@pytest.mark.parametrize("verbose", [False, True])
def test_no_silence_is_longer_than_30_s_and_no_line_comes_without_need(total, every, verbose):
    found = said(one_stage(total, every), verbose=verbose)
    times = [0, *(second for second, _ in found)]
    gaps = [b - a for a, b in pairwise(times)]
    assert max(gaps) <= LONGEST
    assert min(gaps) >= SHORTEST
    if not verbose:
        assert len(found) <= 1 + 600 / LONGEST + 10


def test_a_line_has_the_stage_n_of_m_and_the_time_left():
    found = dict(said(one_stage(100, 2), seconds=60))
    assert found[1] == "unlearn: 0 of 100"
    assert found[20] == "unlearn: 10 of 100, 0:02:51 left"
    assert said(one_stage(100, 2), verbose=True)[-1][1].endswith("; forget 0.25")


def test_more_than_was_foretold_has_no_time_left():
    assert said(one_stage(10, 2), seconds=60)[-1][1] == "unlearn: 30 of 10 or more"


def test_what_a_resumed_run_had_done_before_tells_nothing_of_the_time_left():
    def work(lines, second):
        if second == 1:
            lines.stage("unlearn", 100)
            lines.advance(90)
        lines.advance(second % 10 == 0)

    assert dict(said(work, seconds=40))[31] == "unlearn: 93 of 100, 0:01:10 left"


def shown_by(monkeypatch, work, *, terminal=False, width=80, **how):
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=terminal, color_system=None)
    monkeypatch.setattr(shown, "err", console)
    monkeypatch.setattr(shown, "SHORTEST", 0.01)
    with ConsoleProgress(**how) as progress:
        work(progress)
    return text.getvalue()


def work(progress):
    progress.stage("calibrating draws", 12_000)
    progress.advance(9_000, forget=0.123, retain=0.456, cosine=-0.789, margin=0.1)
    progress.note("told")
    shown.time.sleep(0.05)


def test_lines_are_said_while_nothing_advances_and_quiet_leaves_notes(monkeypatch):
    assert "calibrating draws: 9,000 of 12,000" in shown_by(monkeypatch, work)
    assert shown_by(monkeypatch, work, quiet=True) == "note: told\n"


@pytest.mark.parametrize(("width", "figures"), [(60, False), (80, False), (120, True)])
def test_a_narrow_bar_keeps_count_and_time_left(monkeypatch, width, figures):
    rows = shown_by(monkeypatch, work, terminal=True, width=width).splitlines()
    last = next(row for row in reversed(rows) if "calibrating" in row)
    assert "9000/12000" in last
    assert "0:00:0" in last or "-:--:--" in last
    assert ("cosine" in last) is figures
