"""Where a store in an object store is: a bucket and a prefix of it, and how to speak to its server."""

from __future__ import annotations

import hashlib
import os
import re
from datetime import timedelta
from typing import Any, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
from obstore.exceptions import BaseError
from obstore.store import S3Store

from ...addresses import without_password
from ...config import StorageConfig
from ...errors import ConfigurationError, ValidationError
from ..rules import check_key

_FORM = "Write s3://bucket/prefix?endpoint=URL&region=NAME; endpoint and region may come from AWS_* variables."
_KEYS = "Put keys into the variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or let the machine's role give them."
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,254}")
_LONG = timedelta(days=365)
"""No limit that anybody notices."""


class Target(msgspec.Struct, frozen=True):
    """A bucket, a prefix of it, and its server."""

    name: str
    """What to call it in messages; there is never a secret in it."""
    bucket: str
    prefix: str
    endpoint: str
    """Empty: that of AWS."""
    region: str
    single_writer: bool
    """Whether no other process writes, as the user says; only then may a store ignore conditions."""
    connect_seconds: float
    seconds: float

    @property
    def identity(self) -> str:
        """A name for what is derived from this store and kept elsewhere."""
        text = "\0".join((self.endpoint, self.bucket, self.prefix))
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def client(self, *, patient: bool = False) -> S3Store:
        """Return a way to speak to the server; a patient one waits for each piece of an answer, however many come.

        Keys come from the usual environment variables, or from the machine's role.

        Raises:
            ConfigurationError: It cannot be made of these settings.
        """
        connect = timedelta(seconds=self.connect_seconds) if self.connect_seconds else _LONG
        limit = timedelta(seconds=self.seconds) if self.seconds else _LONG
        options: dict[str, Any] = {"timeout": _LONG, "read_timeout": limit} if patient else {"timeout": limit}
        options |= {"allow_http": self.endpoint.startswith("http://"), "connect_timeout": connect}
        given: dict[str, Any] = {"endpoint": self.endpoint} if self.endpoint else {}
        problem = None
        try:
            return S3Store(
                self.bucket,
                prefix=self.prefix or None,
                client_options=cast("Any", options),
                retry_config={"max_retries": 0},  # what is tried again is decided in `objects.py`
                region=self.region,
                **given,
            )
        except (BaseError, ValueError) as error:
            problem = type(error).__name__
        raise ConfigurationError(f"{self.name}: the client refuses these settings ({problem}).", hint=_FORM)


def target_of(config: StorageConfig) -> Target:
    """Read the URL; do no I/O.

    Raises:
        ConfigurationError: It is none that names a bucket, or has a secret in it.
    """
    url = config.storage_url
    if "@" in url.partition("?")[0]:
        raise ConfigurationError("storage_url of s3 has a user or a password in it.", hint=_KEYS)
    try:
        parts = urlsplit(url)
        parameters = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        parts, parameters = urlsplit("s3:"), []
    bucket, prefix = parts.netloc, unquote(parts.path).strip("/")
    if not _BUCKET.fullmatch(bucket) or parts.fragment:
        raise ConfigurationError("storage_url with the scheme s3 names no bucket.", hint=_FORM)
    if prefix:
        try:
            check_key(prefix)
        except ValidationError:
            raise ConfigurationError("storage_url: the prefix in the bucket is no key.", hint=_FORM) from None
    name = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
    given = dict(parameters)
    if len(given) < len(parameters) or given.keys() - {"endpoint", "region"}:
        wrong = sorted(given.keys() - {"endpoint", "region"})
        what = f"has no parameter {wrong[0][:40]!r}" if wrong else "has a parameter twice"
        raise ConfigurationError(f"storage_url: {name} {what}.", hint=f"{_FORM} {_KEYS}")
    environment = os.environ  # the usual names of these settings, which every tool for S3 reads
    endpoint = given.get("endpoint") or environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    if endpoint and (not endpoint.startswith(("http://", "https://")) or "@" in endpoint):
        raise ConfigurationError(
            f"{name}: the endpoint {without_password(endpoint)!r} is no http:// or https:// address.", hint=_FORM
        )
    region = given.get("region") or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    return Target(
        name,
        bucket,
        prefix,
        (endpoint or "").rstrip("/"),
        region or "us-east-1",
        config.object_store_single_writer,
        config.object_store_connect_timeout_seconds,
        config.object_store_timeout_seconds,
    )
