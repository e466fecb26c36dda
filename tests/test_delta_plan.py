"""Chains of deltas, folded: the result is that of step by step, each byte is read once, and every chain ends."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotglm.delta_fields import BaseRelease, DeltaFields, TensorDelta
from hotglm.delta_plan import FileStart, KnownStart, Link, PartStart, TensorIdentity, TensorPlan, plan_chain
from hotglm.errors import DeltaChainError, DeltaError, HotglmError, WrongBaseError
from hotglm.file_entry import FileEntry
from hotglm.manifest_fields import ReleasedTensor
from hotglm.version import Version
from support.releases import SHA, small_manifest

MODEL = "model.safetensors"
FULL = replace(small_manifest(), code=None)


def sha(text: str) -> str:
    """Return the digest of a text, in the form of a tensor's."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def tensor(text: str, shape: tuple[int, ...] = (4,)) -> ReleasedTensor:
    """Return a tensor that holds `text`, as far as a plan can see."""
    return ReleasedTensor(file=MODEL, dtype="float32", shape=shape, digest=sha(text))


def link(version: int, tensors: dict[str, ReleasedTensor], base: Link | None, deltas: dict[str, TensorDelta]) -> Link:
    """Return a release of a chain; the digest of its result is made up."""
    files = {MODEL: FileEntry(size=999, digest=f"safetensors:{SHA}")}
    manifest = replace(FULL, version=Version(f"{version}.0"), sequence=version, tensors=tensors, files=files)
    if base is not None:
        named = BaseRelease(version=base.manifest.version, sequence=base.manifest.sequence, digest=base.digest)
        delta = DeltaFields(base=named, payload="d", tensors=deltas, files=files, headers={MODEL: "h"})
        manifest = replace(manifest, files={"d": FileEntry(size=9, digest=f"safetensors:{SHA}")}, delta=delta)
    return Link(manifest=manifest, digest=sha(f"release {version}"), name=f"r{version}")


def draw_chain(rng: random.Random, length: int) -> list[Link]:
    """Return a full release and deltas that keep, change, add, drop and reshape tensors; newest first."""
    tensors = {name: tensor(f"{name} 0") for name in "abcdef"[: rng.randint(1, 6)]}
    links = [link(1, tensors, None, {})]
    for step in range(2, length + 2):
        before, tensors, deltas = tensors, {}, {}
        for name in "abcdefgh":
            old, way = before.get(name), rng.random()
            if old is None and way < 0.7:
                continue
            if old is not None and way < 0.4:
                tensors[name] = old
            elif old is not None and way < 0.8:
                tensors[name] = tensor(f"{name} {step}", old.shape)
                codec, num = rng.choice([("xor-zstd", 1), ("sparse", 2)])
                parts = tuple(f"{name}{number}" for number in range(num))
                deltas[name] = TensorDelta(codec=codec, base=old.digest, parts=parts)
            elif way < 0.95:
                tensors[name] = tensor(f"{name} {step}", (rng.randint(0, 3),))
                deltas[name] = TensorDelta(codec="whole", base=None, parts=(name,))
        links.append(link(step, tensors, links[-1], deltas))
    return links[::-1]


@dataclass
class Applied:
    """What carrying a plan out read, and what it made."""

    result: dict[str, str]
    reads: list[tuple[int, str]]


def carry_out(links: list[Link], plans: dict[str, TensorPlan], known: dict[str, TensorIdentity]) -> Applied:
    """Carry a plan out on digests: a step applied to anything but its base is an error."""
    applied = Applied({}, [])
    for name, plan in plans.items():
        if isinstance(plan.start, KnownStart):
            digest = known[name].digest
        elif isinstance(plan.start, FileStart):
            source = links[plan.start.link].manifest
            assert source.delta is None
            digest = source.tensors[name].digest
            applied.reads.append((plan.start.link, name))
        else:
            digest = links[plan.start.link].manifest.tensors[name].digest
            applied.reads.append((plan.start.link, plan.start.part))
        assert digest == plan.start_digest
        for step in plan.steps:
            assert step.delta.base == digest
            digest = links[step.link].manifest.tensors[name].digest
            applied.reads += [(step.link, part) for part in step.delta.parts]
        applied.result[name] = digest
    return applied


@given(st.integers(0, 2**32), st.integers(1, 64))
def test_folding_a_chain_is_applying_it_step_by_step(seed: int, length: int) -> None:
    """A chain of 1 to 64 deltas gives the tensors of its newest release, and no part is read twice."""
    links = draw_chain(random.Random(seed), length)
    plan = plan_chain(links)
    applied = carry_out(links, dict(plan.tensors), {})
    assert applied.result == {name: one.digest for name, one in links[0].manifest.tensors.items()}
    assert len(set(applied.reads)) == len(applied.reads)
    assert {number for number, _ in applied.reads} == plan.links
    starts = [name for name, one in plan.tensors.items() if isinstance(one.start, FileStart | PartStart)]
    assert len(starts) == len(links[0].manifest.tensors)


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(0, 20))
def test_what_is_known_is_where_tensors_start(seed: int, length: int, at: int) -> None:
    """Tensors of any release of the chain that are live are not read, and only what came after them is applied."""
    links = draw_chain(random.Random(seed), length)
    live = links[min(at, length)].manifest
    known = {name: TensorIdentity.of(one) for name, one in live.tensors.items()}
    plan = plan_chain(links, known=known)
    applied = carry_out(links, dict(plan.tensors), known)
    assert applied.result == {name: one.digest for name, one in links[0].manifest.tensors.items()}
    for name, one in links[0].manifest.tensors.items():
        if known.get(name) == TensorIdentity.of(one):
            assert plan.tensors[name].start == KnownStart()
            assert plan.tensors[name].steps == ()
    assert plan.num_links <= min(at, length) + 1  # nothing older than what is live was looked at
    assert plan_chain(links[: plan.num_links], known=known) == plan


def test_applied_twice_a_delta_changes_nothing() -> None:
    """C08: where the result is live already, every tensor of it is there and nothing is applied."""
    links = draw_chain(random.Random(1), 1)
    known = {name: TensorIdentity.of(one) for name, one in links[0].manifest.tensors.items()}
    plan = plan_chain(links[:1], known=known)
    assert {(type(one.start), one.steps) for one in plan.tensors.values()} == {(KnownStart, ())}


def make_two() -> tuple[Link, Link]:
    """Return a full release and a delta against it."""
    full = link(1, {"w": tensor("1"), "kept": tensor("k")}, None, {})
    changed = TensorDelta(codec="xor-zstd", base=sha("1"), parts=("p",))
    return link(2, {"w": tensor("2"), "kept": tensor("k")}, full, {"w": changed}), full


def refused(*links: Link, max_length: int = 64) -> HotglmError:
    """Return the refusal of a chain."""
    with pytest.raises(DeltaError) as refusal:
        plan_chain(links, max_length=max_length)
    return refusal.value


def test_a_gap_is_named() -> None:
    """C07, C09: a base that is not there is named by version, number and digest, under a code to wait on."""
    delta, full = make_two()
    error = refused(delta)
    assert (type(error), error.code) == (DeltaChainError, "CHAIN_BASE_MISSING")
    assert "1.0, number 1" in str(error)
    assert full.digest in str(error)


def test_a_wrong_base_is_named_with_need_and_have() -> None:
    """C01: another release than the one that a delta was made against is refused; both are named."""
    delta, full = make_two()
    error = refused(delta, replace(full, digest=sha("another")))
    assert (type(error), error.code) == (WrongBaseError, "DELTA_WRONG_BASE")
    assert full.digest in str(error)
    assert sha("another") in str(error)


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"w": tensor("other"), "kept": tensor("k")}, "DELTA_WRONG_BASE"),
        ({"w": tensor("1", (2, 2)), "kept": tensor("k")}, "DELTA_WRONG_BASE"),
        ({"w": replace(tensor("1"), dtype="int32"), "kept": tensor("k")}, "DELTA_WRONG_BASE"),
        ({"kept": tensor("k")}, "DELTA_UNKNOWN_TENSOR"),
        ({"w": tensor("1"), "kept": tensor("other")}, "DELTA_WRONG_BASE"),
        ({"w": tensor("1")}, "DELTA_UNKNOWN_TENSOR"),
    ],
)
def test_a_base_with_other_tensors_is_refused(tensors: dict[str, ReleasedTensor], code: str) -> None:
    """C05: a step for a tensor that the base has not, or with other bytes, dtype or shape, names the tensor."""
    delta, full = make_two()
    error = refused(delta, replace(full, manifest=replace(full.manifest, tensors=tensors)))
    assert (type(error), error.code) == (WrongBaseError, code)
    assert error.tensor in ("w", "kept")


def test_a_delta_against_itself_is_refused() -> None:
    """C07: a delta whose base is its own result leads nowhere."""
    delta, _ = make_two()
    assert refused(link(2, {"w": tensor("2")}, delta, {})).code == "CHAIN_SELF"


def test_a_loop_is_refused() -> None:
    """C07: deltas that are each other's base are refused when one comes again."""
    first = link(1, {"w": tensor("1")}, Link(manifest=FULL, digest=sha("release 2")), {})
    second = link(2, {"w": tensor("1")}, first, {})
    assert refused(first, second, first, second).code == "CHAIN_LOOP"


def test_a_chain_that_is_too_long_is_refused() -> None:
    """C07: 64 deltas are taken, 65 and 10 000 are not, after at most 65 releases were looked at."""
    tensors = {"w": tensor("1")}
    links = [link(1, tensors, None, {})]
    for number in range(2, 10_002):
        links.append(link(number, tensors, links[-1], {}))
    assert plan_chain(links[64::-1]).num_links == 65
    assert refused(*links[65::-1]).code == "CHAIN_TOO_LONG"
    assert refused(*links[::-1]).code == "CHAIN_TOO_LONG"
    assert refused(*links[3::-1], max_length=2).code == "CHAIN_TOO_LONG"
