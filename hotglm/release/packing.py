"""Existing weights become a release: read once, hashed, copied or left in place, and described by a manifest.

Rules this module keeps:

- Weights are never rewritten: a release holds the very bytes of the files it was made of (R9).
- Everything in the directory moves with the weights: config, tokenizer, whatever else is not hidden.
- The manifest is written last, and the release appears whole or not at all (R2). What a killed process leaves is passed
  over by readers, and cleaned by the next one.
- What is not known is left out; nothing is guessed. Name and version must be known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hotglm.contract import Contract
from hotglm.envelope import ENVELOPE_NAME
from hotglm.environment import Environment
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.manifest import format_manifest
from hotglm.manifest_fields import MANIFEST_NAME, CodeEntry, Manifest
from hotglm.problem import describe_exception
from hotglm.progress import Progress
from hotglm.release.directory import Release, open_release
from hotglm.release.drafts import Draft, open_draft
from hotglm.release.environment import format_creation, read_creation
from hotglm.release.filling import Filled, fill_directory, flush_tree, hash_in_place
from hotglm.release.placing import exists_error, find_destination, place_release, write_manifest
from hotglm.release.writing import replace_whole, writing
from hotglm.version import Version

if TYPE_CHECKING:
    from hotglm.trust.keys import SigningKey

__all__ = ["ReleaseDetails", "Stated", "pack", "read_stated", "verify_stated"]

_MODE = 0o644


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseDetails:
    """What a release may say beyond name and version. What is None is taken from the source, where that says it.

    Attributes:
        config: fields of the model's config, as JSON can hold them.
        requires: PEP 508 requirements.
        contract: what the version promises: its call interface, config schema, outputs and capabilities are taken.
        expires_at: when it must no longer be taken for new.
        code: model code among the files; declared only.
        created_at: when it was made; now if None.
        signing_key: signs it before it appears, so that nobody ever sees it unsigned; None for no signature.
    """

    config: Mapping[str, Any] | None = None
    requires: tuple[str, ...] | None = None
    contract: Contract | None = None
    expires_at: datetime | None = None
    code: CodeEntry | None = None
    created_at: datetime | None = None
    signing_key: SigningKey | None = None

    @property
    def sign(self) -> Callable[[bytes], bytes] | None:
        """What returns the envelope for the bytes of a manifest; None where it is not to be signed."""
        return None if self.signing_key is None else self.signing_key.sign_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """Everything that a manifest will say, except its files, its tensors and its sequence number."""

    name: str
    version: Version
    weights: str | None
    config: Mapping[str, Any] | None
    requires: tuple[str, ...]
    contract: Contract
    created_at: datetime
    created_in: Environment | None
    expires_at: datetime | None
    code: CodeEntry | None

    def make_manifest(self, filled: Filled, *, sequence: int) -> Manifest:
        """Return the manifest of these files."""
        return Manifest(
            name=self.name,
            version=self.version,
            sequence=sequence,
            files=filled.files,
            tensors=filled.tensors,
            weights=self.weights,
            config=self.config,
            requires=self.requires,
            capabilities=self.contract.capabilities,
            call=self.contract.call,
            config_spec=self.contract.config,
            outputs=self.contract.outputs,
            created_at=self.created_at,
            created_in=self.created_in,
            expires_at=self.expires_at,
            code=self.code,
        )


def pack(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    version: str | Version | None = None,
    sequence: int = 1,
    details: ReleaseDetails | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Release:
    """Make a release of existing weights and open it.

    Without a destination the directory `source` becomes the release where it is: only a manifest is added, and nothing
    in it may be changed from then on. On an error nothing has changed, and nothing is left behind.

    Args:
        source: a safetensors file, a shard index, or a directory of either with everything that belongs to it.
        destination: a directory that does not exist yet; copied to, and renamed there whole.
        name: name of the model; if None, what the weights say (`hotglm.name`).
        version: version of the weights; if None, what they say (`hotglm.version`).
        sequence: number of the release; a store gives its own.
        details: whatever else the release is to say.
        progress: told about every few MiB, from any thread, one at a time; what it raises ends the packing.

    Returns:
        The open release; the caller closes it.

    Raises:
        ArgumentError: no name or version is known, or one that cannot be meant.
        ReleaseError: what the release would say breaks the format, or the source is a release already (EXISTS).
        StoreConflictError: something is at the destination already.
        StoreWriteError: it cannot be written.
        SourceError: the source cannot be used; everything that is wrong is named.
    """
    with ExitStack() as stack:
        draft = open_draft(source, stack=stack)
        details = details or ReleaseDetails()
        stated = read_stated(draft, name=name, version=version, details=details)
        verify_stated(stated, sequence=sequence)
        plan = _Plan(draft=draft, stated=stated, sequence=sequence, sign=details.sign, progress=progress)
        path = _pack_in_place(plan) if destination is None else _pack_copied(plan, find_destination(destination))
    return open_release(path)


def verify_stated(stated: Stated, *, sequence: int) -> None:
    """Refuse what the format would refuse, before a byte is copied.

    Raises:
        ReleaseError: with everything that is wrong.
    """
    bare = replace(stated, weights=None, code=None)
    format_manifest(bare.make_manifest(Filled(files={}, tensors={}), sequence=sequence))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be packed, and how."""

    draft: Draft
    stated: Stated
    sequence: int
    sign: Callable[[bytes], bytes] | None
    progress: Callable[[Progress], object] | None

    def format_manifest(self, filled: Filled) -> bytes:
        return format_manifest(self.stated.make_manifest(filled, sequence=self.sequence))


def _pack_in_place(plan: _Plan) -> str:
    draft = plan.draft
    if draft.manifest is not None:
        raise exists_error(draft.path, "Expected weights without a manifest, got a release already.")
    if draft.root != draft.path:
        raise ArgumentError(
            f"Expected a directory to become a release in place, got {shorten_repr(draft.path)}.",
            remedy="give its directory, or a destination to copy it to.",
        )
    filled = hash_in_place(draft, progress=plan.progress)
    text = plan.format_manifest(filled)
    with writing(draft.path):
        flush_tree(draft.path, filled.files)
    if plan.sign is not None:  # before the manifest, which makes it a release
        replace_whole(os.path.join(draft.path, ENVELOPE_NAME), plan.sign(text))
    replace_whole(os.path.join(draft.path, MANIFEST_NAME), text)
    return draft.path


def _pack_copied(plan: _Plan, path: str) -> str:
    with place_release(path) as workspace:
        filled = fill_directory(plan.draft, workspace, mode=_MODE, progress=plan.progress)
        write_manifest(workspace, plan.format_manifest(filled), filled.files, mode=_MODE, sign=plan.sign)
    return path


# -- what it says ------------------------------------------------------------------------------------------------------


def read_stated(draft: Draft, *, name: str | None, version: str | Version | None, details: ReleaseDetails) -> Stated:
    """Return what a release of this draft will say: what the caller says, else what the source says.

    Raises:
        ArgumentError: no name or version is known, or one that cannot be meant.
        SourceError: what the source says cannot be read.
    """
    old = draft.manifest
    metadata = {} if draft.files is None else draft.files.metadata
    name = name or (metadata.get("hotglm.name") if old is None else old.name)
    version = version or (metadata.get("hotglm.version") if old is None else old.version)
    if not isinstance(name, str) or version is None:
        missing = "name" if version is not None else "version" if name else "name and version"
        raise ArgumentError(
            f"Expected weights that say what they are, got no {missing} for {shorten_repr(draft.path)}.",
            remedy="give name= and version= (--name, --version), or write the file with hotglm.save_weights.",
        )
    requires = draft.read_metadata("hotglm.requires", []) if old is None else old.requires
    config = (None if draft.files is None else draft.files.config) if old is None else old.config
    created_in = read_creation(metadata, file=draft.path) if old is None else old.created_in
    if details.config is None and not _is_finite(config):
        config = None  # JSON has no infinity: readers take it from `config.json` (M11)
    requires = tuple(requires if details.requires is None else details.requires)
    return Stated(
        name=name,
        version=Version(version),
        weights=draft.weights,
        config=_copy_config(config if details.config is None else details.config),
        requires=requires,
        contract=details.contract or (Contract() if old is None else old.contract),
        created_at=details.created_at or (datetime.now(UTC) if old is None else old.created_at),
        created_in=created_in or Environment.from_dict(json.loads(format_creation(requires))),
        expires_at=details.expires_at or (None if old is None else old.expires_at),
        code=details.code or (None if old is None else old.code),
    )


def _is_finite(config: Mapping[str, Any] | None) -> bool:
    try:
        json.dumps(None if config is None else dict(config), allow_nan=False)
    except ValueError:
        return False
    return True


def _copy_config(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a config as JSON gives it back, tuples as lists.

    Raises:
        ArgumentError: JSON cannot hold it.
    """
    if config is None:
        return None
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(config), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(
            f"Expected a config that JSON can hold, got one that it cannot: {describe_exception(error)}.",
            remedy="give config= with text, finite numbers, booleans, None, lists and mappings.",
            code="BAD_CONFIG",
        ) from error
    return copied
