"""Releases to test with: sources of a few bytes, written without torch, and a strategy that draws whole manifests."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from hypothesis import strategies as st

from hotglm.environment import Environment
from hotglm.file_entry import FileEntry
from hotglm.manifest_fields import MAX_SEQUENCE, CodeEntry, Manifest, ReleasedTensor, find_path_faults
from hotglm.release.store import Store
from hotglm.version import Version
from support.contracts import call_specs, output_specs
from support.sources import write_source

__all__ = ["fill", "manifests", "small_manifest", "versions", "write_source"]

SHA = "0123456789abcdef" * 4


def small_manifest() -> Manifest:
    """Return a manifest in which every optional part is there."""
    return Manifest(
        name="ranker",
        version=Version("1.4.0+d3b07384d113"),
        sequence=7,
        files={
            "model.safetensors": FileEntry(size=120, digest=f"safetensors:{SHA}"),
            "code/model.py": FileEntry(size=3, digest=f"sha256:{SHA}"),
        },
        tensors={"w": ReleasedTensor(file="model.safetensors", dtype="float32", shape=(2, 3), digest=f"sha256:{SHA}")},
        weights="model.safetensors",
        config={"hidden": 3, "eps": 1e-05, "inner": {"list": [1, None, True, "x"]}, "caf\u00e9": "\u4e2d"},
        requires=("torch>=2.6",),
        capabilities=frozenset({"rank", "explain"}),
        created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        created_in=Environment(python="3.12.1", packages={"torch": "2.13.0"}, markers={"sys_platform": "linux"}),
        expires_at=datetime(2027, 1, 2, tzinfo=UTC),
        code=CodeEntry(entry="model.net:Ranker", files=("code/model.py",)),
    )


_words = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=["C"]), min_size=1, max_size=8)
_safe_words = _words.filter(lambda word: word not in ("..", "../") and "/" not in word and ".." not in word)
_digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3),
    max_leaves=8,
)
_paths = st.lists(st.text("abcXYZ0_-\u00e9", min_size=1, max_size=5), min_size=1, max_size=3).map("/".join)
_times = st.integers(-62135510400, 253402214400).map(lambda at: datetime.fromtimestamp(at, UTC))
_versions = st.sampled_from(["1.0", "1.4.0", "2.0.0rc1", "1!3.0", "0.1.dev4", "1.4.0+abc.1"]).map(Version)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Draw a manifest that the format can hold."""
    paths = draw(st.lists(_paths, max_size=4, unique=True))
    paths = [path for path in paths if not list(find_path_faults([*paths]))]
    weights = [f"{path}.safetensors" for path in paths if "/" not in path]
    others = [path for path in paths if "/" in path]
    files = {path: FileEntry(size=draw(st.integers(0, 2**53 - 1)), digest=f"safetensors:{SHA}") for path in weights}
    files |= {path: FileEntry(size=draw(st.integers(0, 99)), digest=f"sha256:{draw(_digests)}") for path in others}
    names = draw(st.lists(_safe_words, max_size=4, unique=True)) if weights else []
    tensors = {
        name: ReleasedTensor(
            file=draw(st.sampled_from(weights)),
            dtype=draw(st.sampled_from(["float32", "bfloat16", "bool", "int64", "float8_e4m3fn"])),
            shape=tuple(draw(st.lists(st.integers(0, 2**48), max_size=4))),
            digest=f"sha256:{draw(_digests)}",
        )
        for name in names
    }
    return Manifest(
        name=draw(_safe_words),
        version=draw(_versions),
        sequence=draw(st.integers(1, MAX_SEQUENCE)),
        files=files,
        tensors=tensors,
        weights=draw(st.sampled_from(weights)) if weights else None,
        config=draw(st.none() | st.dictionaries(_words, _values, max_size=4)),
        requires=tuple(
            draw(st.lists(st.sampled_from(["torch>=2.6", "numpy", "a<2; python_version<'3.12'"]), unique=True))
        ),
        capabilities=frozenset(draw(st.lists(_safe_words, max_size=3))),
        call=draw(st.none() | call_specs()),
        outputs=draw(st.none() | output_specs()),
        created_at=draw(_times),
        created_in=draw(st.none() | st.just(Environment(python="3.11.7", packages={"torch": "2.13"}))),
        expires_at=draw(st.none() | _times),
        code=draw(st.none() | st.just(CodeEntry(entry="a.b:C", files=tuple(sorted(others))))),
    )


def fill(store: Store, sources: Path, num: int) -> None:
    """Publish versions 1.0.0, 1.1.0 and so on."""
    for seed in range(num):
        store.publish(sources / str(seed), name="ranker", version=f"1.{seed}.0")


def versions(store: Store) -> list[str]:
    """Return the versions in a store, in the order they were published."""
    return [str(one.version) for one in store.find_releases()]
