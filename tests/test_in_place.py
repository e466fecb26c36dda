"""Swaps in place: the tensors of the live module never move, and hold one whole version whenever a pass is inside."""

from __future__ import annotations

import asyncio
import copy
import functools
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm import seam
from hotglm.errors import (
    ArgumentError,
    ConflictError,
    DrainTimeoutError,
    NoRollbackError,
    ReentrantError,
    SlotClosedError,
    StageFailedError,
    StaleStateError,
    UnswappableError,
)
from hotglm.slot.passage import Passage
from support.exchanges import FailAt
from support.gates import Beside, Held, is_closing, wait_until
from support.swaps import Model, build, make_class, same_bits, same_state
from support.torn import INPUT, LEAN, PRIMES, Oracle, name_version, read_version, run_in_thread, weights

X = torch.arange(4.0).reshape(2, 2)
MAKER = build(lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).eval())


def make_slot(module: nn.Module | None = None, **options: Any) -> hotglm.ModuleSlot:
    options = {"name": "model", "version": "1.0.0", "swap": hotglm.InPlace(), **options}
    return hotglm.ModuleSlot(MAKER(1) if module is None else module, **options)


def make_oracle(boundary: Callable[[int], object] | None = None, **options: Any) -> hotglm.ModuleSlot:
    module = Oracle(PRIMES[0], boundary=boundary)
    return make_slot(module, version=name_version(PRIMES[0]), policy=LEAN, **options)


def update_to(slot: hotglm.ModuleSlot, prime: int) -> hotglm.Receipt:
    return slot.update(weights(prime), version=name_version(prime))


def addresses(module: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


def assert_unchanged(slot: hotglm.ModuleSlot, prime: int) -> None:
    """The version of `prime` serves, whole, and the gate is open."""
    assert read_version(run_in_thread(lambda: slot(INPUT))) == prime
    assert str(slot.version) == name_version(prime)


# -- bytes and addresses -----------------------------------------------------------------------------------------------


def test_every_version_is_what_a_cold_start_gives_and_no_tensor_moves() -> None:
    """P8, P12: updates and rollbacks change outputs bit for bit, and neither objects nor addresses."""
    module = MAKER(1)
    slot, tensors, before = make_slot(module), [*module.parameters(), *module.buffers()], addresses(module)
    for seed in (2, 3, 4):
        receipt = slot.update(MAKER(seed).state_dict(), version=f"1.0.{seed}")
        assert same_bits(slot(X), MAKER(seed)(X))
        assert same_state(slot.live.module, MAKER(seed))
        assert receipt.in_place is not None
        assert receipt.in_place.addresses_stable
        assert receipt.in_place.num_storages == len(before)
    slot.rollback()
    assert same_bits(slot(X), MAKER(3)(X))
    slot.rollback("1.0.4")
    assert same_bits(slot(X), MAKER(4)(X))
    assert slot.live.module is module
    assert addresses(module) == before
    assert all(one is other for one, other in zip((*module.parameters(), *module.buffers()), tensors, strict=True))


def test_rollbacks_reach_as_far_as_there_are_copies() -> None:
    """P8, P9: two copies hold the version before, three the two before; a rollback needs no memory."""
    for policy, depth in ((hotglm.MemoryPolicy(small_nbytes=0), 1), (hotglm.MemoryPolicy(), 2)):
        slot = make_oracle(memory=policy)
        for prime in PRIMES[1:6]:
            update_to(slot, prime)
        for prime in PRIMES[4 : 4 - depth : -1]:
            held = slot.status().arenas_nbytes
            receipt = slot.rollback()
            assert receipt.plan is None
            assert read_version(slot(INPUT)) == prime
            assert slot.status().arenas_nbytes == held
        with pytest.raises(NoRollbackError):
            slot.rollback()
        assert_unchanged(slot, PRIMES[5 - depth])


def test_memory_is_the_module_and_its_images() -> None:
    """P9: with two copies there is one arena, of the size of the weights, after any number of updates."""
    module = nn.Linear(16, 16, bias=False)
    slot = make_slot(module, memory=hotglm.MemoryPolicy(small_nbytes=0))
    for seed in range(5):
        slot.update({"weight": torch.full((16, 16), float(seed))}, version=f"1.0.{seed + 1}")
        assert slot.status().arenas_nbytes == 16 * 16 * 4
        assert [(g.state, g.nbytes) for g in slot.status().generations] == [("live", 1024), ("held", 1024)]
    assert slot.wait_drained(timeout_s=5) is None  # type: ignore[func-returns-value]  # it returns, that is all


def _strided(self: Any) -> None:
    table = torch.zeros(4, 6)
    self.table = table  # keeps what lies between the columns
    self.linear.weight = nn.Parameter(table[:2, 1:3])
    self.linear.bias = nn.Parameter(torch.zeros(3, 2).t()[:, 1])


def _tied(self: Any) -> None:
    self.other = nn.Linear(2, 2)
    self.other.weight = self.linear.weight
    self.view = self.linear.weight.t()


LAYOUTS: dict[str, Callable[[], type[Model]]] = {
    "strided": lambda: make_class(_strided),
    "tied and viewed": lambda: make_class(_tied, lambda self, x: self.other(self.linear(x)) @ self.view),
    "transposed": lambda: make_class(lambda s: setattr(s.linear, "weight", nn.Parameter(torch.randn(2, 2).t()))),
    "bfloat16": lambda: make_class(lambda self: self.to(torch.bfloat16), lambda self, x: self.linear(x.bfloat16())),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind: str) -> None:
    """Ties are written once, views follow, strides stay, and what lies between the elements is left alone."""
    cls = LAYOUTS[kind]()
    options = {"constants": "*"} if kind == "strided" else {}
    module: Any = build(cls)(1)
    slot = make_slot(module, **options)
    gaps = module.table[:, 3:].clone() if kind == "strided" else None
    first, before = slot(X).clone(), addresses(module)
    new = build(cls)(2)
    state = {name: torch.randn_like(tensor) for name, tensor in new.state_dict().items()}
    if kind == "tied and viewed":
        state["other.weight"] = state["linear.weight"]
    new.load_state_dict(state)
    receipt = slot.update(state, version="1.0.1")
    assert same_bits(slot(X), new(X))
    assert receipt.in_place is not None
    assert receipt.in_place.num_tensors == (3 if kind == "tied and viewed" else 2)
    assert gaps is None or same_bits(module.table[:, 3:], gaps)
    slot.rollback()
    assert same_bits(slot(X), first)
    assert addresses(module) == before


def test_whoever_holds_the_parameters_goes_on_with_the_live_ones() -> None:
    """An optimizer and an average made before any update train and follow what is live."""
    module = MAKER(1)
    slot = make_slot(module)
    optimizer, average = torch.optim.SGD(slot.parameters(), lr=1.0), list(module.parameters())
    slot.update(MAKER(2).state_dict(), version="1.0.1")
    slot(X).square().sum().backward()
    optimizer.step()
    trained = MAKER(2)
    trained(X).square().sum().backward()
    with torch.no_grad():
        for parameter in trained.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    assert same_bits(slot(X), trained(X))
    assert same_bits(average, list(trained.parameters()))
    slot.rollback()
    assert same_bits(slot(X), MAKER(1)(X))


def test_a_backward_pass_over_a_swap_raises() -> None:
    """G06: it never gives the gradient of a mixture; after the swap, gradients are those of the new version."""
    slot = make_slot()
    loss = slot(X).square().sum()
    slot.update(MAKER(2).state_dict(), version="1.0.1")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = slot(X).square().sum()
    slot.rollback()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    module = MAKER(1)
    expected = torch.autograd.grad(module(X).square().sum(), list(module.parameters()))
    found = torch.autograd.grad(slot(X).square().sum(), list(slot.parameters()))
    assert same_bits(list(found), list(expected))


def test_weights_made_in_inference_mode() -> None:
    """A model that was built there can be swapped there, too: torch would refuse to write it from outside."""
    with torch.inference_mode():
        slot = make_slot(MAKER(1))
    slot.update(MAKER(2).state_dict(), version="1.0.1")
    with torch.no_grad():
        assert same_bits(slot(X), MAKER(2)(X))
        slot.rollback()
        assert same_bits(slot(X), MAKER(1)(X))


# -- derived state -----------------------------------------------------------------------------------------------------


class Derived(Model):
    """A buffer, a tensor in an attribute and one in a list, all computed from the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(2, 2), persistent=False)
        self.cache, self.several = torch.zeros(2, 2), [torch.zeros(2)]
        self.scale = 1.0
        self.derive()

    @hotglm.refresh("table", "cache", "several", "scale")
    def derive(self) -> None:
        weight = self.linear.weight.detach()
        self.table.copy_(weight.t() * 2)  # type: ignore[operator]
        self.cache = weight.t() * 3
        self.several[0] = weight.sum(0)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x) @ self.table @ self.cache * self.several[0] * self.scale


def test_derived_tensors_are_computed_beside_and_exchanged() -> None:
    """Refreshed buffers and attributes come from the new weights, where the old ones lay; the receipt compared them."""
    module = build(Derived)(1)
    slot, before = make_slot(module), (module.cache.data_ptr(), module.several[0].data_ptr())
    for seed in (2, 3):
        new = build(Derived)(seed)
        receipt = slot.update(new.state_dict(), version=f"1.0.{seed}")
        assert same_bits(slot(X), new(X))
        assert receipt.in_place is not None
        assert receipt.in_place.derived == ("table", "cache", "several[0]")
        assert receipt.in_place.derived_refreshed
    slot.rollback()
    assert same_bits(slot(X), build(Derived)(2)(X))
    assert (module.cache.data_ptr(), module.several[0].data_ptr()) == before
    slot.update(build(Derived)(4).state_dict(), version="1.0.4")  # and what was noted of it is still right
    assert same_bits(slot(X), build(Derived)(4)(X))


class Number(Derived):
    def derive(self) -> None:
        super().derive()
        self.scale = self.linear.weight.sum().item()

    derive.__hotglm_refresh__ = ("scale", "table", "cache", "several")  # type: ignore[attr-defined]


class Regrown(Derived):
    @hotglm.refresh("cache", "table", "several")
    def derive(self) -> None:
        super().derive()
        self.cache = torch.zeros(3 if self.linear.weight.detach().sum().item() > 0 else 2, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x)


class Box:
    def __init__(self) -> None:
        self.inside = torch.zeros(2)


class Boxed(Derived):
    def __init__(self) -> None:
        self.__dict__["box"] = Box()
        super().__init__()

    @hotglm.refresh("cache", "table", "several", "box")
    def derive(self) -> None:
        super().derive()
        vars(self)["box"].inside = self.linear.weight.detach().sum(0)


@pytest.mark.parametrize(("cls", "named"), [(Number, "scale"), (Regrown, "cache"), (Boxed, "in an object")])
def test_what_an_exchange_of_bytes_would_leave_stale_is_refused(cls: type[Model], named: str) -> None:
    """G04: a number, a tensor of another shape, one inside an object: refused by name, and the live version serves."""
    first = next(build(cls)(seed) for seed in range(50) if build(cls)(seed).linear.weight.sum() < 0)
    other = next(build(cls)(seed) for seed in range(50) if build(cls)(seed).linear.weight.sum() > 0)
    slot = make_slot(first)
    before = slot(X)
    with pytest.raises(UnswappableError, match=named):
        slot.update(other.state_dict(), version="1.0.1")
    assert same_bits(slot(X), before)
    assert str(slot.version) == "1.0.0"


def test_undeclared_caches_are_refused_as_always() -> None:
    """G04: what nobody declares is refused before anything is exchanged."""
    cls = make_class(lambda self: setattr(self, "wt", self.linear.weight.detach().t() * 1.0))
    slot = make_slot(build(cls)(1))
    with pytest.raises(StaleStateError, match="wt"):
        slot.update(build(cls)(2).state_dict(), version="1.0.1")
    assert same_bits(slot(X), build(cls)(1)(X))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_other_code_is_refused() -> None:
    """A module as source brings code; its state dict does not."""
    slot = make_slot()
    with pytest.raises(UnswappableError, match=r"state_dict\(\)"):
        slot.update(MAKER(2), version="1.0.1")
    assert same_bits(slot(X), MAKER(1)(X))


def test_a_parameter_that_was_replaced_is_named() -> None:
    """Whoever assigns a new parameter has broken what the policy is for; nothing is exchanged."""
    module = MAKER(1)
    slot = make_slot(module)
    staged = slot.stage(MAKER(2).state_dict(), version="1.0.1")
    last: Any = module[3]
    last.weight = nn.Parameter(last.weight.detach().clone())
    with pytest.raises(UnswappableError, match=r"3\.weight"):
        slot.commit(staged)
    with pytest.raises(UnswappableError, match=r"3\.weight"):
        slot.stage(MAKER(2).state_dict(), version="1.0.1")
    assert same_bits(slot(X), MAKER(1)(X))


def test_an_expanded_tensor_cannot_be_written() -> None:
    """Elements that share memory cannot take values of their own; the name and the reason are given."""
    cls = make_class(lambda self: setattr(self.linear, "bias", nn.Parameter(torch.zeros(1).expand(2))))
    slot = make_slot(build(cls)(1))
    with pytest.raises(UnswappableError, match=r"linear\.bias"):
        slot.update(build(cls)(2).state_dict(), version="1.0.1")
    assert same_bits(slot(X), build(cls)(1)(X))


def test_what_cannot_be_meant_is_refused() -> None:
    """Policies are policies, times are not negative, and threads are at least one."""
    with pytest.raises(ArgumentError, match="swap"):
        make_slot(swap="in place")
    for options in ({"timeout_s": -1.0}, {"num_threads": 0}, {"timeout_s": float("nan")}):
        with pytest.raises(ArgumentError):
            hotglm.InPlace(**options)


def test_compare_and_set_and_closing() -> None:
    """Commits in place keep the rules of commits: expected, spent stages, closed slots."""
    slot = make_oracle()
    staged = slot.stage(weights(PRIMES[1]), version=name_version(PRIMES[1]))
    with pytest.raises(ConflictError):
        slot.commit(staged, expected=7)
    slot.commit(staged)
    with pytest.raises(hotglm.DiscardedError):
        slot.commit(staged)
    assert slot.confirm()
    slot.close()
    with pytest.raises(SlotClosedError):
        slot.rollback()
    assert_unchanged(slot, PRIMES[1])


def test_copies_of_a_slot_swap_in_place_as_well() -> None:
    """Deepcopy and pickle carry the policy, and a module of their own."""
    slot = make_slot()
    for other in (copy.deepcopy(slot), pickle.loads(pickle.dumps(slot))):
        before = addresses(other.live.module)
        other.update(MAKER(2).state_dict(), version="1.0.1")
        assert addresses(other.live.module) == before
        assert same_bits(other(X), MAKER(2)(X))
    assert same_bits(slot(X), MAKER(1)(X))


# -- the gate ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy() -> Iterator[tuple[hotglm.ModuleSlot, Held, Beside]]:
    """A slot with a pass inside that waits to be let go."""
    held = Held()
    slot = make_oracle(held, swap=hotglm.InPlace(timeout_s=20))
    inside = Beside(lambda: slot(INPUT), name="held")
    assert held.arrived.acquire(timeout=30)
    yield slot, held, inside
    held.release.set()
    inside.thread.join(30)


def test_a_commit_waits_for_the_pass_inside_and_holds_back_the_next(
    busy: tuple[hotglm.ModuleSlot, Held, Beside],
) -> None:
    """P1, P4: the pass that runs ends in the old version; the one that comes meanwhile begins in the new one."""
    slot, held, inside = busy
    commit = Beside(lambda: update_to(slot, PRIMES[1]))
    wait_until(lambda: is_closing(slot))
    late = Beside(lambda: slot(INPUT))
    assert not late.thread.join(0.05)  # type: ignore[func-returns-value]
    assert late.thread.is_alive()
    assert commit.thread.is_alive()
    held.release.set()
    record = commit.result().in_place
    assert record.num_waited_for == 1
    assert record.closed_s >= record.waited_s >= 0
    assert read_version(inside.result()) == PRIMES[0]
    assert read_version(late.result()) == PRIMES[1]


def test_a_pass_that_never_ends_is_named_and_nothing_changes() -> None:
    """P2, P4: the commit times out, with the stack of the pass in its text; later it can be made after all."""
    held = Held()
    slot = make_oracle(held, swap=hotglm.InPlace(timeout_s=0.05))
    inside = Beside(lambda: slot(INPUT), name="held by a test")
    assert held.arrived.acquire(timeout=30)
    staged = slot.stage(weights(PRIMES[1]), version=name_version(PRIMES[1]))
    with pytest.raises(DrainTimeoutError, match="held by a test") as caught:
        slot.commit(staged)
    assert "in __call__\n    assert self.release.wait(30)" in str(caught.value)
    assert caught.value.receipt is not None
    assert not is_closing(slot)
    assert_unchanged(slot, PRIMES[0])
    with slot.acquire():
        other = Beside(slot.rollback)
        with pytest.raises(NoRollbackError):
            other.result()
    held.release.set()
    assert read_version(inside.result()) == PRIMES[0]
    slot.commit(staged)
    assert_unchanged(slot, PRIMES[1])


def test_sessions_are_named_by_their_place() -> None:
    """A session that outlives the wait is named with the line that acquired it."""
    slot = make_oracle(swap=hotglm.InPlace(timeout_s=0.02))
    with slot.acquire() as generation:
        with pytest.raises(DrainTimeoutError, match=r"session acquired at .*test_in_place\.py:\d+"):
            run_in_thread(lambda: update_to(slot, PRIMES[1]))
        assert read_version(generation.module(INPUT)) == PRIMES[0]
    update_to(slot, PRIMES[1])


def test_a_commit_from_inside_a_pass_is_refused() -> None:
    """F07: it would wait for itself; from a hook, from a session and from what a session runs in another thread."""
    slot = make_oracle(lambda layer: update_to(slot, PRIMES[1]))
    with pytest.raises(ReentrantError):
        slot(INPUT)
    quiet = make_oracle()
    staged = quiet.stage(weights(PRIMES[1]), version=name_version(PRIMES[1]))
    with quiet.acquire(), pytest.raises(ReentrantError):
        quiet.commit(staged)

    async def commit_beside() -> None:
        with quiet.acquire():
            await asyncio.to_thread(quiet.commit, staged)

    with pytest.raises(ReentrantError):
        asyncio.run(commit_beside())
    quiet.commit(staged)
    assert_unchanged(quiet, PRIMES[1])


def test_passes_inside_passes_are_never_held_back(busy: tuple[hotglm.ModuleSlot, Held, Beside]) -> None:
    """F16: while a commit waits, a nested pass of the same thread, or of a task's session elsewhere, goes through."""
    slot, held, _ = busy
    entered, go_on = threading.Event(), threading.Event()

    def nested() -> tuple[int, int]:
        with slot.acquire() as generation, slot.acquire():
            entered.set()
            assert go_on.wait(30)
            return read_version(slot(INPUT)), read_version(generation.module(INPUT))

    async def elsewhere() -> int:
        with slot.acquire():
            ready.set()
            assert await asyncio.to_thread(go_on.wait, 30)
            return read_version(await asyncio.to_thread(slot, INPUT))

    ready = threading.Event()
    mine, others = Beside(nested), Beside(lambda: asyncio.run(elsewhere()))
    assert entered.wait(30)
    assert ready.wait(30)
    commit = Beside(lambda: update_to(slot, PRIMES[1]))
    wait_until(lambda: is_closing(slot))
    go_on.set()
    assert mine.result() == (PRIMES[0], PRIMES[0])
    assert others.result() == PRIMES[0]
    assert commit.thread.is_alive()
    held.release.set()
    assert commit.result().in_place.num_waited_for == 4
    assert_unchanged(slot, PRIMES[1])


def test_a_session_may_look_and_stage_while_a_commit_waits_for_it() -> None:
    """C17: `verify_live` and `stage` inside a session do not wait for the commit that waits for the session."""
    slot = make_oracle(swap=hotglm.InPlace(timeout_s=60))
    update_to(slot, PRIMES[1])

    def look() -> None:
        with slot.acquire():
            opened.set()
            wait_until(lambda: is_closing(slot))
            assert slot.verify_live().version == slot.version
            slot.stage(weights(PRIMES[2]), version=name_version(PRIMES[2])).discard()

    opened = threading.Event()
    looking = Beside(look)
    assert opened.wait(30)
    rollback = Beside(slot.rollback)
    looking.result()
    rollback.result()
    assert_unchanged(slot, PRIMES[0])


def test_whoever_a_commit_waits_for_does_not_wait_for_it() -> None:
    """C17: in a session that a commit waits for, closing, and staging where no memory is left, are refused at once."""
    slot = make_oracle(swap=hotglm.InPlace(timeout_s=60), memory=hotglm.MemoryPolicy(small_nbytes=0))
    update_to(slot, PRIMES[1])

    def look() -> None:
        with slot.acquire():
            opened.set()
            wait_until(lambda: is_closing(slot))
            with pytest.raises(ReentrantError):
                slot.close()
            with pytest.raises(ReentrantError):  # the one image there is, is that of the rollback
                slot.stage(weights(PRIMES[2]), version=name_version(PRIMES[2]))

    opened = threading.Event()
    looking = Beside(look)
    assert opened.wait(30)
    rollback = Beside(slot.rollback)
    looking.result()
    rollback.result()
    assert_unchanged(slot, PRIMES[0])
    slot.close()
    assert slot.status().closed


def test_closing_waits_for_a_commit_that_waits(busy: tuple[hotglm.ModuleSlot, Held, Beside]) -> None:
    """A slot that is closed while a commit waits has that version; no later commit goes through."""
    slot, held, _ = busy
    staged = slot.stage(weights(PRIMES[1]), version=name_version(PRIMES[1]))
    commit = Beside(lambda: slot.commit(staged))
    wait_until(lambda: is_closing(slot))
    closing = Beside(slot.close)
    assert not slot.status().closed
    held.release.set()
    commit.result()
    closing.result()
    with pytest.raises(SlotClosedError):
        slot.rollback()
    assert_unchanged(slot, PRIMES[1])


class Talker(Oracle):
    """A model with methods of every kind."""

    def generate(self) -> Iterator[int]:
        for _ in range(3):
            yield read_version(self(INPUT))

    async def answer(self, gate: asyncio.Event) -> tuple[int, int]:
        first = read_version(self(INPUT))
        await gate.wait()
        return first, read_version(self(INPUT))

    async def stream(self) -> Any:
        for _ in range(2):
            yield read_version(self(INPUT))

    def once(self) -> int:
        return read_version(self(INPUT))


def test_methods_are_passes_from_their_start_to_their_end() -> None:
    """A generator or coroutine is inside while it runs, so that a commit between two of its steps waits."""
    slot = make_slot(Talker(PRIMES[0]), version="1.0.3", policy=LEAN, swap=hotglm.InPlace(timeout_s=0.02))
    steps = slot.generate()
    assert next(steps) == PRIMES[0]
    with pytest.raises(DrainTimeoutError):
        run_in_thread(lambda: update_to(slot, PRIMES[1]))
    assert list(steps) == [PRIMES[0]] * 2

    async def talk() -> tuple[tuple[int, int], list[int]]:
        gate = asyncio.Event()
        answer = asyncio.create_task(slot.answer(gate))
        await asyncio.sleep(0)
        with pytest.raises(DrainTimeoutError):
            await asyncio.to_thread(update_to, slot, PRIMES[1])
        gate.set()
        return await answer, [version async for version in slot.stream()]

    assert asyncio.run(talk()) == ((PRIMES[0], PRIMES[0]), [PRIMES[0]] * 2)
    update_to(slot, PRIMES[1])
    assert slot.once() == PRIMES[1]
    assert slot.once.__name__ == "once"


def test_compiled_and_partial_methods_are_passes() -> None:
    """P1: `self.step = torch.compile(self.step)` and a partial method run the module, so each call is a pass."""
    module = Talker(PRIMES[0])
    module.step = torch.compile(module.once, backend="eager")  # type: ignore[assignment]  # nn.Module takes any attribute
    module.part = functools.partial(Talker.once, module)  # type: ignore[assignment]
    slot = make_slot(module, version="1.0.3", policy=LEAN, swap=hotglm.InPlace())
    for call in (slot.step, slot.part):
        assert isinstance(call, Passage)
        assert call() == PRIMES[0]


def hide(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator as many are: a plain function around anything."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__dict__.pop("__wrapped__")
    return call


class Hider(Talker):
    """A model whose methods do not show that they make generators and coroutines."""

    generate = hide(Talker.generate)
    answer = hide(Talker.answer)
    stream = hide(Talker.stream)


def test_generators_and_coroutines_behind_plain_functions_are_passes_to_their_end() -> None:
    """P1: what a call returns unfinished is inside until it has run, or was dropped; what it gives is the same."""
    slot = make_slot(Hider(PRIMES[0]), version="1.0.3", policy=LEAN, swap=hotglm.InPlace(timeout_s=0.02))

    def assert_waits() -> None:
        with pytest.raises(DrainTimeoutError):
            update_to(slot, PRIMES[1])

    steps = slot.generate()
    run_in_thread(assert_waits)  # before the first step: the call has run already
    assert next(steps) == PRIMES[0]
    run_in_thread(assert_waits)
    assert list(steps) == [PRIMES[0]] * 2
    dropped = slot.generate()
    del dropped

    async def talk() -> tuple[tuple[int, int], list[int]]:
        gate = asyncio.Event()
        answer = asyncio.create_task(slot.answer(gate))
        await asyncio.sleep(0)
        await asyncio.to_thread(assert_waits)
        gate.set()
        versions, loop = [], asyncio.get_running_loop()
        async for version in slot.stream():
            versions.append(version)
            await loop.run_in_executor(None, assert_waits)
            with pytest.raises(ReentrantError):  # this task, in whatever thread, would wait for itself
                await asyncio.to_thread(update_to, slot, PRIMES[1])
        return await answer, versions

    assert asyncio.run(talk()) == ((PRIMES[0], PRIMES[0]), [PRIMES[0]] * 2)
    update_to(slot, PRIMES[1])
    assert list(slot.generate()) == [PRIMES[1]] * 3


def test_a_dropped_session_and_a_kept_error_hold_nothing_back() -> None:
    """F08: what is inside is what lives; a traceback that somebody keeps is no pass."""

    def fail(layer: int) -> None:
        if threading.current_thread().name == "failing":
            raise ValueError("planted")

    slot = make_oracle(fail, swap=hotglm.InPlace(timeout_s=2))
    failing = Beside(lambda: slot(INPUT), name="failing")
    with pytest.raises(ValueError, match="planted") as kept:
        failing.result()
    assert kept.value.__traceback__ is not None
    session = slot.acquire()
    del session
    assert slot._admission.gate.count_inside() == 0  # type: ignore[attr-defined]
    update_to(slot, PRIMES[1])
    assert_unchanged(slot, PRIMES[1])


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_copy_that_fails_is_undone_and_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """P2, F18: at whichever copy it fails, the old version serves bit for bit, and the stage can be committed."""
    for nth in range(1, 13):
        slot = make_oracle()
        update_to(slot, PRIMES[1])
        staged = slot.stage(weights(PRIMES[2]), version=name_version(PRIMES[2]))
        operations: list[Callable[[], object]] = [functools.partial(slot.commit, staged), slot.rollback]
        for operate in operations:
            with monkeypatch.context() as patch:
                patch.setattr(seam, "active", FailAt(nth))
                with pytest.raises(StageFailedError, match="planted"):
                    operate()
            assert_unchanged(slot, PRIMES[1])
        slot.commit(staged)
        assert_unchanged(slot, PRIMES[2])
        slot.rollback()
        assert_unchanged(slot, PRIMES[1])


class Slow(seam.Seam):
    """Stops before the second copy of an exchange until it is let go."""

    def __init__(self) -> None:
        self.arrived, self.release, self._num = threading.Event(), threading.Event(), 0

    def reach(self, place: str) -> None:
        if place == "exchange.copy":
            self._num += 1
            if self._num == 2:
                self.arrived.set()
                assert self.release.wait(30)


def test_passes_wait_for_a_copy_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """P1: a pass that is held back looks again and again, and gets the whole new version in the end."""
    slot, slow = make_oracle(), Slow()
    monkeypatch.setattr("hotglm.slot.closing._SLICE_S", 0.001)
    looks = itertools.count()
    alive = threading.Thread.is_alive

    def count(thread: threading.Thread) -> bool:
        if thread.name.startswith("hotglm-commit"):
            next(looks)
        return alive(thread)

    staged = slot.stage(weights(PRIMES[1]), version=name_version(PRIMES[1]))
    monkeypatch.setattr(seam, "active", slow)
    commit = Beside(lambda: slot.commit(staged))
    assert slow.arrived.wait(30)
    monkeypatch.setattr(threading.Thread, "is_alive", count)
    late = Beside(lambda: slot(INPUT))
    wait_until(lambda: next(looks) > 10)
    slow.release.set()
    commit.result()
    assert read_version(late.result()) == PRIMES[1]


def test_where_nothing_whole_is_left_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """P1: if not even the undo succeeds, passes are refused rather than given a mixture."""
    slot = make_oracle()
    staged = slot.stage(weights(PRIMES[1]), version=name_version(PRIMES[1]))

    def fail(self: object) -> None:
        raise MemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(seam, "active", FailAt(6))
        patch.setattr("hotglm.weights.exchange.Lane.undo", fail)
        with pytest.raises(StageFailedError):
            slot.commit(staged)
    for _ in range(2):
        with pytest.raises(hotglm.SlotStateError, match="could not be undone"):
            run_in_thread(lambda: slot(INPUT))
