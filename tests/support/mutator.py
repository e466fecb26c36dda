"""Seeded mutations of safetensors files: some know the structure of a header, some know only bytes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable

from support.bytes_maker import NBITS

__all__ = ["Draft", "make_draft", "mutate", "mutate_bytes", "mutate_draft", "spell"]

_DTYPES = sorted(NBITS)
_LOADABLE = [name for name in _DTYPES if NBITS[name] >= 8]
_NUMBERS = (
    "0", "1", "2", "3", "4", "7", "8", "-1", "-0", "1.0", "1e0", "01", "255", "4294967296", "281474976710656",
    "281474976710657", "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616",
    "99999999999999999999999999", "NaN", "true", "null", '"1"', "[]", "[1]", "{}",
)  # fmt: skip
_VALUES = (
    "null", "true", "0", '""', '"F32"', "[]", "{}", "[0,0]", "[[0]]", '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',
    "NaN", "1e400", '["F32",[0],[0,0]]', '{"a":{"b":[1,{"c":null}]}}', '"\\ud83d\\ude00"', '"\\udead"', "tru", "",
)  # fmt: skip
_NAMES = (
    '"a"', '"\\u0061"', '"b"', '""', '"\\u0000"', '"\\n"', '"../x"', '"__metadata__"', '"__metadat\\u0061__"', '"é"',
    '"\\u202e"', '"\x7f"', '"\t"', '"\\ud800"', '"dtype"', "a", '"a', '"x\\"y"', '"😀"',
)  # fmt: skip
_TOKENS = (
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"0", b"9", b"-", b".", b"e", b" ", b"\n", b"\0", b"\xff",
    b"\xef\xbb\xbf", b"\\u0000", b"\\ud800", b"null", b"NaN", b'"dtype"', b'"__metadata__":{}', b'"data_offsets":[0,0]',
    b"\x80", b"\xed\xa0\x80",
)  # fmt: skip

Member = tuple[str, list[tuple[str, str]] | str]


class Draft:
    """A header before it is spelled: members with raw JSON texts, so that each part can be wrong on its own."""

    def __init__(self, members: list[Member], *, data: bytes) -> None:
        self.members = members
        self.data = data
        self.space = ""
        self.head = ""
        self.tail = ""
        self.length_error = 0

    def copy(self) -> Draft:
        members: list[Member] = [(k, v if isinstance(v, str) else list(v)) for k, v in self.members]
        return Draft(members, data=self.data)


def make_draft(rng: random.Random) -> Draft:
    """Return a draft that is right: up to six tensors of random dtypes and shapes, sometimes with metadata."""
    members: list[Member] = []
    start = 0
    for number in range(rng.randrange(7)):
        dtype = rng.choice(_LOADABLE if rng.random() < 0.98 else _DTYPES)
        shape = [rng.choice((0, 1, 2, 3, 8)) for _ in range(rng.randrange(4))]
        if NBITS[dtype] < 8:
            shape = [8, *shape]
        nbits = NBITS[dtype]
        for size in shape:
            nbits *= size
        stop = start + nbits // 8
        texts = [("dtype", json.dumps(dtype)), ("shape", json.dumps(shape)), ("data_offsets", f"[{start},{stop}]")]
        members.append((json.dumps("abcdef"[number]), [(f'"{key}"', value) for key, value in texts]))
        start = stop
    if rng.random() < 0.3:
        members.insert(rng.randrange(len(members) + 1), ('"__metadata__"', [('"format"', '"pt"'), ('"k"', '"v"')]))
    return Draft(members, data=rng.randbytes(start))


def spell(draft: Draft) -> bytes:
    """Return the file of a draft."""
    gap = draft.space
    parts = []
    for key, value in draft.members:
        if not isinstance(value, str):
            value = f"{{{gap}" + f",{gap}".join(f"{k}:{gap}{v}" for k, v in value) + f"{gap}}}"
        parts.append(f"{key}{gap}:{gap}{value}")
    text = f"{draft.head}{{{gap}" + f"{gap},{gap}".join(parts) + f"{gap}}}{draft.tail}"
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", max(0, len(raw) + draft.length_error)) + raw + draft.data


def _some_info(draft: Draft, rng: random.Random) -> list[tuple[str, str]]:
    infos = [value for _, value in draft.members if isinstance(value, list) and value]
    return rng.choice(infos) if infos else []


def _change_number(draft: Draft, rng: random.Random) -> None:
    info = _some_info(draft, rng)
    lists = [i for i, (_, value) in enumerate(info) if value.startswith("[")]
    if lists:
        at = rng.choice(lists)
        items = info[at][1].strip("[] ").split(",")
        items[rng.randrange(len(items))] = rng.choice(_NUMBERS)
        info[at] = (info[at][0], f"[{','.join(items)}]")


def _change_rank(draft: Draft, rng: random.Random) -> None:
    info = _some_info(draft, rng)
    for at, (key, value) in enumerate(info):
        if key == '"shape"':
            ones = ",".join(["1"] * rng.choice((1, 2, 31, 32, 33, 65)))
            info[at] = (key, f"[{ones}{',' if value.strip('[] ') else ''}{value.strip('[] ')}]")


def _change_dtype(draft: Draft, rng: random.Random) -> None:
    info = _some_info(draft, rng)
    for at, (key, _) in enumerate(info):
        if key == '"dtype"':
            info[at] = (key, json.dumps(rng.choice([*_DTYPES, "F33", "f32"])))


def _change_value(draft: Draft, rng: random.Random) -> None:
    info = _some_info(draft, rng)
    if info:
        at = rng.randrange(len(info))
        info[at] = (info[at][0], rng.choice(_VALUES))


def _change_member(draft: Draft, rng: random.Random) -> None:
    if draft.members:
        at = rng.randrange(len(draft.members))
        draft.members[at] = (draft.members[at][0], rng.choice(_VALUES))


def _change_name(draft: Draft, rng: random.Random) -> None:
    if draft.members:
        at = rng.randrange(len(draft.members))
        draft.members[at] = (rng.choice(_NAMES), draft.members[at][1])


def _drop_field(draft: Draft, rng: random.Random) -> None:
    info = _some_info(draft, rng)
    if info:
        info.pop(rng.randrange(len(info)))


def _add_field(draft: Draft, rng: random.Random) -> None:
    info = _some_info(draft, rng)
    new = (rng.choice((*_NAMES, '"dtype"', '"shape"')), rng.choice(_VALUES))
    info.insert(rng.randrange(len(info) + 1), new)


def _shuffle(draft: Draft, rng: random.Random) -> None:
    rng.shuffle(draft.members)
    rng.shuffle(_some_info(draft, rng))


def _repeat_member(draft: Draft, rng: random.Random) -> None:
    if draft.members:
        draft.members.insert(rng.randrange(len(draft.members)), rng.choice(draft.members))


def _drop_member(draft: Draft, rng: random.Random) -> None:
    if draft.members:
        draft.members.pop(rng.randrange(len(draft.members)))


def _swap_fields(draft: Draft, rng: random.Random) -> None:
    one, two = _some_info(draft, rng), _some_info(draft, rng)
    if one and two:
        i, j = rng.randrange(len(one)), rng.randrange(len(two))
        one[i], two[j] = two[j], one[i]


def _add_space(draft: Draft, rng: random.Random) -> None:
    draft.space = rng.choice((" ", "\n", "\t \r\n", "\x0b", "\0"))


def _pad(draft: Draft, rng: random.Random) -> None:
    draft.tail = rng.choice((" ", "       ", "\n", "  \t", "\0", "x", "{}", "  ,"))


def _lead(draft: Draft, rng: random.Random) -> None:
    draft.head = rng.choice((" ", "\n", "\ufeff", "[", "\0"))


def _resize_data(draft: Draft, rng: random.Random) -> None:
    draft.data = draft.data[:-1] if rng.random() < 0.5 else draft.data + b"\0"


def _change_length(draft: Draft, rng: random.Random) -> None:
    draft.length_error = rng.choice((-8, -1, 1, 8, 2**20, 2**62))


_DRAFT_MUTATIONS: tuple[Callable[[Draft, random.Random], None], ...] = (
    _add_field, _add_space, _change_dtype, _change_length, _change_member, _change_name, _change_number, _change_rank,
    _change_value, _drop_field, _drop_member, _lead, _pad, _repeat_member, _resize_data, _shuffle, _swap_fields,
)  # fmt: skip


def mutate_draft(draft: Draft, rng: random.Random) -> bytes:
    """Return the file of a draft with one to three of its parts changed."""
    changed = draft.copy()
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(_DRAFT_MUTATIONS)(changed, rng)
    return spell(changed)


def mutate_bytes(file: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return `file` with one to four places flipped, cut, repeated, overwritten, or spliced with `other`.

    Three times in four the length in front is put right again, so that the change is looked at by the parser.
    """
    raw = bytearray(file)
    num_data = len(file) - 8 - int.from_bytes(file[:8], "little")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(8, max(9, len(raw) - num_data + 1))
        match rng.randrange(6):
            case 0 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                raw[at:at] = rng.choice(_TOKENS)
            case 2:
                del raw[at : at + rng.choice((1, 1, 2, 8, 30))]
            case 3:
                raw[at:at] = raw[at : at + rng.randrange(40)]
            case 4:
                token = rng.choice(_TOKENS)
                raw[at : at + len(token)] = token
            case _:
                cut = rng.randrange(8, max(9, len(other)))
                raw[at : at + rng.randrange(60)] = other[cut : cut + rng.randrange(60)]
    if rng.random() < 0.75:
        raw[:8] = struct.pack("<Q", max(0, len(raw) - 8 - num_data))
    return bytes(raw)


def mutate(drafts: list[Draft], rng: random.Random) -> bytes:
    """Return one mutation, of either kind, of one of `drafts`."""
    draft = rng.choice(drafts)
    if rng.random() < 0.6:
        return mutate_draft(draft, rng)
    return mutate_bytes(spell(draft), spell(rng.choice(drafts)), rng)
