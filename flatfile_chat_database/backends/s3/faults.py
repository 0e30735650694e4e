"""What the errors of an object store mean for a caller. No message has a key, a signature or stored bytes in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from obstore.exceptions import (
    PermissionDeniedError,
    UnauthenticatedError,
)

from ...errors import ConfigurationError, DurabilityError, StorageError, UnavailableError

_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_STATUS = re.compile(r"Server returned non-2xx status code: (\d{3})")
_NOT_CONNECTED = ("tcp connect error", "ConnectError", "dns error", "Connection refused")
_NO_KEYS = ("169.254.169.254", "credential", "token request", "InstanceMetadata")
"""Where the client looks for keys when there are none in the environment."""
_WRONG_KEYS = {
    "InvalidAccessKeyId": "does not know the access key",
    "SignatureDoesNotMatch": "does not accept the secret key",
    "InvalidToken": "does not accept the session token",
    "ExpiredToken": "says that the session token has expired",
    "AuthorizationHeaderMalformed": "wants another region",
    "PermanentRedirect": "says that the bucket is in another region",
    "IllegalLocationConstraintException": "says that the bucket is in another region",
}


def _signs(error: Exception) -> str:
    """Return the text of an error without what is not the client's own: addresses and keys, which may hold any word."""
    lines = str(error).partition("Debug source:")[2].splitlines() or [str(error)]
    return "\n".join(line for line in lines if "://" not in line and not line.lstrip().startswith(("path:", "body:")))


def is_absent(error: Exception) -> bool:
    """Tell whether an error says that there is no such object, in a bucket that is there."""
    return isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket"


def may_pass(error: Exception) -> bool:
    """Tell whether the same request may succeed when it is made again."""
    status = _status(error)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | FileNotFoundError):
        return False
    return status is None or status >= 500 or status in (408, 409, 429)


def was_sent(error: Exception) -> bool:
    """Tell whether a request that failed may have reached the server."""
    text = _signs(error)
    return not any(sign in text for sign in _NOT_CONNECTED)


def was_refused(error: Exception) -> bool:
    """Tell whether a server that failed says by it that it changed nothing.

    Ceph fails with this code when a write on a condition loses a race, others when they are asked for too much.
    """
    return _code(error) in ("UnknownError", "SlowDown", "ConditionalRequestConflict")


def is_beyond(error: Exception) -> bool:
    """Tell whether an object has no bytes where they were asked for."""
    return _status(error) == 416


def unknown(reason: StorageError) -> DurabilityError:
    """Return the error for a write of which it cannot be told whether it was done, and why it cannot."""
    return DurabilityError(
        f"{reason.message} The outcome of the write is unknown.",
        key=reason.key,
        hint="Read whether it is there, then retry.",
    )


@contextmanager
def after_writing() -> Iterator[None]:
    """Whatever fails here fails behind a write: nobody may say that nothing was changed."""
    try:
        yield
    except DurabilityError:
        raise
    except StorageError as error:
        raise unknown(error) from None


def told(error: Exception, place: str) -> StorageError:
    """Return the error of the contract for what a request failed with; `place` is what to call the store."""
    code, status, text = _code(error), _status(error), _signs(error)
    if code == "NoSuchBucket":
        return ConfigurationError(f"{place}: the bucket does not exist.", hint="Make it, or name another one.")
    if code in _WRONG_KEYS:
        return ConfigurationError(
            f"{place}: the server {_WRONG_KEYS[code]}.",
            hint="Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the region.",
        )
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403):
        return UnavailableError(
            f"{place}: the server denies access ({code or status or 'no reason given'}).",
            hint="Give these keys the rights to list, get, put and delete objects there."
            if "AWS_ACCESS_KEY_ID" in os.environ
            else "AWS_ACCESS_KEY_ID is not set, so the role of this machine was asked for: set it and "
            "AWS_SECRET_ACCESS_KEY, or give the role the rights to list, get, put and delete objects there.",
        )
    if status == 501:
        return ConfigurationError(
            f"{place}: the server has no conditional writes, which keep writers from overwriting each other.",
            hint="Use a server that has them.",
        )
    if code == "QuotaExceeded" or status == 507:
        return UnavailableError(f"{place}: the server has no room.", hint="Free space there, then retry.")
    if any(sign in text for sign in _NO_KEYS):
        return ConfigurationError(
            f"{place}: there are no keys.", hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    if status is not None:
        answer = f"{status} {code}" if code else str(status)
        return UnavailableError(f"{place}: the server answers {answer}.", hint="Retry when it is well.")
    if "timed out" in text or "TimedOut" in text:
        return UnavailableError(
            f"{place}: the server does not answer in time.",
            hint="Check the endpoint, or raise object_store_timeout_seconds.",
        )
    return UnavailableError(
        f"{place}: the server cannot be reached.", hint="Check the endpoint, and whether the server runs."
    )


def _code(error: Exception) -> str | None:
    found = _CODE.search(str(error).partition("Server returned")[2])
    return found[1] if found else None


def _status(error: Exception) -> int | None:
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None
