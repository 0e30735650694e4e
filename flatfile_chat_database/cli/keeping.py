"""Commands that fill a store and keep it well: demo, import, reindex, check."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import click

from ..addresses import without_password
from ..backends.opening import open_backend
from ..check import check as check_store
from ..config import StorageConfig
from ..demo import run_demo
from ..errors import ConfigurationError
from ..importers import FORMATS, Report, import_file
from ..storage import StorageManager
from ..terminal import duration, one_line, visible
from .frame import Options, cli, closing, dim, example, leaves, no_store, place, require_user
from .moving import import_own, max_ratio
from .progress import Show, progress

OWN_FORMAT = "chatdb"

# --- demo ----------------------------------------------------------------------------------------------


@cli.command(epilog=example("chatdb demo", "chatdb demo --store demo-chats"))
@click.option("--store", metavar="PATH_OR_URL", help="Where to make the store. Default: a new temporary folder.")
@click.pass_obj
def demo(options: Options, store: str | None) -> None:
    """Show what the library does, in a new store that stays.

    Stores chats in English and Chinese, a document with its analysis, contexts and a panel of personas; pages and
    searches; then prints the files it made.
    """
    config = options.config(store)
    if store is None and not options.names_a_store():
        config.storage_base_path = tempfile.mkdtemp(prefix="chatdb-demo-")
    place = without_password(config.storage_url) or os.path.abspath(config.storage_base_path)
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
    return f"{shlex.quote(sys.executable)} -m {__name__.partition('.')[0]}"


# --- import --------------------------------------------------------------------------------------------


@cli.command(
    "import",
    epilog=example(
        "chatdb --store chats import monday.tar.zst",
        "chatdb --store chats import chats.jsonl.gz --format openai-jsonl --user ada",
    ),
)
@click.argument("file", type=click.Path(exists=True, readable=True))
@click.option(
    "--format",
    "format_name",
    type=click.Choice([OWN_FORMAT, *FORMATS]),
    help="What the file holds. chatdb: a backup or an export, which is recognised without this. "
    'openai-jsonl: one conversation a line, {"id", "messages": [{"role", "content"}]}.',
)
@click.option("--user", "user_id", help="Whose sessions conversations become. Default: local.")
@click.option("--dry-run", is_flag=True, help="Write nothing; report what would be added.")
@max_ratio
@click.pass_obj
@leaves("What was imported stays; run it again, and it goes on.")
async def import_(
    options: Options, file: str, format_name: str | None, user_id: str | None, dry_run: bool, max_ratio: int
) -> int:
    """Import a backup or an export, or conversations of another format.

    An archive of chatdb, a file or a folder, is verified as a whole before anything is added. What is absent is added,
    a chat whose beginning is there is continued, and what is there but differs is left and reported, and the exit code
    is then 1. Running it again adds nothing. The trash of a backup is not imported: `chatdb restore` has it.

    FILE of another format may be plain or gzip. Ids are made from the source, so an import that is run again adds
    nothing, and one that was interrupted is completed by running it again. A conversation that has grown since is
    continued; one that differs from what was imported under its id is left as it is. The user is created if absent.
    What cannot be imported is skipped and reported, and the exit code is then 1.

    openai-jsonl: a line is {"id", "messages": [...]} or {"custom_id", "body": {"messages": [...]}}. Content in parts
    becomes its texts, one below the other. The title is the line's "title", or the beginning of its first user message.
    Times are "created_at", "timestamp" or "create_time" of messages, or else of the line; without any, 1970. Whatever
    has no field of its own stays in the metadata.
    """
    from ..transfer import is_archive

    is_folder, is_own = await asyncio.to_thread(lambda: (os.path.isdir(file), is_archive(file)))
    if format_name == OWN_FORMAT or (format_name is None and is_own):
        if user_id is not None:
            raise click.UsageError("--user: what an archive of chatdb holds stays with its users.")
        return await import_own(options, file, dry_run, max_ratio)
    if format_name is None and is_folder:
        raise click.UsageError(
            f"{file} is a folder, but no export of chatdb (`chatdb export`). A store is copied by `chatdb migrate`."
        )
    if format_name is None:
        raise click.UsageError(
            f"{file} is no backup and no export of chatdb. If it holds chats of another program, name their form with "
            f"--format, such as {next(iter(FORMATS))}."
        )
    if is_folder:
        raise click.UsageError(f"Invalid value for 'FILE': File '{file}' is a directory.")
    user_id = user_id or "local"
    config = options.config() if dry_run else options.lasting()
    began = time.monotonic()
    async with StorageManager(config, read_only=dry_run) as storage:
        with progress(os.path.basename(file), "messages", options) as show:
            report = await import_file(
                storage,
                file,
                user_id=user_id,
                format_name=format_name,
                dry_run=dry_run,
                progress=None if show is None else _messages_in(show),
            )
    seconds = time.monotonic() - began
    if options.json:
        names = {"file": file, "store": place(config), "user_id": user_id, "seconds": round(seconds, 3)}
        options.print(names | {"messages": report.messages} | asdict(report))
    else:
        verb = "would be imported" if dry_run else "imported"
        if not (report.sessions_added or report.added or report.already_there):
            verb = f"nothing {verb}"
        click.echo(f"{visible(file)}: {verb} into {visible(place(config))} for {visible(user_id)}")
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
                click.echo(dim(f"  line {skip.line:,}: {one_line(skip.detail)}"))
            if tally.count > len(tally.examples):
                click.echo(dim(f"  and {tally.count - len(tally.examples):,} more"))
            if tally.limit_name:
                # A log grows at its end only: what is left out now has no place between messages that are stored.
                first = "delete the session, then " if tally.limit_name == "max_message_size_bytes" else ""
                click.echo(f"  to raise the limit: {first}chatdb --set {tally.limit_name}=…")
        click.echo(dim(f"{duration(seconds)}, {report.messages / max(seconds, 1e-9):,.0f} messages/s"))
        if report.skipped:
            click.echo(f"Skipped in all: {_skipped(report)}.")
    return 1 if report.skipped else 0


def _messages_in(show: Show) -> Callable[[Report, int, int | None], None]:
    """Show how far an import is: the bytes that were read, and the messages in them."""
    return lambda report, position, size: show(position, size, report.messages)


def _skipped(report: Report) -> str:
    """Return how much of what was skipped."""
    counts = Counter[str]()
    for tally in report.skipped.values():
        counts[tally.part.value] += tally.count
    return ", ".join(f"{count:,} {part}{'s' if count > 1 else ''}" for part, count in counts.items())


# --- reindex -------------------------------------------------------------------------------------------


@cli.command(epilog=example("chatdb --store chats reindex ada"))
@click.argument("user", required=False)
@click.pass_obj
@leaves("Indexes that were built stay; run it again for the others.")
async def reindex(options: Options, user: str | None) -> None:
    """Build the search index of USER anew, or of every user who has one.

    Needed only after files were changed by hand. The indexes are made of the files and may be deleted at any moment;
    long histories get theirs by themselves.
    """
    config = options.config()
    began = time.monotonic()
    async with options.reading() as storage:
        if user is not None:
            await require_user(storage, user)
    async with StorageManager(config) as storage:
        count = await storage.reindex(user, progress=_sessions_done(options))
    seconds = time.monotonic() - began
    if options.json:
        options.print({"indexes": count, "seconds": round(seconds, 3)})
    else:
        click.echo(f"Indexes built: {count:,} in {duration(seconds)}.")


def _sessions_done(options: Options) -> Callable[[str, int, int], None] | None:
    """Return what shows how far a user's index is, if anybody can see it."""
    if options.json or not sys.stderr.isatty():
        return None

    def show(user: str, done: int, total: int) -> None:
        end = "\n" if done == total else ""
        click.echo(f"\r{visible(user)}: {done:,} of {total:,} sessions{end}", err=True, nl=False)

    return show


# --- check ---------------------------------------------------------------------------------------------


@cli.command(epilog=example("chatdb --store chats check", "chatdb --store chats check --fix"))
@click.option("--fix", is_flag=True, help="Repair what can be repaired without guessing; nothing is thrown away.")
@click.pass_obj
@leaves("What was repaired stays so; run it again.")
async def check(options: Options, fix: bool) -> int:
    """Find damage in a store, and repair it.

    Looks at everything and reports what does not fit. The exit code is 1 if something is wrong that affects an answer
    and was not repaired. With --json, the last line holds the counts and whether the store is clean.
    """
    config = options.config()
    # Not a StorageManager, which would refuse a store whose own file is damaged.
    async with closing(open_backend(config)) as backend:
        if not await backend.list_children(""):
            raise no_store(config)
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
