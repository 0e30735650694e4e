"""Commands that take a store to another backend: migrate."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import click

from ..backends.opening import open_backend
from ..terminal import duration, visible
from ..transfer.migrate import MigrationReport, migrate
from .frame import Options, cli, closing, dim, example, leaves, place
from .progress import progress

_SHOWN = 10
"""So many keys of a kind are printed."""


@cli.command(
    "migrate",
    epilog=example(
        "chatdb migrate ./chats sqlite:chats.db --dry-run", "chatdb migrate ./chats postgresql://chats@localhost/chats"
    ),
)
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--dry-run", is_flag=True, help="Write nothing; report what would be copied.")
@click.pass_obj
@leaves("What was copied stays, and is no store yet; run it again, and it goes on.")
async def migrate_(options: Options, source: str, target: str, dry_run: bool) -> int:
    """Copy a whole store to another place.

    FROM and TO are folders or URLs, of whatever kinds. Everything is copied as it is, byte by byte: users, sessions,
    messages, documents, panels, personas, what is in the trash and what is damaged; then TO is read and
    compared, and FROM once more unless it can tell that nothing has changed. Search indexes are not copied: they are
    made anew.

    TO must be empty, or what an earlier run has begun: a migration that was interrupted is completed by running it
    again. TO cannot be used before it is complete. FROM may be used meanwhile; what changed there is then counted, the
    exit code is 1, and running it again copies the rest. Stop the application for the last run.
    """
    configs = [options.config(source), options.config(target) if dry_run else options.lasting(target)]
    began = time.monotonic()
    async with closing(open_backend(configs[0])) as one, closing(open_backend(configs[1])) as other:
        with progress("to be compared" if dry_run else "copying, then comparing", "keys", options) as show:
            step = None if show is None else lambda done, total: show(done, total, done)
            report = await migrate(one, other, dry_run=dry_run, progress=step)
    seconds = time.monotonic() - began
    names = {"source": place(configs[0]), "target": place(configs[1]), "seconds": round(seconds, 3)}
    if options.json:
        options.print(names | _facts(report))
    else:
        _show(report, place(configs[0]), place(configs[1]), seconds)
    return 0 if report.finished or (dry_run and not report.foreign) else 1


def _facts(report: MigrationReport) -> dict[str, Any]:
    facts = asdict(report)
    found = facts.pop("found")
    return {
        **{name: found[name] for name in ("keys", "bytes", "counts")},
        **facts,
        "damaged": {"count": found["damaged_count"], "first": found["damaged"]},
        "sha256": report.found.digest,
    }


def _show(report: MigrationReport, source: str, target: str, seconds: float) -> None:
    verb = "would be copied" if report.dry_run else "copied"
    click.echo(f"{visible(source)} to {visible(target)}")
    found = report.found
    for name, count in [*found.counts.items(), ("keys in all", found.keys), ("bytes", found.bytes)]:
        click.echo(f"  {name:<16}{count:>14,}")
    tallies = [
        (verb, report.copied),
        ("logs continued", report.continued),
        ("replaced", report.replaced),
        ("removed", report.removed),
        ("there already", report.equal),
    ]
    click.echo("keys " + ", ".join(f"{name}: {count:,}" for name, count in tallies if count or name == verb))
    messages = found.counts.get("messages", 0) + found.counts.get("panel messages", 0)
    click.echo(dim(f"{duration(seconds)}, {messages / max(seconds, 1e-9):,.0f} messages/s"))
    if found.damaged_count:
        click.echo(f"Damaged in the source, and copied as they are: {found.damaged_count:,}.")
        _show_some([f"{key}: {damage}" for key, damage in found.damaged.items()], found.damaged_count)
    if report.foreign:
        click.echo(f"Something else is in the target, and was left as it is: {report.foreign.count:,} keys.")
        _show_some(report.foreign.first, report.foreign.count)
    if report.differing:
        click.echo(f"Not the same in both stores: {report.differing.count:,} keys.")
        _show_some(report.differing.first, report.differing.count)
    if report.changed:
        click.echo(f"Changed in the source meanwhile: {report.changed:,} keys. Run it again.")
    if report.finished:
        click.echo(f"Complete, and compared: SHA-256 of all {found.digest}.")


def _show_some(lines: list[str], count: int) -> None:
    for line in lines[:_SHOWN]:
        click.echo(f"  {visible(line)}")
    if count > _SHOWN:
        click.echo(f"  … and {count - _SHOWN:,} more")
