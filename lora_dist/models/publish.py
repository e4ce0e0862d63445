"""Files -> a repository on the Hugging Face Hub, in one commit. Called by `engine/push.py`.

Weights go first, each on its own, and the commit names them at the end: an upload that is broken off leaves the repository as it was,
and the next one sends only what the hub does not have yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, utils
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lora_dist.log import UserError


def check_name(repo_id: str, key: str) -> None:
    """Raises UserError for a name that no repository can have."""
    try:
        utils.validate_repo_id(repo_id)  # type: ignore[attr-defined]
    except HFValidationError as error:
        raise UserError(f"{key}: found {repo_id!r}, expected OWNER/NAME ({str(error).splitlines()[0]})") from error


def open_repo(repo_id: str, *, private: bool, key: str) -> str:
    """Make the repository if it is not there. Returns its full name, with the owner.

    Args:
        private: for a new one; an existing one that is public is refused.

    Raises:
        UserError: no token, no permission, or a hub that cannot be reached.
    """
    api = HfApi()
    try:
        made = api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(made.repo_id) if private else None
    except Exception as error:  # the client's transport errors have no common public base, and each means the same here
        raise _failed(repo_id, key, error, "") from error
    if info is not None and not info.private:
        raise UserError(
            f"{key}: {made.repo_id} is public already, and a private one is asked for: nothing was uploaded; take another name, or make it "
            "private in its settings"
        )
    return str(made.repo_id)


def upload(
    files: Mapping[str, Path | bytes], repo_id: str, *, message: str, key: str, revision: str | None = None, again: str = ""
) -> str:
    """Upload in one commit. Returns its address.

    Args:
        files: by their path in the repository.
        again: the command that goes on with an upload that fails, for the message.

    Raises:
        UserError: it failed; the repository is as it was.
    """
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    try:
        return str(HfApi().create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url)
    except Exception as error:  # as above; LFS uploads raise RuntimeError
        tail = "; what arrived is kept there, the repository is as it was" + (f": go on with {again}" if again else "")
        raise _failed(repo_id, key, error, tail) from error


def _failed(repo_id: str, key: str, error: Exception, tail: str) -> UserError:
    cause: BaseException = error
    while not isinstance(cause, HfHubHTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    reason = (str(cause).strip().splitlines() or [""])[0][:200] or type(cause).__name__
    if status in (401, 403):
        return UserError(
            f"{key}: the hub does not let us write to {repo_id} ({reason}): set HF_TOKEN to a token with write access, or run "
            f"hf auth login{tail}"
        )
    return UserError(f"{key}: {repo_id} could not be uploaded to ({reason}); set HF_ENDPOINT for another hub{tail}")
