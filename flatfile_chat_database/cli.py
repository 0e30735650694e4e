"""`chatdb`: parse, call, print.

Exit codes: 0 done, 1 a problem was found or something failed, 2 the command line or the configuration is wrong,
130 interrupted. Results go to stdout; errors, warnings and progress to stderr.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, ParamSpec

import click

from .backends.base import StorageBackend, open_backend
from .check import check as check_store
from .config import ENVIRONMENT_PREFIX, StorageConfig, load_config, set_from_text
from .demo import run_demo
from .errors import ConfigurationError, NotFoundError, StorageError
from .follower import Follower
from .importers import FORMATS, Report, import_file
from .layout import Layout
from .models import Message, Session
from .storage import StorageManager
from .terminal import block, duration, json_line, one_line, table, utc, visible

P = ParamSpec("P")

_ALL = sys.maxsize
_POLL_SECONDS = 0.3
_COUNTED_AT_ONCE = 100
_STORE_FIELDS = ("storage_url", "storage_base_path")

# A URL's scheme has two letters or more; `./name:x` is always a path.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


# --- the frame -----------------------------------------------------------------------------------------


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
            code = _fail(_misplaced(error) or error.format_message(), 2, hint)
        except click.ClickException as error:
            code = _fail(error.format_message(), error.exit_code)
        except click.Abort:
            code = 130
        except StorageError as error:
            code = _fail(str(error))
        except OSError as error:
            place = f"{error.filename}: " if isinstance(error.filename, str) else ""
            code = _fail(f"{place}{error.strerror or error}")
        sys.exit(code if isinstance(code, int) else 0)


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


def _fail(message: str, code: int = 1, more: str = "") -> int:
    click.echo(f"chatdb: {one_line(message)}{more}", err=True)
    return code


def _warn(message: str) -> None:
    click.echo(f"chatdb: warning: {one_line(message)}", err=True)


class _WarningHandler(logging.Handler):
    """Prints what the library logs, for instance that it passed over a damaged line."""

    def emit(self, record: logging.LogRecord) -> None:
        _warn(record.getMessage())


@dataclass(frozen=True, slots=True)
class _Options:
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
            _warn(str(warning.message))
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
                raise _no_store(config)
            yield storage

    def print(self, value: dict[str, Any]) -> None:
        """Print one line of JSON."""
        click.echo(json_line(value))


def _place(config: StorageConfig) -> str:
    return config.storage_url or config.storage_base_path


def _no_store(config: StorageConfig) -> NotFoundError:
    return NotFoundError(
        f"There is no chat store at {_place(config)}.",
        hint="Name one with --store; `chatdb import` and `chatdb demo` make one.",
    )


def _dim(text: str) -> str:
    return click.style(text, dim=True)  # `click.echo` takes it out again where there is no terminal


def _runs(function: Callable[P, Coroutine[Any, Any, int | None]]) -> Callable[P, int | None]:
    """Make a command of a coroutine function."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> int | None:
        return asyncio.run(function(*args, **kwargs))

    return run


@click.group(cls=_Chatdb, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--store",
    metavar="PATH_OR_URL",
    help="The store: a folder, or a URL such as file:/srv/chats. Default: $CHATDB_STORAGE_URL, "
    "$CHATDB_STORAGE_BASE_PATH or ./data.",
)
@click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a setting for this command; repeatable."
)
@click.option("--json", "as_json", is_flag=True, help="Print results as JSON, one object a line.")
@click.version_option(package_name="flatfile-chat-database", prog_name="chatdb", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, store: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Look into chat stores made of plain JSON files, fill them and check them.

    Every setting of the library can also be given in the environment, as CHATDB_ and its name in capitals.
    """
    if store == "":
        raise click.UsageError("--store must not be empty.")
    if "NO_COLOR" in os.environ:
        context.color = False
    context.obj = _Options(store, settings, as_json)
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


# --- demo ----------------------------------------------------------------------------------------------


@cli.command()
@click.option("--store", metavar="PATH_OR_URL", help="Where to make the store. Default: a new temporary folder.")
@click.pass_obj
def demo(options: _Options, store: str | None) -> None:
    """Show what the library does, in a new store that stays.

    Stores chats in English and Chinese, a document with its analysis, contexts and a panel of personas; pages and
    searches; then prints the files it made.
    """
    config = options.config(store)
    if store is None and not options.names_a_store():
        config.storage_base_path = tempfile.mkdtemp(prefix="chatdb-demo-")
    place = config.storage_url or os.path.abspath(config.storage_base_path)
    made = asyncio.run(_demo(config, place, _program(), (lambda line: None) if options.json else click.echo))
    if options.json:
        options.print(made)


async def _demo(config: StorageConfig, place: str, program: str, say: Callable[[str], None]) -> dict[str, Any]:
    async with StorageManager(config) as storage:
        if await storage.backend.list_children(""):
            raise ConfigurationError(f"{place} is not empty.", hint="Give the demo a new folder.")
        return await run_demo(storage, place, program, say)


def _program() -> str:
    """Return how the user can call this program again."""
    if shutil.which("chatdb"):
        return "chatdb"
    if os.path.basename(sys.argv[0]) == "chatdb":
        return shlex.quote(sys.argv[0])
    return f"{shlex.quote(sys.executable)} -m {__package__}"


# --- import --------------------------------------------------------------------------------------------


@cli.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True))
@click.option(
    "--format",
    "format_name",
    type=click.Choice(list(FORMATS)),
    required=True,
    help='What the file holds. openai-jsonl: one conversation a line, {"id", "messages": [{"role", "content"}]}.',
)
@click.option("--user", "user_id", default="local", show_default=True, help="Whose sessions they become.")
@click.option("--dry-run", is_flag=True, help="Write nothing; report what would be added.")
@click.pass_obj
@_runs
async def import_(options: _Options, file: str, format_name: str, user_id: str, dry_run: bool) -> int:
    """Import conversations from a file.

    FILE may be plain or gzip. Ids are made from the source, so an import that is run again adds nothing, and one that
    was interrupted is completed by running it again. A conversation that has grown since is continued; one that differs
    from what was imported under its id is left as it is. The user is created if absent. What cannot be imported is
    skipped and reported, and the exit code is then 1.

    openai-jsonl: a line is {"id", "messages": [...]} or {"custom_id", "body": {"messages": [...]}}. Content in parts
    becomes its texts, one below the other. The title is the line's "title", or the beginning of its first user message.
    Times are "created_at", "timestamp" or "create_time" of messages, or else of the line; without any, 1970. Whatever
    has no field of its own stays in the metadata.
    """
    config = options.config()
    began = time.monotonic()
    async with StorageManager(config, read_only=dry_run) as storage:
        with _progress(os.path.basename(file), options) as progress:
            report = await import_file(
                storage, file, user_id=user_id, format_name=format_name, dry_run=dry_run, progress=progress
            )
    seconds = time.monotonic() - began
    if options.json:
        names = {"file": file, "store": _place(config), "user_id": user_id, "seconds": round(seconds, 3)}
        options.print(names | {"messages": report.messages} | asdict(report))
    else:
        verb = "would be imported" if dry_run else "imported"
        if not (report.sessions_added or report.added or report.already_there):
            verb = f"nothing {verb}"
        click.echo(f"{visible(file)}: {verb} into {visible(_place(config))} for {visible(user_id)}")
        rows = [
            ("conversations", report.conversations),
            ("messages", report.messages),
            ("added", report.added),
            ("already there", report.already_there),
            ("skipped", report.messages_skipped),
        ]
        for name, count in rows:
            click.echo(f"  {name:<14}{count:>12,}")
        for reason, tally in report.skipped.items():
            unit = tally.part.value + ("s" if tally.count > 1 else "")
            click.echo(f"skipped {tally.count:,} {unit}: {visible(reason)}")
            for skip in tally.examples:
                click.echo(_dim(f"  line {skip.line:,}: {one_line(skip.detail)}"))
            if tally.count > len(tally.examples):
                click.echo(_dim(f"  and {tally.count - len(tally.examples):,} more"))
            if tally.limit_name:
                # A log grows at its end only: what is left out now has no place between messages that are stored.
                first = "delete the session, then " if tally.limit_name == "max_message_size_bytes" else ""
                click.echo(f"  to raise the limit: {first}chatdb --set {tally.limit_name}=…")
        click.echo(_dim(f"{duration(seconds)}, {report.messages / max(seconds, 1e-9):,.0f} messages/s"))
        if report.skipped:
            click.echo(f"Skipped in all: {_skipped(report)}.")
    return 1 if report.skipped else 0


def _skipped(report: Report) -> str:
    """Return how much of what was skipped."""
    counts = Counter[str]()
    for tally in report.skipped.values():
        counts[tally.part.value] += tally.count
    return ", ".join(f"{count:,} {part}{'s' if count > 1 else ''}" for part, count in counts.items())


@contextmanager
def _progress(name: str, options: _Options) -> Iterator[Callable[[Report, int, int | None], None] | None]:
    """Show a progress bar while an import runs, if anybody can see it."""
    if options.json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    began = time.monotonic()
    with bar:
        task = bar.add_task(visible(name), total=None, rate="")

        def show(report: Report, position: int, size: int | None) -> None:
            rate = report.messages / max(time.monotonic() - began, 1e-9)
            text = f"{report.messages:,} messages, {rate:,.0f}/s"
            bar.update(task, completed=position, total=size, rate=text)

        yield show


# --- ls ------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("user", required=False)
@click.option("--limit", type=click.IntRange(0), default=_ALL, help="At most this many; all when left out.")
@click.option("--offset", type=click.IntRange(0), default=0, help="Skip this many.")
@click.pass_obj
@_runs
async def ls(options: _Options, user: str | None, limit: int, offset: int) -> None:
    """List users, or the sessions of a USER.

    Users come by id, sessions most recently updated first.
    """
    rows: list[tuple[str, ...]]
    head: tuple[str, ...]
    async with options.reading() as storage:
        if user is None:
            users = [item.user_id for item in await storage.list_users(limit, offset)]
            counts = await _gather(users, storage.count_sessions)
            rows = [(visible(name), f"{count:,}") for name, count in zip(users, counts, strict=True)]
            records = [{"user_id": name, "sessions": n} for name, n in zip(users, counts, strict=True)]
            head, right = ("USER", "SESSIONS"), (1,)
        else:
            await _require_user(storage, user)
            sessions = await storage.list_sessions(user, limit, offset)
            counts = await _gather(sessions, lambda session: storage.count_messages(user, session.id))
            rows, records = [], []
            for session, count in zip(sessions, counts, strict=True):
                rows.append((visible(session.id), utc(session.updated_at), f"{count:,}", one_line(session.title)))
                records.append(_session_fields(session) | {"messages": count})
            head, right = ("SESSION", "UPDATED (UTC)", "MESSAGES", "TITLE"), (2,)
    if options.json:
        for record in records:
            options.print(record)
        return
    if not rows:
        click.echo("No users to list." if user is None else "No sessions to list.", err=True)
        return
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    first, *lines = table(head, rows, right=right, columns=columns)
    click.echo(_dim(first))
    for line in lines:
        click.echo(line)


async def _gather(items: Sequence[Any], count: Callable[[Any], Coroutine[Any, Any, int]]) -> list[int]:
    """Count several things at once, but not thousands."""
    counts: list[int] = []
    for start in range(0, len(items), _COUNTED_AT_ONCE):
        counts += await asyncio.gather(*map(count, items[start : start + _COUNTED_AT_ONCE]))
    return counts


def _session_fields(session: Session) -> dict[str, Any]:
    fields = asdict(session)
    del fields["version"]
    return fields


# --- show and tail -------------------------------------------------------------------------------------


@cli.command()
@click.argument("user")
@click.argument("session")
@click.option("--limit", type=click.IntRange(0), help="At most this many messages; all when left out.")
@click.option("--offset", type=int, default=0, help="Skip this many; negative: count from the end.")
@click.option("--strict", is_flag=True, help="Stop at a damaged line instead of passing over it.")
@click.pass_obj
@_runs
async def show(options: _Options, user: str, session: str, limit: int | None, offset: int, strict: bool) -> None:
    """Print the messages of a session.

    Oldest first; from --offset, at most --limit.
    """
    async with options.reading() as storage:
        found = await _require_session(storage, user, session)
        if not options.json:
            click.echo(one_line(found.title) or visible(found.id))
            click.echo(_dim(f"{visible(found.id)}, updated {utc(found.updated_at)} UTC"))
        async for message in _messages(storage, found, limit, offset, strict):
            _print_message(options, message)


async def _messages(
    storage: StorageManager, session: Session, limit: int | None, offset: int, strict: bool
) -> AsyncIterator[Message]:
    if limit is not None or offset < 0:
        limit = _ALL if limit is None else limit
        for message in await storage.get_messages(session.user_id, session.id, limit, offset, strict=strict):
            yield message
        return
    position = 0
    async for message in storage.stream_messages(session.user_id, session.id, strict=strict):
        position += 1
        if position > offset:
            yield message


def _print_message(options: _Options, message: Message) -> None:
    if options.json:
        fields = asdict(message)
        if message.parent_id is None:
            del fields["parent_id"]
        options.print(fields)
        return
    click.echo()
    click.echo(f"{visible(message.role)}  {_dim(utc(message.timestamp))}")
    if message.content:
        click.echo(block(message.content))
    for name in message.attachments:
        click.echo(_dim(f"  [{visible(name)}]"))


@cli.command()
@click.argument("user")
@click.argument("session")
@click.option("-n", "--lines", "count", type=click.IntRange(0), default=10, show_default=True, help="How many.")
@click.option("-f", "--follow", is_flag=True, help="Go on with new messages as they come, until interrupted.")
@click.pass_obj
def tail(options: _Options, user: str, session: str, count: int, follow: bool) -> None:
    """Print the newest messages of a session.

    With -f, go on with those that come, until interrupted; a session that does not exist yet is waited for.
    """
    try:
        asyncio.run(_tail(options, user, session, count, follow))
    except KeyboardInterrupt:
        if not follow:
            raise


async def _tail(options: _Options, user: str, session: str, count: int, follow: bool) -> None:
    async with options.reading() as storage:
        if not follow:
            await _require_session(storage, user, session)
        elif not await storage.session_exists(user, session):
            click.echo(one_line(f"chatdb: waiting for the session {session!r} of the user {user!r} …"), err=True)
        follower = Follower(storage, user, session)
        for message in await follower.begin(count):
            _print_message(options, message)
        while follow:
            await asyncio.sleep(_POLL_SECONDS)
            for message in await follower.next():
                _print_message(options, message)


async def _require_user(storage: StorageManager, user: str) -> None:
    if not await storage.user_exists(user):
        raise NotFoundError(f"There is no user {user!r}.", hint="`chatdb ls` lists them.")


async def _require_session(storage: StorageManager, user: str, session: str) -> Session:
    await _require_user(storage, user)
    found = await storage.get_session(user, session)
    if found is None:
        raise NotFoundError(f"The user {user!r} has no session {session!r}.", hint="`chatdb ls USER` lists them.")
    return found


# --- search --------------------------------------------------------------------------------------------


@cli.command()
@click.argument("query")
@click.option("--user", required=True, help="Whose chats.")
@click.option("--session", help="Only in this session.")
@click.option("--limit", type=click.IntRange(0), help="At most this many; 20 unless configured otherwise.")
@click.option(
    "--order",
    type=click.Choice(["time", "relevance"]),
    default="time",
    show_default=True,
    help="Newest or best first.",
)
@click.pass_obj
@_runs
async def search(
    options: _Options,
    query: str,
    user: str,
    session: str | None,
    limit: int | None,
    order: Literal["time", "relevance"],
) -> None:
    """Search a user's chats.

    Finds messages, contexts and document analyses that hold every word of QUERY. Words match whole, whatever their case
    and accents; `word*` matches a beginning and "two words" a phrase; Chinese, Japanese and Korean text matches
    anywhere.
    """
    async with options.reading() as storage:
        await _require_user(storage, user)
        if session is not None:
            await _require_session(storage, user, session)
        hits = await storage.search(query, user_id=user, session_id=session, order=order, limit=limit)
    for number, hit in enumerate(hits):
        if options.json:
            options.print(asdict(hit))
            continue
        if number:
            click.echo()
        what = hit.message.role if hit.message is not None else hit.filename or hit.kind
        click.echo(f"{visible(hit.session_id)}  {visible(what)}  {_dim(utc(hit.timestamp))}")
        click.echo(f"  {one_line(hit.snippet)}")
    if not hits:
        click.echo("Nothing found.", err=True)


# --- reindex -------------------------------------------------------------------------------------------


@cli.command()
@click.argument("user", required=False)
@click.pass_obj
@_runs
async def reindex(options: _Options, user: str | None) -> None:
    """Build the search index of USER anew, or of every user who has one.

    Needed only after files were changed by hand. The indexes are made of the files and may be deleted at any moment;
    long histories get theirs by themselves.
    """
    config = options.config()
    began = time.monotonic()
    async with options.reading():
        pass
    async with StorageManager(config) as storage:
        count = await storage.reindex(user, progress=_sessions_done(options))
    seconds = time.monotonic() - began
    if options.json:
        options.print({"indexes": count, "seconds": round(seconds, 3)})
    else:
        click.echo(f"Indexes built: {count:,} in {duration(seconds)}.")


def _sessions_done(options: _Options) -> Callable[[str, int, int], None] | None:
    """Return what shows how far a user's index is, if anybody can see it."""
    if options.json or not sys.stderr.isatty():
        return None

    def show(user: str, done: int, total: int) -> None:
        end = "\n" if done == total else ""
        click.echo(f"\r{visible(user)}: {done:,} of {total:,} sessions{end}", err=True, nl=False)

    return show


# --- check ---------------------------------------------------------------------------------------------


@cli.command()
@click.option("--fix", is_flag=True, help="Repair what can be repaired without guessing; nothing is thrown away.")
@click.pass_obj
@_runs
async def check(options: _Options, fix: bool) -> int:
    """Find damage in a store, and repair it.

    Looks at everything and reports what does not fit. The exit code is 1 if something is wrong that affects an answer
    and was not repaired. With --json, the last line holds the counts and whether the store is clean.
    """
    config = options.config()
    # Not a StorageManager, which would refuse a store whose own file is damaged.
    async with _closing(open_backend(config)) as backend:
        if not await backend.list_children(""):
            raise _no_store(config)
        report = await check_store(backend, fix=fix)
    if options.json:
        for problem in report:
            options.print(asdict(problem))
        options.print({"counts": report.counts, "clean": report.clean})
        return 0 if report.clean else 1
    # Escaped one by one, before they are put together: a name with a newline in it would make a line of its own.
    report.problems = [replace(problem, key=visible(problem.key), detail=visible(problem.detail)) for problem in report]
    click.echo(str(report))
    return 0 if report.clean else 1


@asynccontextmanager
async def _closing(backend: StorageBackend) -> AsyncIterator[StorageBackend]:
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


def main() -> None:
    """Run `chatdb` with the arguments of the process."""
    # A terminal that cannot show a character is no reason to fail.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("flatfile_chat_database")
    logger.addHandler(_WarningHandler())
    logger.propagate = False
    cli(prog_name="chatdb")
