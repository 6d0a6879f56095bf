"""What huggingface_hub raises and logs: in one line that says what to do, and without secrets.

Servers repeat what they were sent, tokens among it, and addresses of uploads are signed. Neither may reach a
terminal, a log or a file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bittern.errors import BitternError

_TOKENS = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|hf_oauth_[\w.-]{16,}|hf_jwt_[\w.-]{16,}|api_org_[A-Za-z0-9]{30,})")
_ADDRESS = re.compile(r"https?://\S+")
_QUERY = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>)]+")
_QUOTA = re.compile(r"quota|storage (limit|space)|limit reached|exceed\w* .{0,40}(storage|limit)", re.IGNORECASE)
_HIDDEN = "[hidden]"
_MIN_TOKEN = 8  # characters; hiding fewer would hide words
_MAX_SAID = 200  # characters of a server's words


@contextmanager
def guarded() -> Iterator[None]:
    """Keep secrets out of every error that is raised inside and all that led to it, and out of the logs meanwhile."""
    handlers = [*logging.getLogger("huggingface_hub").handlers, *logging.getLogger().handlers]
    own = _known_token()

    def hide(record: logging.LogRecord) -> bool:
        record.msg, record.args = _hidden(record.getMessage(), own), ()
        if record.exc_info:
            record.exc_text = _hidden(logging.Formatter().formatException(record.exc_info), own)
        return True

    for handler in handlers:
        handler.addFilter(hide)
    try:
        yield
    except Exception as error:
        for each in _chain(error):
            each.args = tuple(_hidden(arg, own) if isinstance(arg, str) else arg for arg in each.args)
            for name, value in vars(each).items():
                if isinstance(value, str):
                    setattr(each, name, _hidden(value, own))
        raise
    finally:
        for handler in handlers:
            handler.removeFilter(hide)


@contextmanager
def told(repo_id: str) -> Iterator[None]:
    """The same, and whatever huggingface_hub raises as a BitternError of one line."""
    with guarded():
        try:
            yield
        except BitternError as error:
            raise BitternError(f"{repo_id}: {error}") from error.__cause__
        except Exception as error:
            reason = _reason(error, repo_id)
            if reason is None:
                raise
            raise BitternError(f"{repo_id}: {reason}") from error


@contextmanager
def downloading(repo_id: str, revision: str | None) -> Iterator[None]:
    """What goes wrong while a repository is fetched as a BitternError of one line; one that is such already passes."""
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        reason = f"its owner must grant access: ask at https://huggingface.co/{repo_id}, then set HF_TOKEN"
        raise BitternError(f"{repo_id}: gated, {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise BitternError(f"{repo_id}: the repository has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "no such folder here, and no such repository on the Hub (a private one needs HF_TOKEN)"
        raise BitternError(f"{repo_id}: {reason}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = f"the Hub cannot be reached ({_cause(error)}) and the cache holds no complete copy{at}"
        raise BitternError(f"{repo_id}: no such folder here, {reason}") from error
    except errors.HFValidationError as error:
        raise BitternError(f"{repo_id}: no such folder here, and not a Hub id: {one_line(error)}") from error
    except Exception as error:
        # The HTTP client of huggingface_hub has changed twice; its errors are told by their module.
        if not isinstance(error, (errors.HfHubHTTPError, OSError, ValueError)) and "http" not in type(error).__module__:
            raise
        raise BitternError(f"{repo_id}: downloading from the Hub failed: {one_line(error)}") from error


def passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    for each in _chain(error):
        status = _status(each)
        if status is not None:
            return status >= 500 or status in (408, 429)
        if isinstance(each, (ConnectionError, TimeoutError)) and type(each).__name__ != "OfflineModeIsEnabled":
            return True
        if type(each).__module__.startswith(("httpx", "httpcore")):
            return True
    return False


def _cause(error: BaseException) -> str:
    """Why the network was not used: the innermost reason that says something."""
    cause = error.__cause__
    if cause is None:
        return one_line(error)
    return "HF_HUB_OFFLINE is set" if type(cause).__name__ == "OfflineModeIsEnabled" else one_line(cause)


def _reason(error: BaseException, repo_id: str) -> str | None:
    """What went wrong and what to do, None for what is no matter of the Hub."""
    chain = list(_chain(error))
    status = next((found for each in chain if (found := _status(each)) is not None), None)
    names = {type(each).__name__ for each in chain}
    said = _short(_hidden(_last_words(chain), _known_token()))
    if _QUOTA.search(_ADDRESS.sub("", said)) or status in (402, 413, 507):
        return f"the Hub has no more room for it: {said}; free space or raise the quota, then push again"
    if "OfflineModeIsEnabled" in names:
        return "the Hub cannot be reached: HF_HUB_OFFLINE is set"
    if "GatedRepoError" in names:
        return f"gated, its owner must grant access: ask at https://huggingface.co/{repo_id}"
    if status == 401 and "RepositoryNotFoundError" not in names:
        return "the Hub does not take the token, it is wrong or has expired: `hf auth login` stores another"
    if status == 403:
        namespace = repo_id.split("/")[0]
        return f"the token may not do this ({said}): it needs to write to {namespace}, see its settings on the Hub"
    if status == 404 or "RepositoryNotFoundError" in names:
        return f"the Hub does not find it ({said}), or the token may not see it"
    if status in (409, 412):
        return f"it has changed meanwhile ({said}): push again"
    if status == 429:
        return "the Hub asks to wait, too many requests: push again later; what has arrived is not sent twice"
    if status is not None and status >= 500:
        return f"the Hub fails ({status}): push again later; what has arrived is not sent twice"
    if status is not None:
        return f"the Hub refuses ({status}): {said}"
    if "xet" in said:
        return f"the upload by xet fails ({said}): push again, or without xet: HF_HUB_DISABLE_XET=1"
    if "HFValidationError" in names:
        return f"not a Hub id: {said}"
    if passing(error):
        return f"the connection to the Hub is lost ({said}): push again; what has arrived is not sent twice"
    foreign = any(type(each).__module__.startswith(("huggingface_hub", "hf_xet")) for each in chain)
    return f"the Hub refuses: {said}" if foreign or isinstance(error, (OSError, ValueError, RuntimeError)) else None


def _status(error: BaseException) -> int | None:
    """Of the server's answer, where there was one."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, the last one first."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _last_words(chain: Sequence[BaseException]) -> str:
    """What the server said, or else the innermost reason."""
    for each in chain:
        if getattr(each, "server_message", None):
            return str(vars(each)["server_message"])
    return one_line(chain[-1])


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_SAID else f"{text[:_MAX_SAID]} ..."


def token() -> str | None:
    """The user's token, from where huggingface_hub finds it."""
    from huggingface_hub import get_token

    return get_token()


def secret(data: bytes) -> bool:
    """Whether a text holds the user's token, or what looks like anybody's."""
    own = _known_token()
    return bool(_TOKENS.search(data.decode("utf-8", "replace"))) or (own is not None and own.encode() in data)


def _known_token() -> str | None:
    """The token to hide, if it is long enough to be one; what cannot be had is in nothing either."""
    try:
        own = token()
    except Exception:
        return None
    return own if own and len(own) >= _MIN_TOKEN else None


def _hidden(text: str, own: str | None) -> str:
    """A text without tokens and without the queries of addresses, which are signed."""
    if own:
        text = text.replace(own, _HIDDEN)
    return _QUERY.sub(rf"\1?{_HIDDEN}", _TOKENS.sub(_HIDDEN, text))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
