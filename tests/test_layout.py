"""The map: keys are built and parsed back, no two things share one, and no id leaves its place."""

import functools
import hashlib
import itertools
import random
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatfile_chat_database.backends.rules import check_key
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import ConfigurationError, ValidationError
from flatfile_chat_database.layout import MAX_SEGMENT_BYTES, Layout, Shape, check_id, escape, unescape

from .characters import characters

LAYOUT = Layout(StorageConfig())
OTHER_LAYOUTS = {
    "the specification's": LAYOUT,
    "users at the top": Layout(StorageConfig(user_data_directory_name="")),
    "other names": Layout(
        StorageConfig(
            user_data_directory_name="People",
            panel_sessions_directory_name="P",
            global_personas_directory_name="g.p",
            system_config_directory_name="System",
            user_profile_filename="Profile",
            session_metadata_filename="session",
            messages_filename="Log.jsonl",
            situational_context_filename="now.json",
            document_metadata_filename="index",
            document_storage_subdirectory_name="files",
            document_analysis_subdirectory_name="An",
            context_history_subdirectory_name="then",
        )
    ),
}

NAMES = {
    "user_id": "ann",
    "session_id": "chat_session_20260131_120000",
    "persona_id": "critic",
    "snapshot_id": "context_20260131_120000",
    "document": "report.pdf",
    "panel_id": "panel_20260131_120000",
    "insight_id": "insight_20260131_120000",
    "item": "0198c0de.bin",
}

KEYS = {
    "store": "system/config.json",
    "user": "users/ann/profile.json",
    "persona": "users/ann/personas/critic.json",
    "session": "users/ann/chat_session_20260131_120000/session.json",
    "messages": "users/ann/chat_session_20260131_120000/messages.jsonl",
    "context": "users/ann/chat_session_20260131_120000/situational_context.json",
    "context_snapshot": "users/ann/chat_session_20260131_120000/context_history/context_20260131_120000.json",
    "documents": "users/ann/chat_session_20260131_120000/documents/metadata.json",
    "document": "users/ann/chat_session_20260131_120000/documents/report.pdf",
    "analysis": "users/ann/chat_session_20260131_120000/documents/analysis/report.pdf.json",
    "panel": "panel_sessions/panel_20260131_120000/panel.json",
    "panel_messages": "panel_sessions/panel_20260131_120000/messages.jsonl",
    "panel_persona": "panel_sessions/panel_20260131_120000/personas/critic.json",
    "insight": "panel_sessions/panel_20260131_120000/insights/insight_20260131_120000.json",
    "global_persona": "personas_global/critic.json",
    "quarantine": "system/quarantine/0198c0de.bin",
}
"""On disk, do not change: the specification's sections 5.1 to 5.3, and what was added to them."""


def placeholders(layout: Layout, name: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", layout.entries[name].pattern)


# --- entries -------------------------------------------------------------------------------------------


def test_the_map_has_these_entries_in_these_places() -> None:
    assert {entry.name: LAYOUT.key(entry.name, **names_of(LAYOUT, entry.name)) for entry in LAYOUT} == KEYS


def names_of(layout: Layout, name: str) -> dict[str, str]:
    return {placeholder: NAMES[placeholder] for placeholder in placeholders(layout, name)}


def test_users_may_stand_at_the_top_as_in_the_specification() -> None:
    layout = OTHER_LAYOUTS["users at the top"]
    assert layout.key("user", user_id="ann") == "ann/profile.json"
    assert layout.key("messages", user_id="ann", session_id="s") == "ann/s/messages.jsonl"
    assert layout.parent("user") == ""


@pytest.mark.parametrize("layout", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
@pytest.mark.parametrize("name", KEYS)
def test_every_entry_is_built_and_parsed_back(layout: Layout, name: str) -> None:
    names = names_of(layout, name)
    key = layout.key(name, **names)
    place = layout.parse(key)
    assert place is not None
    assert (place.entry.name, place.names) == (name, names)
    assert check_key(key) == key
    assert layout.folder(name, **names) == key.rpartition("/")[0]


@pytest.mark.parametrize("layout", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
@pytest.mark.parametrize("name", [name for name in KEYS if name != "store"])
def test_children_of_a_parent_are_parsed_back(layout: Layout, name: str) -> None:
    names = names_of(layout, name)
    *outer, last = names
    parent = layout.parent(name, **{placeholder: names[placeholder] for placeholder in outer})
    key = layout.key(name, **names)
    assert key.startswith(f"{parent}/") or parent == ""
    child = key[len(parent) + 1 if parent else 0 :].partition("/")[0]
    assert layout.parse_child(name, child) == names[last]


def test_shapes_are_documents_logs_and_blobs() -> None:
    shapes = {entry.name: entry.shape for entry in LAYOUT}
    assert {name for name, shape in shapes.items() if shape is Shape.LOG} == {"messages", "panel_messages"}
    assert {name for name, shape in shapes.items() if shape is Shape.BLOB} == {"document", "quarantine"}


def test_every_entry_says_what_it_means() -> None:
    assert all(entry.meaning for entry in LAYOUT)
    assert len({entry.pattern for entry in LAYOUT}) == len(KEYS)


NEAR_MISSES = [
    "",
    "users",
    "users/",
    "users/ann",
    "users/ann/",
    "/users/ann/profile.json",
    "users//profile.json",
    "users/ann/profile.json/",
    "users/ann/Profile.json",
    "users/ann/profile.jso",
    "users/ann/profile.json.tmp",
    "users/ann/.profile.json",
    "Users/ann/profile.json",
    "user/ann/profile.json",
    "users/Ann/profile.json",  # upper case is escaped
    "users/%41nn/profile.json.bak",
    "users/%61nn/profile.json",  # "a" is not
    "users/%4Ann/profile.json",
    "users/%4a/x/profile.json",
    "users/%C3%A9/profile.json",  # lower-case digits only
    "users/%ff/profile.json",  # no UTF-8
    "users/%0a/profile.json",  # a control character
    "users/%ed%a0%80/profile.json",  # a lone surrogate
    "users/%c0%af/profile.json",  # "/" in too many bytes
    "users/%/profile.json",
    "users/%2/profile.json",
    "users/%zz/profile.json",
    "users/é/profile.json",
    "users/a b/profile.json",
    "users/a%20b/profile.jsonx",
    "users/../profile.json",
    "users/./profile.json",
    "users/-rf/profile.json",
    "users/.hidden/profile.json",
    "users/con/profile.json",
    "users/nul.txt/profile.json",
    "users/ann./profile.json",
    "users/ann/personas",
    "users/ann/personas/.json",
    "users/ann/personas/critic",
    "users/ann/personas/critic.JSON",
    "users/ann/personas/a/critic.json",
    "users/ann/personas/session.json",  # a persona called "session", and no session called "personas"
    "users/ann/profile.json/session.json",  # that session is %70rofile.json
    "users/ann/s/sessions.json",
    "users/ann/s/messages.json",
    "users/ann/s/messages.jsonl.gz",
    "users/ann/s/x/messages.jsonl",
    "users/ann/s/context_history",
    "users/ann/s/context_history/c.txt",
    "users/ann/s/documents",
    "users/ann/s/documents/.hidden.pdf",
    "users/ann/s/documents/-rf.pdf",
    "users/ann/s/documents/%41.pdf",
    "users/ann/s/documents/METADATA.json",
    "users/ann/s/documents/Analysis",
    "users/ann/s/documents/con.txt",
    "users/ann/s/documents/x/report.pdf",
    "users/ann/s/documents/analysis/report.pdf",
    "panel_sessions/p",
    "panel_sessions/p/panels.json",
    "panel_sessions/P/panel.json",
    "panel_sessions/p/insights/i",
    "personas_global/critic",
    "personas_global/x/critic.json",
    "system",
    "system/config.jsonl",
    "system/x/config.json",
    "system/lock",
    "system/open",
    "system/checkpoint",
    "system/journal",
    "system/journal/00000001.jsonl",
    "system/journal/history.jsonl",
    "system/quarantine",
    "system/quarantine/x/y",
    "system/trash/x",
    "config.json",
    "\0",
    "users/a\0b/profile.json",
    "users/ann/profile.json\n",
    "users\\ann\\profile.json",
]
"""Names that look like ours and are not."""


@pytest.mark.parametrize("key", NEAR_MISSES, ids=ascii)
def test_what_only_looks_like_a_key_stands_for_nothing(key: str) -> None:
    place = LAYOUT.parse(key)
    if key == "users/ann/personas/session.json":
        assert place is not None
        assert (place.entry.name, place.names["persona_id"]) == ("persona", "session")
    else:
        assert place is None


@pytest.mark.parametrize(
    "names",
    [
        {"messages_filename": "panel.json"},
        {"messages_filename": "Personas"},
        {"messages_filename": "insights"},
        {"user_profile_filename": "personas"},
        {"user_profile_filename": "PERSONAS"},
        {"document_metadata_filename": "analysis"},
        {"document_analysis_subdirectory_name": "Metadata.json"},
    ],
)
def test_names_that_would_share_a_place_are_refused(names: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="in each other's place"):
        Layout(StorageConfig(**names))  # type: ignore[arg-type]


# --- ids -----------------------------------------------------------------------------------------------

ESCAPES = {
    "ann": "ann",
    "user@example.com": "user@example.com",
    "a-b_c.d+e9": "a-b_c.d+e9",
    "张三": "张三",
    "سلام": "سلام",
    "あア": "あア",
    "ა": "ა",
    "../x": "%2e.%2fx",
    ".": "%2e",
    "..": "%2e%2e",
    "...": "%2e.%2e",
    "a.": "a%2e",
    ".a": "%2ea",
    "-rf": "%2drf",
    "a/b": "a%2fb",
    "a\\b": "a%5cb",
    "Ab": "%41b",
    "ab": "ab",
    "CON": "%43%4f%4e",
    "con": "%63on",
    "con.txt": "%63on.txt",
    "com1": "%63om1",
    "lpt9.x.y": "%6cpt9.x.y",
    "console": "console",
    "com": "com",
    "com10": "com10",
    "%41": "%2541",
    "%": "%25",
    " ": "%20",
    "a b": "a%20b",
    "é": "%c3%a9",
    "e\u0301": "e%cc%81",
    "ß": "%c3%9f",
    "ﬁ": "%ef%ac%81",
    "가": "%ea%b0%80",
    "\u1100\u1161": "%e1%84%80%e1%85%a1",
    "🙂": "%f0%9f%99%82",
    "\u200d": "%e2%80%8d",
    "\u00ad": "%c2%ad",
    "\ufeff": "%ef%bb%bf",
    "\u202eabc": "%e2%80%aeabc",
    "\u2028": "%e2%80%a8",
    "~": "%7e",
    "$HOME": "%24%48%4f%4d%45",
    "a:b": "a%3ab",
    "*?": "%2a%3f",
}
"""On disk, do not change."""


@pytest.mark.parametrize(("text", "segment"), ESCAPES.items(), ids=[ascii(text) for text in ESCAPES])
def test_an_id_becomes_this_segment(text: str, segment: str) -> None:
    assert escape(text) == segment
    assert unescape(segment) == text


@pytest.mark.parametrize("beside", ["profile.json", "personas"])
def test_an_id_like_one_of_our_names_is_escaped_further(beside: str) -> None:
    key = LAYOUT.key("session", user_id="ann", session_id=beside)
    assert key == f"users/ann/%{ord(beside[0]):02x}{beside[1:]}/session.json"
    place = LAYOUT.parse(key)
    assert place is not None
    assert place.names == {"user_id": "ann", "session_id": beside}
    assert LAYOUT.parse_child("session", beside) is None
    assert LAYOUT.parse_child("session", key.split("/")[2]) == beside


def test_an_id_is_escaped_further_where_it_differs_only_in_case() -> None:
    layout = OTHER_LAYOUTS["other names"]
    assert layout.key("session", user_id="ann", session_id="profile") == "People/ann/%70rofile/session"
    assert layout.key("session", user_id="ann", session_id="Profile") == "People/ann/%50rofile/session"


@pytest.mark.parametrize("name", ["panel_sessions", "personas_global", "system"])
def test_a_user_at_the_top_is_not_called_as_one_of_our_folders(name: str) -> None:
    with pytest.raises(ValidationError, match="one of the store's own folders"):
        OTHER_LAYOUTS["users at the top"].key("user", user_id=name)
    place = OTHER_LAYOUTS["users at the top"].parse(f"{name}/profile.json")
    assert place is None or place.entry.name == "global_persona"
    assert OTHER_LAYOUTS["users at the top"].parse_child("user", name) is None
    assert LAYOUT.key("user", user_id=name) == f"users/{name}/profile.json"


@pytest.mark.parametrize(
    "value",
    [
        *("", "\0", "a\0b", "a\n", "\x1b[2J", "\x7f", "\x85", "\ud800", "a\udfff", "\ud83d"),
        *("x" * 10_000, "x" * 181, "A" * 61, "é" * 31, None, 7, 1.5, b"ann", ["ann"], True),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_is_no_id_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValidationError, match=r"^user_id "):
        check_id(value, "user_id")
    with pytest.raises(ValidationError, match=r"^user_id "):
        LAYOUT.key("user", user_id=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["x" * 180, "A" * 60, "张" * 60, "é" * 30, "a" * 177 + "B"])
def test_the_longest_ids_fit_a_file_name(value: str) -> None:
    assert check_id(value, "user_id") == value
    segments = LAYOUT.key("persona", user_id=value, persona_id=value).split("/")
    assert max(len(segment.encode()) for segment in segments) <= MAX_SEGMENT_BYTES + len(".json")


# --- 100,000 hostile ids -------------------------------------------------------------------------------

PIECES = [
    *("..", ".", "/", "\\", "../", "..\\", "//", "%2e%2e", "%2f", "%00", "%", "%25", "%41", "~", "$", "`", "|", ";"),
    *("con", "CON", "nul", "aux.txt", "com1", "COM9", "lpt1", "conin$", "prn.", "com¹"),
    *("-rf", "--", " ", "  ", "\u00a0", "\u3000", "\u2028", "\u202e", "\u200b", "\u200d", "\ufeff", "\u00ad", "\u034f"),
    *("é", "e\u0301", "É", "E\u0301", "Å", "A\u030a", "\u212b", "ﬁ", "fi", "ß", "ss", "SS", "ẞ", "İ"),
    *("i\u0307", "ı", "I", "ς", "σ", "Σ", "K", "\u212a", "k", "ſ", "s", "µ", "μ", "Ω", "\u2126", "ω", "ǆ", "ǅ", "Ǆ"),
    *("가", "\u1100\u1161", "각", "\u1100\u1161\u11a8", "\u3164", "\uffa0", "\u115f", "ᄀ", "ㄱ"),
    *("🙂", "👩\u200d👩\u200d👧", "🏳️", "\ufe0f", "\U000e0041", "𝐚", "𐐀", "𐐨", "Ꭰ", "ꭰ", "ა", "Ა", "ᲀ"),
    *("张三", "張三", "豈", "\uf900", "が", "か\u3099", "ガ", "カ\u3099", "क\u093c", "\u0958", "ⅷ", "Ⅷ", "①", "٣", "߀"),
    *("profile.json", "session.json", "personas", "metadata.json", "users", "system", "Profile.json", "PERSONAS"),
    *("a", "A", "b", "B", "ab", "aB", "Ab", "AB", "x", "0", "_", "-", "+", "@", ".json", ".tmp", "user@example.com"),
]  # fmt: skip


@functools.cache
def hostile_ids(count: int) -> list[str]:
    """Return so many different legal ids: the pieces above glued together, and characters from everywhere."""
    chosen = random.Random(20260131)
    found: dict[str, None] = dict.fromkeys(piece for piece in PIECES if escape(piece) is not None)
    found |= dict.fromkeys(one + other for one, other in itertools.product(PIECES, repeat=2))
    while len(found) < count * 1.2:
        text = "".join(chosen.choice(PIECES) for _ in range(chosen.randint(1, 5)))
        kind = chosen.random()
        if kind < 0.3:
            text += chr(chosen.randrange(0x20, sys.maxunicode))
        elif kind < 0.4:
            text = unicodedata.normalize(chosen.choice(["NFC", "NFD", "NFKC", "NFKD"]), text)
        elif kind < 0.5:
            text = chosen.choice([text.upper(), text.lower(), text.swapcase(), text.title(), text.casefold()])
        elif kind < 0.55:
            text = escape(text) or "a"
        found[text] = None
    legal = []
    for text in found:
        segment = escape(text)
        if segment is not None and len(segment.encode()) <= MAX_SEGMENT_BYTES:
            legal.append(text)
    chosen.shuffle(legal)
    assert len(legal) >= count
    return legal[:count]


@functools.cache
def hostile_segments(count: int) -> list[tuple[str, str]]:
    """Return the segment of each hostile id, with the id."""
    return [(LAYOUT.key("session", user_id="ann", session_id=text).split("/")[2], text) for text in hostile_ids(count)]


FEW, MANY = 5_000, 100_000
# The tables of characters differ between Pythons, so a part of them is tried on each.
by_count = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


def collisions(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Yield what two different things have in common; each pair is the form, and what has it."""
    seen: dict[str, str] = {}
    for form, text in pairs:
        other = seen.setdefault(form, text)
        if other != text:
            yield form, other, text


@by_count
def test_no_hostile_id_leaves_its_folder_or_changes(count: int) -> None:
    for text in hostile_ids(count):
        key = LAYOUT.key("session", user_id="ann", session_id=text)
        assert re.fullmatch(r"users/ann/[^/\\]+/session\.json", key), ascii(text)
        segment = key.split("/")[2]
        assert segment[0] not in ".-", ascii(text)
        assert segment[-1] not in ". ", ascii(text)
        assert segment.partition(".")[0] not in ("con", "prn", "aux", "nul"), ascii(text)
        place = LAYOUT.parse(key)
        assert place is not None
        assert place.entry.name == "session"
        assert place.names == {"user_id": "ann", "session_id": text}
        check_key(key)


@by_count
@pytest.mark.parametrize("form", ["as it is", "casefold", "upper", "lower", "NFC", "NFD", "NFKC", "NFKD"])
def test_no_two_hostile_ids_share_a_segment_even_where_case_or_form_is_ignored(form: str, count: int) -> None:
    def seen_by_a_file_system(segment: str) -> str:
        if form == "as it is":
            return segment
        if form.startswith("NF"):
            # HFS+ and APFS do both at once.
            return unicodedata.normalize(form, unicodedata.normalize(form, segment).casefold())  # type: ignore[arg-type]
        return str(getattr(segment, form)())

    segments = hostile_segments(count)
    assert list(collisions((seen_by_a_file_system(segment), text) for segment, text in segments)) == []


@pytest.mark.parametrize("layout", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
def test_no_two_entries_make_the_same_key(layout: Layout) -> None:
    texts = [*hostile_ids(FEW)[:300], "profile.json", "personas", "session.json", "messages.jsonl", "panel.json"]
    texts += ["documents"]
    texts += ["users", "People", "people", "Profile", "index", "An", "an", "g.p", "analysis", "config", "quarantine"]
    keys: dict[str, tuple[str, dict[str, str]]] = {}
    for name in KEYS:
        wanted = placeholders(layout, name)
        for text in texts if wanted else [""]:
            names = dict.fromkeys(wanted, text)
            if "document" in names:
                names["document"] = layout.document_segment(f"{text}.pdf", 0)
            if "item" in names:
                names["item"] = "0198c0de.bin"
            key = layout.key(name, **names)
            form = unicodedata.normalize("NFC", key.casefold())
            assert keys.setdefault(form, (name, names)) == (name, names)
            place = layout.parse(key)
            assert place is not None
            assert (place.entry.name, place.names) == (name, names)


@given(st.text(min_size=1))
def test_any_text_is_an_island_or_no_id(text: str) -> None:
    segment = escape(text)
    if segment is None:
        assert any(unicodedata.category(character) in ("Cc", "Cs") for character in text)
    else:
        assert unescape(segment) == text
        assert unicodedata.normalize("NFD", segment) == unicodedata.normalize("NFC", segment) == segment
        assert segment.casefold() == segment
        # What lower() would change is no letter of another segment: Cherokee, whose capitals are what folding makes.
        assert all(character in segment or escape(character) != character for character in segment.lower())


@given(st.text(min_size=1, max_size=30))
def test_any_segment_is_that_of_one_id_or_of_none(segment: str) -> None:
    text = unescape(segment)
    if text is not None:
        assert segment in (escape(text), f"%{segment[1:3]}{segment[3:]}")
        assert "/" not in segment


# --- every character of Unicode --------------------------------------------------------------------------


@functools.cache
def kept_characters() -> list[str]:
    """Return the characters that stay as they are in an id; to try so many takes a second, so only once."""
    return [character for character in characters() if escape(f"a{character}a") == f"a{character}a"]


def test_plain_letters_of_all_scripts_are_kept() -> None:
    kept = set(kept_characters())
    assert len(kept) > 40_000
    assert set("abcxyz0189-_.@+张あアשسกა") <= kept
    assert not set("AZéßΣяЯ %/\\:*~\"'<>|?가") & kept


@pytest.mark.parametrize("form", ["casefold", "upper", "lower", "title", "NFC", "NFD", "NFKC", "NFKD"])
def test_no_two_kept_characters_are_the_same_to_a_file_system(form: str) -> None:
    def seen(character: str) -> str:
        if form.startswith("NF"):
            return unicodedata.normalize(form, character)  # type: ignore[arg-type]
        return str(getattr(character, form)())

    assert list(collisions((seen(character), character) for character in kept_characters())) == []
    if form.startswith("NF") or form == "casefold":
        assert [character for character in kept_characters() if seen(character) != character] == []


def test_no_kept_character_composes_with_the_one_before() -> None:
    decompositions = (unicodedata.decomposition(chr(code)).split() for code in range(sys.maxunicode + 1))
    second = {chr(int(parts[1], 16)) for parts in decompositions if len(parts) == 2 and parts[0][0] != "<"}
    # Hangul composes by rule, without a table: a leading, a vowel and a trailing jamo.
    second |= {chr(code) for code in [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]}
    assert len(second) > 100
    assert second & set(kept_characters()) == set()
    assert all(unicodedata.combining(character) == 0 for character in kept_characters())


def test_no_kept_character_is_invisible() -> None:
    ignorable = {0x00AD, 0x034F, 0x061C, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFEFF, 0xFFA0}
    ignorable |= {*range(0x180B, 0x1810), *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070)}
    ignorable |= {*range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000)}
    assert not ignorable & {ord(character) for character in kept_characters()}


def test_the_same_characters_are_kept_by_every_python() -> None:
    # On disk, do not change: another digest means that ids would move when Python is updated.
    assert len(kept_characters()) == 74_026
    digest = hashlib.sha256("".join(kept_characters()).encode()).hexdigest()
    assert digest == "5e9642c4394f23fd59c71005300499ff504995a1e635190c6d22d5bcf227b4e7"


# --- documents -----------------------------------------------------------------------------------------

DOCUMENTS = {
    "report.pdf": "report.pdf",
    "Quarterly Report (final).PDF": "Quarterly Report (final).PDF",
    "résumé.md": "résumé.md",
    "re\u0301sume\u0301.md": "résumé.md",
    "张三 2026.txt": "张三 2026.txt",
    "a:b*c?.txt": "a_b_c_.txt",
    "con.txt": "_con.txt",
    "-rf.txt": "_-rf.txt",
    "$(rm).txt": "_(rm).txt",
    " a .txt": "_ a.txt",
    "\u202egpj.txt": "_gpj.txt",
    "a.b.txt": "a.b.txt",
    "..txt": "_.txt",
}
"""On disk, do not change."""


@pytest.mark.parametrize(("filename", "segment"), DOCUMENTS.items(), ids=[ascii(name) for name in DOCUMENTS])
def test_a_document_keeps_a_readable_name(filename: str, segment: str) -> None:
    assert LAYOUT.document_segment(filename, 0) == segment
    stem, _, extension = segment.rpartition(".")
    assert LAYOUT.document_segment(filename, 7) == f"{stem}~7.{extension}"


@pytest.mark.parametrize("count", [FEW, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_document_is_safe_and_short_whatever_its_name(count: int) -> None:
    for text in hostile_ids(count):
        for generation in (0, 12):
            segment = LAYOUT.document_segment(f"{text}.pdf", generation)
            assert len(segment.encode()) <= MAX_SEGMENT_BYTES
            key = LAYOUT.key("document", user_id="ann", session_id="s", document=segment)
            if LAYOUT.is_free_document_segment(segment):
                place = LAYOUT.parse(key)
                assert place is not None
                assert place.names["document"] == segment
            check_key(key)


@pytest.mark.parametrize("extension", ["pdf", "x" * 20, "文" * 20])
def test_a_long_name_is_cut_and_keeps_its_extension(extension: str) -> None:
    for length in range(150, 260):
        for character in ("x", "é", "文", "𝐚"):
            segment = LAYOUT.document_segment(f"{character * length}.{extension}", 3)
            assert len(segment.encode()) <= MAX_SEGMENT_BYTES
            assert segment.endswith(f"~3.{extension}")


@pytest.mark.parametrize(
    "segment", ["metadata.json", "METADATA.JSON", "analysis", "Analysis", "con.txt", "NUL", "aux.pdf"]
)
def test_a_name_of_our_own_or_of_a_device_is_not_free(segment: str) -> None:
    assert not LAYOUT.is_free_document_segment(segment)
    assert LAYOUT.is_free_document_segment(f"my {segment}")


# --- trash ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unique", ["0198c0de-0000-7000-8000-00000000abcd", "", "x", "an id with / and 張"])
def test_a_trash_id_says_when_and_what(unique: str) -> None:
    moment = datetime(2026, 1, 31, 12, 30, 45, 123456, tzinfo=UTC)
    trash_id = LAYOUT.trash_id("session", moment, unique)
    assert LAYOUT.parse_trash_id(trash_id) == (moment, "session")
    key = f"{LAYOUT.trash_folder(trash_id)}/users/ann/s/session.json"
    assert LAYOUT.parse_trash(key) == (trash_id, "users/ann/s/session.json")
    assert check_key(key) == key


def test_trash_ids_sort_by_time() -> None:
    start = datetime(2026, 12, 31, 23, 59, 59, 999_990, tzinfo=UTC)
    moments = [start + timedelta(microseconds=7 * number) for number in range(100)]
    ids = [LAYOUT.trash_id("user", moment, str(number)) for number, moment in enumerate(moments)]
    assert ids == sorted(set(ids))


@pytest.mark.parametrize(
    "trash_id",
    [
        "", "x", "20260131_123045_123456_session_", "20260131_123045_123456_session_0000000g",
        "20260131_123045_123456_Session_00000000", "20261331_123045_123456_session_00000000",
        "20260131_253045_123456_session_00000000", "20260131_123045_12345_session_00000000",
        " 20260131_123045_123456_session_00000000", "20260131_123045_123456_session_00000000\n",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_trash_id_is_none(trash_id: str) -> None:
    assert LAYOUT.parse_trash_id(trash_id) is None


@pytest.mark.parametrize(
    "key", ["system/trash", "system/trash/", "system/trash/x", "system/trash/x/", "trash/x/y", "users/a"]
)
def test_what_only_looks_like_a_key_in_the_trash_is_none(key: str) -> None:
    assert LAYOUT.parse_trash(key) is None


@pytest.mark.parametrize("filename", ["a.txt", "A b.tar.md", "張.pdf", "no extension", "x.y-1.csv"])
@pytest.mark.parametrize("generation", [0, 1, 4_000_000_000])
def test_a_readable_filename_is_read_back_from_its_name_on_disk(filename: str, generation: int) -> None:
    layout = Layout(StorageConfig())
    if "." in filename:
        assert layout.document_filename(layout.document_segment(filename, generation)) == filename
    assert layout.document_filename("a~b.txt") == "a~b.txt"


def test_only_folders_with_names_of_the_map_are_its_folders() -> None:
    layout = Layout(StorageConfig())
    for folder in ("users", "panel_sessions", "personas_global", "system", "users/a/personas", "users/a/s/documents"):
        assert layout.is_folder(folder), folder
    for other in ("users/a", "users/a/s", "users/readme.txt", "panel_sessions/p", "README", "users/a/s/other"):
        assert not layout.is_folder(other), other
    named = [name for name, entry in layout.entries.items() if "{" in entry.pattern]
    assert {name for name in named if not layout.is_in_folders(name)} == {
        *("persona", "global_persona", "panel_persona"),
        *("context_snapshot", "document", "analysis", "insight", "quarantine"),
    }
