"""Every error of the library: one base and a leaf for each thing a caller can do about it.

    StorageError
    ├── NotFoundError (LookupError)      name something that exists
    ├── ValidationError (ValueError)     send other input
    │   └── StorageLimitExceeded         send less, or raise the limit
    ├── ConflictError                    read again, then decide
    │   └── PlaceLostError               watch again from its `cursor`
    ├── IntegrityError                   look at the damage, run `chatdb check`
    ├── ConfigurationError (ValueError)  change the configuration
    ├── UnavailableError                 mend the medium (disk full, read-only, lock held), then retry
    ├── DurabilityError                  reopen the store and look whether the write is there
    └── ClosedError                      open a new StorageManager

A class's docstring is its default message; a bare `raise ConflictError()` still explains itself.
"""

from __future__ import annotations


class StorageError(Exception):
    """The store could not do what was asked."""

    def __init__(self, message: str | None = None, *, key: str | None = None, hint: str | None = None) -> None:
        """Keep the facts beside the message.

        Args:
            message: What went wrong; the class's docstring when left out.
            key: The store key concerned, if one is.
            hint: The way out, when one is known; it is appended to the message.
        """
        self.message = message or (type(self).__doc__ or "").strip()
        self.key = key
        self.hint = hint
        super().__init__(f"{self.message} {hint}" if hint else self.message)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword arguments do not survive Exception's own pickling, and process pools pickle errors.
        return (_rebuild, (type(self), self.message, self.key, self.hint, self.__dict__.copy()))


def _rebuild(
    kind: type[StorageError], message: str, key: str | None, hint: str | None, state: dict[str, object]
) -> StorageError:
    error = kind.__new__(kind)
    StorageError.__init__(error, message, key=key, hint=hint)
    error.__dict__.update(state)
    return error


class NotFoundError(StorageError, LookupError):
    """What the call names does not exist."""


class ValidationError(StorageError, ValueError):
    """The input is not acceptable; nothing was changed."""


class StorageLimitExceeded(ValidationError):
    """The input is over a configured limit; nothing was changed."""

    def __init__(
        self,
        message: str | None = None,
        *,
        limit_name: str,
        limit: int,
        value: int,
        key: str | None = None,
    ) -> None:
        """Name the config field `limit_name`, its value `limit`, and the `value` that is over it."""
        self.limit_name = limit_name
        self.limit = limit
        self.value = value
        super().__init__(
            message or f"{value} exceeds the limit of {limit} ({limit_name}).",
            key=key,
            hint=f"Raise {limit_name} in the configuration if this is wanted.",
        )


class ConflictError(StorageError):
    """What was read has changed since, or exists already; nothing was changed."""


class PlaceLostError(ConflictError):
    """What a watch has delivered is not in the log any more, so what is new in it cannot be told."""

    def __init__(self, message: str | None = None, *, cursor: str, key: str | None = None) -> None:
        """Name the cursor that begins this log again, and goes on with everything else that is watched."""
        self.cursor = cursor
        super().__init__(message, key=key, hint="Watch again from this error's cursor: that log begins anew.")


class IntegrityError(StorageError):
    """Stored data is damaged or contradicts itself; nothing was changed."""


class ConfigurationError(StorageError, ValueError):
    """The configuration cannot be used."""


class UnavailableError(StorageError):
    """The storage medium refuses to work (full, read-only, locked or unreachable); nothing was changed."""


class DurabilityError(StorageError):
    """The outcome of the write is unknown: it could not be made durable and may or may not be there."""


class ClosedError(StorageError):
    """The store is closed, or was opened before a fork."""
