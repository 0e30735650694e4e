"""Stores that lose power: operations are recorded on a simulated disk, every state that may be left is opened again.

    trial = Trial(open_flatfile(StorageConfig()))
    one = trial.start()
    one.do(Operation("add message", (Append(key, (line,)),)))
    laboratory.check(trial)

A state is opened by a new process, which must find what `histories.History` allows, with `verify` clean and nothing
acknowledged in the quarantine, and which must be able to go on writing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..backends.changes import Append, Change, Put
from ..errors import DurabilityError, StorageError
from .crashes import State, Trace, digest_of, states
from .disk import Disk, Nodes
from .histories import Answer, Asked, Blob, Close, Contents, History, Operation
from .inline import OpenStore, Store, repeatable
from .simulated import Killed, SimulatedFiles

_PARENT = "/data"


# --- recording -----------------------------------------------------------------------------------------


class Process:
    """A process that has the store open, or opens it with its next operation."""

    def __init__(self, trial: Trial) -> None:
        self.files = trial.files(trial.disk)
        self._trial = trial
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """The open store."""
        if self._store is None:
            self._store = self._trial.open_store(self.files)
        return self._store

    def do(self, operation: Operation) -> Answer:
        """Ask for an operation, a blob of it first, and note what became of it."""
        answer: Answer = "done"
        for step in operation.steps:
            if answer == "done" and isinstance(step, Blob):
                blob = step
                answer = self._ask(
                    Operation(f"{operation.name}, its blob", (blob,)),
                    lambda: self.store.write_blob(blob.key, blob.data),  # noqa: B023 - it is called at once
                )
            elif isinstance(step, Close):
                answer = self._ask(operation, self.close)
        if answer == "done" and operation.changes:
            commit = Operation(operation.name, tuple(operation.changes))
            answer = self._ask(commit, lambda: self.store.commit(operation.changes))
        return answer

    def _ask(self, operation: Operation, work: Callable[[], object]) -> Answer:
        log = self._trial.disk.log
        asked = Asked(operation, len(log))
        self._trial.history.asked.append(asked)
        try:
            work()
            asked.answer = "done"
        except DurabilityError:
            asked.answer = "unknown"
        except StorageError:
            asked.answer = "failed"
        except Killed:
            asked.answer = "unknown"
        finally:
            asked.ended = len(log)
        return asked.answer

    def open(self) -> None:
        """Open the store, and finish what others left."""
        self.store.commit([])

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            store, self._store = self._store, None
            store.close()

    def at(self, call: int, work: Callable[[], object]) -> None:
        """Let something happen before the n-th changing call from now on, counted from 1."""
        counter = itertools.count(1)

        def before(files: SimulatedFiles, name: str) -> None:
            if name in files.CHANGING and next(counter) == call:
                files.before = None
                work()

        self.files.before = before


class Trial:
    """A disk, the processes that use the store on it, and what was asked of them."""

    def __init__(
        self,
        open_store: OpenStore,
        *,
        nodes: Nodes | None = None,
        before: Sequence[Contents] = ({},),
        whole_commits: bool = True,
        files: type[SimulatedFiles] = SimulatedFiles,
    ) -> None:
        """Begin with a disk (an empty one by default) whose store has one of the contents `before`.

        `files` are the system calls of its processes, which a test may spoil.
        """
        self.open_store = open_store
        self.files = files
        self.disk = Disk(nodes)
        if nodes is None:
            self.disk.make_folders(_PARENT)
        self.history = History(list(before), whole_commits=whole_commits)

    def start(self) -> Process:
        """Start a process."""
        return Process(self)

    def trace(self) -> Trace:
        """Return what was done so far."""
        return Trace(self.disk.initial, list(self.disk.log))


# --- checking ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Observation:
    """What a new process finds in a state."""

    contents: Contents
    quarantine: list[bytes]
    problems: list[str]


@dataclass(slots=True)
class Violation:
    """A state that no crash may leave."""

    point: int
    reason: str
    nodes: Nodes


@dataclass(slots=True)
class Report:
    """What checks have seen so far."""

    checked: int = 0
    """States, those that came again at another point or in another trial included."""
    digests: set[bytes] = field(default_factory=set)
    """One for each distinct disk image."""
    violations: list[Violation] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.checked:,} crash states checked, {len(self.digests):,} distinct disk images by hash, "
            f"{len(self.violations)} violations"
        )


class Laboratory:
    """Opens states and compares what is found with what is allowed; each distinct image is opened once."""

    def __init__(
        self,
        open_store: OpenStore,
        *,
        most: int = 64,
        seed: float = 0,
        ordered: bool = False,
        levels: int = 1,
        nested: int = 0,
        loses: bool = False,
        stop: bool = False,
        files: type[SimulatedFiles] = SimulatedFiles,
        observed: dict[bytes, Observation | str] | None = None,
    ) -> None:
        """Prepare for checks.

        Args:
            open_store: Opens the store after the crash.
            most: States of one crash point that are drawn where there are more.
            seed: Of the sample.
            ordered: Choose the stricter model of a disk.
            levels: How often power is lost: with 2, once more while a state is being opened.
            nested: Every which state is opened on that further level.
            loses: Whether acknowledged operations may be lost since the last close, as at the level `normal`.
            stop: End a check with the first violation.
            files: The system calls of who opens a state.
            observed: What was found in states by their digests, to be used and added to: laboratories with the same
                `open_store` and `files` may share it.
        """
        self._open_store = open_store
        self._most = most
        self._seed = seed
        self._ordered = ordered
        self._levels = levels
        self._nested = nested
        self._loses = loses
        self._stop = stop
        self._files = files
        self._observed = {} if observed is None else observed
        self._opened = 0
        self.report = Report()

    def check(self, trial: Trial, *, first: int = 0, level: int = 1) -> Report:
        """Check every state that a power loss during a trial may leave, from crash point `first` on."""
        trace = trial.trace()
        closed = [
            asked.ended or 0
            for asked in trial.history.asked
            if asked.answer == "done" and any(isinstance(step, Close) for step in asked.operation.steps)
        ]
        seen: set[tuple[bytes, int]] = set()
        answers = {asked.ended for asked in trial.history.asked if asked.ended is not None}
        for state in states(
            trace, most=self._most, seed=self._seed, ordered=self._ordered, first=first, answers=answers
        ):
            allowed = trial.history.allowed(state.point)
            digest = state.digest()
            key = digest, (id(allowed) if not self._loses else state.point)
            if key in seen:
                continue
            seen.add(key)
            self.report.checked += 1
            self.report.digests.add(digest)
            found = self.observe(state.nodes, digest)
            floor = max((end for end in closed if end <= state.point), default=0)
            reason = self._judge(found, trial.history, state, floor)
            reason = reason or _kept_in_vain(found, trial.history)
            if reason is not None:
                self.report.violations.append(Violation(state.point, reason, state.nodes))
                if self._stop:
                    break
            elif level < self._levels:
                self._opened += 1
                if self._opened % self._nested == 0:
                    self._check_opening(state, trial.history, level + 1)
        return self.report

    def check_death(self, trial: Trial) -> Report:
        """Check what a death of all processes leaves, without a power loss: everything that was acknowledged."""
        nodes = dict(trial.disk.nodes)
        digest = digest_of(nodes)
        self.report.checked += 1
        self.report.digests.add(digest)
        point = len(trial.disk.log) + 1
        reason = self._compare(self.observe(nodes, digest), trial.history.allowed(point))
        if reason is not None:
            self.report.violations.append(Violation(point, reason, nodes))
        return self.report

    def observe(self, nodes: Nodes, digest: bytes) -> Observation | str:
        """Return what a new process finds in a state, or what goes wrong with it."""
        found = self._observed.get(digest)
        if found is None:
            found = self._observed[digest] = self._open(nodes)
        return found

    def _open(self, nodes: Nodes) -> Observation | str:
        files = self._files(Disk(nodes))
        with repeatable(1 << 64):
            try:
                store = self._open_store(files)
                store.commit([])
                problems = store.problems()
                contents = store.contents()
                aside = store.quarantine()
                again = _go_on(store, contents)
                store.close()
            except StorageError as error:
                return f"it cannot be used: {error!r}"
        if again is not None:
            return again
        return Observation(contents, aside, problems)

    def _judge(self, found: Observation | str, history: History, state: State, floor: int) -> str | None:
        if not self._loses or isinstance(found, str):
            return self._compare(found, history.allowed(state.point))
        if found.problems:
            return f"verify says {found.problems}"
        possible = history.survivors(state.point, floor)
        for key in set(possible) | set(found.contents):
            left = found.contents.get(key)
            # A log that is there without records is as good as none.
            if left not in possible.get(key, {None}) and not (left == b"" and None in possible.get(key, {None})):
                return f"{key} holds {found.contents.get(key)!r:.300}"
        return None

    def _compare(self, found: Observation | str, allowed: list[Contents]) -> str | None:
        if isinstance(found, str):
            return found
        if found.contents not in allowed:
            return _difference(found.contents, allowed)
        if found.problems:
            return f"verify says {found.problems}"
        return None

    def _check_opening(self, state: State, history: History, level: int) -> None:
        """Lose power while a state is being opened, written to and closed."""
        trial = Trial(
            self._open_store,
            nodes=state.nodes,
            before=history.allowed(state.point),
            whole_commits=history.whole_commits,
            files=self._files,
        )
        process = trial.start()
        with repeatable(
            (level + 1) << 64
        ):  # names of temporary files that are neither in the state nor taken by `_open`
            again = [asked for asked in history.asked if asked.may_have_happened(state.point)][-1:]
            process.open()
            process.store.problems()
            for asked in again:  # the caller never got an answer, so it asks again
                process.do(asked.operation)
            process.do(Operation("close", (Close(),)))
        self.check(trial, level=level)


def _go_on(store: Store, contents: Contents) -> str | None:
    """Write to a store that holds some contents; return what is wrong with the result."""
    expected = dict(contents)
    changes: list[Change] = []
    for key, data in contents.items():
        if key.endswith(".jsonl") and len(changes) < _WRITES:
            line = b'{"id":"later","role":"user","content":""}\n'
            changes.append(Append(key, (line,)))
            expected[key] = data + line
    if changes:
        changes.append(Put("later.json", b"{}\n"))
        expected["later.json"] = b"{}\n"
        store.commit(changes)
        found = store.contents()
        if found != expected:
            return f"after one more write: {_difference(found, [expected])}"
    return None


_WRITES = 2


def _kept_in_vain(found: Observation | str, history: History) -> str | None:
    """Return which messages are in quarantine that are in their place as well, though they were asked for once."""
    if isinstance(found, str) or not found.quarantine:
        return None
    asked = Counter(
        line
        for one in history.asked
        for change in one.operation.changes
        if isinstance(change, Append)
        for line in change.lines
    )
    held = {line + b"\n" for data in found.contents.values() for line in data.split(b"\n")}
    aside = {line + b"\n" for data in found.quarantine for line in data.split(b"\n")}
    twice = {line for line in held & aside if asked[line] == 1}
    return f"in quarantine, though nothing is wrong with it: {twice}" if twice else None


def _difference(found: Contents, allowed: Sequence[Contents]) -> str:
    if not allowed:
        return "nothing is allowed: the history contradicts itself"
    nearest = min(allowed, key=lambda one: sum(found.get(key) != one.get(key) for key in found.keys() | one.keys()))
    texts = [
        f"{key} holds {found.get(key)!r:.300} instead of {nearest.get(key)!r:.300}"
        for key in sorted(found.keys() | nearest.keys())
        if found.get(key) != nearest.get(key)
    ]
    return "; ".join(texts)
