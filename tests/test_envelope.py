"""Envelopes: one reading only, whatever the bytes (FAULTS B05, B06, B07, B29)."""

from __future__ import annotations

import base64
import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotglm import envelope as envelopes
from hotglm.envelope import (
    MANIFEST_TYPE,
    ROOTS_TYPE,
    Envelope,
    EnvelopeSignature,
    encode_signed,
    format_envelope,
    parse_envelope,
    read_base64,
)
from hotglm.errors import SignatureError

KEY_ID = f"sha256:{'0a' * 32}"
GOOD = Envelope(
    payload_type=MANIFEST_TYPE, payload=b"payload\xff", signatures=(EnvelopeSignature(key_id=KEY_ID, signature=b"sig"),)
)

signatures = st.builds(
    EnvelopeSignature,
    key_id=st.just("") | st.binary(min_size=32, max_size=32).map(lambda raw: f"sha256:{raw.hex()}"),
    signature=st.binary(max_size=64),
)
drawn_envelopes = st.builds(
    Envelope,
    payload_type=st.just(MANIFEST_TYPE),
    payload=st.binary(max_size=64),
    signatures=st.lists(signatures, max_size=4).map(tuple),
)


def refuse(text: bytes) -> str:
    """Return the code that a text is refused with."""
    with pytest.raises(SignatureError) as caught:
        parse_envelope(text, payload_type=MANIFEST_TYPE)
    return caught.value.code


def edited(**members: object) -> bytes:
    """Return the good envelope with other members."""
    return f"{json.dumps({**json.loads(format_envelope(GOOD)), **members}, indent=1)}\n".encode()


@given(drawn_envelopes)
def test_what_is_written_is_read(envelope: Envelope) -> None:
    """parse_envelope(format_envelope(e)) == e."""
    assert parse_envelope(format_envelope(envelope), payload_type=MANIFEST_TYPE) == envelope


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_read_or_refused(text: bytes) -> None:
    """Whatever the bytes, the answer is an envelope or a SignatureError."""
    with contextlib.suppress(SignatureError):
        parse_envelope(text, payload_type=MANIFEST_TYPE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["payload", "payloadType", "signatures", "other"]), json_values)
def test_any_member_is_read_or_refused(name: str, value: object) -> None:
    """Whatever stands in the place of a member, the answer is an envelope or a SignatureError."""
    with contextlib.suppress(SignatureError):
        parse_envelope(edited(**{name: value}), payload_type=MANIFEST_TYPE)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "ENVELOPE_BAD_JSON"),
        (b"[]", "ENVELOPE_CUT"),
        (format_envelope(GOOD)[:-1], "ENVELOPE_CUT"),
        (format_envelope(GOOD) + b"\n", "ENVELOPE_CUT"),
        (b"{}\n", "WRONG_TYPE"),
        (b"\xef\xbb\xbf{}", "ENVELOPE_NOT_UTF8"),
        (b"\xff", "ENVELOPE_NOT_UTF8"),
        (b"[" * 100_000, "ENVELOPE_TOO_DEEP"),
        (format_envelope(GOOD)[:-5], "ENVELOPE_BAD_JSON"),
        (format_envelope(GOOD).replace(b'{"payload"', b'{"payload":"","payload"'), "DUPLICATE_KEY"),  # B06
        (format_envelope(GOOD).replace(b'"sig":', b'"sig":"","sig":'), "DUPLICATE_KEY"),
        (edited(payloadType=ROOTS_TYPE), "WRONG_TYPE"),  # B05
        (edited(payloadType=f"{MANIFEST_TYPE} "), "WRONG_TYPE"),
        (edited(payloadType=None), "WRONG_TYPE"),
        (edited(threshold=0), "UNKNOWN_FIELD"),  # B26
        (edited(signatures=None), "BAD_FIELD"),
        (edited(signatures=[{"sig": "c2ln", "alg": "none"}]), "UNKNOWN_FIELD"),  # B08
        (edited(signatures=[{"keyid": KEY_ID}]), "MISSING_FIELD"),
        (edited(signatures=[{"keyid": KEY_ID.upper(), "sig": "c2ln"}]), "BAD_DIGEST"),
        (edited(signatures=[{"keyid": 0, "sig": "c2ln"}]), "BAD_FIELD"),
        (edited(signatures=[{"keyid": 7, "sig": "c2ln"}]), "BAD_DIGEST"),
        (edited(signatures=[{"sig": "c2ln"}] * 33), "BAD_FIELD"),
        (edited(signatures=[{"sig": base64.b64encode(bytes(1025)).decode()}]), "BAD_FIELD"),
        (edited(payload="cGF5bG9hZP8"), "BAD_BASE64"),  # B07: padding left out
        (edited(payload="cGF5bG9hZP8=\n"), "BAD_BASE64"),
        (edited(payload="cGF5 bG9hZP8="), "BAD_BASE64"),
        (edited(payload="cGF5bG9hZP9="), "BAD_BASE64"),  # bits behind the end
        (edited(payload="-_+/"), "BAD_BASE64"),
        (edited(payload="\u00e9\u00e9=="), "BAD_BASE64"),
        (edited(payload=None), "BAD_BASE64"),
    ],
)
def test_other_spellings_are_refused(text: bytes, code: str) -> None:
    """Broken JSON, duplicate, unknown and missing members, other types and other base64 are refused by name."""
    assert refuse(text) == code


def test_both_alphabets_are_read() -> None:
    """Standard and url-safe base64 mean the same bytes (B07)."""
    raw = bytes(range(256))
    assert read_base64(base64.b64encode(raw).decode()) == read_base64(base64.urlsafe_b64encode(raw).decode()) == raw


@given(st.binary(max_size=12), st.data())
def test_bytes_have_one_spelling_in_each_alphabet(raw: bytes, data: st.DataObject) -> None:
    """A text that differs from the spelling of its bytes in one character means other bytes, or nothing."""
    text = base64.b64encode(raw).decode()
    at = data.draw(st.integers(0, max(0, len(text) - 1)))
    other = text[:at] + data.draw(st.sampled_from("Az09+/=\n -_")) + text[at + 1 :]
    if other not in (text, base64.urlsafe_b64encode(raw).decode()):
        assert read_base64(other) != raw


def test_a_large_envelope_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the cap is refused by its size alone (B29)."""
    monkeypatch.setattr(envelopes, "parse_json", None)
    assert refuse(bytes(envelopes.MAX_ENVELOPE_NBYTES + 1)) == "ENVELOPE_TOO_LARGE"


def test_type_and_payload_are_signed_together() -> None:
    """No two pairs of type and payload have one encoding: lengths are in it (B05)."""
    assert encode_signed("a", b"b 1 c") != encode_signed("a 5 b", b"c")
    assert encode_signed("t", b"") == b"DSSEv1 1 t 0 "
    assert encode_signed("\u00e9", b"x") == b"DSSEv1 2 \xc3\xa9 1 x"


def test_a_key_has_one_signature() -> None:
    """A second signature of one key takes the place of the first; others stay, ordered by key."""
    second = GOOD.with_signature(EnvelopeSignature(key_id=f"sha256:{'00' * 32}", signature=b"b"))
    assert [one.signature for one in second.signatures] == [b"b", b"sig"]
    again = second.with_signature(EnvelopeSignature(key_id=KEY_ID, signature=b"new"))
    assert [one.signature for one in again.signatures] == [b"b", b"new"]
