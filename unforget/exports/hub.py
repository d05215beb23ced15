"""A folder or a file on its way to the Hugging Face hub, and what goes wrong there in one sentence."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # no __all__, but documented there
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from unforget.errors import CannotRun, UnforgetError, UsageError

HIDDEN = "[hidden]"
"""What stands in a message where a secret stood."""
_SECRETS = (
    (re.compile(r"(?i)\b(bearer|authorization\W+basic)\s+[^\s'\",]+"), rf"\1 {HIDDEN}"),
    (re.compile(r"(://)[^/\s@]*@"), rf"\1{HIDDEN}@"),
    # Signed storage URLs carry their signature in the query.
    (re.compile(r"(https?://[^\s?'\"]+\?)[^\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf_(?:jwt_|oauth_)?|api_org_)[A-Za-z0-9]{6,}[\w.-]*|\beyJ[\w-]+\.[\w-]+\.[\w-]+"), HIDDEN),
)
_TOKEN = "Set HF_TOKEN to a token that may write there, or log in with `hf auth login`."
_ANSWERS = {
    401: ("the hub does not accept the token for '{repo}'", _TOKEN),
    403: ("the hub does not let this token write to '{repo}'", _TOKEN),
    404: ("the hub has no '{repo}', or the token may not see it", "Check the name and what the token may see."),
    429: ("the hub takes no more uploads to '{repo}' for now", "Wait some minutes and push again."),
}
"""What a refusal means, and the way out, by HTTP status."""
_REFUSED = ("the hub refuses what is pushed to '{repo}'", "Correct what it complains of, then push again.")
_FAILED = ("the hub failed to take '{repo}'", "Push again later; what arrived is not sent twice.")
_REACH = "Check the network, the proxy and HF_ENDPOINT, then push again."


def push(path: Path, repo: str, *, private: bool = True, token: str | None = None, message: str) -> str:
    """Upload a folder, or one file, to a model repository, which is made if there is none.

    The endpoint, and the token if none is given, are huggingface_hub's: HF_ENDPOINT as it was when that was imported,
    HF_TOKEN or the stored login. A folder of many files may become several commits.

    Args:
        path: The folder, whose content goes to the root of the repository, or the file.
        repo: `owner/name`, or a name in the namespace of the token's owner.
        private: Make the repository private, and refuse one that is public.
        token: In place of the one in the environment.
        message: First line of the commit.

    Returns:
        The address of the (last) commit.

    Raises:
        UsageError: If `repo` is no name of a repository, or there is nothing at `path`.
        CannotRun: If the hub cannot be reached or refuses. No message holds a token.
    """
    _check(path, repo)
    token = (token or "").strip() or None
    secrets = {token} if token else set()
    try:
        secrets |= {stored} if (stored := get_token()) else set()
        _check_tokens(secrets)
        with _quiet():
            return _upload(HfApi(token=token), path, repo, private, message)
    except UnforgetError as error:
        raise type(error)(redacted(error.message, secrets), error.hint) from None
    except Exception as error:  # httpx's, hf_xet's and huggingface_hub's own have no class in common
        raise _said(error, repo, secrets) from None


def redacted(text: str, secrets: Collection[str] = ()) -> str:
    """The text on one line, without the secrets and without what looks like one: tokens, passwords, signatures."""
    for secret in sorted(secrets, key=len, reverse=True):
        for form in (secret, quote(secret, safe=""), repr(secret)[1:-1]):
            text = text.replace(form, HIDDEN)
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _check(path: Path, repo: str) -> None:
    """Refuse what can be told before anybody is asked."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UsageError(
            f"'{redacted(repo)}' is no name of a repository",
            "Give owner/name: letters, digits, '-', '_' and '.', at most 96 characters each.",
        ) from None
    if not path.exists() or (path.is_dir() and not any(p.is_file() for p in path.rglob("*"))):
        raise UsageError(f"there is nothing to upload at '{path}'", "Give what `unforget export` wrote.")
    if constants.HF_HUB_OFFLINE:
        raise CannotRun(f"'{repo}' is not pushed: HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE to reach the hub.")


def _check_tokens(tokens: Collection[str]) -> None:
    """Refuse what cannot stand in a header before a library quotes it in its complaint."""
    if not all(token.isascii() and token.isprintable() and " " not in token for token in tokens):
        raise CannotRun("the token for the hub holds characters that no token has", _TOKEN)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without huggingface_hub's progress bars, for the length of a block."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _upload(api: HfApi, path: Path, repo: str, private: bool, message: str) -> str:
    found = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if private and api.model_info(found).private is False:  # one that was there keeps what it was
        raise CannotRun(f"'{found}' is there already, and public", "Choose another name, or allow it to be public.")
    if path.is_dir():
        return api.upload_folder(
            repo_id=found, folder_path=path, commit_message=message, ignore_patterns=["*.partial"]
        ).commit_url
    return api.upload_file(
        repo_id=found, path_or_fileobj=path, path_in_repo=path.name, commit_message=message
    ).commit_url


def _said(error: BaseException, repo: str, secrets: Collection[str]) -> CannotRun:
    """A failure inside the library, as ours."""
    chain = _chain(error)
    status = next((s for e in chain if (s := getattr(getattr(e, "response", None), "status_code", None))), 0)
    reason = redacted(next((str(m) for e in chain if (m := getattr(e, "server_message", None))), ""), secrets)
    if status:
        sentence, hint = _ANSWERS.get(status, _REFUSED if status < 500 else _FAILED)
        if status == 401 and not secrets:
            sentence = "the hub takes '{repo}' only with a token"
        detail = f"{status}: {reason}" if reason else str(status)
        return CannotRun(redacted(f"{sentence.format(repo=repo)} ({_short(detail)})", secrets), hint)
    reason = _short(redacted(str(error), secrets) or type(error).__name__)
    # Timeouts and refused connections: their classes' names are all that the HTTP libraries agree on.
    if {"TransportError", "ConnectionError"} & {c.__name__ for e in chain for c in type(e).__mro__}:
        return CannotRun(redacted(f"cannot reach the hub at {constants.ENDPOINT}: {reason}", secrets), _REACH)
    return CannotRun(redacted(f"cannot push to '{repo}': {reason}", secrets), _FAILED[1])


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from: an upload's thread wraps the hub's answer."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def _short(text: str, longest: int = 300) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
