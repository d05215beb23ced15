"""A folder or a file on its way to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # of its HTTP library
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # no __all__, but documented there
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from unforget.errors import CannotRun, UsageError, redacted
from unforget.reports.words import one_line


def check(repo: str) -> None:
    """What is known before there is anything to upload: UsageError for no name of a repository, CannotRun offline."""
    try:
        validate_repo_id(repo)
        if not repo.isascii():  # which older versions let through
            raise HFValidationError("Names have ASCII letters, digits, '-', '_' and '.'.")
    except HFValidationError as error:
        raise UsageError(f"'{redacted(repo)}' is no name of a repository", redacted(str(error))) from None
    if constants.HF_HUB_OFFLINE:
        raise CannotRun(f"'{repo}' is not pushed: HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE to reach the hub.")


def push(path: Path, repo: str, *, private: bool = True, message: str) -> str:
    """Upload a folder, or one file, to a model repository, which is made if there is none; returns the commit's URL.

    Endpoint and token are huggingface_hub's: HF_ENDPOINT, HF_TOKEN or the stored login. `private` refuses a repository
    that is there and public. CannotRun, if the hub refuses, has its own words; no message holds a token.
    """
    if not path.exists() or (path.is_dir() and not any(p.is_file() for p in path.rglob("*"))):
        raise UsageError(f"there is nothing to upload at '{path}'", "Give what `unforget export` wrote.")
    check(repo)
    token, bars = get_token(), not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return _upload(HfApi(token=token), path, repo, private, message)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # its own, the network's, hf_xet's
        answers = [e for e in (error, error.__cause__) if getattr(e, "response", None) is not None]
        status = answers[0].response.status_code if answers else 0  # type: ignore[union-attr]
        said = next((m for e in answers if (m := getattr(e, "server_message", None))), None) or str(error)
        said = one_line(redacted(said, token)) or type(error).__name__
        raise CannotRun(f"cannot push to '{repo}': {f'{status}: ' * bool(status)}{said}", _hint(status)) from None
    finally:
        if bars:
            enable_progress_bars()


def _upload(api: HfApi, path: Path, repo: str, private: bool, message: str) -> str:
    found = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if private and api.model_info(found).private is False:  # one that was there keeps what it was
        raise CannotRun(f"'{found}' is there already, and public", "Choose another name, or allow it to be public.")
    if path.is_dir():
        done = api.upload_folder(repo_id=found, folder_path=path, commit_message=message, ignore_patterns=["*.partial"])
    else:
        done = api.upload_file(repo_id=found, path_or_fileobj=path, path_in_repo=path.name, commit_message=message)
    return done.commit_url


def _hint(status: int) -> str:
    """The way out, by HTTP status."""
    if status in (401, 403):
        return "Set HF_TOKEN to a token that may write there, or log in with `hf auth login`."
    if status == 404:
        return "Check the name, and what the token may see."
    return "Check the network, the proxy and HF_ENDPOINT, then push again; what arrived is not sent twice."
