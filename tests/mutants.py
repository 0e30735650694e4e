"""Protocols that are known to be wrong, as small patches of the seam: whatever the engine, a step goes missing."""

from flatfile_chat_database.testing.simulated import SimulatedFiles


class TruncatesInPlace(SimulatedFiles):
    """A document that is there already is emptied and written again."""

    def rename(self, source: str, target: str) -> None:
        try:
            status = self.status(target)
        except FileNotFoundError:
            status = None
        if status is None or status.kind != "file":
            super().rename(source, target)
            return
        finished, descriptor = self.open_to_read(source), self.open_to_change(target)
        self.truncate(descriptor, 0)
        self.write_at(descriptor, self.read(finished, 1 << 24, 0), 0)
        self.sync(descriptor)
        self.close(finished)
        self.close(descriptor)
        self.remove(source)


class _Watching(SimulatedFiles):
    """Knows how each descriptor was opened."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.created: set[int] = set()
        self.changed: set[int] = set()

    def create(self, path: str) -> int:
        descriptor = super().create(path)
        self.created.add(descriptor)
        return descriptor

    def open_to_append(self, path: str) -> int:
        descriptor = super().open_to_append(path)
        self.changed.add(descriptor)
        return descriptor

    def open_to_change(self, path: str) -> int:
        descriptor = super().open_to_change(path)
        self.changed.add(descriptor)
        return descriptor


class RenamesWithoutSync(_Watching):
    """What a new file holds is not flushed before it gets its name."""

    def sync(self, descriptor: int) -> None:
        if descriptor not in self.created:
            super().sync(descriptor)


class AppendsWithoutSync(_Watching):
    """What is added to a file is not flushed."""

    def sync(self, descriptor: int) -> None:
        if descriptor not in self.changed:
            super().sync(descriptor)


class NeverSyncsFolders(SimulatedFiles):
    """No name is flushed."""

    def sync_folder(self, path: str) -> None:
        return None


class NeverSyncsParents(SimulatedFiles):
    """The names of new folders are not flushed."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._parents: set[str] = set()

    def make_folder(self, path: str) -> None:
        super().make_folder(path)
        self._parents.add(path.rpartition("/")[0] or "/")

    def sync_folder(self, path: str) -> None:
        if path not in self._parents:
            super().sync_folder(path)


class ForgetsFolderOfNewLog(SimulatedFiles):
    """The name of a new log is not flushed."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._folders: set[str] = set()

    def create(self, path: str) -> int:
        self._note(path)
        return super().create(path)

    def rename(self, source: str, target: str) -> None:
        self._note(target)
        super().rename(source, target)

    def _note(self, path: str) -> None:
        if path.endswith(".jsonl"):
            self._folders.add(path.rpartition("/")[0])

    def sync_folder(self, path: str) -> None:
        if path not in self._folders:
            super().sync_folder(path)


SEAM: dict[str, type[SimulatedFiles]] = {
    "truncate in place": TruncatesInPlace,
    "rename without fsync": RenamesWithoutSync,
    "no directory sync": NeverSyncsFolders,
    "no parent-directory sync after mkdir": NeverSyncsParents,
    "append without fsync": AppendsWithoutSync,
    "no directory sync after creating the log": ForgetsFolderOfNewLog,
}
"""The six of reliability.md, M8."""
