"""Servers that tests start for themselves: on free ports of loopback, in temporary folders, gone at the end.

A server that is not installed fails the tests where CI runs, and skips them, with its name, elsewhere; `make servers`
installs what is missing.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PATIENCE_SECONDS = 60


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def missing(server: str) -> None:
    """Skip the test, for a server is not installed; where CI runs that is a failure (`conftest.py`)."""
    import pytest  # which the benchmarks, that start servers as well, do without

    pytest.skip(f"{server} is not installed: `make servers` installs it")


class PostgresServer:
    """A PostgreSQL of the newest version that is installed.

    It runs as the user `postgres` when we are root, for it refuses to run as root.
    """

    def __init__(self, folder: Path, *, durable: bool = False, settings: tuple[str, ...] = ()) -> None:
        """Keep it in an empty folder; `durable` flushes as it does in production."""
        self.folder = folder
        self.port = free_port()
        self._settings = settings
        self._durable = durable
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def url(self, database: str = "postgres", **options: str) -> str:
        """Return the address of a database."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}" + (f"?{query}" if query else "")

    def make(self) -> None:
        """Make an empty cluster."""
        arguments = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        self.run("initdb", "-D", str(self.data), *arguments)

    def make_replica_of(self, primary: PostgresServer, name: str) -> None:
        """Make a copy that follows a server which runs; `name` is what `synchronous_standby_names` may say."""
        address = f"host=127.0.0.1 port={primary.port} user=postgres application_name={name}"
        self.run("pg_basebackup", "-d", address, "-D", str(self.data), "-R", "-c", "fast", "-X", "stream", "--no-sync")

    def promote(self) -> None:
        """Make a replica a server that is written to."""
        self.run("pg_ctl", "promote", "-D", str(self.data), "-w", "-t", str(_PATIENCE_SECONDS))

    def start(self) -> None:
        """Start the server and wait until it answers."""
        lax = () if self._durable else ("fsync=off", "full_page_writes=off", "synchronous_commit=off")
        settings = ("listen_addresses=127.0.0.1", "shared_buffers=64MB", "max_connections=100", *lax, *self._settings)
        flags = [part for setting in settings for part in ("-c", setting)]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [_program("postgres"), "-D", self.data, "-p", str(self.port), "-k", self.folder, *flags],
                stdout=log,
                stderr=log,
                start_new_session=True,  # a group of its own, to be killed as one
                **self._identity(),
            )
        end = time.monotonic() + _PATIENCE_SECONDS
        while subprocess.run(
            [_program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)], check=False
        ).returncode:
            assert self._process.poll() is None and time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.02)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start it now and stop it at the end, whatever was done to it meanwhile."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """Stop it: connections are ended, nothing is lost."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGINT)
            process.wait(_PATIENCE_SECONDS)

    def kill(self) -> None:
        """End it as a crash does, with all of its processes."""
        process, self._process = self._process, None
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_PATIENCE_SECONDS)
            (self.data / "postmaster.pid").unlink(missing_ok=True)

    def run(self, program: str, *arguments: str) -> str:
        """Run one of PostgreSQL's programs as the server's user; return what it prints."""
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [_program(program), *arguments], check=False, capture_output=True, text=True, **self._identity()
        )
        assert done.returncode == 0, f"{program}: {done.stderr}"
        return done.stdout

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run a statement with psql; return what it prints, without decoration."""
        return self.run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", self.url(database), "-c", statement).strip()

    def _identity(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {"cwd": self.folder}
        return {"user": "postgres", "group": "postgres", "extra_groups": [], "cwd": self.folder}


def is_postgres_installed() -> bool:
    """Tell whether there is a PostgreSQL to start."""
    return _find("postgres") is not None


def _program(name: str) -> str:
    found = _find(name)
    if found is None:
        missing("PostgreSQL")
    return str(found)


def _find(name: str) -> str | None:
    """Return the path of one of PostgreSQL's programs; Debian does not put them all on the path."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    return str(versions[-1] / name) if versions else shutil.which(name)


@contextmanager
def server_folder() -> Iterator[Path]:
    """A folder that PostgreSQL may use, with a path that is short enough for its socket."""
    folder = Path(tempfile.mkdtemp(prefix="chatdb-pg-", dir="/tmp"))
    try:
        if os.geteuid() == 0:
            try:
                owner = pwd.getpwnam("postgres")
            except KeyError:
                missing("PostgreSQL")
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def postgres_server(*, durable: bool = False, settings: tuple[str, ...] = ()) -> Iterator[PostgresServer]:
    """A server of its own, for whoever is going to kill it."""
    with server_folder() as folder:
        server = PostgresServer(folder, durable=durable, settings=settings)
        server.make()
        with server.running():
            yield server


@contextmanager
def postgres_replica(primary: PostgresServer, name: str, *, durable: bool = False) -> Iterator[PostgresServer]:
    """A server that follows another one; it may be promoted."""
    with server_folder() as folder:
        replica = PostgresServer(folder, durable=durable)
        replica.make_replica_of(primary, name)
        with replica.running():
            yield replica
