"""Stores in an S3 server that the tests of one process share; looked at by the tests' own means.

Each test gets a prefix of its own in one bucket, which takes no time.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import obstore
from obstore.store import S3Store

from .servers import ACCESS_KEY, SECRET_KEY, CephServer, S3Server, ceph_server

BUCKET = "chats"
OWN = "system/objects/"

_servers: dict[int, CephServer] = {}
_numbers = itertools.count()


def server() -> CephServer:
    """Return the server of this process; it starts with the first call, and stops when the process ends."""
    found = _servers.get(os.getpid())
    if found is None:
        stack = ExitStack()
        found = _servers[os.getpid()] = stack.enter_context(ceph_server())
        atexit.register(stack.close)
        make_bucket(found, BUCKET)
    return found


def let_in() -> None:
    """Put the keys of the servers where clients look for them; other processes inherit them."""
    os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = ACCESS_KEY, SECRET_KEY


def client(server: S3Server, bucket: str = BUCKET, prefix: str = "") -> S3Store:
    """Return a client of the tests' own."""
    return S3Store(
        bucket,
        prefix=prefix or None,
        endpoint=f"http://127.0.0.1:{server.port}",
        region="us-east-1",
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )


def make_bucket(server: S3Server, name: str) -> None:
    """Make a bucket."""
    url = obstore.sign(client(server, name), "PUT", "/", timedelta(minutes=5))
    with urllib.request.urlopen(urllib.request.Request(url, method="PUT")) as answer:
        assert answer.status == 200


def url_of(server: S3Server, bucket: str = BUCKET, prefix: str = "") -> str:
    """Return the URL of a store."""
    return f"s3://{bucket}/{prefix}?endpoint=http://127.0.0.1:{server.port}&region=us-east-1"


def empty_store() -> str:
    """Return the URL of a store with nothing in it."""
    let_in()
    return url_of(server(), BUCKET, f"{os.getpid()}-{next(_numbers)}")


# --- the back door ---------------------------------------------------------------------------------------


@functools.cache
def _inside(url: str, process: int) -> S3Store:
    bucket, _, rest = url.removeprefix("s3://").partition("/")
    prefix, _, query = rest.partition("?")
    port = int(query.partition("&")[0].rpartition(":")[2])
    return client(S3Server(port), bucket, prefix)


def inside(url: str) -> S3Store:
    """Return a client for the objects of a store."""
    return _inside(url, os.getpid())


def get(url: str, path: str) -> bytes | None:
    """Return an object."""
    try:
        return bytes(obstore.get(inside(url), path).bytes())
    except FileNotFoundError:
        return None


def put(url: str, path: str, data: bytes) -> None:
    """Write an object, whatever is there."""
    obstore.put(inside(url), path, data, use_multipart=False)


def delete(url: str, path: str) -> None:
    """Remove an object."""
    obstore.delete(inside(url), path)


@contextmanager
def read_only() -> Iterator[None]:
    """Let the keys be good for reading only."""
    server().administer("user", "modify", "--uid=t", "--op-mask=read")
    try:
        yield
    finally:
        server().administer("user", "modify", "--uid=t", "--op-mask=read,write,delete")


def paths(url: str) -> list[str]:
    """Return the paths of all objects."""
    return [str(each["path"]) for run in obstore.list(inside(url)) for each in run]


def manifest(url: str, key: str) -> tuple[dict[str, Any], bytes] | None:
    """Return the manifest at a key and what follows it; None if there are the bytes themselves, or nothing."""
    data = get(url, key)
    if data is None or not data.startswith(b'{"chatdb":'):
        return None
    line, _, rest = data.partition(b"\n")
    return json.loads(line), rest


def peek(url: str, key: str) -> bytes | None:
    """Return the bytes at a key."""
    found = manifest(url, key)
    if found is None:
        return get(url, key)
    facts, rest = found
    if facts["chatdb"] == "gone":
        return None
    parts = [(get(url, f"{OWN}parts/{part[0]}") or b"")[: part[1]] for part in facts.get("parts", [])]
    content = b"".join([*parts, rest])
    number = facts.get("through", 0)
    while facts["chatdb"] == "log":
        number += 1
        segment = get(url, f"{OWN}segments/{facts['generation']}/{number:012d}")
        if segment is None:
            break
        line, _, lines = segment.partition(b"\n")
        content += lines[json.loads(line)["own_at"] :]
    return content


def peek_keys(url: str) -> list[str]:
    """Return all keys."""
    listed = [each for run in obstore.list(inside(url)) for each in run if not each["path"].startswith(OWN)]
    small = [each["path"] for each in listed if each["size"] < 100]  # what stands for nothing is
    gone = {key for key in small if (manifest(url, key) or ({"chatdb": ""}, b""))[0]["chatdb"] == "gone"}
    return [each["path"] for each in listed if each["path"] not in gone]
