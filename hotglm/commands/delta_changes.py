"""What a delta changes against its base, tensor by tensor, as far as the base is there to be looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hotglm.errors import SourceError
from hotglm.manifest_fields import Manifest
from hotglm.release.chains import find_base
from hotglm.release.directory import Release, open_release

__all__ = ["Changes", "TensorChange", "describe_changes", "find_changes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """One tensor that the result does not have from its base as it is.

    Attributes:
        name: of the tensor.
        kind: `"modified"`, `"added"` or `"removed"`; `"replaced"` where the base is not there to tell the first two
            apart.
        codec: how it is carried; None for one that is removed.
        nbytes: its size in the result, or in the base for one that is removed.
        carried_nbytes: what the delta carries for it.
    """

    name: str
    kind: str
    codec: str | None
    nbytes: int
    carried_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a delta changes.

    Attributes:
        tensors: those that changed, the largest part of the delta first.
        num_kept: how many are the base's own.
        nbytes: size of all tensors of the result.
        carried_nbytes: size of the payload.
        has_base: whether the base was there; if not, what it had more is not known.
    """

    tensors: tuple[TensorChange, ...]
    num_kept: int
    nbytes: int
    carried_nbytes: int
    has_base: bool

    def count_kinds(self) -> Counter[str]:
        """Return how many tensors were changed in which way."""
        return Counter(one.kind for one in self.tensors)


def find_changes(release: Release) -> Changes | None:
    """Return what a delta changes; None for a full release.

    Raises:
        SourceError: its payload is not what its manifest says.
    """
    manifest = release.manifest
    if manifest.delta is None:
        return None
    base = _read_base(release)
    with release.open_payload() as payload:
        sizes = {name: location.nbytes for name, location in payload.tensors.items()}
    changes = [
        TensorChange(
            name=name,
            kind=_tell_kind(name, has_base=one.base is not None, base=base),
            codec=one.codec,
            nbytes=manifest.tensors[name].nbytes,
            carried_nbytes=sum(sizes.get(part, 0) for part in one.parts),
        )
        for name, one in manifest.delta.tensors.items()
    ]
    if base is not None:
        changes += [
            TensorChange(name=name, kind="removed", codec=None, nbytes=one.nbytes, carried_nbytes=0)
            for name, one in base.tensors.items()
            if name not in manifest.tensors
        ]
    return Changes(
        tensors=tuple(sorted(changes, key=lambda one: (-one.carried_nbytes, one.name))),
        num_kept=len(manifest.tensors) - len(manifest.delta.tensors),
        nbytes=sum(one.nbytes for one in manifest.tensors.values()),
        carried_nbytes=manifest.files[manifest.delta.payload].size,
        has_base=base is not None,
    )


def describe_changes(changes: Changes) -> Mapping[str, object]:
    """Return it as JSON values."""
    return {
        "carried_nbytes": changes.carried_nbytes,
        "nbytes": changes.nbytes,
        "num_kept": changes.num_kept,
        "has_base": changes.has_base,
        "tensors": [
            {
                "name": one.name,
                "kind": one.kind,
                "codec": one.codec,
                "nbytes": one.nbytes,
                "carried_nbytes": one.carried_nbytes,
            }
            for one in changes.tensors
        ],
    }


def _read_base(release: Release) -> Manifest | None:
    delta = release.manifest.delta
    path = find_base(release)
    if delta is None or path is None:
        return None
    try:
        with open_release(path) as base:
            return base.manifest if base.result_digest == delta.base.digest else None
    except SourceError:
        return None


def _tell_kind(name: str, *, has_base: bool, base: Manifest | None) -> str:
    if has_base or (base is not None and name in base.tensors):
        return "modified"
    return "replaced" if base is None else "added"
