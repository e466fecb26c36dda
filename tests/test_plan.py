"""Plans of reads: every byte once, in calls of bounded size, and a tensor whole when the plan says so."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hotglm.weights.plan import CHUNK_NBYTES, IOV_MAX, Read, Transfer, plan_reads


@st.composite
def _transfers(draw: st.DrawFn) -> list[Transfer]:
    """Draw tensors of up to three files, with holes between some, and places in the arena in another order."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 3)), max_size=20))
    ends = [0, 0, 0]
    spots = draw(st.permutations(range(len(sizes))))
    transfers = []
    for index, (file, nbytes, hole) in enumerate(sizes):
        start = ends[file] + hole
        ends[file] = start + nbytes
        transfers.append(
            Transfer(name=f"t{index}", file=file, file_offset=start, arena_offset=64 * spots[index], nbytes=nbytes)
        )
    return draw(st.permutations(transfers))


CHUNKS = st.sampled_from([1, 7, 16, 100])
PIECES = st.sampled_from([1, 2, 5])


def _execute(tasks: Sequence[Sequence[Read]], files: list[bytes], arena: bytearray) -> list[str]:
    """Do what the reads say; return the names in the order in which they were complete."""
    completed: list[str] = []
    for task in tasks:
        for read in task:
            at = read.file_offset
            for piece in read.pieces:
                arena[piece.arena_offset : piece.arena_offset + piece.nbytes] = files[read.file][at : at + piece.nbytes]
                at += piece.nbytes
            completed += read.completes
    return completed


@given(_transfers(), CHUNKS, PIECES, st.integers(0, 1 << 16))
def test_every_tensor_arrives_whole_once(transfers: list[Transfer], chunk: int, pieces: int, seed: int) -> None:
    """In whatever order tasks run, each tensor's bytes end where they belong and it is reported complete once."""
    rng = random.Random(seed)
    files = [rng.randbytes(2000) for _ in range(3)]
    arena = bytearray(64 * 21)
    tasks = list(plan_reads(transfers, chunk_nbytes=chunk, max_pieces=pieces))
    rng.shuffle(tasks)
    completed = _execute(tasks, files, arena)
    assert sorted(completed) == sorted(t.name for t in transfers if t.nbytes)
    for t in transfers:
        wanted = files[t.file][t.file_offset : t.file_offset + t.nbytes]
        assert arena[t.arena_offset : t.arena_offset + t.nbytes] == wanted


@given(_transfers(), CHUNKS, PIECES)
def test_every_byte_is_read_once_and_no_other(transfers: list[Transfer], chunk: int, pieces: int) -> None:
    """The ranges of all reads are exactly the ranges of all tensors: none twice, none between them."""
    read = [
        (r.file, r.file_offset + i)
        for task in plan_reads(transfers, chunk_nbytes=chunk, max_pieces=pieces)
        for r in task
        for i in range(r.nbytes)
    ]
    wanted = [(t.file, t.file_offset + i) for t in transfers for i in range(t.nbytes)]
    assert sorted(read) == sorted(wanted)


@given(_transfers(), CHUNKS, PIECES)
def test_no_read_is_larger_than_allowed(transfers: list[Transfer], chunk: int, pieces: int) -> None:
    """No read takes more bytes than a chunk, more pieces than the system allows, or nothing at all."""
    for task in plan_reads(transfers, chunk_nbytes=chunk, max_pieces=pieces):
        for read in task:
            assert 0 < read.nbytes <= chunk
            assert 0 < len(read.pieces) <= pieces
            assert all(piece.nbytes for piece in read.pieces)


@given(_transfers(), CHUNKS, PIECES)
def test_a_tensor_is_never_spread_over_two_tasks(transfers: list[Transfer], chunk: int, pieces: int) -> None:
    """The task that completes a tensor has read all of it, in order, so that one thread can hash it as it comes."""
    by_name = {t.name: t for t in transfers}
    for task in plan_reads(transfers, chunk_nbytes=chunk, max_pieces=pieces):
        names = [name for read in task for name in read.completes]
        assert sum(read.nbytes for read in task) == sum(by_name[name].nbytes for name in names)
        if len(task) > 1:
            assert len(names) == 1
            offsets = [read.file_offset for read in task]
            assert offsets == sorted(offsets)


def test_neighbours_are_read_by_one_call() -> None:
    """A run of small tensors without holes is one read of many pieces, up to the system's limit."""
    transfers = [
        Transfer(name=f"t{i}", file=0, file_offset=4 * i, arena_offset=64 * i, nbytes=4) for i in range(IOV_MAX + 1)
    ]
    tasks = plan_reads(transfers)
    assert [[len(read.pieces) for read in task] for task in tasks] == [[IOV_MAX], [1]]


def test_a_large_tensor_is_read_in_chunks() -> None:
    """A tensor above the chunk size is one task of consecutive reads, and complete at its last."""
    large = Transfer(name="w", file=0, file_offset=8, arena_offset=0, nbytes=2 * CHUNK_NBYTES + 1)
    (task,) = plan_reads([large])
    assert [read.nbytes for read in task] == [CHUNK_NBYTES, CHUNK_NBYTES, 1]
    assert [read.completes for read in task] == [(), (), ("w",)]


def test_nothing_to_read_is_no_task() -> None:
    """Empty tensors and empty lists give no reads."""
    assert plan_reads([]) == ()
    assert plan_reads([Transfer(name="e", file=0, file_offset=0, arena_offset=0, nbytes=0)]) == ()


def test_the_design_page_names_the_chunk() -> None:
    """The size of a read in docs/design.md is the one that is used."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "design.md").read_text(encoding="utf-8")
    assert f"in chunks of at most {CHUNK_NBYTES >> 20} MiB" in page
