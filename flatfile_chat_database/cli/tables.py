"""The command that tells which table of a database holds what: schema."""

from __future__ import annotations

from importlib import resources

import click

from ..backends import sql
from ..backends.tables import Tables
from ..layout import Layout
from .frame import Options, cli, example


def _scripts() -> dict[str, list[str]]:
    """Return the statements that make the tables of each database, in the order of their versions."""
    found: dict[str, list[str]] = {}
    for script in sorted(resources.files(sql).iterdir(), key=lambda script: script.name):
        if script.name.endswith(".sql"):
            found.setdefault(script.name.partition("_")[0], []).append(script.read_text("utf-8"))
    return found


@cli.command(epilog=example("chatdb schema", "chatdb schema --sql sqlite"))
@click.option("--sql", "database", type=click.Choice(sorted(_scripts())), help="Print the statements that make them.")
@click.pass_obj
def schema(options: Options, database: str | None) -> None:
    """Tell which table of a database holds what is in which file.

    The names are the same in SQLite and in PostgreSQL. The JSON of a document or a message stands in the column
    `body`, byte for byte; the columns beside it are there to ask for. Read them as you like, and change them only
    through the library.
    """
    if database is not None:
        click.echo("\n".join(_scripts()[database]).rstrip("\n"))
        return
    layout = Layout(options.config())
    rows = Tables(layout).mapping()
    if options.json:
        for row in rows:
            options.print({"entry": row.entry, "key": row.pattern, "table": row.table, "columns": list(row.columns)})
        return
    width = max(len(row.table) for row in rows)
    for row in rows:
        click.echo(f"{row.table:{width}}  {row.pattern}")
        click.echo(f"{'':{width}}  {', '.join(row.columns)}")
