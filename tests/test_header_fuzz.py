"""The header parser against the reference reader: mutated files by the ten thousand, and what writers write."""

from __future__ import annotations

import random
import struct
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from hotglm.errors import HeaderError
from hotglm.header import DTYPES, Header, Limits, find_name_fault, parse_header, parse_header_length
from support.bytes_maker import NBITS
from support.mutator import Draft, make_draft, mutate, spell
from support.reference import metadata_by_reference, seen_by_reference, seen_by_us, write_by_reference

STRICTER = {
    "BAD_NAME",  # A31
    "BAD_TENSOR_INFO",  # the fields as a list, in order
    "DIM_TOO_LARGE",  # A23
    "DUPLICATE_KEY",  # A14, in the metadata
    "DUPLICATE_TENSOR",  # A12, A13: the last one wins
    "HEADER_BAD_PADDING",  # A10
    "HEADER_LEADING_SPACE",  # A09
    "HEADER_TOO_DEEP",  # A33: unknown fields may nest 127 deep
    "METADATA_TYPE",  # A15: null
    "RANK_TOO_LARGE",  # A21
    "SIZE_OVERFLOW",  # sizes that overflow beside a zero
    "UNKNOWN_FIELD",  # A16
    "UNSUPPORTED_DTYPE",  # A19
}
"""What the reference reader (safetensors 0.8) accepts and we refuse: all of it on purpose."""


def parse_file(file: bytes) -> Header:
    """Parse a whole file the way its reader does."""
    nbytes = parse_header_length(file[:8], file_size=len(file))
    return parse_header(file[8 : 8 + nbytes], file_size=len(file))


def judge(file: bytes) -> tuple[str, Header | None]:
    """Return our verdict on one file (a code, or "ACCEPTED"), after comparing it with that of the reference reader."""
    header, refusal = None, None
    try:
        header = parse_file(file)
    except HeaderError as error:
        refusal = error
    try:
        theirs = seen_by_reference(file)
    except SafetensorError:
        theirs = None
    if refusal is None:
        assert header is not None
        assert seen_by_us(file, header) == theirs
        return "ACCEPTED", header
    codes = {problem.code for problem in refusal.problems}
    assert theirs is None or codes & STRICTER, f"refused with {codes} what the reference reader accepts"
    assert all(0 <= (problem.offset or 0) <= len(file) for problem in refusal.problems)
    assert str(refusal).replace("\n", "").isprintable()
    return refusal.code, None


def fuzz(seed: int, *, num: int, path: Path) -> Counter[str]:
    """Judge `num` mutations and return how often each verdict came; any surprise fails with the file in hex."""
    rng = random.Random(seed)
    verdicts: Counter[str] = Counter()
    drafts: list[Draft] = []
    for number in range(num):
        if number % 200 == 0:
            drafts = [make_draft(rng) for _ in range(8)]
        file = mutate(drafts, rng)
        began = time.thread_time()
        try:
            code, header = judge(file)
        except BaseException:
            print(f"seed {seed}, number {number}: {file.hex()}")
            raise
        assert time.thread_time() - began < 1, file.hex()
        verdicts[code] += 1
        if header is not None and header.metadata and verdicts[code] % 20 == 0:
            path.write_bytes(file)
            assert metadata_by_reference(path) == header.metadata
    return verdicts


def test_drafts_are_good() -> None:
    """What the fuzzer starts from is accepted, unless torch cannot load its dtype."""
    rng = random.Random(1)
    codes = Counter(judge(spell(make_draft(rng)))[0] for _ in range(300))
    assert set(codes) <= {"ACCEPTED", "UNSUPPORTED_DTYPE"}
    assert codes["ACCEPTED"] > 200


def test_mutations_never_surprise(tmp_path: Path) -> None:
    """A38: 30 thousand mutated files crash and hang nothing, and are read as the reference reads them or refused."""
    verdicts = fuzz(20_260, num=30_000, path=tmp_path / "x.safetensors")
    assert verdicts["ACCEPTED"] > 2000
    assert len(verdicts) >= 20  # the mutations reach this many kinds of refusal


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_million_mutations_never_surprise(tmp_path: Path, seed: int) -> None:
    """A38, long form: a million mutated files, a tenth from each seed."""
    verdicts = fuzz(seed, num=100_000, path=tmp_path / "x.safetensors")
    assert verdicts["ACCEPTED"] > 5000


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 20, 100])
def test_noise_is_refused(size: int) -> None:
    """A38: random bytes, with and without a length that fits, are refused with a typed error."""
    rng = random.Random(size)
    for _ in range(500):
        noise = rng.randbytes(size)
        with pytest.raises(HeaderError):
            parse_file(noise)
        with pytest.raises(HeaderError):
            parse_file(struct.pack("<Q", size) + noise)


WRITERS_NAMES = {info.torch_name: name for name, info in DTYPES.items() if info.torch_name}
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda name: find_name_fault(name) is None and name != "__metadata__"
)
metadata = st.none() | st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.text(max_size=50).filter(str.isprintable),
    max_size=5,
)


@st.composite
def written(draw: st.DrawFn) -> tuple[str, tuple[int, ...], bytes]:
    """Draw a tensor: its dtype in the writer's word, shape and bytes."""
    word = draw(st.sampled_from(sorted(WRITERS_NAMES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    nbytes = NBITS[WRITERS_NAMES[word]] // 8
    for size in shape:
        nbytes *= size
    return word, shape, draw(st.binary(min_size=nbytes, max_size=nbytes))


@given(st.dictionaries(names, written(), max_size=6), metadata)
def test_what_is_written_is_read(
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]], metadata: dict[str, str] | None
) -> None:
    """parse(write(tensors, metadata)) == (tensors, metadata), for the reference writer and every dtype we share."""
    if not tensors and metadata == {}:
        metadata = None  # safetensors 0.8 writes `{},"__metadata__":{}}` for these, which it does not read itself
    file = write_by_reference(tensors, metadata)
    header = parse_file(file)
    expected = {name: (WRITERS_NAMES[word], shape, data) for name, (word, shape, data) in tensors.items()}
    assert seen_by_us(file, header) == expected == seen_by_reference(file)
    assert header.metadata == (metadata or {})
    order = [(entry.start, entry.stop) for entry in header.tensors.values()]
    assert order == sorted(order)


@given(st.binary(max_size=200))
def test_any_text_is_refused_or_understood(text: bytes) -> None:
    """No header text at all raises anything but HeaderError."""
    judge(struct.pack("<Q", len(text)) + text)


@given(st.text(max_size=40))
def test_names_without_fault_are_printable_on_one_line(name: str) -> None:
    """A31: a name that passes moves no cursor and forges no line of a log."""
    if find_name_fault(name) is None:
        assert name
        assert len(name) <= Limits().name_length
        assert len(name.splitlines()) == 1
        assert "\x1b" not in name
