"""Chat templates: programs in Jinja that come with a tokenizer, of which only the text around a prompt is wanted.

No check of such a program tells how long it runs (a constant is computed while it is compiled), and neither Jinja's
sandbox nor a signal stops it. So it runs in a process that the kernel bounds (`chat_process`), once and before any
work, on a few prompts: what it writes before and after each of them must be the same, and is put around all prompts
from then on. A template that treats prompts otherwise is refused.
"""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from unforget.errors import CannotRun

PROCESS = Path(__file__).with_name("chat_process.py")
WAIT = 60  # seconds until the process is given up where the system counts none of its own; most go to imports
TRIED = ("unforget 1f0c", "", "a red square", ' A "\u00e9" {{ 7 * 7 }}\n<b>&\n\n')
"""Prompts that a template is tried on; the first one is found again in what it wrote."""


def bound(words: Any, name: str) -> None:
    """Let a pipeline that asks a tokenizer to put a prompt into its chat template be answered with bounds.

    CannotRun then for a template that takes too long or too much memory, or writes more than a prompt and the same text
    around each, and for what is more than one prompt.
    """

    def apply(conversation: Any, *, tokenize: bool = True, **how: Any) -> str:
        match conversation:
            case [{"role": "user", "content": str(prompt)}] if not tokenize:
                asked = {"template": words.get_chat_template(), "how": {**words.special_tokens_map, **how}}
                before, after = _around(json.dumps(asked, sort_keys=True, default=str), name)
                return before + prompt + after
        raise CannotRun(f"the pipeline asks '{name}' for more than one prompt in its chat template", "Give another.")

    if hasattr(words, "apply_chat_template"):
        words.apply_chat_template = apply


@lru_cache
def _around(asked: str, name: str) -> tuple[str, str]:
    """What a template writes before and after a prompt."""
    hint = "Get the model again: a template of Qwen's has a role, the prompt and marks around them."
    process = [sys.executable, "-P", str(PROCESS)]
    try:
        done = subprocess.run(
            process, input=json.dumps({**json.loads(asked), "prompts": TRIED}), capture_output=True, text=True,
            encoding="utf-8", timeout=WAIT,
        )  # fmt: skip
        found = json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError):
        found = None
    if found is None:
        raise CannotRun(f"the chat template of '{name}' takes too long or too much memory", hint)
    if isinstance(found, str):
        raise CannotRun(f"the chat template of '{name}' does not work: {found}", hint)
    before, _, after = found[0].partition(TRIED[0])
    if found != [before + prompt + after for prompt in TRIED]:
        raise CannotRun(f"the chat template of '{name}' does not put every prompt as it is into the same text", hint)
    return before, after
