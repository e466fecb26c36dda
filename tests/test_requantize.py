"""Plain weights for a slot whose module is quantised: proved as plain weights, quantised in staging, swapped in."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm import seam
from hotglm.errors import (
    ArgumentError,
    DefinitionError,
    DigestMismatchError,
    GoldenMismatchError,
    HotglmError,
    IncompatibleError,
    MemoryPlanError,
    NonFiniteError,
    NotMaterializedError,
    ReentrantError,
    StageFailedError,
    SupersededError,
    UncopyableError,
    UnswappableError,
)
from hotglm.model import registry
from hotglm.model.wrappers import find_memory
from hotglm.seam import Seam
from hotglm.slot import spare
from hotglm.slot.memory import read_available_nbytes
from hotglm.weights.arena import ALIGNMENT
from hotglm.weights.delta_codec import SPARSE
from support.delta_releases import write_delta, write_full
from support.quantised import KINDS, Int8Linear, replace_layers
from support.swaps import same_bits
from support.trusted import Host, make_key
from support.universal import Chain, make_state
from support.watched import Watched
from support.watched import X as CHAIN_X
from support.wrapped import WIDTH, Blocked, X, make_plain, quantise, quantise_layers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

POLICIES: dict[str, Callable[[], Any]] = {"flip": hotglm.Flip, "in place": hotglm.InPlace}
SWAPS = [
    (kind, policy) for kind, how in KINDS.items() for policy in POLICIES if policy == "flip" or how.is_tensors_alone
]


def make_slot(kind: str = "wrappers", *, seed: int = 1, **options: Any) -> hotglm.ModuleSlot:
    """Return a slot of version 1.0.0 around a model that was quantised cold."""
    how = KINDS[kind]
    requantize = hotglm.Requantize(build=lambda: make_plain(0), quantize=how.quantize)
    return hotglm.ModuleSlot(
        how.make(seed), **{"name": "model", "version": "1.0.0", "requantize": requantize, **options}
    )


def live_of(slot: hotglm.ModuleSlot) -> Any:
    return slot.live.module


def save(path: Path, seed: int, **options: Any) -> Path:
    """Write the plain weights of `seed`."""
    hotglm.save_weights(make_plain(seed), path, **options)
    return path


def refuse(slot: hotglm.ModuleSlot, source: Any, error: type[HotglmError], **options: Any) -> HotglmError:
    """Return the error of an update, having seen that what was live still serves, bit for bit."""
    before, number, version = slot(X), slot.live.number, slot.version
    with pytest.raises(error) as caught:
        slot.update(source, **{"version": "1.0.9", **options})
    assert same_bits(slot(X), before)
    assert (slot.live.number, slot.version) == (number, version)
    slot.verify_live()
    return caught.value


# -- swaps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "policy"), SWAPS)
def test_a_warm_swap_of_plain_weights_is_a_cold_start(kind: str, policy: str, tmp_path: Path) -> None:
    """P12: a file that is quantised in staging gives, bit for bit, what a cold start loads and quantises."""
    slot, how = make_slot(kind, swap=POLICIES[policy]()), KINDS[kind]
    receipts = [slot.update(save(tmp_path / f"{seed}.safetensors", seed), version=f"1.0.{seed}") for seed in (2, 3, 4)]
    cold = make_slot(kind)
    for seed, receipt in zip((2, 3, 4), receipts, strict=True):
        if how.is_tensors_alone:
            assert receipt.digest == cold.update(how.make(seed), version=f"1.0.{seed}").digest
    assert same_bits(slot(X), how.make(4)(X))
    assert same_bits([m for t in slot.parameters() for m in find_memory(t)], _read(how.make(4)))
    assert type(live_of(slot)[0]) is type(how.make(4)[0])
    slot.verify_live()
    slot.rollback()
    assert same_bits(slot(X), how.make(3)(X))
    slot.verify_live()


def _read(model: Any) -> list[torch.Tensor]:
    return [memory for parameter in model.parameters() for memory in find_memory(parameter)]


def test_what_it_became_of_is_in_the_receipt(tmp_path: Path) -> None:
    """Both digests: that of the plain weights, as a slot of the plain model has it, and that of what is live."""
    path = save(tmp_path / "a.safetensors", 2)
    plain = hotglm.ModuleSlot(make_plain(1), name="model", version="1.0.0").update(path)
    slot = make_slot()
    receipt = slot.update(path)
    origin = receipt.quantized_from
    assert origin is not None
    assert (origin.digest, dict(origin.digests)) == (plain.digest, dict(plain.digests))
    assert origin.nbytes == plain.nbytes == receipt.nbytes
    assert receipt.new_version == plain.new_version  # named by what was published
    assert receipt.digest == slot.verify_live().digest != origin.digest
    assert "0.weight.qdata" in receipt.digests
    assert f"quantised from weights of digest {origin.digest}" in receipt.explain()
    assert receipt.origins.read_nbytes == origin.nbytes
    assert json.loads(json.dumps(receipt.to_dict()))["quantized_from"]["digest"] == origin.digest
    assert pickle.loads(pickle.dumps(receipt)).quantized_from == origin
    assert slot.update(make_plain(3).state_dict(), version="1.0.3").quantized_from != origin
    assert slot.rollback().quantized_from == origin
    assert slot.rollback(1).quantized_from is None


def test_quantising_is_a_part_of_the_stage() -> None:
    """It is timed, told as progress, and what it has made goes through warm-up, goldens and checks."""
    seen: list[Any] = []
    told: list[hotglm.Progress] = []
    golden = hotglm.Golden(inputs=X, outputs=KINDS["wrappers"].make(2)(X), rtol=0, atol=0)
    policy = hotglm.StagePolicy(warm_up=(X,), goldens=(golden,), checks=(seen.append,))
    slot = make_slot(policy=policy)
    receipt = slot.update(make_plain(2).state_dict(), version="1.0.1", progress=told.append)
    parts = [timing.part for timing in receipt.timings]
    assert parts.index("load") < parts.index("quantize") < parts.index("place") < parts.index("check")
    order = list(dict.fromkeys(one.part for one in told))
    assert order == ["load", "quantize", "place"]
    assert all(one.done_nbytes <= one.total_nbytes for one in told)
    assert isinstance(seen[0][0].weight, Blocked)
    assert isinstance(refuse(slot, make_plain(3).state_dict(), GoldenMismatchError), HotglmError)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_it_is_quantised_in_the_grad_mode_of_the_caller(mode: Callable[[], Any]) -> None:
    """Without autocast, in the stage's thread, in evaluation mode as the live one is."""
    seen: list[Any] = []

    def note(model: Any) -> None:
        state = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        seen.append((state, model.training, threading.current_thread().name))
        quantise_layers(model)

    slot = make_slot(requantize=hotglm.Requantize(build=lambda: make_plain(0).train(), quantize=note))
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), False
        slot.update(make_plain(2).state_dict(), version="1.0.1")
    assert seen == [(wanted, False, "hotglm-stage-model")]
    assert same_bits(slot(X), KINDS["wrappers"].make(2)(X))


@pytest.mark.parametrize("policy", POLICIES)
def test_swaps_compile_nothing(policy: str) -> None:
    """Plain weights for a compiled quantised model: nothing is compiled, where compiling again raises."""
    torch._dynamo.reset()
    how = KINDS["wrappers"]
    requantize = hotglm.Requantize(build=lambda: make_plain(0), quantize=how.quantize)
    compiled: Any = torch.compile(how.make(1), backend="eager", fullgraph=True)
    slot = hotglm.ModuleSlot(
        compiled,
        name="model", version="1.0.0", requantize=requantize, swap=POLICIES[policy](),
    )  # fmt: skip
    with torch.no_grad():
        slot(X)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(2, 7):
                assert slot.update(make_plain(seed).state_dict(), version=f"1.0.{seed}").recompiles == 0
                assert torch.allclose(slot(X), how.make(seed)(X), atol=1e-6)


def test_what_was_added_to_the_live_module_stays() -> None:
    """Where versions differ in tensors alone, hooks and attributes of the live module are those of the next."""
    slot, ran = make_slot(), list[int]()
    live_of(slot)[0].register_forward_hook(lambda *_: ran.append(1))
    slot.update(make_plain(2).state_dict(), version="1.0.1")
    assert same_bits(slot(X), KINDS["wrappers"].make(2)(X))
    assert ran == [1]


def test_digests_of_the_caller_are_of_plain_tensors() -> None:
    """They are held against what was offered, and asked of nothing that became of it."""
    digests = dict(hotglm.ModuleSlot(make_plain(1), name="m").update(make_plain(2)).digests)
    slot = make_slot()
    slot.update(make_plain(2).state_dict(), version="1.0.1", digests={"2.weight": digests["2.weight"]})
    assert same_bits(slot(X), KINDS["wrappers"].make(2)(X))


def test_what_the_live_version_promises_goes_on() -> None:
    """The layout of golden outputs that the slot was made with is promised by what is quantised later, too."""
    golden = hotglm.Golden(inputs=X, outputs=KINDS["wrappers"].make(1)(X))
    slot = make_slot(policy=hotglm.StagePolicy(goldens=(golden,)))
    promised = slot.live.contract.outputs
    assert promised is not None
    slot.update(make_plain(2).state_dict(), version="1.0.1", policy=hotglm.StagePolicy())
    assert slot.live.contract.outputs == promised


@pytest.mark.parametrize("policy", POLICIES)
def test_a_table_that_quantize_adds_is_the_same_in_all_versions(policy: str) -> None:
    """What is no parameter, but of the same bytes in both, needs no declaration of its own."""

    def quantize(model: Any) -> None:
        replace_layers(model)
        model[0].codebook = torch.linspace(-1, 1, 16)

    live = make_plain(1)
    quantize(live)
    requantize = hotglm.Requantize(build=lambda: make_plain(0), quantize=quantize)
    slot = hotglm.ModuleSlot(live, name="model", version="1.0.0", requantize=requantize, swap=POLICIES[policy]())
    slot.update(make_plain(2).state_dict(), version="1.0.1")
    assert same_bits(slot(X), KINDS["layers"].make(2)(X))
    assert torch.equal(live_of(slot)[0].codebook, torch.linspace(-1, 1, 16))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_number_that_passes_change_goes_on(policy: str) -> None:
    """What the constructor gave it and quantize left alone has nothing to do with weights; the live value stays."""

    class Counting(nn.Sequential):
        num_passes = 0

        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(*layers)
            self.num_passes = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.num_passes += 1
            found: torch.Tensor = self[2](self[1](self[0](x)))
            return found

    def build(seed: int = 0) -> Any:
        return Counting(*make_plain(seed))

    live = build(1)
    quantise_layers(live)
    requantize = hotglm.Requantize(build=build, quantize=quantise_layers)
    slot = hotglm.ModuleSlot(live, name="model", version="1.0.0", requantize=requantize, swap=POLICIES[policy]())
    slot(X)
    live_of(slot).label = "canary"
    slot.update(make_plain(2).state_dict(), version="1.0.1")
    assert same_bits(slot(X), KINDS["wrappers"].make(2)(X))
    assert (slot.num_passes, slot.label) == (2, "canary")


def test_what_is_quantised_already_is_taken_as_it_is() -> None:
    """Modules, state dicts of wrappers, and tensors that fill the live module and not the plain one."""
    calls: list[int] = []

    def note(model: Any) -> None:
        calls.append(1)
        replace_layers(model)

    slot = make_slot("layers", requantize=hotglm.Requantize(build=lambda: make_plain(0), quantize=note))
    receipt = slot.update(KINDS["layers"].make(2).state_dict(), version="1.0.1")
    assert receipt.quantized_from is None
    slot.update(KINDS["layers"].make(3), version="1.0.2")
    assert same_bits(slot(X), KINDS["layers"].make(3)(X))
    wrappers = make_slot()
    assert wrappers.update(KINDS["wrappers"].make(2).state_dict(), version="1.0.1").quantized_from is None
    assert calls == []


def test_weights_that_fill_both_are_quantised() -> None:
    """Where the quantised module has names and dtypes of the plain one, what is offered is plain."""

    def round_weights(model: Any) -> None:
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.weight.copy_((layer.weight * 8).round() / 8)

    first, second = make_plain(1), make_plain(2)
    round_weights(first)
    round_weights(second)
    requantize = hotglm.Requantize(build=lambda: make_plain(0), quantize=round_weights)
    slot = hotglm.ModuleSlot(first, name="model", version="1.0.0", requantize=requantize)
    slot.update(make_plain(2).state_dict(), version="1.0.1")
    assert same_bits(slot(X), second(X))


# -- what a slot of the plain model does -------------------------------------------------------------------------------


def test_migrations_are_of_plain_weights() -> None:
    """Weights of an older layout are brought to that of the plain model before they are quantised."""
    migrations = hotglm.Migrations("model")
    migrations.state("0.9", "1.0", [hotglm.Rename(r"first\.(.*)", r"0.\1"), hotglm.Rename(r"last\.(.*)", r"2.\1")])
    slot = make_slot(migrations=migrations, accept="major")
    plain = make_plain(2).state_dict()
    old = {name.replace("0.", "first.").replace("2.", "last."): tensor for name, tensor in plain.items()}
    receipt = slot.update(old, version="0.9.5")
    assert receipt.migration
    assert same_bits(slot(X), KINDS["wrappers"].make(2)(X))
    assert slot.live.is_migrated
    assert str(slot.live.code_version) == "1.0.0"
    named = slot.update(plain)
    assert str(named.new_version).startswith("1.0.0+")  # they fit as they are, so they are not of the older version


def test_deltas_apply_to_plain_bytes(tmp_path: Path) -> None:
    """A delta is applied to the plain release that it names, from files, and quantised after that."""
    second = make_plain(1)
    second[0].weight.data[0, 0] += 1
    for number, model in ((1, make_plain(1)), (2, second)):
        write_full(tmp_path / "store", number, model.state_dict())
    base, full = sorted((tmp_path / "store").iterdir())
    delta = write_delta(base, full, tmp_path / "delta" / full.name, codecs={"0.weight": SPARSE})
    shutil.copytree(base, delta.parent / base.name)
    slot = make_slot(name="m", version="1.0.1")
    receipt = slot.update(delta)
    assert receipt.origins.decoded_nbytes
    quantise_layers(second)
    assert same_bits(slot(X), second(X))


@pytest.mark.parametrize("policy", POLICIES)
def test_trust_is_in_the_published_bytes(policy: str, tmp_path: Path) -> None:
    """A signed release of plain weights is verified, remembered and quantised; an unsigned one is refused."""
    host = Host(tmp_path)
    slot = make_slot(name="ranker", trust=host.open(), swap=POLICIES[policy](), accept="major", version="0.9.0")

    def release(seed: int, *, is_signed: bool) -> Path:
        source, target = tmp_path / f"source-{seed}", tmp_path / f"release-{seed}"
        source.mkdir()
        save(source / "model.safetensors", seed)
        hotglm.pack(source, target, name="ranker", version=f"1.0.{seed}", sequence=seed).close()
        if is_signed:
            hotglm.sign_release(target, make_key("release"))
        return target

    receipt = slot.update(release(2, is_signed=True))
    assert same_bits(slot(X), KINDS["wrappers"].make(2)(X))
    assert receipt.quantized_from is not None
    accepted = slot.live.accepted
    assert accepted is not None
    memory = host.state_path.read_bytes()
    refuse(slot, release(3, is_signed=False), hotglm.SignatureError, version=None)
    assert host.state_path.read_bytes() == memory
    assert slot.confirm()


def test_a_store_is_watched(tmp_path: Path) -> None:
    """A quantised slot follows a label in a store of plain releases; a damaged one is refused for ever."""

    def quantise_chain(chain: Any) -> None:
        for layer in chain.layers:
            layer.weight = nn.Parameter(quantise(layer.weight), requires_grad=False)

    def make_chain(number: int) -> Chain:
        chain = Chain()
        chain.load_state_dict(make_state(number))
        quantise_chain(chain)
        return chain

    requantize = hotglm.Requantize(build=Chain, quantize=quantise_chain)
    slot = hotglm.ModuleSlot(make_chain(0), name="chain", version="1.0.0", requantize=requantize)
    watched = Watched(tmp_path, slot=slot)
    for number in (1, 2):
        watched.publish(number)
        watched.settle()
        watched.wait(1.5)
        with torch.no_grad():
            assert same_bits(slot(CHAIN_X), make_chain(number)(CHAIN_X))
        assert isinstance(live_of(slot).layers[0].weight, Blocked)
    watched.publish(3, bad=True)
    watched.wait(1.5)
    assert watched.status.applied == "1.0.2"
    with torch.no_grad():
        assert same_bits(slot(CHAIN_X), make_chain(2)(CHAIN_X))


def test_a_file_is_held_against_the_plain_model(tmp_path: Path) -> None:
    """Verdict, digests and values are of plain names, all at once, before anything is quantised."""
    slot = make_slot(
        requantize=hotglm.Requantize(build=lambda: make_plain(0), quantize=lambda _: pytest.fail("quantised"))
    )
    error = refuse(slot, {"0.weight": torch.ones(3), "0.bias": torch.ones(WIDTH)}, IncompatibleError)
    assert [problem.tensor for problem in error.problems] == ["0.weight", "2.weight", "2.bias"]
    refuse(slot, make_plain(2).state_dict(), IncompatibleError, version="2.0.0")
    bad = make_plain(2)
    bad[2].weight.data[0, 0] = float("nan")
    assert refuse(slot, bad.state_dict(), NonFiniteError).tensor == "2.weight"
    digests = {"2.weight": f"sha256:{'0' * 64}"}
    assert refuse(slot, make_plain(2).state_dict(), DigestMismatchError, digests=digests).tensor == "2.weight"
    path = save(tmp_path / "a.safetensors", 2)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    refuse(slot, path, DigestMismatchError)


@dataclass
class Config:
    """How wide the middle is, and by what the answer is scaled."""

    width: int = WIDTH
    factor: float = 1.0


@pytest.fixture
def model() -> Iterator[type[nn.Module]]:
    """A registered class that is built from a config."""

    @hotglm.versioned("requantized", "1.0.0", config=Config)
    class Ranker(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.config = config
            self.up, self.down = nn.Linear(WIDTH, config.width), nn.Linear(config.width, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.down(self.up(x)) * self.config.factor
            return found

    yield Ranker
    registry._definitions.pop("requantized", None)


def quantise_ranker(model: Any) -> None:
    for layer in (model.up, model.down):
        layer.weight = nn.Parameter(quantise(layer.weight), requires_grad=False)


@pytest.mark.parametrize("has_build", [True, False])
def test_a_release_with_another_config_is_built_quantised_and_remembered(
    model: Any, has_build: bool, tmp_path: Path
) -> None:
    """Its class is built from its config; plain weights without a config after it are those of that config."""

    def make(seed: int, config: Config) -> Any:
        torch.manual_seed(seed)
        return model(config).eval()

    def cold(seed: int, config: Config) -> Any:
        made = make(seed, config)
        quantise_ranker(made)
        return made

    small, large = Config(), Config(width=2 * WIDTH, factor=3.0)
    build = (lambda: model(Config())) if has_build else None
    slot = hotglm.ModuleSlot(
        cold(1, small), accept="major", requantize=hotglm.Requantize(build=build, quantize=quantise_ranker)
    )
    hotglm.save_weights(make(2, large), tmp_path / "a.safetensors", version="1.1.0")
    slot.update(tmp_path / "a.safetensors")
    assert same_bits(slot(X), cold(2, large)(X))
    for one in (slot, copy.deepcopy(slot)):
        one.update(make(3, large).state_dict(), version="1.1.1")
        assert same_bits(one(X), cold(3, large)(X))
        one.update(make(4, small).state_dict(), version="1.2.0", config={"width": WIDTH, "factor": 1.0})
        assert same_bits(one(X), cold(4, small)(X))
    fixed = hotglm.ModuleSlot(
        cold(1, small),
        accept="major",
        swap=hotglm.InPlace(),
        requantize=hotglm.Requantize(build=build, quantize=quantise_ranker),
    )
    refuse(fixed, tmp_path / "a.safetensors", UnswappableError, version=None)


# -- what the user's functions do wrong --------------------------------------------------------------------------------


def _raise(_: Any) -> None:
    raise ValueError("no calibration data")


def _exhaust(_: Any) -> None:
    torch.empty(1 << 60)


def _update(slots: list[hotglm.ModuleSlot]) -> Callable[[Any], Any]:
    return lambda _: slots[0].update(make_plain(3).state_dict(), version="1.0.2")


def _return_live(slots: list[hotglm.ModuleSlot]) -> Callable[[Any], Any]:
    return lambda _: slots[0].live.module


WRONG: dict[str, tuple[Callable[[list[hotglm.ModuleSlot]], Callable[[Any], Any]], type[HotglmError], str, str]] = {
    "raises": (lambda _: _raise, StageFailedError, "QUANTIZE_FAILED", "no calibration data"),
    "has no memory": (lambda _: _exhaust, MemoryPlanError, "MEMORY", "can't allocate memory"),
    "updates the slot": (_update, ReentrantError, "REENTRANT", "from inside it"),
    "returns a number": (lambda _: lambda model: 3, DefinitionError, "BAD_DEFINITION", "got 'int'"),
    "does nothing": (
        lambda _: lambda model: None,
        UnswappableError,
        "CANNOT_SWAP_WRAPPED",
        "Blocked, got a plain tensor",
    ),
    "another block size": (
        lambda _: lambda model: quantise_layers(model, block=2),
        UnswappableError,
        "CANNOT_SWAP_WRAPPED",
        "Blocked with 'block' 4, got 2",
    ),
    "another kind": (lambda _: replace_layers, UnswappableError, "CANNOT_SWAP_WRAPPED", "got a plain tensor"),
    "returns the live one": (_return_live, UnswappableError, "CANNOT_SWAP", "parts of the live one"),
    "returns what cannot be held": (
        lambda _: lambda model: nn.Linear(2, 2, device="meta"),
        NotMaterializedError,
        "NOT_MATERIALIZED",
        "It is what quantize made",
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("what", WRONG)
def test_what_quantize_does_wrong_is_refused_by_name(what: str, policy: str) -> None:
    """Its error is typed, with a cause and a remedy, and all differences to what is live are named at once."""
    make, kind, code, text = WRONG[what]
    slots: list[hotglm.ModuleSlot] = []
    requantize = hotglm.Requantize(build=lambda: make_plain(0), quantize=make(slots))
    slots.append(make_slot(requantize=requantize, swap=POLICIES[policy]()))
    error = refuse(slots[0], make_plain(2).state_dict(), kind)
    assert type(error) is kind
    assert error.code == code
    assert text in str(error)
    assert (error.version, error.serving) == ("1.0.9", "1.0.0")
    assert error.remedy
    if code == "CANNOT_SWAP_WRAPPED":
        assert {"0.weight", "2.weight"} <= {problem.tensor for problem in error.problems}
    slots.clear()


def test_all_tensors_that_differ_are_named() -> None:
    """Without wrappers too: what is missing, new, and of another dtype or kind."""

    def other(model: Any) -> None:
        replace_layers(model)
        model[0].scale = model[0].scale.double()
        model[2].register_buffer("zero_point", torch.zeros(1))
        del model[2].bias
        model[2].register_parameter("bias", None)

    slot = make_slot("layers", requantize=hotglm.Requantize(build=lambda: make_plain(0), quantize=other))
    error = refuse(slot, make_plain(2).state_dict(), UnswappableError)
    assert {problem.tensor: problem.message for problem in error.problems} == {
        "0.scale": "Expected a buffer of float32 [8], got a buffer of float64 [8]",
        "2.bias": "Expected a parameter of float32 [8], got none",
        "2.zero_point": "Expected none, got a buffer of float32 [1]",
    }
    assert {problem.code for problem in error.problems} == {"CANNOT_SWAP_QUANTIZED"}


@pytest.mark.parametrize(("kind", "names"), [("numbers", ["0.scale", "2.scale"]), ("packed", None)])
def test_what_an_exchange_would_leave_stale_is_refused_in_place(kind: str, names: list[str] | None) -> None:
    """Numbers and packed weights are no tensors; under InPlace they are named, and the remedy is Flip."""
    error = refuse(make_slot(kind, swap=hotglm.InPlace()), make_plain(2).state_dict(), UnswappableError)
    found = [problem.tensor for problem in error.problems]
    assert found == names if names else all("_packed_params" in str(name) for name in found)
    assert found
    assert "Flip" in error.remedy


def test_a_hook_that_quantize_registers_is_of_the_new_version() -> None:
    """It may have captured something of the weights, so it comes from the module that was quantised."""

    def shift(model: Any) -> None:
        quantise_layers(model)
        amount = model[0].weight.to_plain().sum()
        model[0].register_forward_hook(lambda module, inputs, output: output + amount)

    def cold(seed: int) -> Any:
        made = make_plain(seed)
        shift(made)
        return made

    requantize = hotglm.Requantize(build=lambda: make_plain(0), quantize=shift)
    slot = hotglm.ModuleSlot(cold(1), name="model", version="1.0.0", requantize=requantize)
    slot.update(make_plain(2).state_dict(), version="1.0.1")
    assert same_bits(slot(X), cold(2)(X))


kept = make_plain(5)


def _build_quantised() -> Any:
    return KINDS["wrappers"].make(3)


def _build_on_meta() -> Any:
    model = make_plain(0)
    model.register_buffer("table", torch.ones(2), persistent=False)
    return model.to("meta")


BAD_BUILDS: dict[str, tuple[Any, type[HotglmError], str]] = {
    "raises": (lambda: 1 / 0, DefinitionError, "ZeroDivisionError"),
    "returns a number": (lambda: 3, DefinitionError, "got 'int'"),
    "is quantised": (_build_quantised, UnswappableError, "got the subclass Blocked"),
    "is another model": (lambda: nn.Sequential(nn.Linear(2, 2)), UnswappableError, "got none"),
    "has no value": (_build_on_meta, NotMaterializedError, "'table'"),
    "cannot be held": (lambda: nn.Sequential(nn.LazyLinear(2)), NotMaterializedError, "'0.weight'"),
    "is nowhere": (None, DefinitionError, "before it is quantised"),
}


@pytest.mark.parametrize("what", BAD_BUILDS)
def test_a_build_that_does_not_match_is_refused_when_the_slot_is_made(what: str) -> None:
    """And not when the first release comes in the night."""
    build, kind, text = BAD_BUILDS[what]
    with pytest.raises(kind) as caught:
        make_slot(requantize=hotglm.Requantize(build=build, quantize=quantise_layers))
    assert text in str(caught.value)
    assert caught.value.remedy


def test_a_build_that_returns_the_live_module_is_refused() -> None:
    """What was kept before it was quantised in place is quantised now."""
    live = KINDS["layers"].make(1)
    with pytest.raises(UnswappableError, match="parts of the live one"):
        hotglm.ModuleSlot(live, name="m", requantize=hotglm.Requantize(build=lambda: live, quantize=replace_layers))


def test_settings_that_cannot_be_meant_are_refused() -> None:
    """No function, or no Requantize."""
    with pytest.raises(ArgumentError, match="bad quantize, build"):
        hotglm.Requantize(build=3, quantize="int8")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Requantize"):
        make_slot(requantize=quantise_layers)


@pytest.mark.parametrize("build", [lambda: kept, lambda: make_plain(0).to("meta")], ids=["kept", "meta"])
def test_only_the_structure_of_what_is_built_is_used(build: Callable[[], Any]) -> None:
    """A plain module that its owner keeps is neither written nor quantised; one on the meta device will do."""
    before = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    slot = make_slot(requantize=hotglm.Requantize(build=build, quantize=quantise_layers))
    for seed in (2, 3):
        slot.update(make_plain(seed).state_dict(), version=f"1.0.{seed}")
        assert same_bits(slot(X), KINDS["wrappers"].make(seed)(X))
    assert all(torch.equal(before[name], tensor) for name, tensor in kept.state_dict().items())


def test_building_draws_no_random_numbers_and_fills_no_parameters() -> None:
    """The service's generator stays where it is."""
    slot = make_slot(
        requantize=hotglm.Requantize(
            build=lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), quantize=quantise_layers
        )
    )
    state = torch.get_rng_state()
    slot.update(make_plain(2).state_dict(), version="1.0.1")
    assert torch.equal(state, torch.get_rng_state())
    assert same_bits(slot(X), KINDS["wrappers"].make(2)(X))


# -- memory, threads, copies -------------------------------------------------------------------------------------------


def test_all_that_is_held_at_once_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain copy and what becomes of it are in the plan; where they do not fit, nothing is loaded or given up."""
    slot = make_slot(memory=hotglm.MemoryPolicy(small_nbytes=0))
    plan = slot.update(make_plain(2).state_dict(), version="1.0.1").plan
    assert plan is not None
    plain, quantised = 2 * (WIDTH * WIDTH * 4 + ALIGNMENT), plan.nbytes  # a bias takes less than a line
    assert plan.beside_nbytes == plain + quantised
    assert f"Beside it {plan.beside_nbytes} bytes" in plan.explain()
    available = read_available_nbytes()
    monkeypatch.setattr(spare, "read_available_nbytes", lambda: (64 << 20) + plan.beside_nbytes - 1)
    refuse(slot, make_plain(3).state_dict(), MemoryPlanError)
    monkeypatch.setattr(spare, "read_available_nbytes", lambda: available)
    slot.rollback()  # the rollback target is still there
    assert same_bits(slot(X), KINDS["wrappers"].make(1)(X))


def test_a_rollback_target_outlives_a_quantiser_that_fails() -> None:
    """With memory for two copies only, what failed before the spare was needed has given up nothing."""
    calls: list[int] = []

    def quantize(model: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("no")
        quantise_layers(model)

    requantize = hotglm.Requantize(build=lambda: make_plain(0), quantize=quantize)
    slot = make_slot(requantize=requantize, memory=hotglm.MemoryPolicy(small_nbytes=0))
    slot.update(make_plain(2).state_dict(), version="1.0.1")
    refuse(slot, make_plain(3).state_dict(), StageFailedError)
    slot.rollback()
    assert same_bits(slot(X), KINDS["wrappers"].make(1)(X))


def test_plain_layers_go_as_they_are_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's plain memory is given back when quantize lets go of it, not when the stage ends."""
    width, depth = 640, 4
    nbytes = width * width * 4
    maps: list[tuple[weakref.ref[Any], int]] = []

    class Counted(Seam):
        def map_anonymous(self, nbytes: int) -> Any:
            made = super().map_anonymous(nbytes)
            maps.append((weakref.ref(made), nbytes))
            return made

    def build() -> Any:
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))

    held: list[int] = []

    def quantize(model: Any) -> None:
        for index in range(depth):
            model[index] = Int8Linear(model[index])
            held.append(sum(size for made, size in maps if made() is not None))

    cold = build()
    replace_layers(cold)
    slot = hotglm.ModuleSlot(
        cold, name="m", version="1.0.0", requantize=hotglm.Requantize(build=build, quantize=quantize)
    )
    monkeypatch.setattr(seam, "active", Counted())
    slot.update(build().state_dict(), version="1.0.1")
    before = held[0] + nbytes
    assert held == [before - (index + 1) * nbytes for index in range(depth)]
    assert held[-1] < nbytes  # the biases, which are used as they are


@pytest.mark.parametrize("fails", [False, True])
def test_the_plain_copy_is_gone_when_the_stage_ends(fails: bool) -> None:
    """Without the garbage collector, and although somebody keeps the error."""
    seen: list[weakref.ref[Any]] = []

    def quantize(model: Any) -> None:
        seen.extend(weakref.ref(one) for one in (model, model[0].weight, model[0].bias))
        if fails:
            raise ValueError("no")
        quantise_layers(model)

    slot = make_slot(requantize=hotglm.Requantize(build=lambda: make_plain(0), quantize=quantize))
    for number in range(3):
        error = None
        if fails:
            error = refuse(slot, make_plain(2).state_dict(), StageFailedError)
        else:
            slot.update(make_plain(2).state_dict(), version=f"1.0.{number + 1}")
        assert [one() for one in seen] == [None] * len(seen)
        del error
    assert slot._core.spares.pool.nbytes <= 3 * 384


def test_passes_are_answered_while_it_is_quantised_and_a_newer_stage_supersedes_it() -> None:
    """The user's function may take long: the live version serves, and what was superseded meanwhile is not staged."""
    entered, leave = threading.Event(), threading.Event()

    def quantize(model: Any) -> None:
        if not entered.is_set():
            entered.set()
            assert leave.wait(30)
        quantise_layers(model)

    slot = make_slot(requantize=hotglm.Requantize(build=lambda: make_plain(0), quantize=quantize))
    before, failures = slot(X), list[BaseException]()

    def stage() -> None:
        try:
            slot.stage(make_plain(2).state_dict(), version="1.0.1")
        except HotglmError as error:
            failures.append(error)

    first = threading.Thread(target=stage)
    first.start()
    assert entered.wait(30)
    assert same_bits(slot(X), before)
    second = threading.Thread(target=lambda: slot.update(make_plain(3).state_dict(), version="1.0.2"))
    second.start()
    while slot._core.stager._supersedable:
        assert second.is_alive()
    leave.set()
    first.join(30)
    second.join(30)
    assert [type(one) for one in failures] == [SupersededError]
    assert same_bits(slot(X), KINDS["wrappers"].make(3)(X))


def _build() -> Any:
    return make_plain(0)


def test_copies_and_pickles_of_a_slot_quantise_too() -> None:
    """What a slot was told goes along, and what is live in it came from."""
    slot = make_slot(requantize=hotglm.Requantize(build=_build, quantize=replace_layers), seed=1, kind="layers")
    slot.update(make_plain(2).state_dict(), version="1.0.1")
    for one in (copy.deepcopy(slot), pickle.loads(pickle.dumps(slot))):
        assert one.live.origin is not None
        one.update(make_plain(3).state_dict(), version="1.0.2")
        assert same_bits(one(X), KINDS["layers"].make(3)(X))
        assert isinstance(live_of(one)[0], Int8Linear)


def test_derived_state_of_the_plain_model_is_declared_or_refused() -> None:
    """What a plain module computes from its weights is recomputed before it is quantised, or refused by name."""

    class Cached(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, WIDTH)
            self.total = self.weight.detach().sum()

    def build(kind: type[nn.Module]) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(kind(), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).eval()

    class Declared(Cached):
        @hotglm.refresh("total")
        def _refresh(self) -> None:
            self.total = self.weight.detach().sum()

    totals: list[float] = []

    def quantize(model: Any) -> None:
        totals.append(float(model[0].total))
        replace_layers(model)

    for kind, error in ((Declared, None), (Cached, hotglm.StaleStateError)):
        slot = make_slot(
            "layers", requantize=hotglm.Requantize(build=functools.partial(build, kind), quantize=quantize)
        )
        if error is None:
            slot.update(make_plain(2).state_dict(), version="1.0.1")
            assert totals == [float(make_plain(2)[0].weight.sum())]
        else:
            refuse(slot, make_plain(2).state_dict(), error)


def test_a_module_that_could_not_be_held_is_refused_before_it_is_loaded() -> None:
    """A plain model whose structure cannot be copied is an error of the stage, by name."""

    def build() -> Any:
        model = make_plain(0)
        model.get_other = lambda: model[0]
        return model

    slot = make_slot(requantize=hotglm.Requantize(build=build, quantize=quantise_layers))
    assert "get_other" in str(refuse(slot, make_plain(2).state_dict(), UncopyableError))


# -- torchao -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_plain_weights_are_quantised_by_torchao(
    config: str, policy: str, mode: Callable[[], Any], tmp_path: Path
) -> None:
    """Files into a compiled slot: equal to a cold start, 0 recompiles, rolled back, verified."""
    torchao: Any = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def quantize(model: Any) -> None:
        torchao.quantize_(model, getattr(torchao, config)())

    def cold(seed: int) -> Any:
        model = make_plain(seed)
        quantize(model)
        return model

    torch._dynamo.reset()
    compiled: Any = torch.compile(cold(1), backend="eager")
    slot = hotglm.ModuleSlot(
        compiled,
        name="model", version="1.0.0", swap=POLICIES[policy](),
        requantize=hotglm.Requantize(build=lambda: make_plain(0), quantize=quantize),
    )  # fmt: skip
    with mode():
        slot(X)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in (2, 3, 4):
                path = save(tmp_path / f"{seed}.safetensors", seed)
                assert slot.update(path, version=f"1.0.{seed}").recompiles == 0
                assert same_bits(slot(X), cold(seed)(X))
        slot.verify_live()
        slot.rollback()
        assert same_bits(slot(X), cold(3)(X))
