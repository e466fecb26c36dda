"""A slot against a small model of it: any sequence of stages, commits, rollbacks, holds and failures (Hypothesis)."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

import hotglm
from hotglm.errors import (
    CallableCheckError,
    ConflictError,
    DiscardedError,
    HotglmError,
    IncompatibleError,
    NonFiniteError,
    NoRollbackError,
    SupersededError,
)
from support.torn import LAYERS, PRIMES, WIDTH, Oracle

X = torch.linspace(-1.0, 2.0, WIDTH, dtype=torch.float64)
SEEDS = st.integers(0, 40)


def make_state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{layer}": torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator) for layer in range(LAYERS)}


def answer(seed: int) -> torch.Tensor:
    """Return what a module of its own, loaded cold with the weights of `seed`, answers."""
    module = Oracle(PRIMES[0])
    module.load_state_dict(make_state(seed))
    output: torch.Tensor = module(X)
    return output


@dataclass(frozen=True, slots=True)
class Version:
    """One generation, as the model sees it."""

    number: int
    seed: int


@dataclass(slots=True)
class Model:
    """What a slot is, without memory, threads or weights: who is live, who is held, and what happened.

    A stage takes an arena that is free, if there is one. Else it gives up rollback targets, as many as are more than
    `copies` allow beside the live version and the new one: first what was rolled back from, then the oldest, the target
    of `rollback()` last.
    """

    live: Version
    copies: int
    held: list[Version] = field(default_factory=list)
    before: Version | None = None
    trial: bool = False
    history: list[tuple[str, int]] = field(default_factory=lambda: [("created", 1)])
    has_free: bool = False

    def take_spare(self) -> None:
        if not self.has_free:
            order = self.held[::-1]  # what was live the longest time ago comes first
            order.sort(key=lambda version: (version == self.before, version.number < self.live.number))
            for retired in order[: max(0, len(self.held) + 2 - self.copies)]:
                self.held.remove(retired)
                self.before = None if self.before == retired else self.before
        self.has_free = False

    def commit(self, version: Version) -> None:
        self.held.insert(0, self.live)
        self.live, self.before, self.trial = version, self.live, True
        self.history.append(("committed", version.number))

    def rollback(self, target: Version) -> None:
        self.held.remove(target)
        self.held.insert(0, self.live)
        older = [version for version in self.held if version.number < target.number]
        self.live, self.trial = target, False
        self.before = max(older, key=lambda version: version.number, default=None)
        self.history.append(("rolled back", target.number))


class SlotMachine(RuleBasedStateMachine):
    """Every rule does one thing to the slot and to the model; the invariants compare them."""

    stages = Bundle("stages")
    sessions = Bundle("sessions")

    @initialize(copies=st.integers(2, 4), seed=SEEDS)
    def start(self, copies: int, seed: int) -> None:
        module = Oracle(PRIMES[0])
        module.load_state_dict(make_state(seed))
        memory = hotglm.MemoryPolicy(max_copies=copies, small_nbytes=0, drain_timeout_s=0.0)
        policy = hotglm.StagePolicy(num_threads=1, nice=0, digest=False)
        self.slot = hotglm.ModuleSlot(module, name="model", version="1.0.0", policy=policy, memory=memory)
        self.model = Model(Version(1, seed), copies)
        self.next_number = 2
        self.staged: hotglm.Staged | None = None
        self.open: dict[hotglm.Session, tuple[hotglm.Generation, Version]] = {}

    def supersede(self) -> None:
        if self.staged is not None:
            self.staged = None
            self.model.has_free = True

    def offer(self, seed: int) -> tuple[Version, str]:
        version = Version(self.next_number, seed)
        self.next_number += 1
        return version, f"1.0.{version.number}"

    # -- staging -----------------------------------------------------------------------------------------------------

    @rule(target=stages, seed=SEEDS)
    def stage(self, seed: int) -> tuple[hotglm.Staged, Version, int]:
        version, name = self.offer(seed)
        self.supersede()
        self.model.take_spare()
        self.staged = self.slot.stage(make_state(seed), version=name)
        assert self.staged.number == version.number
        return self.staged, version, self.model.live.number

    @rule(seed=SEEDS)
    def update(self, seed: int) -> None:
        version, name = self.offer(seed)
        self.supersede()
        self.model.take_spare()
        receipt = self.slot.update(make_state(seed), version=name)
        assert (receipt.old_number, receipt.new_number) == (self.model.live.number, version.number)
        self.model.commit(version)

    @rule(seed=SEEDS, how=st.sampled_from(["nan", "check", "shape", "missing", "major", "kind"]))
    def fail(self, seed: int, how: str) -> None:
        """A stage that fails late has used the spare, one that fails early has not; nothing else differs."""
        _, name = self.offer(seed)
        self.supersede()
        state, policy = make_state(seed), None
        expected: type[HotglmError] = IncompatibleError
        match how:
            case "nan":
                state["w2"][1, 2], expected = torch.nan, NonFiniteError
            case "check":
                policy = hotglm.StagePolicy(digest=False, checks=(lambda module: False,))
                expected = CallableCheckError
            case "shape":
                state["w1"] = state["w1"][:2]
            case "missing":
                del state["w3"]
            case "major":
                name = "2.0.0"
            case _:
                state["w0"] = state["w0"].to(torch.int64)
        if how in ("nan", "check"):
            self.model.take_spare()
            self.model.has_free = True
        with pytest.raises(expected) as refused:
            self.slot.stage(state, version=name, policy=policy)
        assert refused.value.serving == str(self.slot.version)

    @rule(stage=consumes(stages))
    def discard(self, stage: tuple[hotglm.Staged, Version, int]) -> None:
        staged, _, _ = stage
        was_staged = staged is self.staged
        assert staged.discard() == was_staged
        assert not staged.discard()
        if was_staged:
            self.supersede()

    # -- changing what is live ---------------------------------------------------------------------------------------

    @rule(stage=stages, force=st.booleans())
    def commit(self, stage: tuple[hotglm.Staged, Version, int], force: bool) -> None:
        staged, version, base = stage
        expected = self.model.live.number if force else None
        if staged is not self.staged:
            with pytest.raises((DiscardedError, SupersededError)):
                self.slot.commit(staged, expected=expected)
        elif not force and base != self.model.live.number:
            with pytest.raises(ConflictError):
                self.slot.commit(staged)
        else:
            self.slot.commit(staged, expected=expected)
            self.staged = None
            self.model.commit(version)

    @rule()
    def rollback(self) -> None:
        if self.model.before is None:
            with pytest.raises(NoRollbackError):
                self.slot.rollback()
            return
        receipt = self.slot.rollback()
        self.model.rollback(self.model.before)
        assert receipt.new_number == self.model.live.number

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def rollback_to(self, data: st.DataObject) -> None:
        target = data.draw(st.sampled_from(self.model.held))
        with pytest.raises(ConflictError):
            self.slot.rollback(to=target.number, expected=self.next_number)
        self.slot.rollback(to=target.number, expected=self.model.live.number)
        self.model.rollback(target)

    @rule()
    def roll_back_to_what_is_gone(self) -> None:
        gone = next(n for n in range(1, self.next_number + 1) if all(n != held.number for held in self.model.held))
        with pytest.raises(NoRollbackError):
            self.slot.rollback(to=gone)

    @rule()
    def confirm(self) -> None:
        assert self.slot.confirm() == self.model.trial
        self.model.trial = False

    # -- holding -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.open) < 3)
    @rule(target=sessions)
    def hold(self) -> hotglm.Session:
        session = self.slot.acquire()
        self.open[session] = (session.__enter__(), self.model.live)
        return session

    @rule(session=consumes(sessions))
    def release(self, session: hotglm.Session) -> None:
        del self.open[session]
        session.__exit__()

    # -- what must be true after every step --------------------------------------------------------------------------

    @invariant()
    def is_as_the_model_says(self) -> None:
        model, live = self.model, self.slot._admission.live
        assert self.slot.live.number == model.live.number
        assert [held.number for held in live.held] == [held.number for held in model.held]
        assert (None if live.before is None else live.before.number) == (model.before.number if model.before else None)
        status = self.slot.status()
        assert (status.trial, status.epoch) == (model.trial, len(model.history) - 1)
        assert [(entry.action, entry.number) for entry in self.slot.history] == model.history
        assert (status.staged is not None) == (self.staged is not None)

    @invariant()
    def answers_bit_for_bit(self) -> None:
        assert torch.equal(self.slot(X), answer(self.model.live.seed))
        for held, version in zip(self.slot._admission.live.held, self.model.held, strict=True):
            assert torch.equal(held.module(X), answer(version.seed))
        for generation, version in self.open.values():
            assert torch.equal(generation.module(X), answer(version.seed))

    @invariant()
    def memory_is_within_the_policy(self) -> None:
        one = LAYERS * WIDTH * WIDTH * 8
        assert self.slot.status().arenas_nbytes <= one * (self.model.copies + len({v for _, v in self.open.values()}))

    def teardown(self) -> None:
        if not hasattr(self, "slot"):
            return
        for session in list(self.open):
            self.release(session)
        self.slot.update(make_state(99), version="1.1.0")
        assert torch.equal(self.slot(X), answer(99))


TestSlotAgainstModel = SlotMachine.TestCase
TestSlotAgainstModel.settings = settings(max_examples=60, stateful_step_count=30)
