"""The process in which a chat template runs, started by `chat`: it imports nothing of ours, and has bounds of its own.

Reads JSON (`template`, `how`, `prompts`) and writes a list of what the template makes of the prompts, or the first line
of why it cannot.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

SECONDS = 2  # of the processor; Qwen's takes a thousandth
MEMORY = 2**28  # bytes beside what the libraries took
LONGEST = 2**16  # characters of what is written


def limit() -> None:
    """Let the kernel end this process where it takes more; on systems that cannot, whoever started it does."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        spent = resource.getrusage(resource.RUSAGE_SELF)
        end = int(spent.ru_utime + spent.ru_stime) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (end, end))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Answer what was asked."""
    asked = json.load(sys.stdin)
    chats = [[{"role": "user", "content": prompt}] for prompt in asked["prompts"]]
    limit()
    try:
        said: Any = render_jinja_template(conversations=chats, chat_template=asked["template"], **asked["how"])[0]
        found = said if max(map(len, said)) <= LONGEST else f"it writes more than {LONGEST} characters"
    except Exception as error:  # whatever a template does
        found = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
