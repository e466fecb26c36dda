"""A migrated load: what a plan says ends in the arena, from files and mappings alike, without a second copy of it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hotglm.errors import (
    DigestMismatchError,
    MigrationStepError,
    NonFiniteError,
    SourceChangedError,
    SupersededError,
    TensorValueError,
)
from hotglm.migration import expression as e
from hotglm.migration.expression import Called, Expression, Filled, Source, TensorSpec
from hotglm.migration.initialisers import Constant, Normal, Ones, Zeros
from hotglm.migration.plan import StatePlan
from hotglm.release.files import open_weights
from hotglm.testing.seams import hooked
from hotglm.weights import bundles, migration, proof, scratch
from hotglm.weights.dtypes import LOADABLE_DTYPES, TORCH_DTYPES, dtype_name
from hotglm.weights.migration import load_migrated
from hotglm.weights.pace import AtWill
from hotglm.weights.plan import plan_reads
from hotglm.weights.proof import Loaded, LoadOptions
from hotglm.weights.workers import Cancellation
from support.peak import read_peak
from support.spares import Spare, random_tensor

Tensors = Mapping[str, torch.Tensor]


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))


def _sources(tensors: Tensors) -> dict[str, Source]:
    return {name: Source(name, _spec(tensor)) for name, tensor in tensors.items()}


def _plan(tensors: Tensors, outputs: Mapping[str, Expression]) -> StatePlan:
    return StatePlan(sources={name: _spec(tensor) for name, tensor in tensors.items()}, outputs=outputs)


def _make_spare(plan: StatePlan, *, ties: Mapping[str, str] | None = None) -> Spare:
    like = {
        name: torch.empty(output.spec.shape, dtype=TORCH_DTYPES[output.spec.dtype])
        for name, output in plan.outputs.items()
        if name not in (ties or {})
    }
    return Spare(like, ties=ties)


def _save(tensors: Tensors, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _load_file(path: Path, plan: StatePlan, spare: Spare, **options: Any) -> Loaded:
    with open_weights(path) as files:
        return load_migrated(files, plan, spare.targets, lease=spare.lease, options=LoadOptions(**options))


def _load_mapping(tensors: Tensors, plan: StatePlan, spare: Spare, **options: Any) -> Loaded:
    return load_migrated(tensors, plan, spare.targets, lease=spare.lease, options=LoadOptions(**options))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype is not other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def _swap_halves(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"low": given["x"][2:] * 2, "high": given["x"][:2].clone()}


def _sum_twelve(words: list[int]) -> float:
    """Return the sum of the four 16-bit numbers in each of three words, about its mean of -6."""
    parts = [(word >> shift) & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    return 6.0 + sum(part - 0x10000 if part >= 0x8000 else part for part in parts)


def _make_case() -> tuple[dict[str, torch.Tensor], dict[str, Expression], dict[str, torch.Tensor]]:
    """Return tensors, an expression of every kind over them, and what each is by plain torch."""
    torch.manual_seed(0)
    tensors = {
        "plain": torch.randn(3, 4),
        "qkv": torch.randn(6, 4),
        "a": torch.randn(2, 4),
        "b": torch.randn(3, 4),
        "wide": torch.randn(2, 3, 4),
        "half": torch.randn(4, 3).bfloat16(),
        "one": torch.randn(2, 2),
        "same": torch.zeros(2, 2),
        "x": torch.randn(4, 2),
        "gone": torch.randn(5),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "double": torch.randn(4).double(),
        "count": torch.arange(4),
    }
    tensors["same"].copy_(tensors["one"])
    s = _sources(tensors)
    calls = [
        Called(
            _swap_halves,
            (s["x"],),
            ("x",),
            (("low", TensorSpec(dtype="float32", shape=(2, 2))), ("high", TensorSpec(dtype="float32", shape=(2, 2)))),
            index,
            "Apply(_swap_halves)",
        )
        for index in (0, 1)
    ]
    outputs: dict[str, Expression] = {
        "renamed": s["plain"],
        "q": e.narrow(s["qkv"], 0, 0, 2),
        "k": e.narrow(s["qkv"], 0, 2, 2),
        "v": e.reshape(e.narrow(s["qkv"], 0, 4, 2), (8,)),
        "joined": e.join([s["a"], s["b"]], 0),
        "transposed": e.permute(s["wide"], (2, 0, 1)),
        "wider": e.scale(e.convert(s["half"], "float32"), 0.5),
        "tied": e.same([s["one"], s["same"]]),
        "low": calls[0],
        "high": calls[1],
        "scalar": s["scalar"],
        "empty": s["empty"],
        "padded": e.pad(e.convert(s["double"], "float16"), 0, 1, 2, -1.0),
        "counted": e.scale(s["count"], 3),
        "zeros": Filled("zeros", Zeros(), TensorSpec(dtype="float32", shape=(2,))),
        "ones": Filled("ones", Ones(), TensorSpec(dtype="bool", shape=(3,))),
        "constant": Filled("constant", Constant(0.1), TensorSpec(dtype="bfloat16", shape=(3,))),
        "normal": Filled("normal", Normal(0.02, 7), TensorSpec(dtype="float32", shape=(33,))),
    }
    t = tensors
    generated = torch.Generator().manual_seed(_seed_of(7, "normal"))
    words_of_numbers = torch.empty(33, 3, dtype=torch.int64).random_(-(2**63), None, generator=generated)
    expected = {
        "renamed": t["plain"],
        "q": t["qkv"][:2],
        "k": t["qkv"][2:4],
        "v": t["qkv"][4:].reshape(8),
        "joined": torch.cat([t["a"], t["b"]]),
        "transposed": t["wide"].permute(2, 0, 1),
        "wider": t["half"].float() * 0.5,
        "tied": t["one"],
        "low": t["x"][2:] * 2,
        "high": t["x"][:2],
        "scalar": t["scalar"],
        "empty": t["empty"],
        "padded": torch.cat([torch.full((1,), -1.0), t["double"].half().float(), torch.full((2,), -1.0)]).half(),
        "counted": t["count"] * 3,
        "zeros": torch.zeros(2),
        "ones": torch.ones(3, dtype=torch.bool),
        "constant": torch.full((3,), 0.1, dtype=torch.bfloat16),
        "normal": torch.tensor([_sum_twelve(words) for words in words_of_numbers.tolist()]) / 65536 * 0.02,
    }
    return tensors, outputs, expected


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little") >> 1


# -- what arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "mapping"])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("chunk", [None, 7])
def test_every_kind_of_expression_arrives_as_plain_torch_makes_it(
    kind: str, num_threads: int, chunk: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of expression arrives bit for bit as torch computes it, with the digest of what is in the arena."""
    if chunk is not None:
        planned = functools.partial(plan_reads, max_pieces=3)
        monkeypatch.setattr(AtWill, "chunk_nbytes", chunk)
        monkeypatch.setattr(migration, "plan_reads", planned)
        monkeypatch.setattr(bundles, "CHUNK_NBYTES", chunk)
        monkeypatch.setattr(proof, "_SMALL_NBYTES", 0)
    tensors, outputs, expected = _make_case()
    plan = _plan(tensors, outputs)
    spare = _make_spare(plan)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    if kind == "file":
        loaded = _load_file(_save(tensors, tmp_path / "w.safetensors"), plan, spare, num_threads=num_threads)
    else:
        loaded = _load_mapping(tensors, plan, spare, num_threads=num_threads)
    assert {name for name in outputs if not _same_bits(spare[name], expected[name])} == set()
    assert loaded.digests == {name: digest_of(expected[name]) for name in outputs}
    assert loaded.nbytes == sum(output.spec.nbytes for output in outputs.values())
    assert loaded.converted == []
    assert all(_same_bits(tensors[name], before[name]) for name in tensors)


def digest_of(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor's bytes, by the standard library alone."""
    data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_the_same_bytes_come_by_reading_and_by_computing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read straight into the arena is what would have been computed; neither way is the other in disguise."""
    torch.manual_seed(1)
    tensors = {"qkv": torch.randn(3, 2, 5), "a": torch.randn(1, 4), "b": torch.randn(1, 3), "c": torch.randn(7)}
    s = _sources(tensors)
    outputs = {
        "q": e.select(s["qkv"], 0, 0),
        "kv": e.reshape(e.narrow(s["qkv"], 0, 1, 2), (4, 5)),
        "ab": e.join([s["a"], s["b"]], 1),  # behind a dimension of one element, so still one run after the other
        "cc": e.stack([e.narrow(s["c"], 0, 3, 3), e.narrow(s["c"], 0, 0, 3)], 0),
    }
    plan = _plan(tensors, outputs)
    path = _save(tensors, tmp_path / "w.safetensors")
    direct, computed = _make_spare(plan), _make_spare(plan)
    monkeypatch.setattr(scratch.Scratch, "open", _fail)
    _load_file(path, plan, direct)
    monkeypatch.undo()
    monkeypatch.setattr(migration, "find_byte_runs", lambda expression: None)
    _load_file(path, plan, computed)
    for name, output in outputs.items():
        assert _same_bits(direct[name], computed[name]), name
        assert tuple(direct[name].shape) == output.spec.shape


def _fail(*_: object) -> object:
    raise AssertionError("nothing should have been computed")


@pytest.mark.parametrize("kind", ["file", "mapping"])
def test_dtypes_of_the_code_are_taken_at_the_end(kind: str, tmp_path: Path) -> None:
    """A target of another dtype takes the finished value, converted once, and is named as converted."""
    tensors = {"w": torch.randn(4, 4), "z": torch.randn(4)}
    s = _sources(tensors)
    outputs = {"w": e.permute(s["w"], (1, 0)), "zz": e.scale(e.convert(s["z"], "float16"), 3.0)}
    plan = _plan(tensors, outputs)
    spare = Spare({"w": torch.empty(4, 4).bfloat16(), "zz": torch.empty(4)})
    path = _save(tensors, tmp_path / "w.safetensors")
    loaded = _load_file(path, plan, spare) if kind == "file" else _load_mapping(tensors, plan, spare)
    assert _same_bits(spare["w"], tensors["w"].T.bfloat16())
    assert _same_bits(spare["zz"], (tensors["z"].half() * 3.0).float())
    assert sorted(loaded.converted) == ["w", "zz"]


def test_views_of_any_strides_are_filled(tmp_path: Path) -> None:
    """A target that is not contiguous, as of a transposed parameter, gets the right elements."""
    tensors = {"w": torch.randn(3, 5), "v": torch.randn(5, 3)}
    s = _sources(tensors)
    plan = _plan(tensors, {"w": s["w"], "t": e.permute(s["v"], (1, 0))})
    spare = Spare({"w": torch.empty(5, 3).T, "t": torch.empty(5, 3).T})
    _load_file(_save(tensors, tmp_path / "w.safetensors"), plan, spare)
    assert _same_bits(spare["w"], tensors["w"])
    assert _same_bits(spare["t"], tensors["v"].T)


@pytest.mark.parametrize("dtype", sorted(LOADABLE_DTYPES, key=str), ids=str)
def test_every_dtype_is_moved_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Splitting, padding and transposing change no bit of any dtype."""
    tensor = random_tensor(dtype, 4, 3)
    s = _sources({"w": tensor})["w"]
    outputs = {
        "top": e.narrow(s, 0, 0, 1),
        "right": e.narrow(s, 1, 2, 1),
        "more": e.pad(e.permute(s, (1, 0)), 1, 0, 1, 0),
    }
    plan = _plan({"w": tensor}, outputs)
    spare = _make_spare(plan)
    _load_file(_save({"w": tensor}, tmp_path / "w.safetensors"), plan, spare, finite=False)
    assert _same_bits(spare["top"], tensor[:1])
    assert _same_bits(spare["right"], tensor[:, 2:])
    assert _same_bits(spare["more"][:, :4].contiguous(), tensor.T.contiguous())


# -- memory ------------------------------------------------------------------------------------------------------------

MIB = 1 << 20


def test_moved_tensors_take_no_memory_beside_the_spare(tmp_path: Path) -> None:
    """Renames, splits and joins of leading dimensions are read to where they stay: nothing else is taken."""
    tensors = {f"w{index}": torch.ones(3 * MIB // 4, 4) for index in range(8)}
    s = _sources(tensors)
    outputs: dict[str, Expression] = {f"renamed.{index}": s[f"w{index}"] for index in range(4)}
    outputs |= {f"part.{index}": e.narrow(s["w4"], 0, index * MIB // 4, MIB // 4) for index in range(3)}
    outputs["joined"] = e.join([s["w5"], s["w6"]], 0)
    outputs["kept"] = s["w7"]
    plan = _plan(tensors, outputs)
    path = _save(tensors, tmp_path / "w.safetensors")
    del tensors
    spare = _make_spare(plan)
    spare.arena.populate(0, spare.arena.nbytes)
    peak = read_peak(lambda: _load_file(path, plan, spare, num_threads=2))
    assert plan.peak_nbytes(num_workers=2) >= 0
    assert peak < 4 * MIB, peak


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_peak_is_the_operands_of_the_largest_units(
    num_threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed units take, for each thread, one block for the operands and intermediates of its largest unit."""
    nbytes = 12 * MIB
    tensors = {f"w{index}": torch.ones(nbytes // 16, 4) for index in range(6)}
    s = _sources(tensors)
    # The factor is applied to the whole tensor before it is cut, so a unit needs it and one intermediate.
    outputs = {f"t{i}": e.narrow(e.scale(s[f"w{i}"], 0.5), 1, 0, 2) for i in range(6)}
    plan = _plan(tensors, outputs)
    path = _save(tensors, tmp_path / "w.safetensors")
    del tensors
    spare = _make_spare(plan)
    spare.arena.populate(0, spare.arena.nbytes)
    taken: list[int] = []
    with hooked(_count_memory(taken)):
        peak = read_peak(lambda: _load_file(path, plan, spare, num_threads=num_threads))
    bound = num_threads * (nbytes + nbytes)
    assert plan.peak_nbytes(num_workers=num_threads) == bound
    assert set(taken) == {nbytes + nbytes}
    assert len(taken) <= num_threads
    assert nbytes < peak < bound + 4 * MIB, (peak, bound)


def _count_memory(taken: list[int]) -> Callable[[str, int, tuple[Any, ...]], None]:
    def count(kind: str, number: int, args: tuple[Any, ...]) -> None:
        if kind == "map_anonymous":
            taken.append(args[0])

    return count


def test_scratch_memory_is_taken_once_for_each_thread(tmp_path: Path) -> None:
    """However many units are computed, a thread takes one block of scratch memory, as large as its largest unit."""
    tensors = {f"w{index}": torch.randn(8 + index, 4) for index in range(50)}
    s = _sources(tensors)
    plan = _plan(tensors, {name: e.permute(source, (1, 0)) for name, source in s.items()})
    path = _save(tensors, tmp_path / "w.safetensors")
    spare = _make_spare(plan)
    taken: list[int] = []
    with hooked(_count_memory(taken)):
        _load_file(path, plan, spare)
    assert taken == [-(-57 * 4 * 4 // 64) * 64]


def test_what_a_function_keeps_is_not_written_again(tmp_path: Path) -> None:
    """A free function that keeps its argument keeps its values: the scratch memory is left to it."""
    kept: list[torch.Tensor] = []

    def keep(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept.append(given["x"])
        return {"y": given["x"] + 1}

    tensors = {f"w{index}": torch.full((4,), float(index)) for index in range(4)}
    s = _sources(tensors)
    writes = (("y", TensorSpec(dtype="float32", shape=(4,))),)
    plan = _plan(tensors, {f"y{i}": Called(keep, (s[f"w{i}"],), ("x",), writes, 0, "Apply(keep)") for i in range(4)})
    spare = _make_spare(plan)
    _load_file(_save(tensors, tmp_path / "w.safetensors"), plan, spare)
    assert sorted(tensor[0].item() for tensor in kept) == [0.0, 1.0, 2.0, 3.0]


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "mapping"])
@pytest.mark.parametrize("digest", [True, False])
def test_promised_digests_are_those_of_source_tensors(kind: str, digest: bool, tmp_path: Path) -> None:
    """A source tensor whose bytes are not the promised ones is named, renamed, split, joined or computed with."""
    tensors = {name: torch.randn(6, 2) for name in ("moved", "cut", "joined", "turned", "used", "gone")}
    s = _sources(tensors)
    outputs = {
        "new": s["moved"],
        "c0": e.narrow(s["cut"], 0, 0, 1),
        "c1": e.narrow(s["cut"], 0, 1, 5),
        "j": e.join([e.narrow(s["joined"], 0, 3, 3), e.narrow(s["joined"], 0, 0, 3)], 0),
        "t": e.permute(s["turned"], (1, 0)),
        "u": e.narrow(s["used"], 0, 0, 2),  # only a part of it is needed: it is read whole to be verified
    }
    plan = _plan(tensors, outputs)
    path = _save(tensors, tmp_path / "w.safetensors")
    promised = {name: digest_of(tensor) for name, tensor in tensors.items()}

    def load(expected: Mapping[str, str]) -> Loaded:
        spare = _make_spare(plan)
        options: dict[str, Any] = {"expected": expected, "digest": digest, "num_threads": 2}
        return (
            _load_file(path, plan, spare, **options)
            if kind == "file"
            else _load_mapping(tensors, plan, spare, **options)
        )

    load(promised)
    wrong = {name: digest_of(torch.zeros(1)) for name in tensors}
    with pytest.raises(DigestMismatchError) as caught:
        load(wrong)
    assert [problem.tensor for problem in caught.value.problems] == sorted(set(tensors) - {"gone"})
    for name in sorted(set(tensors) - {"gone"}):
        with pytest.raises(DigestMismatchError) as caught:
            load({**promised, name: wrong[name]})
        assert [problem.tensor for problem in caught.value.problems] == [name]


@pytest.mark.parametrize("kind", ["file", "mapping"])
def test_tensors_that_differ_cannot_be_tied(kind: str, tmp_path: Path) -> None:
    """A tie of tensors that are not bitwise equal is refused and names both; so is a second name with other values."""
    tensors = {"a": torch.zeros(2), "b": torch.tensor([0.0, -0.0]), "c": torch.ones(2), "d": torch.zeros(2)}
    s = _sources(tensors)
    plan = _plan(tensors, {"tied": e.same([s["a"], s["b"]]), "first": s["c"], "second": s["d"]})
    spare = _make_spare(plan, ties={"second": "first"})
    path = _save(tensors, tmp_path / "w.safetensors")
    with pytest.raises(TensorValueError) as caught:
        _load_file(path, plan, spare) if kind == "file" else _load_mapping(tensors, plan, spare)
    found = {problem.tensor: problem for problem in caught.value.problems}
    assert set(found) == {"b", "second"}
    assert found["b"].code == "TIE_CONFLICT"
    assert "'a'" in found["b"].message
    assert "'first'" in found["second"].message


def test_bytes_that_two_outputs_share_are_read_once(tmp_path: Path) -> None:
    """An untied tensor is read once and copied, so that both outputs are the bytes whose digest was verified."""
    tensors = {"w": torch.randn(64)}
    s = _sources(tensors)
    plan = _plan(tensors, {"one": s["w"], "two": s["w"]})
    spare = _make_spare(plan)
    path = _save(tensors, tmp_path / "w.safetensors")
    reads: list[int] = []

    def count(kind: str, number: int, args: tuple[Any, ...]) -> None:
        if kind == "preadv":
            reads.append(sum(view.nbytes for view in args[1]))

    with hooked(count):
        _load_file(path, plan, spare)
    assert reads == [256]
    assert _same_bits(spare["one"], tensors["w"])
    assert _same_bits(spare["two"], tensors["w"])


def _raise(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise ValueError("no such thing")


def _write_it(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"y": given["x"].add_(1)}


BAD_FUNCTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (_raise, "ValueError: no such thing"),
    "writes its argument": (_write_it, "wrote what it was given"),
    "returns no mapping": (lambda given: given["x"], "no mapping"),
    "returns nothing for a name": (lambda given: {}, "nothing as 'y'"),
    "returns another shape": (lambda given: {"y": given["x"][:1]}, "float32 [1]"),
    "returns another dtype": (lambda given: {"y": given["x"].double()}, "float64 [3]"),
    "returns what it did not declare": (lambda given: {"y": given["x"] * 2, "z": given["x"]}, "as 'z'"),
    "returns no tensor": (lambda given: {"y": [1, 2, 3]}, "'list' as 'y'"),
}


@pytest.mark.parametrize("kind", ["file", "mapping"])
@pytest.mark.parametrize("what", BAD_FUNCTIONS)
def test_a_free_function_that_fails_is_named(what: str, kind: str, tmp_path: Path) -> None:
    """A free function that raises, writes its argument or returns what it did not declare is named with its tensors."""
    function, said = BAD_FUNCTIONS[what]
    tensors = {"x": torch.randn(3)}
    call = Called(
        function,
        (_sources(tensors)["x"],),
        ("x",),
        (("y", TensorSpec(dtype="float32", shape=(3,))),),
        0,
        "Apply(this_one)",
    )
    plan = _plan(tensors, {"new": call})
    spare = _make_spare(plan)
    path = _save(tensors, tmp_path / "w.safetensors")
    before = tensors["x"].clone()
    with pytest.raises(MigrationStepError) as caught:
        _load_file(path, plan, spare) if kind == "file" else _load_mapping(tensors, plan, spare)
    assert "Apply(this_one)" in str(caught.value)
    assert said in str(caught.value)
    assert caught.value.tensor in ("x", "y", "z")
    assert _same_bits(tensors["x"], before)


def test_values_are_proved_where_they_will_run(tmp_path: Path) -> None:
    """A value that a step made infinite is found; one that a step dropped is not."""
    tensors = {"big": torch.full((2,), 6e4).half(), "bad": torch.tensor([1.0, float("nan")])}
    s = _sources(tensors)
    path = _save(tensors, tmp_path / "w.safetensors")
    plan = _plan(tensors, {"big": e.scale(s["big"], 2.0), "good": e.narrow(s["bad"], 0, 0, 1)})
    with pytest.raises(NonFiniteError) as caught:
        _load_file(path, plan, _make_spare(plan))
    assert [problem.tensor for problem in caught.value.problems] == ["big"]


def test_progress_counts_the_bytes_of_the_source(tmp_path: Path) -> None:
    """Progress ends at the size of the source, whatever is dropped, cut or made new."""
    tensors, outputs, _ = _make_case()
    plan = _plan(tensors, {**outputs, "cut": e.narrow(_sources(tensors)["gone"], 0, 1, 2)})
    path = _save(tensors, tmp_path / "w.safetensors")
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    loads: tuple[Callable[..., Loaded], ...] = (
        functools.partial(_load_file, path),
        functools.partial(_load_mapping, tensors),
    )
    for load in loads:
        seen: list[int] = []
        load(plan, _make_spare(plan), report=seen.append)
        assert sum(seen) == total
        assert min(seen) >= 0


@pytest.mark.parametrize("kind", ["file", "mapping"])
def test_a_cancelled_load_stops_at_its_next_unit(kind: str, tmp_path: Path) -> None:
    """A migrated load that is superseded stops within a unit and raises the reason."""
    tensors = {f"w{index}": torch.randn(4, 2) for index in range(20)}
    plan = _plan(tensors, {name: e.permute(source, (1, 0)) for name, source in _sources(tensors).items()})
    cancellation, done = Cancellation(), []

    def report(nbytes: int) -> None:
        done.append(nbytes)
        if len(done) == 5:
            cancellation.cancel(SupersededError("newer"))

    path = _save(tensors, tmp_path / "w.safetensors")
    options: dict[str, Any] = {"cancellation": cancellation, "report": report}
    load = functools.partial(_load_file, path) if kind == "file" else functools.partial(_load_mapping, tensors)
    with pytest.raises(SupersededError):
        load(plan, _make_spare(plan), **options)
    assert len(done) == 5


def test_a_source_that_ends_early_is_an_error(tmp_path: Path) -> None:
    """A file that is cut while operands are read is a typed error, like any file."""
    tensors = {"w": torch.randn(64, 64)}
    plan = _plan(tensors, {"w": e.permute(_sources(tensors)["w"], (1, 0))})
    path = _save(tensors, tmp_path / "w.safetensors")
    with open_weights(path) as files:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1)
        spare = _make_spare(plan)
        with pytest.raises(SourceChangedError):
            load_migrated(files, plan, spare.targets, lease=spare.lease, options=LoadOptions())
