"""The three signature algorithms, as the package `cryptography` has them; the only module that imports it.

Rules this module keeps:

- Nothing of cryptography is written here: keys, signatures and their verification are the library's.
- A key is taken in one encoding only, the one that the library writes: so no key has two ids (T3, B22).
- Parameters belong to the algorithm and are never read from a signature: RSA-PSS has SHA-256, MGF1 with SHA-256, a salt
  of 32 bytes and 2048 to 8192 bits; ECDSA has P-256 and SHA-256; Ed25519 has none (T3, B08).
- Imported by name, by `hotglm.trust.keys`, so that everything else works without the extra `sign`.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from hotglm.problem import describe_exception

__all__ = [
    "find_public_fault",
    "generate",
    "is_valid",
    "load_private",
    "load_public_pem",
    "write_private_pem",
    "write_public_pem",
]

_RSA_BITS = range(2048, 8193)
_NEW_RSA_BITS = 3072

_Public = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey
_Private = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
_ENCODING, _SPKI = serialization.Encoding, serialization.PublicFormat.SubjectPublicKeyInfo


def _padding() -> padding.PSS:
    return padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=hashes.SHA256().digest_size)


def _algorithm_of(key: object) -> str | None:
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "ed25519"
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return "ecdsa-p256-sha256"
    if isinstance(key, rsa.RSAPublicKey) and key.key_size in _RSA_BITS:
        return "rsa-pss-sha256"
    return None


def _load_public(algorithm: str, spki: bytes) -> _Public | str:
    """Return the key; or what is wrong with it, as the rest of a sentence."""
    try:
        key = serialization.load_der_public_key(spki)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        return f"bytes that are no key ({describe_exception(error)})"
    found = _algorithm_of(key)
    if found != algorithm or not isinstance(key, _Public):
        return f"a key for {found or 'none of them'}"
    if key.public_bytes(_ENCODING.DER, _SPKI) != spki:
        return "another encoding of a key than the usual one"
    return key


def find_public_fault(algorithm: str, spki: bytes) -> str | None:
    """Return what is wrong with a key for an algorithm, as the rest of a sentence, or None."""
    key = _load_public(algorithm, spki)
    return key if isinstance(key, str) else None


def is_valid(algorithm: str, spki: bytes, *, signature: bytes, message: bytes) -> bool:
    """Tell whether `signature` is one of this key over `message`; False for a key that cannot be used."""
    key = _load_public(algorithm, spki)
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, message, _padding(), hashes.SHA256())
        else:
            return False
    except (InvalidSignature, ValueError):
        return False
    return True


def load_public_pem(text: bytes) -> tuple[str, bytes] | str:
    """Return algorithm and DER of a public key in PEM; or what is wrong with it, as the rest of a sentence."""
    try:
        key = serialization.load_pem_public_key(text)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        return f"something else ({describe_exception(error)})"
    algorithm = _algorithm_of(key)
    return "a key of another kind" if algorithm is None else (algorithm, key.public_bytes(_ENCODING.DER, _SPKI))


def write_public_pem(spki: bytes) -> bytes:
    """Return the PEM of a public key."""
    return serialization.load_der_public_key(spki).public_bytes(_ENCODING.PEM, _SPKI)


def load_private(text: bytes, passphrase: bytes | None) -> tuple[str, bytes, Callable[[bytes], bytes]] | str:
    """Return algorithm, public DER and signing function of a private key in PEM; or what is wrong with it."""
    try:
        key = serialization.load_pem_private_key(text, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        return f"something else, or another passphrase ({describe_exception(error)})"
    algorithm = _algorithm_of(key.public_key())
    if algorithm is None or not isinstance(key, _Private):
        return "a key of another kind"
    return algorithm, key.public_key().public_bytes(_ENCODING.DER, _SPKI), _signer(key)


def generate(algorithm: str) -> _Private:
    """Return a new private key of one of `hotglm.roots.ALGORITHMS`."""
    if algorithm == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if algorithm == "ecdsa-p256-sha256":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(public_exponent=65537, key_size=_NEW_RSA_BITS)


def write_private_pem(key: _Private, passphrase: bytes | None) -> bytes:
    """Return a private key as PKCS 8 in PEM, encrypted if there is a passphrase."""
    encryption = (
        serialization.NoEncryption() if passphrase is None else serialization.BestAvailableEncryption(passphrase)
    )
    return key.private_bytes(_ENCODING.PEM, serialization.PrivateFormat.PKCS8, encryption)


def _signer(key: _Private) -> Callable[[bytes], bytes]:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return lambda message: key.sign(message, ec.ECDSA(hashes.SHA256()))
    return lambda message: key.sign(message, _padding(), hashes.SHA256())
