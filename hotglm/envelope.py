"""Signature envelopes (DSSE): values <-> bytes, strictly, and the bytes that a signature is over.

Rules this module keeps:

- Pure: no IO, no cryptography. Nothing here believes a signature; `hotglm.trust` does that.
- What is signed is type and payload together (`encode_signed`), so a signature holds for nothing else (T2, B05).
- One reading only: exactly the known members, each once; base64 in one of its two alphabets, padded, without white
  space, in the one spelling of its bytes (T1, B06, B07).
- `parse_envelope(format_envelope(e)) == e`. Clauses in parentheses are those of docs/release-format.md.

Source of the format: https://github.com/secure-systems-lab/dsse (protocol.md, envelope.md, version 1).
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, replace

from hotglm.document import Report, parse_json, verify_utf8
from hotglm.errors import SignatureError, shorten_repr
from hotglm.field_reader import SHA256, FieldReader

__all__ = [
    "ENVELOPE_NAME",
    "MANIFEST_TYPE",
    "MAX_ENVELOPE_NBYTES",
    "ROOTS_TYPE",
    "Envelope",
    "EnvelopeSignature",
    "encode_signed",
    "format_envelope",
    "parse_envelope",
    "read_base64",
]

ENVELOPE_NAME = "hotglm-manifest.dsse.json"
"""Name of the envelope beside the manifest (T1)."""

MANIFEST_TYPE = "application/vnd.hotglm.manifest+json"
ROOTS_TYPE = "application/vnd.hotglm.roots+json"

MAX_ENVELOPE_NBYTES = 96 * 2**20
"""A manifest of the largest size in base64, and its signatures."""

MAX_SIGNATURES = 32
_MAX_SIGNATURE_NBYTES = 1024
"""An RSA signature of 8192 bits."""

_MAX_BRACKETS = 1000
_URL_SAFE = str.maketrans("-_", "+/")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvelopeSignature:
    """One signature.

    Attributes:
        key_id: which key it claims to be of, a hint; empty where it does not say.
        signature: its bytes.
    """

    key_id: str
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A payload with its signatures, none of which is believed yet.

    Attributes:
        payload_type: what the payload is.
        payload: its bytes.
        signatures: in the order of the envelope; may be empty.
    """

    payload_type: str
    payload: bytes
    signatures: tuple[EnvelopeSignature, ...] = ()

    @property
    def signed(self) -> bytes:
        """The bytes that a signature of it is over."""
        return encode_signed(self.payload_type, self.payload)

    def with_signature(self, signature: EnvelopeSignature) -> Envelope:
        """Return it with one more signature, which takes the place of one of the same key; ordered by key."""
        others = (one for one in self.signatures if one.key_id != signature.key_id)
        return replace(self, signatures=tuple(sorted((*others, signature), key=lambda one: one.key_id)))


def encode_signed(payload_type: str, payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding: what is signed (T2).

    >>> encode_signed("http://example.com/HelloWorld", b"hello world")
    b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def format_envelope(envelope: Envelope) -> bytes:
    """Return the bytes of an envelope: one JSON object, ASCII, one newline behind it."""
    document = {
        "payload": base64.b64encode(envelope.payload).decode(),
        "payloadType": envelope.payload_type,
        "signatures": [
            {"keyid": one.key_id, "sig": base64.b64encode(one.signature).decode()} for one in envelope.signatures
        ],
    }
    return f"{json.dumps(document, sort_keys=True, separators=(',', ':'))}\n".encode()


def parse_envelope(text: bytes, *, payload_type: str, file: str | None = None) -> Envelope:
    """Return what an envelope holds, or refuse it with everything that is wrong.

    Args:
        text: the whole of it.
        payload_type: what its payload must be.
        file: its path, for the refusal.

    Raises:
        SignatureError: it breaks the format or a cap, or is of another type (WRONG_TYPE).
    """
    report = Report(
        SignatureError,
        headline=f"The signatures {'given' if file is None else shorten_repr(file)} were refused",
        remedy="sign it again with `hotglm sign`, or fetch it again if it was damaged on its way.",
        prefix="ENVELOPE",
        file=file,
    )
    if len(text) > MAX_ENVELOPE_NBYTES:
        message = f"Expected at most {MAX_ENVELOPE_NBYTES} bytes, got {len(text)}."
        report.stop("ENVELOPE_TOO_LARGE", message, expected=MAX_ENVELOPE_NBYTES, found=len(text))
    verify_utf8(text, report=report)
    document = parse_json(text, report=report, max_brackets=_MAX_BRACKETS)
    if not text.endswith(b"}\n"):  # so that not even a cut of one byte is taken for whole
        report.stop("ENVELOPE_CUT", "Expected one newline behind the last brace, and nothing else, got another end.")
    reader = _Reader(report=report)
    members = reader.read_members(document, ("payload", "payloadType", "signatures"), where="the envelope")
    if (found := members["payloadType"]) != payload_type:
        message = f"Expected a payload of type {payload_type!r}, got {shorten_repr(found)}."
        report.stop("WRONG_TYPE", message, expected=payload_type)
    payload = reader.read_bytes(members["payload"], where="payload")
    signatures = reader.read_signatures(members["signatures"])
    report.raise_if_any()
    return Envelope(payload_type=payload_type, payload=payload, signatures=signatures)


def read_base64(text: object) -> bytes | None:
    r"""Return the bytes that a text spells in base64, standard or url-safe; None where it is not their one spelling.

    >>> read_base64("+/8="), read_base64("-_8="), read_base64("+_8="), read_base64("+/9="), read_base64("+/8")
    (b'\xfb\xff', b'\xfb\xff', None, None, None)
    """
    if not isinstance(text, str) or not text.isascii():
        return None
    standard = text if "+" in text or "/" in text else text.translate(_URL_SAFE)
    try:
        content = binascii.a2b_base64(standard, strict_mode=True)
    except binascii.Error:
        return None
    # Encoded again: bits behind the end that do not count would be a second spelling of the same bytes (B07).
    return content if base64.b64encode(content).decode() == standard else None


class _Reader(FieldReader):
    """Reads the parts of one envelope. What it returns is believed only when the report stayed empty."""

    def read_bytes(self, value: object, *, where: str) -> bytes:
        content = read_base64(value)
        if content is None:
            self.refuse("base64 in its one spelling, standard or url-safe", value, where=where, code="BAD_BASE64")
        return content or b""

    def read_signatures(self, value: object) -> tuple[EnvelopeSignature, ...]:
        if not isinstance(value, list) or len(value) > MAX_SIGNATURES:
            found = f"one of {len(value)}" if isinstance(value, list) else value
            self.refuse(f"an array of at most {MAX_SIGNATURES} signatures", found, where="signatures")
            return ()
        return tuple(self._read_signature(one, where=f"signatures[{place}]") for place, one in enumerate(value))

    def _read_signature(self, value: object, *, where: str) -> EnvelopeSignature:
        given = {"keyid": "", **value} if isinstance(value, dict) else value  # DSSE lets signers leave the hint out
        members = self.read_members(given, ("keyid", "sig"), where=where)
        key_id = members["keyid"]
        if key_id:
            key_id = self.read_digest(key_id, SHA256, where=f"{where}.keyid")
        elif key_id != "":
            self.refuse("text", key_id, where=f"{where}.keyid")
        signature = self.read_bytes(members["sig"], where=f"{where}.sig")
        if len(signature) > _MAX_SIGNATURE_NBYTES:
            self.refuse(f"at most {_MAX_SIGNATURE_NBYTES} bytes", len(signature), where=f"{where}.sig")
        return EnvelopeSignature(key_id=key_id or "", signature=signature)
