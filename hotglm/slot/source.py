"""What may be staged: files, directories, mappings and modules, made to look alike.

Rules this module keeps:

- Opening a source reads headers and metadata only; no weight is read, copied or checked here.
- What the source does not say (version, name, config, digests) stays None; nothing is guessed.
- A source that was opened is closed by its owner, on every path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from hotglm.contract import Contract
from hotglm.document import Report, parse_json
from hotglm.errors import (
    ArgumentError,
    DigestMismatchError,
    Problem,
    SignatureError,
    TensorValueError,
    VersionSyntaxError,
    shorten_repr,
)
from hotglm.migration.plan import StatePlan
from hotglm.model.compiled import Recipe, find_recipe, unwrap
from hotglm.model.inspection import contract_of, find_state
from hotglm.model.module_versions import KEY as MODULE_VERSIONS_KEY
from hotglm.model.module_versions import MAX_MODULES, find_module_versions
from hotglm.model.registry import Definition, find_definition, read_config
from hotglm.model.wrappers import WrapperSpec, find_wrapper_specs, flatten_mapping
from hotglm.release.directory import Release, is_release, open_release
from hotglm.release.files import WeightFiles, open_weights
from hotglm.release.payloads import read_result_metadata
from hotglm.slot.requantize import PlainOrigin
from hotglm.trust.policy import Accepted, Trust
from hotglm.version import Version
from hotglm.weights.dtypes import LOADABLE_DTYPES, TORCH_DTYPES, dtype_name

__all__ = ["Offer", "Source", "open_source", "verify_digests"]

Source = str | os.PathLike[str] | Mapping[str, torch.Tensor] | nn.Module
"""A safetensors file, a shard index, a directory, a release, a mapping of names to tensors, or a module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """What stands between the tensors of a source and the code that holds them.

    Attributes:
        plan: how each tensor comes about.
        lines: what is done, in words, one line for each step.
    """

    plan: StatePlan
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """An opened source.

    Attributes:
        label: what to call it in texts.
        contract: of its tensors alone, after their migration; kinds, persistence and ties unknown.
        nbytes: bytes of its tensors.
        name: model name it carries.
        version: version it carries.
        config: config it carries.
        requires: requirements it carries.
        digests: digests its tensors must have.
        module_versions: versions of torch's modules that their state was saved under, where that is told.
        migration: what stands between its tensors and `contract`, if anything does.
        files: open files, for a file source; none for a delta, whose tensors have to be made first.
        release: the open release that it is, if it is one.
        accepted: the proof that the slot's trust accepted that release.
        tensors: tensors, for a mapping or module.
        wrappers: what the subclasses are that wrap some of its tensors, by the name of the whole.
        module: the module, for a module source: its structure is what holds the weights.
        recipe: how that was compiled as a whole, if it was what `torch.compile` returns.
        definition: what is declared of the module's class.
        origin: the plain weights that it was quantised from in this stage, if it was.
    """

    label: str
    contract: Contract
    nbytes: int
    name: str | None = None
    version: Version | None = None
    config: Mapping[str, Any] | None = None
    requires: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    module_versions: Mapping[str, int] | None = None
    migration: Migration | None = None
    files: WeightFiles | None = None
    release: Release | None = None
    accepted: Accepted | None = None
    tensors: Mapping[str, torch.Tensor] | None = None
    wrappers: Mapping[str, WrapperSpec] = field(default_factory=dict)
    module: nn.Module | None = None
    recipe: Recipe | None = None
    definition: Definition | None = None
    origin: PlainOrigin | None = None

    def close(self) -> None:
        """Close the files; may be called twice."""
        if self.files is not None:
            self.files.close()
        if self.release is not None:
            self.release.close()

    def with_dtypes_of(self, code: Contract) -> Offer:
        """Return the offer as it will be after floating-point tensors are converted to the dtypes of `code`."""
        state = dict(self.contract.state)
        for name, spec in self.contract.state.items():
            target = code.state.get(name)
            if target is not None and _is_floating(spec.dtype) and _is_floating(target.dtype):
                state[name] = replace(spec, dtype=target.dtype)
        return replace(self, contract=replace(self.contract, state=MappingProxyType(state)))


def _is_floating(name: str) -> bool:
    dtype = TORCH_DTYPES.get(name)
    return dtype is not None and dtype.is_floating_point


def open_source(source: Source, *, trust: Trust | None = None) -> Offer:
    """Open `source` and read what it says about itself.

    Args:
        source: what is offered.
        trust: what must accept a path before anything beside its manifest is read; then nothing but a release will do.
            Mappings and modules are the host's own.

    Raises:
        ArgumentError: it is none of the kinds of `Source`.
        SourceError: the file, index, directory or mapping cannot be used; everything that is wrong is named.
        ModuleError: a module that no slot can hold.
        TrustError: `trust` refuses it.
    """
    if isinstance(source, nn.Module):
        return _offer_module(unwrap(source), compiled=source)
    if isinstance(source, Mapping):
        return _offer_tensors(source)
    if isinstance(source, (str, os.PathLike)):
        return _offer_files(source, trust=trust)
    raise ArgumentError(
        f"Expected a path, a mapping of tensors or a module, got {shorten_repr(type(source).__name__)}.",
        remedy="pass model.state_dict() for tensors, or the path of a .safetensors file, index or directory.",
    )


def _offer_release(path: str, *, trust: Trust | None) -> Offer:
    """Open a release: what its manifest says counts, and every byte that is used is held against its digests."""
    with ExitStack() as stack:
        release = stack.enter_context(open_release(path))
        accepted = None if trust is None else trust.verify(release)
        manifest = release.manifest
        files = stack.enter_context(release.open_weights()) if manifest.delta is None else None
        metadata = _read_result_metadata(release) if files is None else files.metadata
        offer = Offer(
            label=ascii(path),
            contract=Contract.of_tensors({name: (one.dtype, one.shape) for name, one in manifest.tensors.items()}),
            nbytes=sum(one.nbytes for one in manifest.tensors.values()),
            name=manifest.name,
            version=manifest.version,
            config=release.read_config(),
            requires=manifest.requires,
            digests=MappingProxyType({name: one.digest for name, one in manifest.tensors.items()}),
            module_versions=_read_module_versions(metadata, path),
            files=files,
            release=release,
            accepted=accepted,
        )
        stack.pop_all()
    return offer


def _read_result_metadata(release: Release) -> Mapping[str, str]:
    with release.open_payload() as payload:
        return read_result_metadata(payload, release.manifest)


def _offer_files(source: str | os.PathLike[str], *, trust: Trust | None) -> Offer:
    path = os.fspath(source)
    if isinstance(path, str) and is_release(path):
        return _offer_release(path, trust=trust)
    if trust is not None:
        message = "Expected a signed release, got a path that is none."
        raise SignatureError(
            f"{shorten_repr(path)} cannot be signed.",
            problems=[Problem(code="UNSIGNED", message=message, file=os.fsdecode(path))],
            remedy="make it a release with `hotglm pack --sign KEY`, and stage that.",
        )
    files = open_weights(source)
    try:
        tensors = {name: (at.entry.torch_dtype, at.entry.shape) for name, at in files.tensors.items()}
        return Offer(
            label=ascii(files.path),
            contract=Contract.of_tensors(tensors),
            nbytes=files.total_nbytes,
            name=files.metadata.get("hotglm.name"),
            version=_read_version(files),
            config=files.config,
            requires=tuple(_read_list(files, "hotglm.requires")),
            digests=_read_digests(files),
            module_versions=_read_module_versions(files.metadata, files.path),
            files=files,
        )
    except BaseException:
        files.close()
        raise


def _read_version(files: WeightFiles) -> Version | None:
    text = files.metadata.get("hotglm.version")
    try:
        return None if text is None else Version(text)
    except VersionSyntaxError as error:
        raise _bad_metadata(files.path, "hotglm.version", f"a version, got {shorten_repr(text)},") from error


def _read_list(files: WeightFiles, key: str) -> list[str]:
    value = _read_json(files.metadata, files.path, key, [])
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _read_digests(files: WeightFiles) -> Mapping[str, str]:
    value = _read_json(files.metadata, files.path, "hotglm.digests", {})
    known = isinstance(value, dict) and all(
        name in files.tensors and isinstance(digest, str) for name, digest in value.items()
    )
    if not known:
        raise _bad_metadata(files.path, "hotglm.digests", "a JSON object from names of tensors in the file to digests")
    return MappingProxyType(value)


def _read_module_versions(metadata: Mapping[str, str], path: str) -> Mapping[str, int] | None:
    value = _read_json(metadata, path, MODULE_VERSIONS_KEY, None)
    if value is None:
        return None
    known = isinstance(value, dict) and len(value) <= MAX_MODULES and all(type(v) is int for v in value.values())
    if not known:
        raise _bad_metadata(path, MODULE_VERSIONS_KEY, f"a JSON object of at most {MAX_MODULES} paths to numbers")
    return MappingProxyType(value)


def _read_json(metadata: Mapping[str, str], path: str, key: str, default: object) -> Any:
    text = metadata.get(key)
    if text is None:
        return default
    headline = f"Expected JSON in metadata {key!r} of {path!a}."
    remedy = "write the file with hotglm.save_weights."
    report = Report(TensorValueError, headline=headline, remedy=remedy, prefix="METADATA", file=path)
    return parse_json(text.encode(), report=report)


def _bad_metadata(path: str, key: str, expected: str) -> TensorValueError:
    problem = Problem(code="BAD_METADATA", message=f"Expected {expected} in metadata {key!r}", file=path)
    return TensorValueError(
        "Expected usable metadata.", problems=[problem], remedy="write the file with hotglm.save_weights."
    )


def _offer_tensors(source: Mapping[str, torch.Tensor]) -> Offer:
    tensors, wrappers = flatten_mapping(source)
    problems = [
        Problem(code="BAD_TENSOR", message=f"Expected a dense tensor with memory, got {why}", tensor=str(name))
        for name, tensor in tensors.items()
        if (why := _why_unusable(name, tensor))
    ]
    if problems:
        raise TensorValueError(
            "Expected a mapping of names to tensors.", problems=problems, remedy="pass model.state_dict() or the like."
        )
    return Offer(
        module_versions=find_module_versions(source),
        label=f"a mapping of {len(source)} tensors",
        contract=Contract.of_tensors({name: (dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()}),
        nbytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        tensors=tensors,
        wrappers=wrappers,
    )


def _why_unusable(name: object, tensor: object) -> str | None:
    if not isinstance(name, str):
        return f"the name {shorten_repr(name)}, which is not text"
    if not isinstance(tensor, torch.Tensor):
        return f"{shorten_repr(type(tensor).__name__)}"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return f"a {tensor.layout} tensor, quantised or nested"
    if tensor.is_meta:
        return "a meta tensor"
    return None if tensor.dtype in LOADABLE_DTYPES or tensor.dtype.is_complex else f"dtype {dtype_name(tensor.dtype)}"


def _offer_module(module: nn.Module, *, compiled: nn.Module) -> Offer:
    contract = contract_of(module)
    definition = find_definition(type(module))
    tensors = {entry.name: entry.tensor for entry in find_state(module) if entry.persistent}
    persistent = {name: (spec.dtype, spec.shape) for name, spec in contract.state.items() if spec.persistent}
    return Offer(
        label=f"a module of class {type(module).__qualname__}",
        contract=Contract.of_tensors(persistent),
        nbytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        name=definition.name if definition else None,
        version=definition.version if definition else None,
        config=read_config(module),
        requires=definition.requires if definition else (),
        tensors=tensors,
        wrappers=find_wrapper_specs(module),
        module=module,
        recipe=None if compiled is module else find_recipe(compiled),
        definition=definition,
    )


def verify_digests(offer: Offer, digests: Mapping[str, str]) -> None:
    """Refuse digests of the caller's that no bytes could have beside those that the source promises itself.

    Raises:
        DigestMismatchError: naming every tensor.
    """
    problems = [
        Problem(code="DIGEST_MISMATCH", message="No such tensor in the source", tensor=name)
        for name in digests
        if name not in offer.contract.state
    ]
    problems += [
        Problem(
            code="DIGEST_MISMATCH",
            message=f"Expected digest {digest}, got a source that promises {offer.digests[name]}",
            tensor=name,
            expected=digest,
            found=offer.digests[name],
        )
        for name, digest in digests.items()
        if offer.digests.get(name, digest) != digest
    ]
    if problems:
        raise DigestMismatchError(
            f"Expected digests of the tensors that {offer.label} has, got some of others.",
            problems=problems,
            remedy="pass the digests that belong to this source.",
        )
