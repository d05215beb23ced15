"""Forget one image of the bundled model through the Python API, and judge the result.

    python examples/api.py [OUT]

The functions are the commands of the same names; the keywords of their configurations are the commands' options, with
the same defaults: `UnlearnConfig(..., learning_rate=2e-4, train="full")`.
"""

import sys
from pathlib import Path

from unforget import ConsoleProgress, UnlearnConfig, VerifyConfig, unlearn, verify


def main(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    with ConsoleProgress() as progress:
        made = unlearn(UnlearnConfig(model="faces", target="demo:3", output=out / "3.patch"), progress)
    print(f"{made.steps} steps, stopped by {made.stopped}; look at {made.folder / 'sheet.png'}")
    with ConsoleProgress() as progress:
        judged = verify(VerifyConfig(model="faces", patch=made.output, level="quick"), progress)
    print(f"{judged.verdict}: {judged.summary}")
    return judged.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
