"""`ModuleSlot`: what an application holds and calls; stable across versions of the model behind it.

Rules this module keeps:

- A slot is an `nn.Module` and stands for its live one: traversals, `state_dict`, attributes and methods are those of
  the live generation, each call in one generation from its start to its end.
- The way of a pass through this file is one line, `__call__`; the argument for it is in slot/admission.py.
- Whatever would write the live weights in place, or replace them one by one, is refused with the way to do it instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from hotglm.errors import SlotStateError
from hotglm.events import Event
from hotglm.migration.registry import Migrations
from hotglm.model.compilations import listen
from hotglm.model.compiled import settle
from hotglm.model.inspection import contract_of
from hotglm.model.registry import find_definition
from hotglm.model.scripted import is_script, verify_script
from hotglm.model.swappable import verify_swappable
from hotglm.progress import Progress
from hotglm.slot.admission import Admission
from hotglm.slot.checks import StagePolicy, promise_outputs
from hotglm.slot.choosing import choose_swap
from hotglm.slot.copies import copy_slot, reduce_slot
from hotglm.slot.core import SlotCore
from hotglm.slot.facade import ModuleFacade
from hotglm.slot.forking import follow_forks
from hotglm.slot.generation import Generation, State
from hotglm.slot.holders import Holder
from hotglm.slot.live_proof import LiveProof, verify_live
from hotglm.slot.memory import MemoryPolicy
from hotglm.slot.observer import find_holders, read_status, wait_drained
from hotglm.slot.policies import Flip, InPlace
from hotglm.slot.publication import Expected, HistoryEntry
from hotglm.slot.quantizing import verify_requantize
from hotglm.slot.receipt import Receipt
from hotglm.slot.requantize import Requantize
from hotglm.slot.sessions import AsyncSession, Session, find_place
from hotglm.slot.settings import SlotSettings, StageOptions, verify_settings
from hotglm.slot.source import Source
from hotglm.slot.staged import Staged
from hotglm.slot.status import Status
from hotglm.trust.policy import Trust
from hotglm.version import Bump, Version

__all__ = ["ModuleSlot"]


class ModuleSlot(ModuleFacade):
    """Holds the live version of a model, and changes it between two passes.

    The module given to a slot is the slot's from then on: its tensors are the first of the two copies. Any thread may
    call any method; passes take no lock and never wait for an update.

    Example:
        >>> import torch
        >>> slot = ModuleSlot(nn.Linear(2, 2), name="ranker", version="1.0.0")
        >>> receipt = slot.update({"weight": torch.eye(2), "bias": torch.zeros(2)}, version="1.0.1")
        >>> slot(torch.ones(2)).tolist(), str(slot.version)
        ([1.0, 1.0], '1.0.1')
        >>> str(slot.rollback().new_version)
        '1.0.0'
    """

    def __init__(  # noqa: PLR0913 - two groups are policy objects already; the rest stand for themselves
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        version: str | Version | None = None,
        accept: Bump | str = Bump.MINOR,
        policy: StagePolicy | None = None,
        memory: MemoryPolicy | None = None,
        constants: Sequence[str] = (),
        refresh: Callable[[nn.Module], object] | None = None,
        migrations: Migrations | None = None,
        trust: Trust | None = None,
        swap: Flip | InPlace | Literal["auto"] | None = None,
        requantize: Requantize | None = None,
    ) -> None:
        """Take `module` over and make it the first generation.

        Args:
            module: any `nn.Module` with its tensors on the CPU or CUDA devices; owned by the slot from now on.
            name: name of the slot and the model; what `@versioned` declared, else the class's name.
            version: version of `module`; what `@versioned` declared, else `0.0.0`, from which every step but one to
                another `0.0.x` is a major one, and refused unless `accept` is `"major"`.
            accept: the largest step of versions that is taken; `"major"` lets callers notice.
            policy: what every stage must prove, unless `stage` is given another one; the layout of its golden outputs
                is what `module` is taken to promise.
            memory: how much memory updates may use.
            constants: patterns of names of derived state that does not depend on the weights (see `hotglm.refresh`).
            refresh: recomputes derived state of somebody else's model; called with the staged module.
            migrations: steps between versions of somebody else's model, or of one that is to keep its code whatever
                classes are registered: weights of any version that a path leads from are brought to this code. By
                default those of the class, if it has any.
            trust: what must accept a path before it is staged (`hotglm.open_trust`); then only signed releases are.
                What is handed over in memory, mappings and modules, is the host's own. The slot asks in its own name.
            swap: `InPlace()` for a module whose tensors must stay where they are; by default `Flip()`. `"auto"` takes
                `InPlace()` for TorchScript and captured graphs, where somebody holds the tensors, and where a device
                has no room for a second copy, and says why.
            requantize: how plain weights (files, releases, mappings) are quantised for a module that is.

        Raises:
            ModuleError: the module holds something no slot can hold; everything is named.
            ArgumentError: `version` or `accept` cannot be meant.
        """
        verify_settings(
            name=name, policy=policy, memory=memory, refresh=refresh, migrations=migrations, trust=trust, swap=swap
        )
        module = settle(module)
        listen()
        choice = choose_swap(swap, module)
        is_fixed = isinstance(choice.policy, InPlace)
        contract = promise_outputs(contract_of(module, is_fixed=is_fixed), policy or StagePolicy(), live=None)
        verify_swappable(module, is_fixed=is_fixed)
        origin = None if requantize is None else verify_requantize(requantize, module)
        if is_script(module):
            verify_script(module, constants=constants)
        definition = find_definition(type(module))
        label = name or (definition.name if definition else type(module).__name__)
        parsed = Version(version) if version is not None else definition.version if definition else Version("0.0.0")
        settings = SlotSettings(
            name=label,
            accept=Bump.parse(accept),
            policy=policy or StagePolicy(),
            memory=memory or MemoryPolicy(),
            constants=tuple([constants] if isinstance(constants, str) else constants),
            refresh=refresh,
            migrations=migrations,
            trust=None if trust is None else trust.for_slot(label),
            swap=choice,
            requantize=requantize,
        )
        code_version = definition.version if definition else parsed
        core = SlotCore(
            Generation(
                module,
                number=1,
                name=label,
                version=parsed,
                contract=contract,
                code_version=code_version,
                origin=origin,
            ),
            settings,
        )
        # Set as bookkeeping, not by nn.Module, which would register parts (see ModuleFacade).
        self._core = core
        self._admission = core.admission  # one attribute less on the way of a pass
        follow_forks(core)

    _core: SlotCore
    _admission: Admission

    # -- passes --------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass in the generation that is live now. Takes no lock; see slot/admission.py."""
        return self._admission.live.call(*args, **kwargs)

    def acquire(self) -> Session:
        """Return a session: `with slot.acquire() as generation:` holds one generation for several passes.

        Enter it once. Its memory is not reused until the session exits and everything taken from it is gone; use the
        generation's number in the key of anything cached from it.
        """
        return Session(self._admission, sessions=self._core.sessions, place=find_place()).open()

    def acquire_async(self) -> AsyncSession:
        """Return `acquire` for `async with`: while a commit in place holds it back, the event loop goes on."""
        return AsyncSession(self._admission, sessions=self._core.sessions, place=find_place())

    @property
    def live(self) -> Generation:
        """The live generation. Keeping it keeps its memory; use `acquire` for work of any length."""
        return self._admission.live.generation

    @property
    def version(self) -> Version:
        """The live version."""
        return self._admission.live.generation.version

    @property
    def name(self) -> str:
        """Name of the slot."""
        return self._admission.name

    @property
    def history(self) -> tuple[HistoryEntry, ...]:
        """The latest changes of the live generation, oldest first; refusals change nothing and are not in it."""
        return self._admission.live.history

    def train(self, mode: bool = True) -> ModuleSlot:  # noqa: FBT001, FBT002 - nn.Module's signature
        """Set training mode on the live module, those held for rollback and a staged one; later ones copy it."""
        super().train(mode=mode)
        staged = self._core.stager.staged
        if staged is not None and staged.state is State.STAGED:
            with contextlib.suppress(SlotStateError):  # it may be discarded just now
                staged.module.train(mode=mode)
        return self

    # -- updates -------------------------------------------------------------------------------------------------------

    def stage(
        self,
        source: Source,
        version: str | Version | None = None,
        *,
        policy: StagePolicy | None = None,
        digests: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Staged:
        """Load and prove a new version beside the live one; return it, ready to be committed.

        Weights of another version than the code's are brought to it by the migrations that lie between, if there are
        any, while they are read; they keep their own version. Weights that carry no version are taken as they are
        where they fit, else as the version of the one known layout that leads here; `migration` of the receipt says so.

        The live version serves throughout and is not touched, whatever happens. Blocks the calling thread; from asyncio
        use `await asyncio.to_thread(slot.stage, ...)`. A newer stage supersedes one that is not committed.

        Args:
            source: a `.safetensors` file, a `*.safetensors.index.json`, a directory of either, a mapping of names to
                tensors, or a module, whose code and weights are then copied.
            version: its version; else the one it carries; else the live one with a label made from its digest.
            policy: what it must prove, in place of the slot's own policy.
            digests: digests its tensors must have, by name (`sha256:...`), beside those the source carries.
            config: fields of the config to build a registered class from, in place of the one the source carries.
            progress: called in this thread as bytes arrive.

        Raises:
            SourceError: the bytes cannot be used. IncompatibleError: the verdict says no. CheckError: a proof failed.
            TrustError: the slot's trust refuses a path: SignatureError, ReplayedError, ExpiredError, TrustStateError.
            MigrationError: the way from their version is ambiguous or does not fit, or is not known (no version).
            ModuleError: the structure cannot be carried over. MemoryPlanError: no room.
            SlotStateError: superseded, closed, or called from inside a stage. StageTimeoutError, StageFailedError,
            ThreadStartError, ArgumentError: as they say.
        """
        options = StageOptions(policy=policy, digests=digests, config=config, progress=progress)
        return self._core.stage(source, version, options)

    def commit(self, staged: Staged, *, expected: Expected | None = None) -> Receipt:
        """Make a staged version the live one, between two passes; return the receipt.

        Passes that run keep the old version to their end; passes that begin after this returned see the new one.

        Args:
            staged: from `stage` of this slot.
            expected: number or version that must be live; by default the generation that was live when it was staged.

        Raises:
            ConflictError: another generation is live. DiscardedError, SupersededError: it is no longer staged.
            SlotClosedError: the slot was closed. ArgumentError: it belongs to another slot.
        """
        return self._core.commit(staged, expected)

    def update(
        self,
        source: Source,
        version: str | Version | None = None,
        *,
        expected: Expected | None = None,
        policy: StagePolicy | None = None,
        digests: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Receipt:
        """Stage and commit in one turn; updates from several threads are made one after the other.

        Args and errors are those of `stage` and `commit`.
        """
        options = StageOptions(policy=policy, digests=digests, config=config, progress=progress)
        return self._core.update(source, version, expected, options)

    def rollback(self, to: Expected | None = None, *, expected: Expected | None = None) -> Receipt:
        """Make a held generation live again, by default the one before the live one; return the receipt.

        Needs no disk, no network and no loading. The generation that was live stays held.

        Args:
            to: number or version of a held generation.
            expected: number or version that must be live now.

        Raises:
            NoRollbackError: it is not held. ConflictError: another generation is live. SlotClosedError: closed.
        """
        return self._core.rollback(to, expected)

    def confirm(self, *, expected: Expected | None = None) -> bool:
        """End the trial of the live generation; return whether it was on trial.

        With a trust, its release is remembered as the one that a restart may always come back to.

        Args:
            expected: number or version that must be live.

        Raises:
            ConflictError: another generation is live.
            TrustStateError: it cannot be remembered; the trial has ended, and `confirm` may be called again.
        """
        return self._core.confirm(expected)

    # -- looking -------------------------------------------------------------------------------------------------------

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call `callback` with every event from now on; return the function that ends this."""
        return self._core.subscribers.subscribe(callback)

    def status(self) -> Status:
        """Return what the slot is doing. Costs the caller a look at every thread's stack, and passes nothing."""
        return read_status(self._core)

    def find_holders(self) -> tuple[Holder, ...]:
        """Return who still holds a generation that is neither live nor held for rollback.

        Passes with their stacks, sessions, and every module, tensor and bound method that is kept, with what keeps
        it. Walks all objects of the process with the GIL held, which may take long; for diagnosis.
        """
        return find_holders(self._core)

    def verify_live(
        self,
        *,
        quick: bool = False,
        num_threads: int | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> LiveProof:
        """Hash what is live again, and hold it against what was committed; return the proof.

        Parameters and buffers that files carry are read, at low priority; passes and updates go on. Blocks the
        calling thread; what `progress` raises, and Ctrl-C, end it at the next tensor.

        Args:
            quick: compare fingerprints, at the speed of memory, where they were taken with the digests (by a full
                `verify_live`, a stage that reused live tensors, or any on a device); they find whatever memory does by
                itself, and not who means to deceive.
            num_threads: threads that read; None means one core is left, of at most four.
            progress: called in this thread after each tensor.

        Raises:
            ArgumentError: no such number of threads.
            LiveMismatchError: tensors differ; all are named. Live weights are left as they are.
            MemoryPlanError: weights are on a device, and there is no pinned memory to fetch them to.
            StageFailedError: a device fails.
            ThreadStartError: as it says.
        """
        return verify_live(self._core, quick=quick, num_threads=num_threads, progress=progress)

    def wait_drained(self, *, timeout_s: float | None = None) -> None:
        """Wait until the live generation is the only one in use.

        Then no pass or session runs in any other, and the memory of those that are not held for rollback is free.

        Args:
            timeout_s: how long to wait, in seconds; None means for ever.

        Raises:
            DrainTimeoutError: it took longer; the text names who holds what, passes with their stacks.
        """
        wait_drained(self._core, timeout_s)

    def close(self) -> None:
        """Take no further updates, and let the spare and the rollback targets go; passes go on. May be called twice."""
        self._core.close()

    # -- the slot itself as an object --------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleSlot:
        """Return an independent slot around a deep copy of the live module, with the same settings."""
        with self.acquire() as generation:
            copied = memo[id(self)] = copy_slot(self._core, generation, memo, kind=ModuleSlot)
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the live module and the slot's settings; history, subscribers and held generations stay behind."""
        with self.acquire() as generation:
            return reduce_slot(self._core, generation, protocol, kind=ModuleSlot)
