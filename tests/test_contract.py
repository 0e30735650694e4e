"""The contract suite itself: it quotes every sentence, leaves nothing out, and catches backends that break rules."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from flatfile_chat_database.backends.base import Capability, StorageBackend
from flatfile_chat_database.backends.changes import (
    Absent,
    Append,
    Change,
    Edit,
    Move,
    Outcome,
    Put,
    Quota,
    Require,
    Truncate,
)
from flatfile_chat_database.backends.rules import check_key, good_lines, mended
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.testing import contract, waiting
from flatfile_chat_database.testing.case import BackendCase, needs
from flatfile_chat_database.testing.contract import BackendContract
from flatfile_chat_database.testing.sentences import contract_sentences, says, split_sentences

from . import test_backends
from .test_backends import SixMethods

# --- sentences -----------------------------------------------------------------------------------------


def test_a_docstring_is_cut_into_its_sentences() -> None:
    text = """Return the bytes, or None. `data` must end; "" is all.

    Condition: nothing is
    at or below `target`
    """
    assert split_sentences(text) == [
        "Return the bytes, or None.",
        '`data` must end; "" is all.',
        "Condition: nothing is at or below `target`",
    ]


def test_the_contract_is_read_from_every_docstring() -> None:
    sentences = contract_sentences()
    owners = {owner for owner, _ in sentences}
    methods = {
        f"StorageBackend.{name}" for name in vars(StorageBackend) if inspect.isfunction(vars(StorageBackend)[name])
    }
    assert {owner for owner in owners if owner.startswith("StorageBackend.")} == {
        name for name in methods if not name.startswith("StorageBackend._") or name.endswith("__init__")
    }
    assert {kind.__name__ for kind in (Put, Append, Edit, Truncate, Move, Quota)} <= owners
    assert {f"Capability.{capability.name}" for capability in Capability} <= owners
    assert {"ANY", "ABSENT", "backends.base"} <= owners
    assert ("StorageBackend.delete", "Return whether there was anything.") in sentences
    assert len(sentences) > 80


def test_a_sentence_without_a_case_and_a_quote_without_a_sentence_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = test_backends.TestSixMethods()
    suite.test_every_sentence_of_the_contract_is_quoted()
    cases = contract._cases()
    quoting = "test_deleting_removes_one_key_and_tells_whether_it_was_there"
    monkeypatch.setattr(contract, "_cases", lambda: {name: case for name, case in cases.items() if name != quoting})
    with pytest.raises(AssertionError, match="no case shows these sentences"):
        suite.test_every_sentence_of_the_contract_is_quoted()

    @says("StorageBackend.delete", "Return the moon.")
    def boast() -> None:
        pass

    monkeypatch.setattr(contract, "_cases", lambda: cases | {"boast": boast})
    with pytest.raises(AssertionError, match="these quotes are not in the contract"):
        suite.test_every_sentence_of_the_contract_is_quoted()


# --- nothing is left out -------------------------------------------------------------------------------


class Suite(test_backends.TestSixMethods):
    """Not collected: for the tests below."""

    __test__ = False

    async def test_that_skips_itself(self) -> None:
        pytest.skip("no time")

    @needs(Capability.PROCESSES)
    async def test_that_needs_processes(self) -> None:
        raise AssertionError("it ran")


def test_a_case_is_skipped_only_for_a_capability_that_is_not_declared() -> None:
    suite = Suite()
    with pytest.raises(pytest.skip.Exception, match="does not declare processes"):
        suite.test_that_needs_processes()  # type: ignore[unused-coroutine]
    with pytest.raises(pytest.fail.Exception, match="may be skipped only for a capability"):
        suite.test_that_skips_itself()  # type: ignore[unused-coroutine]


def test_what_is_declared_is_what_the_backend_declares() -> None:
    class Boasting(test_backends.TestSixMethods):
        __test__ = False
        capabilities = frozenset({Capability.PROCESSES})

    suite = Boasting()
    suite.data = {}
    with pytest.raises(AssertionError):
        suite.test_the_capabilities_are_those_that_the_backend_declares()


def test_a_case_cannot_be_overridden(request: pytest.FixtureRequest) -> None:
    class Easier(test_backends.TestSixMethods):
        __test__ = False

        async def test_the_newest_records_are_dropped(self) -> None:
            pass

    with pytest.raises(AssertionError, match="test_the_newest_records_are_dropped is overridden"):
        Easier().test_no_case_is_left_out(request)


def test_a_suite_needs_its_back_door() -> None:
    class Incomplete(BackendContract):
        __test__ = False

        def make_backend(self, config: StorageConfig) -> StorageBackend:
            return SixMethods(config, {})

    with pytest.raises(TypeError, match="abstract"):
        Incomplete()  # type: ignore[abstract]


# --- backends that break the rules -----------------------------------------------------------------------

Method = Callable[..., Any]


async def read_absent_as_empty(self: SixMethods, key: str) -> bytes:
    return await SixMethods.read(self, key) or b""


async def write_at_the_end(self: SixMethods, key: str, data: bytes) -> bool:
    return await SixMethods.write(self, key, self.data.get(key, b"") + data)


async def write_without_looking_at_the_key(self: SixMethods, key: str, data: bytes) -> bool:
    self.data[key] = data
    return True


async def append_to_half_a_line(self: SixMethods, key: str, data: bytes) -> bool:
    self.data[check_key(key)] = self.data.get(key, b"") + data
    return True


async def append_with_a_gap(self: SixMethods, key: str, data: bytes) -> bool:
    before, _ = mended(self.data.get(check_key(key), b""))
    await test_backends._give_way()
    self.data[key] = before + data
    return True


async def delete_is_always_true(self: SixMethods, key: str) -> bool:
    await SixMethods.delete(self, key)
    return True


async def a_folder_exists(self: SixMethods, key: str) -> bool:
    return any(name == key or name.startswith(f"{key}/") for name in self.data)


async def keys_as_they_come(self: SixMethods, prefix: str) -> list[str]:
    return [key for key in self.data if key.startswith(prefix)]


async def keys_of_a_folder(self: SixMethods, prefix: str) -> list[str]:
    start = f"{prefix.rstrip('/')}/" if prefix else ""
    return sorted(key for key in self.data if key.startswith(start))


async def children_again_and_again(self: SixMethods, folder: str) -> list[str]:
    start = f"{folder}/" if folder else ""
    return [key[len(start) :].split("/")[0] for key in await self.list_keys(start)]


async def commit_beside_others(self: SixMethods, changes: Sequence[Change]) -> list[Outcome]:
    for change in changes:
        await self._check(change)
    return [await self._apply(change) for change in changes]


async def commit_one_after_the_other(self: SixMethods, changes: Sequence[Change]) -> list[Outcome]:
    outcomes = []
    async with self._turn:
        for change in changes:
            await self._check(change)
            outcomes.append(await self._apply(change))
    return outcomes


async def commit_until_cancelled(self: SixMethods, changes: Sequence[Change]) -> list[Outcome]:
    async with self._turn:
        for change in changes:
            await self._check(change)
        return [await self._apply(change) for change in changes]


async def commit_backwards(self: SixMethods, changes: Sequence[Change]) -> list[Outcome]:
    return (await StorageBackend.commit(self, changes[::-1]))[::-1]


def without_condition(kind: type) -> Method:
    async def check(self: SixMethods, change: Change) -> None:
        if not isinstance(change, kind):
            await StorageBackend._check(self, change)

    return check


def applying(kind: type, other: Callable[[Any], Change]) -> Method:
    async def apply(self: SixMethods, change: Change) -> Outcome:
        return await StorageBackend._apply(self, other(change) if isinstance(change, kind) else change)

    return apply


async def append_the_same_again(self: SixMethods, change: Change) -> Outcome:
    if not isinstance(change, Append):
        return await StorageBackend._apply(self, change)
    await self.append(change.key, b"".join(change.lines) or b"\n")
    return len(change.lines)


async def truncate_newest_first(self: SixMethods, change: Change) -> Outcome:
    outcome = await StorageBackend._apply(self, change)
    return outcome[::-1] if isinstance(change, Truncate) and isinstance(outcome, list) else outcome


async def log_with_its_tail(
    self: SixMethods, key: str, start: int = 0, stop: int | None = None, **_: bool
) -> list[bytes]:
    return good_lines(key, (await self.read(key) or b"") + b"\n", newline=False)[start:stop]


async def log_up_to_the_damage(
    self: SixMethods, key: str, start: int = 0, stop: int | None = None, *, strict: bool = False
) -> list[bytes]:
    good = await StorageBackend.read_log(self, key, strict=strict)
    lines = (await self.read(key) or b"").split(b"\n")
    return [line for number, line in enumerate(good) if lines[number] == line][start:stop]


async def log_of_any_lines(
    self: SixMethods, key: str, start: int = 0, stop: int | None = None, **_: bool
) -> list[bytes]:
    return (await self.read(key) or b"").split(b"\n")[:-1][start:stop]


async def log_from_the_front(
    self: SixMethods, key: str, start: int = 0, stop: int | None = None, *, strict: bool = False
) -> list[bytes]:
    return (await StorageBackend.read_log(self, key, strict=strict))[max(start, 0) : stop]


async def position_from_one(self: SixMethods, key: str, record_id: str) -> tuple[int, bytes] | None:
    found = await StorageBackend.find_record(self, key, record_id)
    return found and (found[0] + 1, found[1])


async def newest_in_order_of_keys(self: SixMethods, keys: Sequence[str]) -> list[bytes | None]:
    return await StorageBackend.newest_records(self, sorted(keys))


async def many_without_the_absent(self: SixMethods, keys: Sequence[str]) -> list[bytes | None]:
    return [data for data in await StorageBackend.read_many(self, keys) if data is not None]


async def blob_over_another(self: SixMethods, key: str, chunks: AsyncIterator[bytes]) -> bool:
    return await self.write(key, b"".join([chunk async for chunk in chunks]))


async def blob_piece_by_piece(self: SixMethods, key: str, chunks: AsyncIterator[bytes]) -> bool:
    if await self.exists(key):
        return False
    self.data[check_key(key)] = b""
    async for chunk in chunks:
        self.data[key] += chunk
    return True


async def blob_of_nothing(self: SixMethods, key: str) -> AsyncIterator[bytes]:
    yield await self.read(key) or b""


async def set_aside_without_a_trace(self: SixMethods, key: str, reason: str) -> str:
    await self.delete(key)
    return key


async def open_with_a_file(self: SixMethods) -> None:
    self.data.setdefault("own", b"")


MUTANTS: dict[str, tuple[str, Method, str]] = {
    "reading what is absent gives nothing": ("read", read_absent_as_empty, "reading_returns_the_bytes_or_none"),
    "writing appends": ("write", write_at_the_end, "readers_beside_a_writer_see_whole_writes_only"),
    "keys are not looked at": ("write", write_without_looking_at_the_key, "what_is_no_key_is_refused_by_every_method"),
    "appending glues": ("append", append_to_half_a_line, "half_a_line_is_not_appended"),
    "appends overwrite each other": ("append", append_with_a_gap, "half_a_line_is_not_appended"),
    "deleting is always true": (
        "delete",
        delete_is_always_true,
        "deleting_removes_one_key_and_tells_whether_it_was_there",
    ),
    "a folder is a key": ("exists", a_folder_exists, "what_is_no_key_is_refused_by_every_method"),
    "keys come unsorted": ("list_keys", keys_as_they_come, "every_legal_key_holds_its_own_bytes"),
    "a prefix is a folder": ("list_keys", keys_of_a_folder, "a_prefix_is_a_text_and_not_a_folder"),
    "children come more than once": ("list_children", children_again_and_again, "children_are_the_next_segments"),
    "every child is a folder": (
        "list_folders",
        StorageBackend.list_children,
        "folders_are_children_with_keys_below_them",
    ),
    "commits mix": ("commit", commit_beside_others, "a_hundred_committers_at_once_lose_no_update"),
    "commits are checked one by one": (
        "commit",
        commit_one_after_the_other,
        "a_commit_with_a_condition_that_fails_changes_nothing",
    ),
    "cancelling tears": ("commit", commit_until_cancelled, "a_cancelled_commit_happens_wholly_or_not_at_all"),
    "changes are applied backwards": ("commit", commit_backwards, "a_commit_returns_an_outcome_for_each_change"),
    "no version is checked": ("_check", without_condition(Put), "a_commit_with_a_condition_that_fails_changes_nothing"),
    "nothing is required": ("_check", without_condition(Require), "what_is_no_key_is_refused_by_every_method"),
    "nothing must be absent": ("_check", without_condition(Absent), "what_is_no_key_is_refused_by_every_method"),
    "no quota": ("_check", without_condition(Quota), "a_commit_with_a_condition_that_fails_changes_nothing"),
    "no condition of an append": (
        "_check",
        without_condition(Append),
        "a_commit_with_a_condition_that_fails_changes_nothing",
    ),
    "no condition of an edit": (
        "_check",
        without_condition(Edit),
        "a_commit_with_a_condition_that_fails_changes_nothing",
    ),
    "no condition of a truncation": (
        "_check",
        without_condition(Truncate),
        "a_commit_with_a_condition_that_fails_changes_nothing",
    ),
    "moving onto something": ("_check", without_condition(Move), "what_is_no_key_is_refused_by_every_method"),
    "the same record twice": ("_apply", append_the_same_again, "a_message_without_a_newline_is_completed"),
    "an edit drops": (
        "_apply",
        applying(Edit, lambda edit: Edit(edit.key, edit.record_id, edit.expected, None)),
        "a_message_without_a_newline_is_completed",
    ),
    "a truncation drops one too many": (
        "_apply",
        applying(Truncate, lambda cut: Truncate(cut.key, cut.count and cut.count + 1)),
        "a_message_without_a_newline_is_completed",
    ),
    "a truncation answers newest first": ("_apply", truncate_newest_first, "the_newest_records_are_dropped"),
    "a move leaves its source": (
        "_apply",
        applying(Move, lambda move: Put(move.target, b"moved")),
        "a_commit_returns_an_outcome_for_each_change",
    ),
    "half a line is a record": ("read_log", log_with_its_tail, "half_a_line_at_the_end_is_no_record_and_no_damage"),
    "damage hides what follows": ("read_log", log_up_to_the_damage, "positions_are_those_of_a_slice"),
    "damage is a record": ("read_log", log_of_any_lines, "positions_are_those_of_a_slice"),
    "negative positions are zero": ("read_log", log_from_the_front, "positions_are_those_of_a_slice"),
    "positions begin with one": ("find_record", position_from_one, "a_bad_line_is_reported_and_hides_nothing"),
    "newest records come sorted": (
        "newest_records",
        newest_in_order_of_keys,
        "newest_records_come_in_the_order_asked_for",
    ),
    "absent documents are left out": (
        "read_many",
        many_without_the_absent,
        "many_documents_come_in_the_order_asked_for",
    ),
    "a blob overwrites": ("write_blob", blob_over_another, "a_blob_is_never_overwritten"),
    "a blob grows in its place": ("write_blob", blob_piece_by_piece, "an_error_in_the_chunks_leaves_nothing_behind"),
    "a blob that is absent is empty": ("read_blob", blob_of_nothing, "a_blob_that_is_absent_is_an_error"),
    "what is set aside is gone": ("set_aside", set_aside_without_a_trace, "what_is_set_aside_is_kept_with_a_note"),
    "opening makes a file": ("open", open_with_a_file, "every_legal_key_holds_its_own_bytes"),
}


def first_failure(
    broken: type[SixMethods], caplog: pytest.LogCaptureFixture, begin_with: str | None = None
) -> str | None:
    """Run the suite on a backend and return the first case that fails; `begin_with` is the one that runs first."""
    cases = contract._cases()
    first = {} if begin_with is None else {begin_with: cases.pop(begin_with)}
    for name, case in (first | cases).items():
        for arguments in _arguments(case, caplog):
            caplog.clear()
            try:
                getattr(_suite_of(broken), name)(**arguments)
            except pytest.skip.Exception as skipped:
                assert "does not declare" in str(skipped)
            except (Exception, pytest.fail.Exception):
                return name
    return None


def _suite_of(broken: type[SixMethods]) -> BackendContract:
    class Broken(test_backends.TestSixMethods):
        __test__ = False

        def make_backend(self, config: StorageConfig) -> StorageBackend:
            return broken(config, self.data)

    suite = Broken()
    suite.data = {}
    return suite


def _arguments(case: Callable[..., object], caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return what the marks of a case give it; none for a case about the suite itself."""
    combinations: list[dict[str, Any]] = [{"caplog": caplog}]
    for mark in getattr(case, "pytestmark", []):
        names = [mark.args[0]] if isinstance(mark.args[0], str) else list(mark.args[0])
        values = [value if len(names) > 1 else (value,) for value in mark.args[1]]
        combinations = [one | dict(zip(names, other, strict=True)) for one in combinations for other in values]
    wanted = inspect.signature(case).parameters.keys() - {"self"}
    given = [{name: value for name, value in one.items() if name in wanted} for one in combinations]
    return [arguments for arguments in given if arguments.keys() == wanted]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_backend_that_breaks_a_rule_is_caught(mutant: str, caplog: pytest.LogCaptureFixture) -> None:
    name, method, case = MUTANTS[mutant]
    assert first_failure(type("Broken", (SixMethods,), {name: method}), caplog, f"test_{case}") is not None


def test_a_backend_that_wakes_nobody_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait_for_change(self: SixMethods, keys: Sequence[str] | frozenset[str], seconds: float) -> None:
        await asyncio.sleep(min(seconds, self.config.watch_poll_seconds))

    monkeypatch.setattr(waiting, "_PATIENCE", 0.5)
    suite, case = (
        _suite_of(type("Broken", (SixMethods,), {"wait_for_change": wait_for_change})),
        "wakes_who_waits_for_it",
    )
    with pytest.raises(TimeoutError):
        getattr(suite, f"test_a_change_{case}")()


@pytest.mark.slow
def test_the_backend_that_breaks_no_rule_is_not_caught(caplog: pytest.LogCaptureFixture) -> None:
    assert first_failure(SixMethods, caplog) is None


def test_a_case_is_run_outside_of_any_plugin() -> None:
    assert not any(inspect.iscoroutinefunction(case) for case in contract._cases().values())
    assert issubclass(BackendContract, BackendCase)
