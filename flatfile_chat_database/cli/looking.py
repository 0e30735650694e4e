"""Commands that look into a store: ls, show, tail, search."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import asdict
from typing import Any, Literal

import click

from ..errors import PlaceLostError
from ..models import Message, Session
from ..storage import StorageManager
from ..terminal import block, one_line, table, utc, visible
from .frame import Options, cli, dim, example, require_session, require_user, runs, warn

_ALL = sys.maxsize
_COUNTED_AT_ONCE = 100


# --- ls ------------------------------------------------------------------------------------------------


@cli.command(epilog=example("chatdb --store chats ls", "chatdb --store chats ls ada --limit 10"))
@click.argument("user", required=False)
@click.option("--limit", type=click.IntRange(0), default=_ALL, help="At most this many; all when left out.")
@click.option("--offset", type=click.IntRange(0), default=0, help="Skip this many.")
@click.pass_obj
@runs
async def ls(options: Options, user: str | None, limit: int, offset: int) -> None:
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
            await require_user(storage, user)
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
    click.echo(dim(first))
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


@cli.command(epilog=example("chatdb --store chats show ada SESSION --offset -5"))
@click.argument("user")
@click.argument("session")
@click.option("--limit", type=click.IntRange(0), help="At most this many messages; all when left out.")
@click.option("--offset", type=int, default=0, help="Skip this many; negative: count from the end.")
@click.option("--strict", is_flag=True, help="Stop at a damaged line instead of passing over it.")
@click.pass_obj
@runs
async def show(options: Options, user: str, session: str, limit: int | None, offset: int, strict: bool) -> None:
    """Print the messages of a session.

    Oldest first; from --offset, at most --limit.
    """
    async with options.reading() as storage:
        found = await require_session(storage, user, session)
        if not options.json:
            click.echo(one_line(found.title) or visible(found.id))
            click.echo(dim(f"{visible(found.id)}, updated {utc(found.updated_at)} UTC"))
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


def _print_message(options: Options, message: Message, session: str = "", **more: str) -> None:
    if options.json:
        fields = asdict(message)
        if message.parent_id is None:
            del fields["parent_id"]
        options.print(({"session_id": session} if session else {}) | fields | more)
        return
    click.echo()
    click.echo(
        "  ".join([visible(message.role), dim(utc(message.timestamp)), *[dim(visible(session))] * bool(session)])
    )
    if message.content:
        click.echo(block(message.content))
    for name in message.attachments:
        click.echo(dim(f"  [{visible(name)}]"))


@cli.command(
    epilog=example(
        "chatdb --store chats tail ada SESSION -n 20", "chatdb --store chats --json tail -f ada --cursor beginning"
    )
)
@click.argument("user")
@click.argument("session", required=False)
@click.option(
    "-n", "--lines", "count", type=click.IntRange(0), help="How many messages of a SESSION; 10 when left out."
)
@click.option("-f", "--follow", is_flag=True, help="Go on with new messages as they come, until interrupted.")
@click.option(
    "--cursor", help="With -f: begin behind the message that was printed with this cursor, or at `beginning`."
)
@click.pass_obj
def tail(options: Options, user: str, session: str | None, count: int | None, follow: bool, cursor: str | None) -> None:
    """Print the newest messages of a session, or follow what comes.

    With -f, go on with those that come, until interrupted; a session that does not exist yet is waited for. Without a
    SESSION follow all of the user's. With --json each message that is followed has a cursor: given to --cursor, it
    goes on from there, with nothing left out and nothing printed twice.
    """
    if not follow and session is None:
        raise click.UsageError("Name a SESSION, or follow all of them with -f.")
    if not follow and cursor is not None:
        raise click.UsageError("--cursor needs -f.")
    if count is not None and (session is None or cursor is not None):
        raise click.UsageError(f"-n cannot be given {'with --cursor' if session else 'without a SESSION'}.")
    if count is None:
        count = 0 if session is None or cursor is not None else 10
    try:
        asyncio.run(_tail(options, user, session, count, follow, cursor))
    except KeyboardInterrupt:
        if not follow:
            raise


async def _tail(options: Options, user: str, session: str | None, count: int, follow: bool, cursor: str | None) -> None:
    async with options.reading() as storage:
        if follow:
            await _say_what_is_waited_for(storage, user, session)
            await _follow(options, storage, user, session, count, cursor)
        elif session is not None:
            await require_session(storage, user, session)
            for message in await storage.get_messages(user, session, count, -count) if count else []:
                _print_message(options, message)


async def _say_what_is_waited_for(storage: StorageManager, user: str, session: str | None) -> None:
    if session is None and not await storage.user_exists(user):
        click.echo(one_line(f"chatdb: waiting for the user {user!r} …"), err=True)
    elif session is not None and not await storage.session_exists(user, session):
        click.echo(one_line(f"chatdb: waiting for the session {session!r} of the user {user!r} …"), err=True)


async def _follow(
    options: Options, storage: StorageManager, user: str, session: str | None, count: int, cursor: str | None
) -> None:
    while True:
        if session is None:
            watch = storage.watch_user(user, cursor=cursor)
        else:
            watch = storage.watch_session(user, session, cursor=cursor, last=count)
        try:
            async for arrival in watch:
                of = arrival.session_id if session is None else None
                _print_message(options, arrival.message, of or "", cursor=arrival.cursor)
        except PlaceLostError as lost:
            warn(f"{lost.message} It is printed from its beginning.")
            cursor, count = lost.cursor, 0


# --- search --------------------------------------------------------------------------------------------


@cli.command(epilog=example("chatdb --store chats search 'read file*' --user ada --order relevance"))
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
@runs
async def search(
    options: Options,
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
        await require_user(storage, user)
        if session is not None:
            await require_session(storage, user, session)
        hits = await storage.search(query, user_id=user, session_id=session, order=order, limit=limit)
    for number, hit in enumerate(hits):
        if options.json:
            options.print(asdict(hit))
            continue
        if number:
            click.echo()
        what = hit.message.role if hit.message is not None else hit.filename or hit.kind
        click.echo(f"{visible(hit.session_id)}  {visible(what)}  {dim(utc(hit.timestamp))}")
        click.echo(f"  {one_line(hit.snippet)}")
    if not hits:
        click.echo("Nothing found.", err=True)
