"""The contract of `backends/base.py` as tests that any backend can inherit.

    class TestMyBackend(BackendContract):
        capabilities = frozenset({Capability.PERSISTENT})

        @pytest.fixture(autouse=True)
        def medium(self, tmp_path):
            self.root = tmp_path / "store"

        def make_backend(self, config):
            return MyBackend(config, self.root)

        def peek(self, key): ...
        def poke(self, key, data): ...
        def peek_keys(self): ...

The back door (`peek`, `poke`, `peek_keys`) reads and writes the medium without the backend, so that two matching bugs
cannot cancel out. Cases run only where the capabilities that they need are declared; no case can be left out in any
other way. Call `pytest.register_assert_rewrite("flatfile_chat_database.testing")` in your `conftest.py` to see the
values in a failing assertion.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ..backends.base import Capability
from ..config import StorageConfig
from .blobs import BlobCases
from .case import BackendCase, needed_by
from .changes import ChangeCases
from .commits import CommitCases
from .documents import DocumentCases
from .extents import ExtentCases
from .handles import HandleCases
from .loading import LoadCases
from .logs import LogCases
from .sentences import contract_sentences, quotes
from .snapshots import SnapshotCases
from .waiting import WaitingCases


class BackendContract(
    DocumentCases,
    LogCases,
    CommitCases,
    LoadCases,
    ChangeCases,
    ExtentCases,
    WaitingCases,
    BlobCases,
    SnapshotCases,
    HandleCases,
):
    """Every sentence of the contract, shown on one backend. Fill in the hooks of BackendCase."""

    def test_every_sentence_of_the_contract_is_quoted(self) -> None:
        quoted = {quote for case in _cases().values() for quote in quotes(case)}
        sentences = contract_sentences()
        assert sorted(sentences - quoted) == [], "no case shows these sentences"
        assert sorted(quoted - sentences) == [], "these quotes are not in the contract"

    def test_every_capability_has_a_case(self) -> None:
        assert {capability for case in _cases().values() for capability in needed_by(case)} == set(Capability)

    def test_the_capabilities_are_those_that_the_backend_declares(self) -> None:
        assert self.make_backend(StorageConfig()).capabilities == self.capabilities

    def test_no_case_is_left_out(self, request: pytest.FixtureRequest) -> None:
        for name, case in _cases().items():
            assert getattr(type(self), name) is case, f"{name} is overridden"
        for item in request.session.items:
            if isinstance(item, pytest.Function) and item.cls is type(self):
                for mark in ("skip", "skipif", "xfail"):
                    assert item.get_closest_marker(mark) is None, f"{item.name} has the mark {mark}"


def _cases() -> dict[str, Callable[..., object]]:
    """Return the suite's cases by name."""
    kinds = [kind for kind in BackendContract.__mro__ if issubclass(kind, BackendCase)]
    return {name: getattr(BackendContract, name) for kind in kinds for name in vars(kind) if name.startswith("test_")}
