"""The sentences of the backend contract, read from the docstrings of `base.py` and `changes.py`, and who quotes them.

A case of the contract suite says which sentences it shows:

    @says("StorageBackend.delete", "Return whether there was anything.")
    async def test_deleting_tells_whether_there_was_anything(self) -> None: ...
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import typing
from collections.abc import Callable, Iterator

from ..backends import base, changes

Sentence = tuple[str, str]
"""Whose docstring, such as "StorageBackend.read", and the sentence with its spaces made single."""

Case = typing.TypeVar("Case", bound=Callable[..., object])

_BEFORE_THE_RULES = "The docstrings below and those of `changes.py` are the contract"
_MODULE = "backends.base"


def says(owner: str, *sentences: str) -> Callable[[Case], Case]:
    """Note that a case shows these sentences of the docstring of `owner`."""

    def note(case: Case) -> Case:
        quoted = quotes(case)
        quoted.update((owner, sentence) for sentence in sentences)
        case.__says__ = quoted  # type: ignore[attr-defined]
        return case

    return note


def quotes(case: object) -> set[Sentence]:
    """Return the sentences that a case says it shows."""
    return set(getattr(case, "__says__", ()))


def split_sentences(text: str) -> list[str]:
    """Cut a docstring into sentences; a paragraph ends one as well."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        sentences += [sentence for sentence in re.split(r"(?<=\.)\s+(?=[A-Z`\"])", words) if sentence]
    return sentences


def contract_sentences() -> set[Sentence]:
    """Return every sentence of the contract."""
    return {(owner, sentence) for owner, text in _docstrings() for sentence in split_sentences(text)}


def _docstrings() -> Iterator[tuple[str, str]]:
    paragraphs = (base.__doc__ or "").split("\n\n")
    first = next(number for number, text in enumerate(paragraphs) if text.startswith(_BEFORE_THE_RULES))
    yield _MODULE, "\n\n".join(paragraphs[first + 1 :])
    for kind in typing.get_args(changes.Change):
        yield kind.__name__, inspect.getdoc(kind) or ""
    for backend in (base.StorageBackend, base.Snapshot):
        for name, member in vars(backend).items():
            if inspect.isfunction(member) and (name == "__init__" or not name.startswith("_")):
                yield f"{backend.__name__}.{name}", inspect.cleandoc(member.__doc__ or "")
    yield from _texts_under_assignments()


def _texts_under_assignments() -> Iterator[tuple[str, str]]:
    """The members of Capability, and the constants; their texts stand below them and only the source has them."""
    module = ast.parse(inspect.getsource(base))
    bodies = [("", module.body), ("", ast.parse(inspect.getsource(changes)).body)]
    bodies += [
        (f"{node.name}.", node.body)
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name == base.Capability.__name__
    ]
    for prefix, body in bodies:
        for assignment, below in itertools.pairwise(body):
            if not isinstance(below, ast.Expr) or not isinstance(below.value, ast.Constant):
                continue
            target = assignment.targets[0] if isinstance(assignment, ast.Assign) else None
            target = assignment.target if isinstance(assignment, ast.AnnAssign) else target
            if isinstance(target, ast.Name) and isinstance(below.value.value, str):
                yield prefix + target.id, inspect.cleandoc(below.value.value)
