"""Deltas made and materialised: the very bytes of the new release, for every dtype and shape, or a typed refusal."""

from __future__ import annotations

import json
import os
import random
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotglm.deltas.making import make_delta
from hotglm.deltas.materializing import materialize
from hotglm.errors import (
    ArgumentError,
    DeltaError,
    DigestMismatchError,
    HotglmError,
    SourceError,
    StoreConflictError,
)
from hotglm.manifest import format_manifest
from hotglm.manifest_fields import MANIFEST_NAME
from hotglm.progress import Progress
from hotglm.release.directory import open_release
from hotglm.release.hashing import num_hash_threads
from hotglm.weights.zstd import compress
from support.bytes_maker import split_file
from support.deltas import Part, State, change_state, draw_state, edit_delta, pack_state, read_tree
from support.mutator import mutate_bytes
from support.peak import read_peak

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # flushing a disk takes longer than all the rest
GOLDEN = Path(__file__).parent / "golden" / "deltas-1"
BIG: State = {
    "kept": ("F32", (50,), random.Random(1).randbytes(200)),
    "whole": ("F32", (50,), random.Random(2).randbytes(200)),
    "sparse": ("BF16", (600,), random.Random(3).randbytes(1200)),
    "xor": ("F32", (400,), bytes(1600)),
    "gone": ("I8", (1,), b"x"),
}


def change_big() -> State:
    """Return the next version of `BIG`, for which every codec is the smallest somewhere."""
    data = bytearray(BIG["sparse"][2])
    data[100] ^= 1
    return {
        "kept": BIG["kept"],
        "whole": ("F32", (50,), random.Random(4).randbytes(200)),
        "sparse": ("BF16", (600,), bytes(data)),
        "xor": ("F32", (400,), bytes([0, 0, 0, 1] * 400)),
        "new": ("F32", (), b"abcd"),
    }


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    """A delta from version 1.0 to 2.0, beside both."""
    old, new = pack_state(tmp_path, 1, BIG), pack_state(tmp_path, 2, change_big())
    make_delta(old, new, tmp_path / "delta-2").close()
    return tmp_path / "delta-2"


# -- the very bytes ----------------------------------------------------------------------------------------------------


@settings(max_examples=settings().max_examples // 2)  # each makes a dozen small files, flushed
@given(st.integers(0, 2**32), st.integers(1, 2), st.integers(1, 3))
def test_a_delta_and_its_base_give_the_very_bytes(seed: int, old_files: int, new_files: int) -> None:
    """C16, C12: base and delta give every file of the target, for all dtypes, empty, 0-rank and one-byte tensors."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        directory = Path(name)
        old = draw_state(rng, 5)
        new = change_state(rng, old) or draw_state(rng, 3)
        base = pack_state(directory, 1, old, num_files=min(old_files, len(old)))
        target = pack_state(directory, 2, new, num_files=min(new_files, len(new)))
        with make_delta(base, target, directory / "delta") as made, open_release(target) as full:
            made.verify()
            assert made.manifest.kind == "delta"
            assert made.result_digest == full.digest == full.result_digest
            with materialize(made, directory / "made") as result:
                assert result.digest == full.digest
                result.verify()
        assert read_tree(directory / "made") == read_tree(target)


def test_every_codec_is_used_where_it_is_the_smallest(delta: Path) -> None:
    """Tensors that are equal are not in the payload; others are whole, sparse or xored, whichever is smallest."""
    with open_release(delta) as release:
        fields = release.manifest.delta
        assert fields is not None
        assert {name: one.codec for name, one in fields.tensors.items()} == {
            "new": "whole",
            "sparse": "sparse",
            "whole": "whole",
            "xor": "xor-zstd",
        }
        assert release.manifest.total_nbytes < 2500


def test_making_a_delta_again_gives_the_same_bytes(delta: Path) -> None:
    """A delta depends on its two releases alone: not on threads, time or place."""
    make_delta(delta.parent / "full-1", delta.parent / "full-2", delta.parent / "again").close()
    assert read_tree(delta.parent / "again") == read_tree(delta)


@pytest.mark.parametrize("length", [2, 5])
def test_a_chain_folds_to_what_each_step_gives(tmp_path: Path, length: int) -> None:
    """Materialising the newest of a chain gives what materialising step by step gives, and needs no step between."""
    rng = random.Random(length)
    states = [draw_state(rng)]
    pack_state(tmp_path, 1, states[0])
    for number in range(2, length + 2):
        states.append(change_state(rng, states[-1]) or draw_state(rng))
        target = pack_state(tmp_path, number, states[-1])
        before = tmp_path / ("full-1" if number == 2 else f"delta-{number - 1}")
        make_delta(before, target, tmp_path / f"delta-{number}").close()
    (tmp_path / "only").mkdir()
    for name in ("full-1", *(f"delta-{number}" for number in range(2, length + 2))):
        (tmp_path / name).rename(tmp_path / "only" / name)
    materialize(tmp_path / "only" / f"delta-{length + 1}", tmp_path / "folded").close()
    assert read_tree(tmp_path / "folded") == read_tree(tmp_path / f"full-{length + 1}")


def test_a_delta_between_deltas_folds_them(delta: Path) -> None:
    """A new release that is a delta itself is resolved: one delta leads over several steps."""
    parent = delta.parent
    third = pack_state(parent, 3, change_state(random.Random(9), change_big()))
    make_delta(delta, third, parent / "delta-3").close()
    with make_delta(parent / "full-1", parent / "delta-3", parent / "leap") as leap:
        assert leap.manifest.delta is not None
        assert str(leap.manifest.delta.base.version) == "1.0"
    (parent / "delta-3" / "hotglm-manifest.json").unlink()
    materialize(parent / "leap", parent / "made").close()
    assert read_tree(parent / "made") == read_tree(third)


def test_full_releases_are_copied(delta: Path) -> None:
    """Who materialises need not know what it is: a full release becomes a copy of itself."""
    with materialize(delta.parent / "full-2", delta.parent / "copy") as copy, open_release(delta) as made:
        assert copy.digest == made.result_digest
    assert read_tree(delta.parent / "copy") == read_tree(delta.parent / "full-2")


def test_progress_counts_every_byte(delta: Path) -> None:
    """Making and materialising tell how far they are, up to the whole; what the callback raises ends it cleanly."""
    parent, told = delta.parent, list[Progress]()
    make_delta(parent / "full-1", parent / "full-2", parent / "a", progress=told.append).close()
    materialize(delta, parent / "b", progress=told.append).close()
    for part in ("delta", "materialize"):
        counts = [one.done_nbytes for one in told if one.part == part]
        assert counts == sorted(counts)
        assert counts[-1] == 3204
        assert {one.total_nbytes for one in told if one.part == part} == {3204}

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_delta(parent / "full-1", parent / "full-2", parent / "stopped", progress=stop)
    with pytest.raises(KeyboardInterrupt):
        materialize(delta, parent / "stopped", progress=stop)
    assert not [path for path in parent.iterdir() if path.name == "stopped" or path.name.endswith(".partial")]


def test_golden_deltas_lead_to_their_bytes_for_ever(tmp_path: Path) -> None:
    """B30: a chain of format 1 that was made once, with every codec, gives the same release in every later hotglm."""
    with open_release(GOLDEN / "delta-3") as release, materialize(release, tmp_path / "made") as made:
        release.verify()
        assert format_manifest(release.manifest) == (GOLDEN / "delta-3" / MANIFEST_NAME).read_bytes()
        assert release.digest == "sha256:1cff9bff9d530b1cf9256b30d91a413565d6d82144b0790e1e4d2a8ff4f782bc"
        assert made.digest == "sha256:4d9407978e07dc4859ea13b81b06f41f0840d7e7767ca7245484aa322ce780bc"
        assert release.result_digest == made.digest
        made.verify()


def test_memory_is_bounded_by_tensors_and_not_by_releases() -> None:
    """Making and materialising hold a few tensors for each core, however many there are."""
    nbytes, num = 2 << 20, 50
    most = 8 * (num_hash_threads() + 1) * nbytes  # old, new, difference and result, twice for each thread
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        directory, half = Path(name), random.Random(3).randbytes(nbytes // 2)
        old: State = {f"w{number}": ("I8", (nbytes,), half * 2) for number in range(num)}
        new: State = {name: ("I8", (nbytes,), half + bytes(nbytes // 2)) for name in old}
        before, after = pack_state(directory, 1, old), pack_state(directory, 2, new)
        del old, new
        assert read_peak(lambda: make_delta(before, after, directory / "delta").close()) < most
        assert read_peak(lambda: materialize(directory / "delta", directory / "made").close()) < most


# -- what it is not ----------------------------------------------------------------------------------------------------


def test_a_delta_has_no_weights_of_its_own(delta: Path) -> None:
    """Weights of a delta cannot be opened, and its text names what to do; its payload is one of a delta only."""
    with open_release(delta) as release, open_release(delta.parent / "full-1") as full:
        with pytest.raises(DeltaError, match=r"slot\.stage") as refusal:
            release.open_weights()
        assert refusal.value.code == "DELTA_NEEDS_BASE"
        assert "materialize" in refusal.value.remedy
        with release.open_payload() as payload:
            assert len(payload.files) == 1
        with pytest.raises(ArgumentError):
            full.open_payload()


def test_the_same_release_twice_makes_no_delta(delta: Path) -> None:
    """C07: a delta against itself is refused where it would be made, also where one side is a delta of the other."""
    for old, new in (("full-1", "full-1"), ("full-2", "delta-2")):
        with pytest.raises(ArgumentError, match="two different"):
            make_delta(delta.parent / old, delta.parent / new, delta.parent / "x")


def test_a_destination_that_is_taken_is_left_alone(delta: Path) -> None:
    """Neither making nor materialising writes where something is."""
    before = read_tree(delta)
    with pytest.raises(StoreConflictError):
        make_delta(delta.parent / "full-1", delta.parent / "full-2", delta)
    with pytest.raises(StoreConflictError):
        materialize(delta, delta)
    assert read_tree(delta) == before


# -- what is damaged ---------------------------------------------------------------------------------------------------


def find_part(path: Path, name: str, place: int = 0) -> str:
    """Return what a part of the tensor `name` is called."""
    manifest = json.loads((path / "hotglm-manifest.json").read_bytes())
    found: str = manifest["delta"]["tensors"][name]["parts"][place]
    return found


def refused(path: Path) -> HotglmError:
    """Return the refusal of a delta that is materialised; nothing is left of that."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(SourceError) as refusal:
        materialize(path, path.parent / "refused")
    assert sorted(path.parent.iterdir()) == before
    return refusal.value


def test_every_flipped_bit_of_a_delta_is_refused(delta: Path) -> None:
    """C03: a bit that flips in any file of a delta is found by verifying it, and what it leads to is not made."""
    rng = random.Random(5)
    files = [path for path in delta.rglob("*") if path.is_file()]
    with open_release(delta) as release:
        digest = release.digest
    for path in files:
        good = path.read_bytes()
        path.chmod(0o644)
        for at in sorted(rng.sample(range(len(good) * 8), min(120, len(good) * 8))):
            bad = bytearray(good)
            bad[at // 8] ^= 1 << at % 8
            path.write_bytes(bytes(bad))
            try:
                with open_release(delta) as release:
                    release.verify()
            except SourceError:
                continue
            with open_release(delta) as release:  # the manifest may say something else, canonically
                assert path.name == "hotglm-manifest.json"
                assert release.digest != digest
        path.write_bytes(good)
    assert open_release(delta).verify() is None  # type: ignore[func-returns-value]


def test_every_truncation_of_a_payload_is_refused(delta: Path) -> None:
    """C06: a payload that ends early is refused when the delta is opened."""
    payload = delta / "delta.safetensors"
    good = payload.read_bytes()
    payload.chmod(0o644)
    for length in range(0, len(good), 37):
        payload.write_bytes(good[:length])
        with pytest.raises(SourceError):
            open_release(delta)


def put(*path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """Return an edit of a manifest."""

    def edit(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("name", "place", "part", "code"),
    [
        ("whole", 0, None, "DELTA_PART_MISSING"),
        ("whole", 0, ("F32", (49,), bytes(196)), "DELTA_BAD_PART"),
        ("whole", 0, ("I32", (50,), bytes(200)), "DELTA_BAD_PART"),
        ("whole", 0, ("F32", (50,), bytes(200)), "DIGEST_MISMATCH"),
        ("xor", 0, ("U8", (1601,), bytes(1601)), "DELTA_TOO_LARGE"),
        ("xor", 0, ("U8", (8,), bytes(8)), "DELTA_BAD_PAYLOAD"),
        ("sparse", 1, ("BF16", (700,), bytes(1400)), "DELTA_TOO_LARGE"),
        ("sparse", 0, ("U16", (1,), b"\xff\xff"), "DELTA_BAD_INDEX"),
        ("sparse", 1, ("BF16", (1,), b"\x12\x34"), "DELTA_RESULT_MISMATCH"),
    ],
)
def test_a_part_that_does_not_fit_is_refused(delta: Path, name: str, place: int, part: Part | None, code: str) -> None:
    """C03 to C06: parts of another size, dtype or content than the result needs are refused by code and tensor."""
    edit_delta(delta, parts={find_part(delta, name, place): part})
    error = refused(delta)
    assert code in [problem.code for problem in error.problems]
    assert error.tensor is not None


def test_a_bomb_is_refused_before_memory_is_taken(delta: Path) -> None:
    """C06: a frame of a few bytes that holds 16 MiB is refused for its size, and not unpacked."""
    bomb = compress(bytes(16 << 20))
    part = len(bomb).to_bytes(4, "little") + bomb
    assert len(part) < 1600
    edit_delta(delta, parts={find_part(delta, "xor"): ("U8", (len(part),), part)})
    tracemalloc.start()
    error = refused(delta)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.code in ("DELTA_TOO_LARGE", "DELTA_BAD_PAYLOAD")
    assert error.tensor == "xor"
    assert peak < 4 << 20


def test_a_part_that_nobody_uses_is_refused(delta: Path) -> None:
    """C05: what is in a payload without a use is no part of a delta."""
    edit_delta(delta, parts={"more": ("U8", (3,), b"abc")})
    assert refused(delta).code == "DELTA_PART_UNUSED"


def test_payloads_of_somebody_with_ill_will_never_surprise(delta: Path) -> None:
    """C03 to C06: parts with any bytes, under digests that fit them, give the promised release or a typed refusal."""
    rng, num_refused = random.Random(7), 0
    good = {name: (delta / name).read_bytes() for name in ("delta.safetensors", MANIFEST_NAME)}
    text, data = split_file(good["delta.safetensors"])
    header = json.loads(text)
    for number in range(100):
        name = rng.choice(sorted(header))
        start, stop = header[name]["data_offsets"]
        part = mutate_bytes(data[start:stop], data, rng)
        size = {"U8": 1, "F32": 4, "BF16": 2}[header[name]["dtype"]]
        shape = (len(part) // size,)
        for path, content in good.items():
            (delta / path).write_bytes(content)
        edit_delta(delta, parts={name: (header[name]["dtype"], shape, part[: shape[0] * size])})
        made = delta.parent / f"made-{number}"
        try:
            materialize(delta, made).close()
        except SourceError:
            num_refused += 1
            assert not made.exists()
        else:
            assert read_tree(made) == read_tree(delta.parent / "full-2")
    assert num_refused > 70


def test_a_header_that_is_not_the_promised_one_is_refused(delta: Path) -> None:
    """R9: the bytes in front of the data are bound by the digest of the file, and refused before they are used."""
    text = read_tree(delta.parent / "full-2")["model.safetensors"]
    length = 8 + int.from_bytes(text[:8], "little")
    other = text[:length].replace(b"version 2", b"version 3")
    assert other != text[:length]
    edit_delta(delta, parts={"header.0": ("U8", (length,), other)})
    assert refused(delta).code == "DIGEST_MISMATCH"
    with open_release(delta) as release, pytest.raises(DeltaError):
        release.verify()
    edit_delta(delta, parts={"header.0": ("U8", (length,), b"\xff" * length)})
    assert refused(delta).code == "HEADER_TOO_LARGE"
    edit_delta(delta, parts={"header.0": ("U8", (length + 1,), text[: length + 1])})
    assert refused(delta).code == "DELTA_BAD_RANGE"
    edit_delta(delta, parts={"header.0": ("I8", (length,), text[:length])})
    assert refused(delta).code == "DELTA_BAD_PART"


def test_a_manifest_that_promises_another_result_is_refused(delta: Path) -> None:
    """C03: what comes out is compared with the digest in the manifest, whoever wrote that."""
    edit_delta(delta, put("tensors", "xor", "digest", value="sha256:" + "0" * 64))
    codes = {problem.code for problem in refused(delta).problems}
    assert codes & {"DIGEST_MISMATCH", "DELTA_RESULT_MISMATCH"}


def test_a_damaged_base_is_refused(delta: Path) -> None:
    """C02: bytes of the base that are not the promised ones are found, and every tensor that they reach is named."""
    weights = delta.parent / "full-1" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-(len(BIG["gone"][2]) + 1)] ^= 1  # in `xor`
    weights.write_bytes(bytes(data))
    error = refused(delta)
    assert isinstance(error, DigestMismatchError)
    assert {(problem.code, problem.tensor) for problem in error.problems} == {("DELTA_RESULT_MISMATCH", "xor")}


# -- chains on disk ----------------------------------------------------------------------------------------------------


def test_a_delta_before_its_base_waits_and_converges(delta: Path) -> None:
    """C09: a delta whose base is not there is refused under a code to wait on, and taken once the base has come."""
    base = delta.parent / "full-1"
    base.rename(delta.parent / ".hidden")
    error = refused(delta)
    assert error.code == "CHAIN_BASE_MISSING"
    assert "1.0, number 1" in str(error)
    (delta.parent / ".hidden").rename(base)
    materialize(delta, delta.parent / "made").close()
    assert read_tree(delta.parent / "made") == read_tree(delta.parent / "full-2")


def test_the_name_of_a_base_does_not_matter_but_its_digest_does(delta: Path) -> None:
    """C01: a base is found under any name; another release under the name that a store would give is refused."""
    parent = delta.parent
    (parent / "full-1").rename(parent / "whatever")
    materialize(delta, parent / "made").close()
    pack_state(parent, 7, BIG).rename(parent / "000000001-1.0")
    error = refused(delta)
    assert error.code == "DELTA_WRONG_BASE"
    assert "7.0, number 7" in str(error)


def test_a_circle_of_deltas_is_refused(delta: Path) -> None:
    """C07: deltas that lead to each other are found out, whatever they are called."""
    parent = delta.parent
    make_delta(parent / "full-2", parent / "full-1", parent / "back").close()
    (parent / "full-1" / "hotglm-manifest.json").unlink()
    (parent / "full-2" / "hotglm-manifest.json").unlink()
    assert refused(delta).code == "CHAIN_LOOP"


def test_a_longer_chain_than_allowed_is_refused(delta: Path) -> None:
    """C07: the cap is the caller's to lower."""
    third = pack_state(delta.parent, 3, BIG)
    make_delta(delta, third, delta.parent / "delta-3").close()
    (delta.parent / "full-2" / "hotglm-manifest.json").unlink()
    third.joinpath("hotglm-manifest.json").unlink()
    with pytest.raises(DeltaError) as refusal:
        materialize(delta.parent / "delta-3", delta.parent / "made", max_chain=1)
    assert refusal.value.code == "CHAIN_TOO_LONG"
    materialize(delta.parent / "delta-3", delta.parent / "made", max_chain=2).close()


def test_models_of_other_names_make_no_delta(delta: Path, tmp_path: Path) -> None:
    """A delta stays within one model."""
    edit = delta.parent / "full-2" / "hotglm-manifest.json"
    edit.chmod(0o644)
    edit.write_bytes(edit.read_bytes().replace(b'"ranker"', b'"other"'))
    with pytest.raises(ArgumentError, match="one model"):
        make_delta(delta.parent / "full-1", delta.parent / "full-2", tmp_path / "x")
