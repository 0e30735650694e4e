"""The simulated file system answers as the real one does, and remembers what is durable."""

import contextlib
import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database.backends.flatfile.files import Files, FileStatus
from flatfile_chat_database.testing.disk import Disk, Left, Renamed, Synced, Write
from flatfile_chat_database.testing.simulated import Killed, SimulatedFiles

NAMES = ["a", "b", "c", "a/a", "a/b", "b/a", "b/c", "a/a/a", "a/a/b", "b/a/c", "x" * 300]
STEPS = 150


class Twins:
    """The same calls on a real folder and on a simulated one; descriptors go by the number of their opening."""

    def __init__(self, folder: Path) -> None:
        self.disk = Disk()
        self.disk.make_folders(str(folder))
        self.folder = str(folder)
        self.systems: list[tuple[Files, Files]] = [
            (Files(), Files()),
            (SimulatedFiles(self.disk), SimulatedFiles(self.disk)),
        ]
        self.opened: list[tuple[int, tuple[int, int]]] = []

    def both(self, process: int, call: Callable[[Files, int], Any]) -> Any:
        """Make a call on both; return what it returned, or the number of its error."""
        answers: list[Any] = []
        for kind, processes in enumerate(self.systems):
            try:
                answers.append(plain(call(processes[process], kind)))
            except OSError as error:
                answers.append(errno.errorcode[error.errno or 0])
        if isinstance(answers[0], Descriptor) and isinstance(answers[1], Descriptor):
            self.opened.append((process, (answers[0].number, answers[1].number)))
            return "opened"
        assert answers[0] == answers[1]
        return answers[0]

    def close(self) -> None:
        for process, (real, _) in self.opened:
            with contextlib.suppress(OSError):
                self.systems[0][process].close(real)


class Descriptor:
    def __init__(self, number: int) -> None:
        self.number = number


def plain(answer: Any) -> Any:
    """Return what two file systems have to agree on."""
    if isinstance(answer, FileStatus):
        return answer.kind, answer.mode, answer.size if answer.kind == "file" else None
    return sorted(answer) if isinstance(answer, list) else answer


def step(dice: random.Random, twins: Twins) -> tuple[str, Any]:
    path = f"{twins.folder}/{dice.choice(NAMES)}"
    other = f"{twins.folder}/{dice.choice(NAMES)}"
    data = bytes([dice.randrange(97, 123)]) * dice.choice([0, 1, 5, 700])
    offset, size = dice.choice([-1, 0, 0, 3, 10, 5000]), dice.choice([0, 1, 7, 2000])
    process = dice.randrange(2)
    named: dict[str, Callable[[Files, int], Any]] = {
        "open_to_read": lambda files, _: Descriptor(files.open_to_read(path)),
        "open_to_append": lambda files, _: Descriptor(files.open_to_append(path)),
        "open_to_change": lambda files, _: Descriptor(files.open_to_change(path)),
        "create": lambda files, _: Descriptor(files.create(path)),
        "open_lock": lambda files, _: Descriptor(files.open_lock(path)),
        **(
            {"create_to_append": lambda files, _: Descriptor(files.create_to_append(path))}
            if hasattr(Files, "create_to_append")
            else {}
        ),
        "status": lambda files, _: files.status(path),
        "rename": lambda files, _: files.rename(path, other),
        "remove": lambda files, _: files.remove(path),
        "make_folder": lambda files, _: files.make_folder(path),
        "remove_folder": lambda files, _: files.remove_folder(path),
        "sync_folder": lambda files, _: files.sync_folder(path),
        "list_folder": lambda files, _: files.list_folder(path),
        "set_mode": lambda files, _: files.set_mode(path, 0o755),
    }
    described: dict[str, Callable[[Files, int], Any]] = {}
    numbers = (0, 0)
    if twins.opened:
        process, numbers = dice.choice(twins.opened)
        described = {
            "read": lambda files, kind: files.read(numbers[kind], size, offset),
            "write": lambda files, kind: files.write(numbers[kind], data),
            "write_at": lambda files, kind: files.write_at(numbers[kind], data, offset),
            "reserve": lambda files, kind: files.reserve(numbers[kind], offset, size),
            "drop_cache": lambda files, kind: files.drop_cache(numbers[kind]),
            "truncate": lambda files, kind: files.truncate(numbers[kind], size),
            "sync": lambda files, kind: files.sync(numbers[kind]),
            "status_of": lambda files, kind: files.status_of(numbers[kind]),
            "try_lock": lambda files, kind: files.try_lock(numbers[kind]),
            "try_share": lambda files, kind: files.try_share(numbers[kind]),
            "unlock": lambda files, kind: files.unlock(numbers[kind]),
        }
        if dice.random() < 0.1:
            described["close"] = lambda files, kind: files.close(numbers[kind])
    names = list(named) + list(described) * 2
    name = dice.choice(names)
    answer = twins.both(process, (named | described)[name])
    if name == "close":  # the real system gives the number to the next file
        twins.opened.remove((process, numbers))
    return name, answer


@pytest.mark.parametrize("seed", range(60))
def test_random_calls_have_the_same_results_and_errors_as_on_the_real_file_system(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    twins = Twins(tmp_path)
    seen: set[str] = set()
    try:
        for _ in range(STEPS):
            name, _ = step(dice, twins)
            seen.add(name)
        real = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*")}
        disk, start = twins.disk, f"{tmp_path}/"
        inside = {path[len(start) :]: node for path, node in disk.paths().items() if path.startswith(start)}
        assert inside.keys() == real.keys()
        for name, path in real.items():
            assert inside[name].kind == ("folder" if path.is_dir() else "file")
            if path.is_file():
                assert inside[name].content() == path.read_bytes()
    finally:
        twins.close()
    assert len(seen) > 15


def test_a_killed_process_leaves_its_bytes_and_lets_go_of_its_lock() -> None:
    disk = Disk()
    one, other = SimulatedFiles(disk), SimulatedFiles(disk)
    written = one.open_lock("/lock")
    assert one.try_lock(written)
    one.write(written, b"half a l")
    seen = other.open_lock("/lock")
    assert not other.try_lock(seen)
    one.kill()
    assert other.try_lock(seen)
    assert other.read(seen, 100, 0) == b"half a l"
    with pytest.raises(Killed):
        one.write(written, b"ine")


def test_the_log_says_what_was_changed_and_what_was_synced() -> None:
    disk = Disk()
    files = SimulatedFiles(disk)
    descriptor = files.create("/a")
    files.write(descriptor, b"one")
    files.sync(descriptor)
    files.rename("/a", "/b")
    files.sync_folder("/")
    files.remove("/b")
    kinds = [type(event) for event in disk.log if isinstance(event, Write | Renamed | Left | Synced)]
    assert kinds == [Write, Synced, Renamed, Synced, Left]


def test_what_a_failed_sync_lost_is_read_from_the_cache_until_that_is_dropped() -> None:
    disk = Disk()
    files = SimulatedFiles(disk)
    descriptor = files.create("/a")
    files.write(descriptor, b"one\n")
    files.sync(descriptor)
    files.write(descriptor, b"two\n")
    files.failing_syncs = frozenset([2])
    with pytest.raises(OSError, match="Input/output error"):
        files.sync(descriptor)
    files.sync(descriptor)
    assert files.read(descriptor, 100, 0) == b"one\ntwo\n"
    files.write(descriptor, b"three\n")
    files.drop_cache(descriptor)
    assert files.read(descriptor, 100, 0) == b"one\n\0\0\0\0three\n"
