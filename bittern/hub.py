"""The only code that talks to the network: a repository of the Hub into the usual cache.

Tokens, cache, mirror and offline mode come from where huggingface_hub takes them (HF_TOKEN and the
token that `hf auth login` stores, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bittern.errors import BitternError

_ALWAYS = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICEN[CS]E*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
_NEVER = (
    "consolidated*",
    "*.onnx*",
    "onnx/*",
    "original/*",
    "*/*.safetensors",
    "*/*.bin",
    "*/*.json",
    "*/*.py",
    "*/*.txt",
)


def download(repo_id: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Have a model repository in the local cache, as far as a checkpoint needs it.

    Safetensors are taken where there are some, pytorch_model.bin otherwise. Files that are in the cache
    are not fetched again, and a complete cached copy serves when the Hub cannot be reached.

    Args:
        repo_id: "org/name".
        revision: branch, tag or commit; None is the default branch.

    Returns:
        The folder with the files, and the commit they are of.

    Raises:
        BitternError: for a repository that is missing, private or gated, a missing revision, no network
            and no complete copy, a full disk.
    """
    folder = _snapshot(repo_id, revision, (*_ALWAYS, "*.safetensors"))
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(repo_id, folder.name, (*_ALWAYS, "pytorch_model*.bin"))
    return folder, folder.name


def _snapshot(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_NEVER))
        )
    except GatedRepoError as error:
        reason = f"its owner must grant access: ask at https://huggingface.co/{repo_id}, then set HF_TOKEN"
        raise BitternError(f"{repo_id}: gated, {reason}") from error
    except RevisionNotFoundError as error:
        raise BitternError(f"{repo_id}: the repository has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        reason = "no such folder here, and no such repository on the Hub (a private one needs HF_TOKEN)"
        raise BitternError(f"{repo_id}: {reason}") from error
    except LocalEntryNotFoundError as error:
        reason = f"the Hub cannot be reached ({_cause(error)}) and the cache holds no complete copy{at}"
        raise BitternError(f"{repo_id}: {reason}") from error
    except HFValidationError as error:
        raise BitternError(f"{repo_id}: no such folder here, and not a Hub id: {_line(error)}") from error
    except Exception as error:
        # The HTTP client of huggingface_hub has changed twice; its errors are told by their module.
        if not isinstance(error, (HfHubHTTPError, OSError, ValueError)) and "http" not in type(error).__module__:
            raise
        raise BitternError(f"{repo_id}: downloading from the Hub failed: {_line(error)}") from error


def _cause(error: BaseException) -> str:
    """Why the network was not used: the innermost reason that says something."""
    cause = error.__cause__
    if cause is None:
        return _line(error)
    return "HF_HUB_OFFLINE is set" if type(cause).__name__ == "OfflineModeIsEnabled" else _line(cause)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
