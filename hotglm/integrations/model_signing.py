"""Bundles of OpenSSF model-signing: verified by that package, and bound to the bytes that are then used.

Rules this module keeps:

- The package decides whether a signature holds, by the key or configuration that the host gives. Nothing of it is
  written again here, and it is imported when it is asked for (extra `model-signing`).
- It hashes files by their paths. So that nothing can change behind it, what it vouches for is taken from the very bytes
  of the bundle that it verified: for a release the digest of the manifest, which must be that of the bytes in memory.
- A bundle may say which paths to leave out, and the package follows it. Here a file that it leaves out is refused.
"""

from __future__ import annotations

import importlib
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hotglm.document import Report, parse_json, verify_utf8
from hotglm.envelope import read_base64
from hotglm.errors import DigestMismatchError, HotglmError, Problem, SignatureError, SourceError, shorten_repr
from hotglm.integrations.extras import missing_model_signing
from hotglm.manifest_fields import MANIFEST_NAME
from hotglm.problem import describe_exception
from hotglm.release.directory import Release
from hotglm.release.reading import read_document
from hotglm.release.tree import find_entries

__all__ = ["VerifiedBundle", "verify_bundle", "verify_release_bundle"]

_MAX_BUNDLE_NBYTES = 64 * 2**20
_MAX_BRACKETS = 200_000
_MISMATCH = "Signature mismatch"
"""What the package's error begins with where the signature holds, and the files are others."""

_REMEDY = "fetch the files and the bundle again; if it stays, find out who changed them."


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedBundle:
    """What a bundle vouches for.

    Attributes:
        path: the directory.
        files: path of every file in it -> `sha256:...` of its bytes, as they were signed; read-only.
    """

    path: str
    files: Mapping[str, str]


def verify_bundle(
    path: str | os.PathLike[str], bundle: str | os.PathLike[str], *, public_key: str | os.PathLike[str] | Any
) -> VerifiedBundle:
    """Verify that a directory is what a bundle says, all of it.

    What is read afterwards by path may have changed since: compare it with `files`, or pack it and sign that.

    Args:
        path: the directory.
        bundle: the bundle's file.
        public_key: the PEM file of an elliptic-curve key; or a `model_signing.verifying.Config` that was told whom to
            believe, such as an identity of Sigstore.

    Raises:
        SignatureError: the signature does not hold, or files are not covered by it (NOT_COVERED).
        DigestMismatchError: files are not the ones that were signed.
        SourceError: a file cannot be read. MissingExtraError: `model-signing` is not installed.
    """
    root, files = os.path.realpath(path), _verify(path, bundle, public_key)
    found = {name for name, status in find_entries(root) if not stat.S_ISDIR(status.st_mode)}
    inside = os.path.relpath(os.path.realpath(bundle), root)
    if left_out := sorted(found - files.keys() - {inside}):
        raise _not_covered(root, left_out)
    return VerifiedBundle(path=root, files=files)


def verify_release_bundle(release: Release, bundle: str | os.PathLike[str], *, public_key: Any) -> VerifiedBundle:
    """Verify that a bundle vouches for the manifest that an open release was opened with, which binds all the rest.

    Args:
        release: open; its other files are verified against its manifest when they are used, or by `release.verify`.
        bundle: the bundle's file.
        public_key: as for `verify_bundle`.

    Raises:
        SignatureError: the signature does not hold, or does not cover the manifest (NOT_COVERED).
        DigestMismatchError: files are not the ones that were signed.
        SourceError: a file cannot be read. MissingExtraError: `model-signing` is not installed.
    """
    files = _verify(release.path, bundle, public_key)
    if MANIFEST_NAME not in files:
        raise _not_covered(release.path, [MANIFEST_NAME])
    if files[MANIFEST_NAME] != release.digest:
        message = f"Expected a manifest of {files[MANIFEST_NAME]}, got {release.digest}."
        raise _mismatch(release.path, message)
    return VerifiedBundle(path=release.path, files=files)


def _verify(path: str | os.PathLike[str], bundle: str | os.PathLike[str], public_key: Any) -> Mapping[str, str]:
    verifying = _load_verifying()
    file = os.fspath(bundle)
    text = read_document(file, limit=_MAX_BUNDLE_NBYTES, error=SourceError, code="TOO_LARGE")
    report = Report(
        SignatureError,
        headline=f"The bundle {shorten_repr(file)} was refused",
        remedy=_REMEDY,
        prefix="BUNDLE",
        file=file,
    )
    resources = _read_resources(text, report=report)
    try:
        config = public_key
        if isinstance(public_key, (str, os.PathLike)):
            config = verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
        with tempfile.TemporaryDirectory(prefix="hotglm-") as directory:
            copy = Path(directory) / "bundle"  # what is verified are the bytes that were read above
            copy.write_bytes(text)
            config.verify(Path(path), copy)
    except HotglmError:
        raise
    except Exception as error:  # whatever it is: it was not verified
        if isinstance(error, ValueError) and str(error).startswith(_MISMATCH):
            raise _mismatch(os.fspath(path), describe_exception(error, limit=1000)) from error
        report.stop("BAD_SIGNATURE", f"Expected a signature that holds, got {describe_exception(error)}.")
    return resources


def _load_verifying() -> Any:
    try:
        return importlib.import_module("model_signing.verifying")
    except ImportError as error:
        raise missing_model_signing(describe_exception(error)) from error


def _read_resources(text: bytes, *, report: Report) -> Mapping[str, str]:
    """Return the files that the payload of a bundle names; nobody has verified it yet."""
    bundle = _parse(text, report=report)
    payload = read_base64(_dig(bundle, "dsseEnvelope", "payload"))
    statement = _parse(payload or b"", report=report)
    resources = _dig(statement, "predicate", "resources")
    files: dict[str, str] = {}
    for one in resources if isinstance(resources, list) else []:
        name, algorithm, digest = (_dig(one, key) for key in ("name", "algorithm", "digest"))
        if algorithm != "sha256" or not isinstance(name, str) or not isinstance(digest, str) or name in files:
            report.stop("BUNDLE_UNSUPPORTED", "Expected each file once, with its sha256, got something else.")
        files[name] = f"sha256:{digest}"
    if not files:
        report.stop("BUNDLE_UNSUPPORTED", "Expected the digests of files in the bundle, got none.")
    return MappingProxyType(files)


def _parse(text: bytes, *, report: Report) -> object:
    verify_utf8(text, report=report)
    return parse_json(text, report=report, max_brackets=_MAX_BRACKETS)


def _dig(document: object, *keys: str) -> object:
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _mismatch(path: str, message: str) -> DigestMismatchError:
    problem = Problem(code="DIGEST_MISMATCH", message=message, file=path)
    headline = f"{shorten_repr(path)} is not what was signed."
    return DigestMismatchError(headline, problems=[problem], remedy=_REMEDY)


def _not_covered(path: str, names: list[str]) -> SignatureError:
    shown = ", ".join(map(shorten_repr, names[:20]))
    problem = Problem(code="NOT_COVERED", message=f"Expected signatures of every file, got none of {shown}.", file=path)
    return SignatureError(
        "The bundle does not cover every file.", problems=[problem], remedy="sign the whole directory again."
    )
