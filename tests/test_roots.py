"""Roots of trust: one spelling, keys under their own digests (FAULTS B08, B15, B22, B26)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotglm.errors import TrustError
from hotglm.roots import ALGORITHMS, PublicKey, Role, Roots, format_roots, parse_roots

KEYS = [PublicKey(algorithm=ALGORITHMS[at % 3], spki=bytes([at]) * 40) for at in range(5)]
ROLE = Role(keys=frozenset({KEYS[0].id}))
GOOD = Roots(
    version=3,
    keys={key.id: key for key in KEYS},
    roles={
        "root": ROLE,
        "release": Role(keys=frozenset(key.id for key in KEYS[1:4]), threshold=2, models=frozenset({"ranker"})),
    },
    expires_at=datetime(2027, 1, 2, tzinfo=UTC),
)


def edit(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return the good roots after a change of their document."""
    document = json.loads(format_roots(GOOD))
    change(document)
    return f"{json.dumps(document, sort_keys=True, separators=(',', ':'))}\n".encode()


@st.composite
def drawn_roots(draw: st.DrawFn) -> Roots:
    """Draw roots that the format can hold."""

    def role(*, is_root: bool) -> Role:
        ids = draw(st.sets(st.sampled_from([key.id for key in KEYS]), min_size=1))
        names = st.none() | st.frozensets(st.sampled_from(["ranker", "caf\u00e9", "a b"]))
        models, slots = (None, None) if is_root else (draw(names), draw(names))
        return Role(keys=frozenset(ids), threshold=draw(st.integers(1, len(ids))), models=models, slots=slots)

    others = draw(st.sets(st.sampled_from(["release", "ranker-team", "x"])))
    return Roots(
        version=draw(st.integers(1, 2**53 - 1)),
        keys={key.id: key for key in KEYS},
        roles={"root": role(is_root=True), **{name: role(is_root=False) for name in others}},
        expires_at=draw(st.none() | st.datetimes(timezones=st.just(UTC))),
    )


@given(drawn_roots())
def test_what_is_written_is_read(roots: Roots) -> None:
    """parse_roots(format_roots(r)) == r, and the same bytes again."""
    text = format_roots(roots)
    assert parse_roots(text) == roots
    assert format_roots(parse_roots(text)) == text


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_refused(text: bytes) -> None:
    """Whatever the bytes, the answer is a TrustError with a code."""
    with pytest.raises(TrustError) as caught:
        parse_roots(text)
    assert caught.value.problems


@given(st.data())
def test_any_value_in_any_place_is_read_or_refused(data: st.DataObject) -> None:
    """Whatever stands in the place of a value, the answer is roots or a TrustError."""
    document = json.loads(format_roots(GOOD))
    at: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(at)))
        if not isinstance(at[key], dict) or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just([]) | st.just({}))
    text = f"{json.dumps(document, sort_keys=True, separators=(',', ':'))}\n".encode()
    with contextlib.suppress(TrustError):
        parse_roots(text)


def test_every_flipped_bit_is_refused_or_another_meaning() -> None:
    """No flipped bit leaves roots that mean the same."""
    text = format_roots(GOOD)
    for at in range(len(text) * 8):
        flipped = bytearray(text)
        flipped[at // 8] ^= 1 << at % 8
        try:
            assert parse_roots(bytes(flipped)) != GOOD
        except TrustError:
            continue


first_key, second_key = sorted(key.id for key in KEYS)[:2]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: d.update(format="hotglm.roots/2"), "FORMAT_UNKNOWN"),
        (lambda d: d.update(trust_code=True), "UNKNOWN_FIELD"),  # B26
        (lambda d: d.pop("expires"), "MISSING_FIELD"),
        *[(lambda d, v=v: d.update(version=v), "BAD_FIELD") for v in (0, -1, 1.5, "2", 2**64, True, None)],  # B15
        *[
            (lambda d, a=a: d["keys"][first_key].update(algorithm=a), "UNSUPPORTED_ALGORITHM")
            for a in ("md5", "none", "", "ed25519 ", "ED25519", "rsa-pkcs1", None)  # B08
        ],
        (lambda d: d["keys"].update({second_key: d["keys"][first_key]}), "BAD_KEY_ID"),  # B22: one key, two ids
        (lambda d: d["keys"].update(x=d["keys"][first_key]), "BAD_KEY_ID"),
        (lambda d: d["keys"][first_key].update(spki="AA"), "BAD_BASE64"),
        (lambda d: d["roles"].pop("root"), "MISSING_FIELD"),
        (lambda d: d["roles"]["root"].update(models=["ranker"]), "BAD_FIELD"),
        (lambda d: d["roles"]["release"].update(keys=["sha256:" + "0" * 64]), "UNKNOWN_KEY"),
        (lambda d: d["roles"]["release"].update(keys=[]), "BAD_THRESHOLD"),
        *[(lambda d, t=t: d["roles"]["release"].update(threshold=t), "BAD_THRESHOLD") for t in (0, -1, 4, True, "1")],
        (lambda d: d["roles"]["release"].update(keys=d["roles"]["release"]["keys"] * 3), "BAD_FIELD"),  # B22
        (lambda d: d["roles"].update({"Release": d["roles"]["root"]}), "BAD_FIELD"),
        (lambda d: d["roles"]["release"].update(models=["a\x1b"]), "BAD_FIELD"),
        (lambda d: d.update(expires="2027-02-31T00:00:00Z"), "BAD_FIELD"),
    ],
)
def test_roots_that_cannot_be_meant_are_refused(change: Callable[[dict[str, Any]], object], code: str) -> None:
    """Unknown fields and algorithms, numbers that are none, keys twice or under other ids, are refused by name."""
    with pytest.raises(TrustError) as caught:
        parse_roots(edit(change))
    assert code in {problem.code for problem in caught.value.problems}


def test_what_reading_would_refuse_is_not_written() -> None:
    """A threshold that cannot be met is refused when roots are written."""
    with pytest.raises(TrustError) as caught:
        format_roots(Roots(keys={KEYS[0].id: KEYS[0]}, roles={"root": Role(keys=ROLE.keys, threshold=2)}))
    assert caught.value.code == "BAD_THRESHOLD"


def test_roles_apply_to_their_models_and_slots_alone() -> None:
    """A role limited to models or slots has no say about others, nor where no slot is named (B25)."""
    limited = Role(keys=ROLE.keys, models=frozenset({"ranker"}), slots=frozenset({"a"}))
    roots = Roots(keys=GOOD.keys, roles={"root": ROLE, "team": limited})
    cases = [("ranker", "a"), ("ranker", "b"), ("ranker", None), ("other", "a")]
    assert [len(list(roots.find_roles(model=model, slot=slot))) for model, slot in cases] == [1, 0, 0, 0]
