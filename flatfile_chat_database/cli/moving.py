"""Commands that move whole stores: export, backup, restore; and what `import` does with an archive of chatdb."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..storage import StorageManager
from ..terminal import duration, visible
from ..transfer.formats import FORMATS, GZIP, MOST_RATIO, ZSTD
from .frame import Options, cli, dim, example, leaves, place, warn
from .progress import counted, progress

if TYPE_CHECKING:
    from ..transfer import ArchiveReport, ImportReport, Keys

_NOT_MADE = "Nothing has the name yet; run it again, which begins anew."

max_ratio = click.option(
    "--max-ratio",
    type=click.IntRange(1),
    default=MOST_RATIO,
    show_default=True,
    help="Refuse a file of which more bytes come out than this for each one in it, beyond the first 64 MiB.",
)

_LABELS = {
    "messages": "message logs",
    "panel_messages": "panel logs",
    "documents": "document lists",
    "analysis": "analyses",
    "trash": "files in the trash",
    "quarantine": "quarantined files",
}
"""What counts are called that are not of their entry's name."""

# --- export and backup ---------------------------------------------------------------------------------


@cli.command(
    epilog=example("chatdb --store chats export ada --user ada", "chatdb --store chats export everybody.tar.zst")
)
@click.argument("target", type=click.Path())
@click.option("--user", "user_id", help="Only the records of this user.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(list(FORMATS)),
    help="What TARGET becomes. Default: what its ending says, otherwise a folder.",
)
@click.pass_obj
@leaves(_NOT_MADE)
async def export(options: Options, target: str, user_id: str | None, format_name: str | None) -> int:
    """Write the records of a store to a folder or a file, for people and other programs.

    In a folder they are plain files under store/, as a store of files keeps them, with checksums for `sha256sum -c`.
    What is in the trash or the quarantine is left out. They are as they were in one moment, also while others go on
    writing. TARGET must not exist; nothing is there before all of it is. `chatdb import` adds an export to a store.
    """
    from ..transfer import export_store

    began = time.monotonic()
    async with options.reading() as storage:
        with progress(f"export to {os.path.basename(target)}", "bytes", options) as show:
            report = await export_store(
                storage,
                target,
                user_id=user_id,
                format=format_name,
                progress=None if show is None else lambda done, total, _: show(done, total, done),
            )
    _print_written(options, report, time.monotonic() - began)
    return 0


@cli.command("backup", epilog=example("chatdb --store chats backup monday.tar.zst"))
@click.argument("file", type=click.Path())
@click.option(
    "--format",
    "format_name",
    type=click.Choice([ZSTD, GZIP]),
    help="Default: what the ending of FILE says, otherwise tar.zst where Zstandard is installed.",
)
@click.pass_obj
@leaves(_NOT_MADE)
async def backup_(options: Options, file: str, format_name: str | None) -> int:
    """Write everything that is in a store to one file, while others go on writing.

    Trash and quarantine are in it, search indexes are not: they are made anew. The store is as it was in one moment.
    FILE must not exist; it is written beside its place, read again and verified, and only then gets its name.
    """
    from ..transfer import backup

    began = time.monotonic()
    async with options.reading() as storage:
        with progress(f"backup to {os.path.basename(file)}", "bytes", options) as show:
            report = await backup(
                storage,
                file,
                format=format_name,
                progress=None if show is None else lambda done, total, _: show(done, total, done),
            )
    _print_written(options, report, time.monotonic() - began)
    return 0


def _print_written(options: Options, report: ArchiveReport, seconds: float) -> None:
    if options.json:
        options.print(asdict(report) | {"seconds": round(seconds, 3)})
    else:
        click.echo(f"{visible(report.path)}: {report.kind}, {report.format}, {counted(report.size, 'bytes')}")
        _print_counts(report.counts, report.files, report.bytes)
        click.echo(dim(f"{duration(seconds)}, {counted(report.bytes / max(seconds, 1e-9), 'bytes')}/s"))
    if report.left_out.count:
        warn(f"{report.left_out.count:,} files are not in it, for no store has such: {_some(report.left_out)}.")


def _print_counts(counts: dict[str, int], files: int, size: int) -> None:
    for name, count in counts.items():
        if name != "store":
            click.echo(f"  {_LABELS.get(name, name.replace('_', ' ') + 's'):<18}{count:>12,}")
    click.echo(f"  {'files in all':<18}{files:>12,}, {counted(size, 'bytes')}")


def _some(keys: Keys) -> str:
    names = ", ".join(map(visible, keys.examples))
    return names if keys.count == len(keys.examples) else f"{names} and {keys.count - len(keys.examples):,} more"


# --- restore -------------------------------------------------------------------------------------------


@cli.command(
    "restore",
    epilog=example(
        "chatdb --store restored restore monday.tar.zst", "chatdb --store sqlite:chats.db restore monday.tar.zst"
    ),
)
@click.argument("file", type=click.Path(exists=True))
@max_ratio
@click.pass_obj
@leaves("There is no store yet; run it again, which begins anew.")
async def restore_(options: Options, file: str, max_ratio: int) -> int:
    """Make a store of a backup, in the place that --store names.

    The place must be empty, and may be one of any kind: a backup of files can become a database, and the other way
    round. There is no store before all of it is there and every hash is right. Then it is checked; the exit code is 1
    if something is wrong in it, as it was in the store that the backup was made of.
    """
    from ..transfer import Limits, restore

    config = options.lasting()
    began = time.monotonic()
    with progress(f"restore {os.path.basename(file)}", "bytes", options) as show:
        report = await restore(
            file,
            config,
            limits=Limits(ratio=max_ratio),
            progress=None if show is None else lambda done, total, _: show(done, total, done),
        )
    seconds = time.monotonic() - began
    problems = [problem for problem in report.problems if not problem.harmless]
    if options.json:
        options.print({"file": file, "store": place(config), "seconds": round(seconds, 3)} | asdict(report))
    else:
        click.echo(f"{visible(file)}: restored into {visible(place(config))}")
        _print_counts(report.counts, report.files, report.bytes)
        click.echo(dim(f"{duration(seconds)}, {counted(report.bytes / max(seconds, 1e-9), 'bytes')}/s"))
        for problem in problems:
            click.echo(f"DAMAGE    {problem.kind:18}  {visible(problem.key)}: {visible(problem.detail)}")
        click.echo("The store is clean." if report.clean else f"Problems that need attention: {len(problems):,}.")
    return 0 if report.clean else 1


# --- import --------------------------------------------------------------------------------------------


async def import_own(options: Options, file: str, dry_run: bool, max_ratio: int) -> int:
    """Add an archive of chatdb to a store, and print what came of it; return the exit code."""
    from ..transfer import Limits, import_archive

    config = options.config() if dry_run else options.lasting()
    began = time.monotonic()
    async with StorageManager(config, read_only=dry_run) as storage:
        with progress(f"import {os.path.basename(file)}", "bytes", options) as show:
            report = await import_archive(
                storage,
                file,
                dry_run=dry_run,
                limits=Limits(ratio=max_ratio),
                progress=None if show is None else lambda done, total, _: show(done, total, done),
            )
    seconds = time.monotonic() - began
    if options.json:
        options.print({"file": file, "store": place(config), "seconds": round(seconds, 3)} | asdict(report))
    else:
        _print_import(report, f"{visible(file)}: {{}} into {visible(place(config))}")
        click.echo(dim(f"{duration(seconds)}, {report.files / max(seconds, 1e-9):,.0f} files/s"))
    return 1 if report.differing.count else 0


def _print_import(report: ImportReport, head: str) -> None:
    verb = "would be imported" if report.dry_run else "imported"
    click.echo(head.format(verb if report.added or report.continued else f"nothing {verb}"))
    rows: dict[str, Any] = {
        "files": report.files,
        "added": report.added,
        "continued": report.continued,
        "already there": report.already_there,
        "differing": report.differing.count,
        "left out": report.left_out,
    }
    for name, count in rows.items():
        click.echo(f"  {name:<14}{count:>12,}")
    for key in report.differing.examples:
        click.echo(f"left as it is: {visible(key)}")
    if report.differing.count > len(report.differing.examples):
        click.echo(dim(f"  and {report.differing.count - len(report.differing.examples):,} more"))
