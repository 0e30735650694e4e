"""What every command stands in: the group, the options before the command, errors and exit codes."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec

import click

from ..addresses import without_password
from ..backends.base import StorageBackend
from ..backends.opening import open_backend
from ..config import ENVIRONMENT_PREFIX, StorageConfig, load_config, set_from_text
from ..errors import ConfigurationError, NotFoundError, StorageError
from ..layout import Layout
from ..models import Session
from ..storage import StorageManager
from ..terminal import json_line, one_line

P = ParamSpec("P")

_STORE_FIELDS = ("storage_url", "storage_base_path")

# A URL's scheme has two letters or more; `./name:x` is always a path.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")

_OF_SQLITE = (".db", ".db3", ".sqlite", ".sqlite3")
"""How files of SQLite are named: a folder of such a name is hardly what is meant."""

_WAYS_OUT = {
    errno.EACCES: "Give this user access to it, or name another place.",
    errno.EPERM: "Give this user access to it, or name another place.",
    errno.EROFS: "That file system is read-only; name another place.",
    errno.ENOSPC: "Free some space, or name another place.",
    errno.EDQUOT: "Free some space or raise the quota, or name another place.",
    errno.ENOTDIR: "A file stands where a folder should be; name another place.",
    errno.EISDIR: "A folder stands where a file should be; name another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Its symbolic links lead in a circle; name another place.",
}
"""What to do about errors of the system with files that are no store's; those of a store say it themselves."""


class _Chatdb(click.Group):
    """A group whose every failure is one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader, such as `head`, has had enough. What is still buffered goes nowhere, quietly.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return code

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
        except click.UsageError as error:
            hint = ""
            if error.ctx is not None and error.ctx.command.get_help_option(error.ctx) is not None:
                hint = f"\nTry '{error.ctx.command_path} --help'."
            code = fail(_misplaced(error) or error.format_message(), 2, hint)
        except click.ClickException as error:
            code = fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            code = fail(str(Interrupted()), 130)
        except StorageError as error:
            code = fail(str(error))
        except OSError as error:
            place = f"{error.filename}: " if isinstance(error.filename, str) else ""
            code = fail(f"{place}{error.strerror or error}. {_WAYS_OUT.get(error.errno or 0, '')}".rstrip())
        sys.exit(code if isinstance(code, int) else 0)


class Interrupted(click.ClickException):
    """Somebody has stopped a command."""

    exit_code = 130

    def __init__(self, left: str = "") -> None:
        """Say what it leaves, and how to go on."""
        super().__init__(f"Interrupted. {left}".rstrip())


def _misplaced(error: click.UsageError) -> str:
    """Return how to write an option that was given after the command and stands before it; "" for any other error."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None or error.ctx.parent is None:
        return ""
    for option in cli.params:
        if isinstance(option, click.Option) and error.option_name in option.opts and option.name != "version":
            value = "" if option.is_flag else f" {option.metavar}"
            return (
                f"{error.option_name} stands before the command: "
                f"{error.ctx.parent.command_path} {error.option_name}{value} {error.ctx.info_name}"
            )
    return ""


def fail(message: str, code: int = 1, more: str = "") -> int:
    click.echo(f"chatdb: {one_line(message)}{more}", err=True)
    return code


def warn(message: str) -> None:
    click.echo(f"chatdb: warning: {one_line(message)}", err=True)


class WarningHandler(logging.Handler):
    """Prints what the library logs, for instance that it passed over a damaged line."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


@dataclass(frozen=True, slots=True)
class Options:
    """What stands before the command."""

    store: str | None
    settings: Sequence[str]
    json: bool

    def config(self, store: str | None = None) -> StorageConfig:
        """Gather the configuration.

        Raises:
            click.UsageError: An option or a variable does not fit.
        """
        store = store or self.store
        if store is not None and not _URL.match(store) and store.endswith(_OF_SQLITE):
            raise click.UsageError(
                f"{store} would be a folder. A file of SQLite is sqlite:{store}, and a folder of that name {store}/."
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                overrides = set_from_text(self.settings)
                if store is not None and _URL.match(store):
                    overrides["storage_url"] = store
                elif store is not None:
                    overrides |= {"storage_base_path": store, "storage_url": ""}
                config = load_config(**overrides)
                open_backend(config)
            except ConfigurationError as error:
                raise click.UsageError(str(error)) from error
        for warning in caught:
            warn(str(warning.message))
        return config

    def lasting(self, store: str | None = None) -> StorageConfig:
        """Gather the configuration of a store that a command fills.

        Raises:
            click.UsageError: An option or a variable does not fit, or the store would end with the command.
        """
        config = self.config(store)
        if config.storage_url.startswith("memory:"):
            raise click.UsageError("memory: ends with the command, and what is put there with it. Name another store.")
        return config

    def names_a_store(self) -> bool:
        """Tell whether a store was named in any way, be it the default one, rather than left to the default."""
        given = {name for name, _, _ in (text.partition("=") for text in self.settings)}
        given |= {name for name in _STORE_FIELDS if os.environ.get(ENVIRONMENT_PREFIX + name.upper())}
        return self.store is not None or not given.isdisjoint(_STORE_FIELDS)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[StorageManager]:
        """Open the store for reading; one that is absent is not made."""
        config = self.config()
        async with StorageManager(config, read_only=True) as storage:
            if not await storage.backend.exists(Layout(config).key("store")) and not await storage.count_users():
                raise no_store(config)
            yield storage

    def print(self, value: dict[str, Any]) -> None:
        """Print one line of JSON."""
        click.echo(json_line(value))


def place(config: StorageConfig) -> str:
    return without_password(config.storage_url) or config.storage_base_path


def no_store(config: StorageConfig) -> NotFoundError:
    hint = "Name one with --store; `chatdb import`, `restore`, `migrate` and `demo` make one."
    if config.storage_url.startswith("postgres"):
        hint = f"The database is there, with no tables of a store in this schema. {hint}"
    return NotFoundError(f"There is no chat store at {place(config)}.", hint=hint)


def dim(text: str) -> str:
    return click.style(text, dim=True)  # `click.echo` takes it out again where there is no terminal


def example(*lines: str) -> str:
    """Return what stands at the end of a command's help: how it is called; no line is broken."""
    return "\n  ".join(["\b\nExample:" if len(lines) == 1 else "\b\nExamples:", *lines])


def runs(function: Callable[P, Coroutine[Any, Any, int | None]]) -> Callable[P, int | None]:
    """Make a command of a coroutine function."""
    return leaves("")(function)


def leaves(left: str) -> Callable[[Callable[P, Coroutine[Any, Any, int | None]]], Callable[P, int | None]]:
    """Make a command of a coroutine function, and say what it leaves when it is interrupted, and how to go on."""

    def decorate(function: Callable[P, Coroutine[Any, Any, int | None]]) -> Callable[P, int | None]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> int | None:
            try:
                return asyncio.run(function(*args, **kwargs))
            except KeyboardInterrupt as error:
                raise Interrupted(left) from error

        return run

    return decorate


@click.group(cls=_Chatdb, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--store",
    metavar="PATH_OR_URL",
    help="The store: a folder, or a URL such as sqlite:chats.db, postgresql://user@host/database or "
    "s3://bucket/prefix. Default: $CHATDB_STORAGE_URL, $CHATDB_STORAGE_BASE_PATH or ./data.",
)
@click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a setting for this command; repeatable."
)
@click.option("--json", "as_json", is_flag=True, help="Print results as JSON, one object a line.")
@click.version_option(package_name="flatfile-chat-database", prog_name="chatdb", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, store: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Look into chat stores, in plain JSON files or in a database, fill them, move them and check them.

    Every setting of the library can also be given in the environment, as CHATDB_ and its name in capitals.
    """
    if store == "":
        raise click.UsageError("--store must not be empty.")
    if "NO_COLOR" in os.environ:
        context.color = False
    context.obj = Options(store, settings, as_json)
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


@asynccontextmanager
async def closing(backend: StorageBackend) -> AsyncIterator[StorageBackend]:
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


async def require_user(storage: StorageManager, user: str) -> None:
    if not await storage.user_exists(user):
        raise NotFoundError(f"There is no user {user!r}.", hint="`chatdb ls` lists them.")


async def require_session(storage: StorageManager, user: str, session: str) -> Session:
    await require_user(storage, user)
    found = await storage.get_session(user, session)
    if found is None:
        raise NotFoundError(f"The user {user!r} has no session {session!r}.", hint="`chatdb ls USER` lists them.")
    return found
