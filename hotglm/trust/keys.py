"""Keys: made, kept in files, and what is signed with them.

Rules this module keeps:

- A private key is written once, readable for its owner alone, never over a file that is there; it is never printed.
- Without the package `cryptography` everything here fails by `MissingExtraError`: nothing is taken for signed because
  it could not be looked at (K15).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hotglm.envelope import MANIFEST_TYPE, Envelope, EnvelopeSignature, format_envelope
from hotglm.errors import ArgumentError, MissingExtraError, SourceError, shorten_repr
from hotglm.problem import describe_exception
from hotglm.release.reading import read_document
from hotglm.release.writing import flush_directory, write_file, writing
from hotglm.roots import ALGORITHMS, PublicKey, Roots

__all__ = ["SigningKey", "find_key_faults", "find_signers", "load_algorithms", "read_public_key", "write_public_key"]

_ALGORITHMS_MODULE = "hotglm.trust.algorithms"
_MAX_KEY_NBYTES = 64 * 2**10
_PRIVATE_MODE, _PUBLIC_MODE = 0o600, 0o644


def load_algorithms() -> Any:
    """Return the module that verifies and signs.

    Raises:
        MissingExtraError: `cryptography` is not installed.
    """
    try:
        return importlib.import_module(_ALGORITHMS_MODULE)
    except ImportError as error:
        raise MissingExtraError(
            f"Expected the package cryptography, which signatures need, got {describe_exception(error)}.",
            remedy="install it: pip install 'hotglm[sign]'; nothing is accepted by a trust policy without it.",
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SigningKey:
    """A private key. Any thread may call any method.

    Attributes:
        public: its public half.
    """

    public: PublicKey
    _sign: Callable[[bytes], bytes] = field(repr=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, passphrase: str | bytes | None = None) -> SigningKey:
        """Read a private key from a PEM file.

        Raises:
            ArgumentError: it is no key of a kind that is taken, or the passphrase is another one (BAD_KEY).
            MissingExtraError: `cryptography` is not installed. SourceReadError: it cannot be read.
        """
        algorithms, at = load_algorithms(), os.fspath(path)
        text = read_document(at, limit=_MAX_KEY_NBYTES, error=SourceError, code="BAD_KEY")
        found = algorithms.load_private(text, passphrase.encode() if isinstance(passphrase, str) else passphrase)
        if isinstance(found, str):
            raise _bad_key(f"Expected a private key in PEM at {shorten_repr(at)}, got {found}.")
        algorithm, spki, sign = found
        return cls(public=PublicKey(algorithm=algorithm, spki=spki), _sign=sign)

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], *, algorithm: str = "ed25519", passphrase: str | bytes | None = None
    ) -> SigningKey:
        """Make a new key, and write it to `path`, which must not exist, readable for its owner alone.

        Args:
            path: where its PEM goes (PKCS 8).
            algorithm: `"ed25519"`, `"ecdsa-p256-sha256"` or `"rsa-pss-sha256"` (3072 bits).
            passphrase: what the file is encrypted with; plain if None.

        Raises:
            ArgumentError: no such algorithm, or an empty passphrase.
            MissingExtraError: `cryptography` is not installed. StoreWriteError: it cannot be written.
        """
        if algorithm not in ALGORITHMS:
            raise ArgumentError(
                f"Expected one of {', '.join(ALGORITHMS)}, got {shorten_repr(algorithm)}.", remedy="choose ed25519."
            )
        secret = passphrase.encode() if isinstance(passphrase, str) else passphrase
        if secret == b"":
            raise ArgumentError("Expected a passphrase, got an empty one.", remedy="leave it out for a plain file.")
        algorithms, at = load_algorithms(), os.path.abspath(os.fspath(path))
        text: bytes = algorithms.write_private_pem(algorithms.generate(algorithm), secret)
        with writing(at):
            write_file(at, text, mode=_PRIVATE_MODE)
            flush_directory(os.path.dirname(at))
        return cls.read(at, passphrase=secret)

    def sign(self, envelope: Envelope) -> Envelope:
        """Return the envelope with a signature of this key, in place of an older one."""
        signature = EnvelopeSignature(key_id=self.public.id, signature=self._sign(envelope.signed))
        return envelope.with_signature(signature)

    def sign_manifest(self, text: bytes) -> bytes:
        """Return the bytes of a fresh envelope around the bytes of a manifest."""
        return format_envelope(self.sign(Envelope(payload_type=MANIFEST_TYPE, payload=text)))


def read_public_key(path: str | os.PathLike[str]) -> PublicKey:
    """Read a public key from a PEM file.

    Raises:
        ArgumentError: it is no key of a kind that is taken (BAD_KEY).
        MissingExtraError: `cryptography` is not installed. SourceReadError: it cannot be read.
    """
    algorithms, at = load_algorithms(), os.fspath(path)
    found = algorithms.load_public_pem(read_document(at, limit=_MAX_KEY_NBYTES, error=SourceError, code="BAD_KEY"))
    if isinstance(found, str):
        raise _bad_key(f"Expected a public key in PEM at {shorten_repr(at)}, got {found}.")
    return PublicKey(algorithm=found[0], spki=found[1])


def write_public_key(path: str | os.PathLike[str], key: PublicKey) -> None:
    """Write a public key to `path`, which must not exist, as PEM.

    Raises:
        MissingExtraError: `cryptography` is not installed. StoreWriteError: it cannot be written.
    """
    at = os.path.abspath(os.fspath(path))
    text: bytes = load_algorithms().write_public_pem(key.spki)
    with writing(at):
        write_file(at, text, mode=_PUBLIC_MODE)
        flush_directory(os.path.dirname(at))


def find_signers(envelope: Envelope, roots: Roots) -> frozenset[str]:
    """Return the ids of the keys of the roots that have signed an envelope, each once, whatever role they have.

    A signature that names a key is tried with that key alone; one that names none, with all (T5).

    Raises:
        MissingExtraError: `cryptography` is not installed.
    """
    algorithms, message = load_algorithms(), envelope.signed
    found: set[str] = set()
    for one in envelope.signatures:
        candidates = [one.key_id] if one.key_id else list(roots.keys)
        for key_id in candidates:
            key = roots.keys.get(key_id)
            if key is None or key_id in found:
                continue
            if algorithms.is_valid(key.algorithm, key.spki, signature=one.signature, message=message):
                found.add(key_id)
    return frozenset(found)


def find_key_faults(roots: Roots) -> list[str]:
    """Return what is wrong with keys of the roots, in sentences.

    Raises:
        MissingExtraError: `cryptography` is not installed.
    """
    algorithms = load_algorithms()
    faults = ((key, algorithms.find_public_fault(key.algorithm, key.spki)) for key in roots.keys.values())
    return [f"Expected a key for {key.algorithm}, got {fault} ({key.id})." for key, fault in faults if fault]


def _bad_key(message: str) -> ArgumentError:
    remedy = "give Ed25519, ECDSA P-256 or RSA of 2048 to 8192 bits, with its passphrase; `hotglm keygen` makes one."
    return ArgumentError(message, remedy=remedy, code="BAD_KEY")
