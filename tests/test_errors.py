"""Errors: one base, facts that survive a process, messages that explain themselves."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from flatfile_chat_database import errors
from flatfile_chat_database.errors import (
    ClosedError,
    ConfigurationError,
    ConflictError,
    DurabilityError,
    IntegrityError,
    NotFoundError,
    PlaceLostError,
    StorageError,
    StorageLimitExceeded,
    UnavailableError,
    ValidationError,
)

LEAVES = [
    NotFoundError,
    ValidationError,
    ConflictError,
    IntegrityError,
    ConfigurationError,
    UnavailableError,
    DurabilityError,
    ClosedError,
]


def limit_exceeded() -> StorageLimitExceeded:
    return StorageLimitExceeded(limit_name="max_document_size_bytes", limit=100, value=101, key="a/b")


def test_every_error_has_the_one_base() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert set(kinds) == {StorageError, StorageLimitExceeded, PlaceLostError, *LEAVES}
    assert all(issubclass(kind, StorageError) for kind in kinds)


def test_errors_are_the_builtin_ones_where_python_has_the_word() -> None:
    assert issubclass(NotFoundError, LookupError)
    assert issubclass(ValidationError, ValueError)
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(StorageLimitExceeded, ValidationError)
    assert not issubclass(NotFoundError, ValueError)


@pytest.mark.parametrize("kind", [StorageError, *LEAVES])
def test_a_bare_error_explains_itself(kind: type[StorageError]) -> None:
    error = kind()
    assert str(error) == error.message == (kind.__doc__ or "").strip()
    assert "\n" not in str(error)
    assert str(error).endswith(".")
    assert (error.key, error.hint) == (None, None)


@pytest.mark.parametrize("kind", [StorageError, *LEAVES])
def test_an_error_carries_its_facts_and_the_way_out(kind: type[StorageError]) -> None:
    error = kind("It is broken.", key="a/b", hint="Mend it.")
    assert str(error) == "It is broken. Mend it."
    assert (error.message, error.key, error.hint) == ("It is broken.", "a/b", "Mend it.")


def test_a_lost_place_names_the_cursor_to_go_on_with_in_another_process_too() -> None:
    error = PlaceLostError(cursor="beginning", key="a/b")
    assert issubclass(PlaceLostError, ConflictError)
    assert str(error).startswith(str(PlaceLostError.__doc__))
    for each in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(each), each.cursor, each.key, str(each)) == (PlaceLostError, "beginning", "a/b", str(error))


def test_a_limit_names_the_field_its_value_and_what_is_over_it() -> None:
    error = limit_exceeded()
    assert (error.limit_name, error.limit, error.value, error.key) == ("max_document_size_bytes", 100, 101, "a/b")
    for fact in ("101", "100", "max_document_size_bytes"):
        assert fact in str(error)


@pytest.mark.parametrize("error", [kind("x", key="k", hint="h") for kind in LEAVES] + [limit_exceeded()], ids=repr)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(error: StorageError, protocol: int) -> None:
    error.extra = "set later"  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.args == error.args
    assert vars(again) == vars(error)
    assert vars(copy.deepcopy(error)) == vars(error)


def _raise_limit() -> None:
    raise limit_exceeded()


def test_an_error_comes_whole_out_of_a_process_pool() -> None:
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(StorageLimitExceeded, match="max_document_size_bytes") as caught,
    ):
        pool.submit(_raise_limit).result()
    assert (caught.value.limit, caught.value.value, caught.value.key) == (100, 101, "a/b")
