"""Commands for two stores that are one, while a backend is changed: mirror start, status, compare, switch, stop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from urllib.parse import parse_qs

import click

from ..addresses import without_password
from ..backends.mirrored import MirroredBackend
from ..backends.opening import open_backend
from ..errors import NotFoundError
from ..terminal import visible
from .frame import Options, cli, closing, example, leaves, runs
from .progress import progress


def _called(name: str) -> str:
    return example(f"chatdb --store 'mirrored:?from=file%3Achats&to=sqlite%3Anew.db' mirror {name}")


@cli.group(epilog=_called("start"))
def mirror() -> None:
    """Change the backend while the application goes on.

    The store is `mirrored:?from=URL&to=URL`, both URLs percent-encoded: give it to --store here and to every process
    of the application. Everything is read from the first store and written to it, and copied to the other one. When
    that has everything, `switch` makes it the first; called again it falls back. At the end give the application the
    URL of the store that you keep, and call `stop`.
    """


@asynccontextmanager
async def _opened(options: Options) -> AsyncIterator[tuple[MirroredBackend, list[str]]]:
    config = options.config()
    backend = open_backend(config)
    if not isinstance(backend, MirroredBackend):
        raise click.UsageError("--store must be mirrored:?from=URL&to=URL, both percent-encoded.")
    urls = parse_qs(config.storage_url.partition("?")[2])
    async with closing(backend):
        yield backend, [visible(without_password(urls[name][0])) for name in ("from", "to")]


@mirror.command(epilog=_called("start"))
@click.pass_obj
@leaves("What was copied stays, and those who write go on with the rest; run it again to wait for it.")
async def start(options: Options) -> int:
    """Copy everything to the second store, and wait until it has it. Others may write meanwhile."""
    async with _opened(options) as (backend, urls):
        if not await backend.exists(backend.layout.key("store")):
            first = urls[backend.first is backend.stores[1]]
            raise NotFoundError(f"There is no chat store at {first}.", hint="Look at `from` in the URL.")
        await backend.start()
    return await _status(options)


@mirror.command(epilog=_called("status"))
@click.pass_obj
@runs
async def status(options: Options) -> int:
    """Show which store is the first one, and how much the other may lack."""
    return await _status(options)


async def _status(options: Options) -> int:
    async with _opened(options) as (backend, urls):
        found = await backend.status()
    if options.json:
        options.print(asdict(found) | {"first": urls[found.first], "second": urls[1 - found.first]})
    else:
        click.echo(f"first   {urls[found.first]}")
        click.echo(f"second  {urls[1 - found.first]}")
        click.echo(f"state   {found.phase}, epoch {found.epoch}")
        click.echo(f"behind  {found.behind:,} keys and folders at most, in {found.records:,} records")
        if found.problem:
            click.echo(f"The second store cannot be used now: {visible(found.problem)}")
    return 1 if found.problem else 0


@mirror.command(epilog=_called("compare"))
@click.option("--fix", is_flag=True, help="Copy what differs from the first store to the second.")
@click.pass_obj
@runs
async def compare(options: Options, fix: bool) -> int:
    """Compare every key of both stores. The exit code is 1 if some differ and were not copied."""
    async with _opened(options) as (backend, _):
        with progress("comparing", "keys", options) as show:
            step = None if show is None else lambda done: show(done, None, done)
            found = await backend.compare(fix=fix, progress=step)
    if options.json:
        options.print(asdict(found) | {"fixed": fix})
    else:
        for key in found.differing:
            click.echo(f"{'copied ' if fix else 'differs'}  {visible(key)}")
        click.echo(f"Compared: {found.keys:,} keys, of which {found.count:,} differ{'ed' if fix else ''}.")
    return 1 if found.count and not fix else 0


@mirror.command(epilog=_called("switch"))
@click.pass_obj
@leaves("Look at `chatdb mirror status` whether it was done.")
async def switch(options: Options) -> None:
    """Make the second store the first one, and the first the second; call it again to fall back.

    Others may go on writing; they wait until the second store has everything.
    """
    async with _opened(options) as (backend, urls):
        first = await backend.switch()
    if options.json:
        options.print({"first": urls[first], "second": urls[1 - first]})
    else:
        click.echo(f"The first store is {urls[first]} now.")


@mirror.command(epilog=_called("stop"))
@click.pass_obj
@leaves("Run it again: the mirroring may have ended in one of the two stores only.")
async def stop(options: Options) -> None:
    """End the mirroring: take out of both stores what it keeps in them.

    Every process of the application must use the URL of the first store alone by now.
    """
    async with _opened(options) as (backend, urls):
        await backend.stop()
        first = backend.first is backend.stores[1]
    if options.json:
        options.print({"first": urls[first]})
    else:
        click.echo(f"The mirroring has ended. The store is {urls[first]}.")
