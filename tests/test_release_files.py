"""Opening weights: files, indexes and directories; every way that an OS, a publisher or an attacker can spoil it."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from hotglm import seam
from hotglm.errors import (
    ArgumentError,
    HeaderError,
    HotglmError,
    ShardIndexError,
    SourceChangedError,
    SourceError,
    SourceReadError,
)
from hotglm.header import Limits
from hotglm.release.files import open_weights
from hotglm.release.index import parse_index
from hotglm.seam import Seam
from support.bytes_maker import entry, layout, make_file, make_header

E = TypeVar("E", bound=HotglmError)
A = {"a": ("F32", (2,))}
B = {"b": ("U8", (3,)), "c": ("F16", ())}


def file_of(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a good file of `tensors`."""
    header, nbytes = layout(tensors)
    return make_file({**({"__metadata__": dict(metadata)} if metadata is not None else {}), **header}, bytes(nbytes))


def write_sharded(directory: Path, name: str = "model.safetensors") -> Path:
    """Write two good shards and their index; return the path of the index."""
    (directory / "x-1.safetensors").write_bytes(file_of(A, {"format": "pt"}))
    (directory / "x-2.safetensors").write_bytes(file_of(B, {"format": "pt", "k": "v"}))
    return write_index(
        directory, {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-2.safetensors"}, name=f"{name}.index.json"
    )


def write_index(directory: Path, weight_map: object, *, name: str = "model.safetensors.index.json") -> Path:
    path = directory / name
    path.write_text(json.dumps({"metadata": {"total_size": 13}, "weight_map": weight_map}, indent=2) + "\n")
    return path


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    """U5: whatever a test opens or fails to open, no descriptor is left."""
    before = num_descriptors()
    yield
    assert num_descriptors() == before


def refusal_of(path: object, kind: type[E]) -> E:
    """Return the error, of exactly `kind`, that `path` is refused with."""
    with pytest.raises(kind) as caught:
        open_weights(path)  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert caught.value.remedy
    assert str(caught.value).replace("\n", "").isprintable()
    return caught.value


def codes_of(error: HotglmError) -> list[str]:
    return [problem.code for problem in error.problems]


class FaultySeam(Seam):
    """The OS, with one method replaced."""

    def __init__(self, **methods: Callable[..., object]) -> None:
        for name, method in methods.items():
            setattr(self, name, method)


def install(monkeypatch: pytest.MonkeyPatch, **methods: Callable[..., object]) -> None:
    monkeypatch.setattr(seam, "active", FaultySeam(**methods))


# --- what is opened ---------------------------------------------------------------------------------------------------


def test_single_file(tmp_path: Path) -> None:
    """A file gives its tensors with absolute offsets, its metadata, its size and the digest of its header."""
    path = tmp_path / "x.safetensors"
    raw = file_of({**A, **B}, {"hotglm.version": "1.2.3"})
    path.write_bytes(raw)
    with open_weights(path) as weights:
        assert list(weights.tensors) == ["a", "b", "c"]
        location = weights.tensors["b"]
        assert (location.offset, location.nbytes) == (len(raw) - 5, 3)
        assert weights.metadata == {"hotglm.version": "1.2.3"}
        assert weights.total_nbytes == 13
        assert weights.config is None
        assert weights.path == str(path)
        (file,) = weights.files
        assert location.file is file
        assert (file.size, file.path) == (len(raw), str(path))
        assert file.header_sha256 == hashlib.sha256(raw[:-13]).hexdigest()
        assert os.pread(file.fd, 13, location.offset - 8) == bytes(13)
        weights.verify_unchanged()


def test_close_is_idempotent(tmp_path: Path) -> None:
    """Closing twice, or leaving the block after closing, closes each descriptor once."""
    index = write_sharded(tmp_path)
    before = num_descriptors()
    with open_weights(index) as weights:
        assert num_descriptors() == before + 2
        weights.close()
        assert num_descriptors() == before
        stranger = os.open(tmp_path, os.O_RDONLY)  # takes the number of a descriptor that was closed
    weights.close()
    os.fstat(stranger)
    os.close(stranger)


def test_header_larger_than_the_first_read(tmp_path: Path) -> None:
    """A header beyond the first read is read to its end."""
    path = tmp_path / "x.safetensors"
    raw = file_of({f"layer.{i}.weight": ("U8", (1,)) for i in range(3000)})
    path.write_bytes(raw)
    with open_weights(path) as weights:
        assert len(weights.tensors) == 3000
        assert weights.files[0].header_sha256 == hashlib.sha256(raw[:-3000]).hexdigest()


def test_sharded_index(tmp_path: Path) -> None:
    """An index gives the tensors and metadata of all its shards, each with its own file and offset."""
    with open_weights(write_sharded(tmp_path)) as weights:
        assert list(weights.tensors) == ["a", "b", "c"]
        assert [os.path.basename(file.path) for file in weights.files] == ["x-1.safetensors", "x-2.safetensors"]
        assert weights.tensors["c"].file is weights.files[1]
        assert weights.metadata == {"format": "pt", "k": "v"}
        assert weights.total_nbytes == 13


def test_directory_prefers_the_names_of_hugging_face(tmp_path: Path) -> None:
    """In a directory: `model.safetensors`, else its index, whatever lies beside them."""
    write_sharded(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(file_of({"z": ("U8", (1,))}))
    with open_weights(tmp_path) as weights:
        assert list(weights.tensors) == ["a", "b", "c"]
        assert weights.path == str(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(file_of({"m": ("U8", (1,))}))
    with open_weights(tmp_path) as weights:
        assert list(weights.tensors) == ["m"]


def test_directory_with_one_file_or_one_index(tmp_path: Path) -> None:
    """Under other names, the only file or the only index is meant; hidden files and other formats are not looked at."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "ranker.safetensors").write_bytes(file_of(A))
    (tmp_path / "one" / "._ranker.safetensors").write_bytes(b"junk")
    (tmp_path / "one" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with open_weights(tmp_path / "one") as weights:
        assert list(weights.tensors) == ["a"]
    (tmp_path / "two").mkdir()
    write_sharded(tmp_path / "two", "ranker.safetensors")
    with open_weights(tmp_path / "two") as weights:
        assert list(weights.tensors) == ["a", "b", "c"]


@pytest.mark.parametrize("with_index", [False, True])
def test_ambiguous_directory_is_refused(tmp_path: Path, with_index: bool) -> None:
    """Where more than one thing could be meant, all of them are listed and none is taken."""
    names = ["one.safetensors", "two.safetensors"]
    if with_index:
        write_sharded(tmp_path, "ranker.safetensors")
        names = ["ranker.safetensors.index.json", "one.safetensors", "two.safetensors"]
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(file_of(A))
    error = refusal_of(tmp_path, SourceError)
    assert error.code == "AMBIGUOUS_SOURCE"
    assert error.problems[0].found == tuple(names)
    assert all(repr(name) in str(error) for name in names)


def test_directory_with_two_indexes_is_refused(tmp_path: Path) -> None:
    """Two indexes are as ambiguous as two files."""
    write_sharded(tmp_path, "one.safetensors")
    write_sharded(tmp_path, "two.safetensors")
    assert refusal_of(tmp_path, SourceError).code == "AMBIGUOUS_SOURCE"


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    """A directory without safetensors is NOT_FOUND, not an empty set of weights."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert refusal_of(tmp_path, SourceReadError).code == "NOT_FOUND"


def test_links_of_a_model_cache_are_followed(tmp_path: Path) -> None:
    """A snapshot made of links into a store of blobs opens; shards stand beside the link of the index."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    write_sharded(blobs)
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    with open_weights(snapshot) as weights:
        assert list(weights.tensors) == ["a", "b", "c"]
    with open_weights(snapshot / "model.safetensors.index.json") as weights:
        assert len(weights.files) == 2


# --- config -----------------------------------------------------------------------------------------------------------


def test_config_beside(tmp_path: Path) -> None:
    """`config.json` counts in a directory, beside an index and beside `model.safetensors`, and nowhere else."""
    (tmp_path / "config.json").write_text('{"hidden": 4, "limit": Infinity}')
    index = write_sharded(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(file_of(A))
    for path in (tmp_path, index):
        with open_weights(path) as weights:
            assert weights.config == {"hidden": 4, "limit": float("inf")}
    with open_weights(tmp_path / "other.safetensors") as weights:
        assert weights.config is None
    (tmp_path / "model.safetensors").write_bytes(file_of(A))
    with open_weights(tmp_path / "model.safetensors") as weights:
        assert weights.config is not None


def test_config_in_the_metadata_goes_first(tmp_path: Path) -> None:
    """A config inside the file is bound to its bytes, so it wins over one that lies beside it."""
    (tmp_path / "config.json").write_text('{"hidden": 4}')
    (tmp_path / "model.safetensors").write_bytes(file_of(A, {"hotglm.config": '{"hidden": 8}'}))
    with open_weights(tmp_path) as weights:
        assert weights.config == {"hidden": 8}
    (tmp_path / "x.safetensors").write_bytes(file_of(A, {"hotglm.config": '{"hidden": 9}'}))
    with open_weights(tmp_path / "x.safetensors") as weights:
        assert weights.config == {"hidden": 9}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "CONFIG_BAD_JSON"),
        (b"{", "CONFIG_BAD_JSON"),
        (b"[]", "CONFIG_NOT_OBJECT"),
        (b"\xef\xbb\xbf{}", "CONFIG_NOT_UTF8"),
        (b'{"a":"\xff"}', "CONFIG_NOT_UTF8"),
        ('{"a":1}'.encode("utf-16-le"), "CONFIG_BAD_JSON"),
        ('{"a":1}'.encode("utf-32-be"), "CONFIG_BAD_JSON"),
        (b'{"a":1,"\\u0061":2}', "DUPLICATE_KEY"),
        (b'{"a":{"b":1,"b":2}}', "DUPLICATE_KEY"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "CONFIG_TOO_DEEP"),
        (b"[" * 2_000_000, "CONFIG_TOO_DEEP"),
        (b'{"a":' + b"9" * 5000 + b"}", "CONFIG_BAD_JSON"),
        (b'{"a":"' + b"x" * Limits().config_nbytes + b'"}', "CONFIG_TOO_LARGE"),
    ],
)
def test_bad_config_is_refused(tmp_path: Path, text: bytes, code: str) -> None:
    """A broken, huge or deep config is refused with its path, and the weights with it."""
    (tmp_path / "model.safetensors").write_bytes(file_of(A))
    (tmp_path / "config.json").write_bytes(text)
    error = refusal_of(tmp_path, SourceError)
    assert (error.code, error.file) == (code, str(tmp_path / "config.json"))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":NaN}', '{"a":1,"a":2}'])
def test_bad_config_in_the_metadata_is_refused(tmp_path: Path, text: str) -> None:
    """A broken config inside a file is refused too, and there NaN is no JSON."""
    (tmp_path / "x.safetensors").write_bytes(file_of(A, {"hotglm.config": text}))
    assert refusal_of(tmp_path / "x.safetensors", SourceError).file == str(tmp_path / "x.safetensors")


def test_config_that_is_no_file_is_refused(tmp_path: Path) -> None:
    """B18: a FIFO as `config.json` blocks nobody."""
    (tmp_path / "model.safetensors").write_bytes(file_of(A))
    os.mkfifo(tmp_path / "config.json")
    assert refusal_of(tmp_path, SourceReadError).code == "NOT_REGULAR"


# --- indexes ----------------------------------------------------------------------------------------------------------

BAD_SHARD_NAMES = (
    "", ".", "..", "../x-1.safetensors", "/etc/passwd", "sub/x.safetensors", "a\\b.safetensors", "x\0.safetensors",
    "x\n.safetensors", "\u202ex.safetensors", "x" * 300, 1, None, True, ["x-1.safetensors"], {"x": "y"},
)  # fmt: skip


@pytest.mark.parametrize("shard", BAD_SHARD_NAMES, ids=lambda shard: ascii(shard)[:30])
def test_shard_elsewhere_is_refused(tmp_path: Path, shard: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """B20: a shard is a plain name beside the index; anything else is refused before any shard is opened."""
    write_sharded(tmp_path)
    index = write_index(tmp_path, {"a": shard, "b": "x-2.safetensors", "c": "x-2.safetensors"})
    opened: list[str] = []

    def note(path: str, flags: int) -> int:
        opened.append(path)
        return os.open(path, flags)

    install(monkeypatch, open=note)
    error = refusal_of(index, ShardIndexError)
    assert (error.code, error.tensor) == ("BAD_SHARD_NAME", "a")
    assert error.offset == index.read_bytes().index(b'"a": ') + 5
    assert set(opened) == {str(index)}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "INDEX_BAD_JSON"),
        (b"{", "INDEX_BAD_JSON"),
        (b"[]", "INDEX_NOT_OBJECT"),
        (b"{}", "MISSING_FIELD"),
        (b'{"weight_map":{}}', "INDEX_EMPTY"),
        (b'{"weight_map":[]}', "INDEX_NOT_OBJECT"),
        (b'{"weight_map":{"a":"x"}} x', "INDEX_BAD_JSON"),
        (b'{"weight_map":{"a":"x"},}', "INDEX_BAD_JSON"),
        (b'{"weight_map":{"a":"x","a":"x"}}', "DUPLICATE_KEY"),
        (b'{"weight_map":{"a":"x","\\u0061":"y"}}', "DUPLICATE_KEY"),
        (b'{"weight_map":{"a":"x"},"weight_map":{"a":"y"}}', "DUPLICATE_KEY"),
        (b'{"metadata":{"n":1,"n":2},"weight_map":{"a":"x"}}', "DUPLICATE_KEY"),
        (b'{"metadata":NaN,"weight_map":{"a":"x"}}', "INDEX_BAD_JSON"),
        (b'{"metadata":{"n":NaN},"weight_map":{"a":"x"}}', "INDEX_BAD_JSON"),
        (b'{"metadata":' + b"[" * 10**6 + b',"weight_map":{"a":"x"}}', "INDEX_TOO_DEEP"),
        (b'{"weight_map":{"\\u0000":"x"}}', "BAD_NAME"),
        (b'{"metadata":[\0[\0]\0],"weight_map":{"a":"x"}}', "INDEX_BAD_JSON"),
        (b"\xef\xbb\xbf{}", "INDEX_NOT_UTF8"),
        (b'{"weight_map":{"a":"\xff"}}', "INDEX_NOT_UTF8"),
    ],
)
def test_bad_index_is_refused(text: bytes, code: str) -> None:
    """An index is strict JSON: broken, ambiguous or empty ones are refused with a code."""
    with pytest.raises(ShardIndexError) as caught:
        parse_index(text, file="i.json")
    assert (caught.value.code, caught.value.file) == (code, "i.json")


def test_index_caps() -> None:
    """The number of shards and of tensors in an index is capped, inclusively."""
    text = json.dumps({"weight_map": {"a": "x", "b": "y"}}).encode()
    assert parse_index(text, limits=Limits(num_shards=2, num_index_tensors=2)).shards == ("x", "y")
    for limits, code in [
        (Limits(num_shards=1), "INDEX_TOO_MANY_SHARDS"),
        (Limits(num_index_tensors=1), "INDEX_TOO_MANY_TENSORS"),
    ]:
        with pytest.raises(ShardIndexError) as caught:
            parse_index(text, limits=limits)
        assert caught.value.code == code


def test_index_too_large_is_not_read(tmp_path: Path) -> None:
    """B29: an index beyond the cap is refused by its size; a sparse one costs nothing."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b"{")
    os.truncate(index, 2**36)
    assert refusal_of(index, ShardIndexError).code == "INDEX_TOO_LARGE"


def test_index_and_shards_must_say_the_same(tmp_path: Path) -> None:
    """Every difference between index and shards is named at once, in both directions."""
    write_sharded(tmp_path)
    index = write_index(
        tmp_path,
        {"a": "x-2.safetensors", "b": "x-2.safetensors", "gone": "x-1.safetensors", "far": "x-9.safetensors"},
    )
    error = refusal_of(index, ShardIndexError)
    assert sorted((p.code, p.tensor) for p in error.problems if p.tensor) == [
        ("TENSOR_IN_OTHER_SHARD", "a"),
        ("TENSOR_NOT_IN_INDEX", "c"),
        ("TENSOR_NOT_IN_SHARD", "a"),
        ("TENSOR_NOT_IN_SHARD", "gone"),
    ]
    assert [p.file for p in error.problems if p.code == "NOT_FOUND"] == [str(tmp_path / "x-9.safetensors")]


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """A tensor that two shards hold is refused, even where the index names one of them."""
    write_sharded(tmp_path)
    (tmp_path / "x-2.safetensors").write_bytes(file_of({**B, **A}))
    error = refusal_of(tmp_path, ShardIndexError)
    assert [(p.code, p.tensor) for p in error.problems] == [("TENSOR_IN_OTHER_SHARD", "a")]


def test_bad_headers_of_shards_are_named_together(tmp_path: Path) -> None:
    """All bad shards of a good index are in one HeaderError; of a bad index, in its ShardIndexError."""
    index = write_sharded(tmp_path)
    for name in ("x-1", "x-2"):
        (tmp_path / f"{name}.safetensors").write_bytes(make_file({name: entry("F32", [2], 0, 4)}, bytes(4)))
    error = refusal_of(index, HeaderError)
    assert [(p.code, os.path.basename(p.file or "")) for p in error.problems] == [
        ("SIZE_SHAPE_MISMATCH", "x-1.safetensors"),
        ("SIZE_SHAPE_MISMATCH", "x-2.safetensors"),
    ]
    (tmp_path / "x-1.safetensors").unlink()
    error = refusal_of(index, ShardIndexError)  # type: ignore[assignment]
    assert codes_of(error) == ["NOT_FOUND", "SIZE_SHAPE_MISMATCH"]


def test_conflicting_metadata_is_refused(tmp_path: Path) -> None:
    """Shards that disagree about what hotglm reads are from different versions."""
    write_sharded(tmp_path)
    (tmp_path / "x-1.safetensors").write_bytes(file_of(A, {"hotglm.version": "1.0.0"}))
    (tmp_path / "x-2.safetensors").write_bytes(file_of(B, {"hotglm.version": "1.0.1"}))
    error = refusal_of(tmp_path, ShardIndexError)
    assert (error.code, error.problems[0].expected, error.problems[0].found) == ("METADATA_CONFLICT", "1.0.0", "1.0.1")


def test_an_embedded_config_is_capped(tmp_path: Path) -> None:
    """A config in the metadata has the same cap as one beside the weights."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(file_of(A, {"hotglm.config": json.dumps({"text": "x" * 100})}))
    open_weights(path, limits=Limits(config_nbytes=200)).close()
    with pytest.raises(SourceError) as caught:
        open_weights(path, limits=Limits(config_nbytes=100))
    assert (caught.value.code, caught.value.file) == ("CONFIG_TOO_LARGE", str(path))


# --- what is not a file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "fifo", "socket", "device", "link-to-fifo"])
def test_not_regular_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """B18, B21: a directory, FIFO, socket or device in a shard's or a file's place is refused, and blocks nobody."""
    write_sharded(tmp_path)
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("x-1.safetensors")
    path.unlink()
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link-to-fifo":
            os.mkfifo("fifo")
            path.symlink_to("fifo")
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        case "device":
            path.symlink_to("/dev/zero")
    assert codes_of(refusal_of(tmp_path, ShardIndexError)) == ["NOT_REGULAR"]
    if kind != "directory":
        assert refusal_of(path, SourceReadError).code == "NOT_REGULAR"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("missing.safetensors", "NOT_FOUND"),
        ("", "NOT_FOUND"),
        ("file/below", "NOT_FOUND"),
        ("loop", "BAD_PATH"),
        ("dangling", "NOT_FOUND"),
        ("x" * 300, "BAD_PATH"),
        ("nul\0.safetensors", "BAD_PATH"),
        ("\ud800", "BAD_PATH"),
        (b"nul\0", "BAD_PATH"),
        (os.fsdecode("gone\n\x1b[31m\u202e".encode()), "NOT_FOUND"),
    ],
)
def test_path_that_leads_nowhere(tmp_path: Path, path: str | bytes, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """E15: a path that cannot be opened is one typed error with a code, whatever is in it."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nothing")
    error = refusal_of(path, SourceReadError)
    assert error.code == code
    assert error.file == os.fsdecode(path)
    assert isinstance(error, OSError)


@pytest.mark.parametrize(
    "name",
    ["two words", os.fsdecode("é层😀".encode()), "new\nline", "tab\t\x1b[31m", "-", "--help", "a'b\"c", b"\xff\xfe"],
)
def test_odd_paths_work(tmp_path: Path, name: str | bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """E15: spaces, newlines, any script and bytes that are no text work, as file and as directory."""
    monkeypatch.chdir(tmp_path)
    os.mkdir(name)
    inside = os.path.join(os.fsencode(name), os.fsencode(name) + b".safetensors")
    Path(os.fsdecode(inside)).write_bytes(file_of(A))
    for path in (name, inside, Path(os.fsdecode(name))):
        with open_weights(path) as weights:
            assert list(weights.tensors) == ["a"]


@pytest.mark.parametrize("path", [None, 3, 2.5, ["x"], object()])
def test_what_is_no_path_is_an_argument_error(path: object) -> None:
    """A path is text, bytes or a PathLike; a number is not taken for a descriptor."""
    refusal_of(path, ArgumentError)


# --- the OS, and other writers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EMFILE, "NO_DESCRIPTORS"),
        (errno.ENFILE, "NO_DESCRIPTORS"),
        (errno.EACCES, "PERMISSION"),
        (errno.EIO, "IO_ERROR"),
        (errno.ENOMEM, "NO_MEMORY"),
        (errno.ESTALE, "STALE_HANDLE"),
        (errno.EINTR, "IO_ERROR"),
    ],
)
@pytest.mark.parametrize("method", ["open", "fstat", "pread", "listdir"])
def test_every_failing_call_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, number: int, code: str
) -> None:
    """D07, D14, D15, K06: fail from the Nth call of a kind on, N = 1, 2, ... until none is left: all typed."""
    write_sharded(tmp_path, "ranker.safetensors")
    (tmp_path / "config.json").write_text("{}")
    num_failed = 0
    for nth in range(1, 100):
        calls = 0

        def fail(*arguments: object, nth: int = nth) -> object:
            nonlocal calls
            calls += 1
            if calls >= nth:
                raise OSError(number, os.strerror(number))
            return getattr(Seam(), method)(*arguments)

        install(monkeypatch, **{method: fail})
        refusal = None
        try:
            open_weights(tmp_path).close()
        except SourceReadError as error:
            refusal = error
        if refusal is None:
            break
        assert (refusal.code, refusal.errno) == (code, number)
        assert refusal.file is not None
        assert refusal.offset is not None or method != "pread"
        num_failed += 1
    assert num_failed >= (2 if method == "listdir" else 4)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, SystemExit])
@pytest.mark.parametrize("method", ["fstat", "pread"])
def test_interrupt_leaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: type[BaseException]
) -> None:
    """F19: whatever is raised between two calls passes through, and every descriptor is closed."""
    write_sharded(tmp_path)
    before = num_descriptors()
    for nth in range(1, 12):
        calls = 0

        def interrupt(*arguments: object, nth: int = nth) -> object:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise kind
            return getattr(Seam(), method)(*arguments)

        install(monkeypatch, **{method: interrupt})
        try:
            open_weights(tmp_path).close()
        except kind:
            pass
        assert num_descriptors() == before


def test_short_and_interrupted_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D07: a system that gives three bytes at a time, and is interrupted between, gives the same result."""
    index = write_sharded(tmp_path)
    calls = 0

    def stutter(fd: int, nbytes: int, offset: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls % 2:
            raise InterruptedError(errno.EINTR, "interrupted")
        return os.pread(fd, min(3, nbytes), offset)

    install(monkeypatch, pread=stutter)
    with open_weights(index) as weights:
        assert list(weights.tensors) == ["a", "b", "c"]


def test_stale_handle_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D19: a handle that went stale on a network file system is looked up again."""
    (tmp_path / "x.safetensors").write_bytes(file_of(A))
    calls = 0

    def stale_once(path: str, flags: int) -> int:
        nonlocal calls
        calls += 1
        if calls % 2:
            raise OSError(errno.ESTALE, "stale")
        return os.open(path, flags)

    install(monkeypatch, open=stale_once)
    with open_weights(tmp_path / "x.safetensors") as weights:
        assert list(weights.tensors) == ["a"]


def test_read_error_names_the_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D07: an I/O error at byte k says k, and is not tried again."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(A))
    num_failed = 0

    def fail_at_20(fd: int, nbytes: int, offset: int) -> bytes:
        nonlocal num_failed
        if offset >= 20:
            num_failed += 1
            raise OSError(errno.EIO, "Input/output error")
        return os.pread(fd, min(nbytes, 20 - offset), offset)

    install(monkeypatch, pread=fail_at_20)
    error = refusal_of(path, SourceReadError)
    assert (error.code, error.offset, error.file, error.errno) == ("IO_ERROR", 20, str(path), errno.EIO)
    assert num_failed == 1


@pytest.mark.parametrize("change", ["shrink", "empty", "grow", "touch"])
def test_change_during_the_header_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """D02: a file that is cut, extended or written to while its header is read is SourceChangedError."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(A))

    def change_then_read(fd: int, nbytes: int, offset: int) -> bytes:
        match change:
            case "shrink":
                os.truncate(path, 30)
            case "empty":
                os.truncate(path, 0)
            case "grow":
                os.truncate(path, 10_000)
            case _:
                os.utime(path, ns=(0, 0))
        return os.pread(fd, nbytes, offset)

    install(monkeypatch, pread=change_then_read)
    error = refusal_of(path, SourceChangedError)
    assert (error.code, error.file) == ("SOURCE_CHANGED", str(path))


def test_verify_unchanged(tmp_path: Path) -> None:
    """D01-D04: rename and unlink change nothing about open files; a write or a cut is named, for all files at once."""
    index = write_sharded(tmp_path)
    with open_weights(index) as weights:
        one, two = (Path(file.path) for file in weights.files)
        two.rename(tmp_path / "moved")
        one.replace(tmp_path / "away")
        weights.verify_unchanged()
        os.truncate(tmp_path / "moved", 10)
        os.utime(tmp_path / "away", ns=(1, 1))
        with pytest.raises(SourceChangedError) as caught:
            weights.verify_unchanged()
        assert [p.file for p in caught.value.problems] == [str(one), str(two)]
        assert caught.value.problems[1].offset == 10
    with pytest.raises(SourceReadError):  # a closed file is no unchanged one
        weights.verify_unchanged()


def test_close_survives_a_failing_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, or an interrupt, while one file is closed leaves no other open."""
    index = write_sharded(tmp_path)
    calls = 0

    def close_and_fail(fd: int) -> None:
        nonlocal calls
        calls += 1
        os.close(fd)
        raise OSError(errno.EIO, "late") if calls % 2 else KeyboardInterrupt

    weights = open_weights(index)
    install(monkeypatch, close=close_and_fail)
    with pytest.raises(KeyboardInterrupt):
        weights.close()
    assert calls == 2


def test_opening_does_not_read_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P5: opening reads headers only; a sparse terabyte opens as quickly as a kilobyte."""
    path = tmp_path / "x.safetensors"
    header, _ = layout({"a": ("U8", (2**40,))})
    path.write_bytes(make_file(header))
    os.truncate(path, len(make_header(header)) + 8 + 2**40)
    num_read = 0

    def count(fd: int, nbytes: int, offset: int) -> bytes:
        nonlocal num_read
        num_read += nbytes
        return os.pread(fd, nbytes, offset)

    install(monkeypatch, pread=count)
    with open_weights(path) as weights:
        assert weights.total_nbytes == 2**40
    assert num_read <= 2**16


def test_flags_never_block_and_never_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every open is read-only, closes on exec and does not block."""
    seen: set[int] = set()

    def note(path: str, flags: int) -> int:
        seen.add(flags)
        return os.open(path, flags)

    write_sharded(tmp_path)
    install(monkeypatch, open=note)
    open_weights(tmp_path).close()
    for flags in seen:
        assert flags & os.O_CLOEXEC
        assert flags & os.O_NONBLOCK
        assert flags & os.O_ACCMODE == os.O_RDONLY


def test_header_errors_name_the_file(tmp_path: Path) -> None:
    """A refusal of a header carries the path, the tensor and the offset in the file."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(make_file({"a\n": entry("F32", [1], 0, 4)}, bytes(4)))
    error = refusal_of(path, HeaderError)
    assert (error.code, error.file, error.tensor, error.offset) == ("BAD_NAME", str(path), "a\n", 9)


@pytest.mark.parametrize("size", range(9))
def test_tiny_files_are_refused(tmp_path: Path, size: int) -> None:
    """A01, A02: files of no to eight zero bytes."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size))
    assert refusal_of(path, HeaderError).code == ("HEADER_TOO_SMALL" if size < 8 else "HEADER_EMPTY")


def test_results_are_read_only(tmp_path: Path) -> None:
    """What was verified stays what it was: no attribute or mapping can be changed."""
    (tmp_path / "x.safetensors").write_bytes(file_of(A, {"k": "v"}))
    with open_weights(tmp_path) as weights:
        with pytest.raises(dataclasses.FrozenInstanceError):
            weights.path = "other"  # type: ignore[misc]
        with pytest.raises(TypeError):
            weights.tensors["b"] = weights.tensors["a"]  # type: ignore[index]
        with pytest.raises(TypeError):
            weights.metadata["k"] = "w"  # type: ignore[index]


def test_many_threads_may_open_at_once(tmp_path: Path) -> None:
    """Opening shares no state: eight threads open and close the same shards, and nothing is left."""
    index = write_sharded(tmp_path)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(25):
                with open_weights(index) as weights:
                    weights.verify_unchanged()
        except BaseException as error:  # noqa: BLE001  # a thread's failure is told to the test
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
