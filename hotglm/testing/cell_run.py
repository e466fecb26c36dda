"""One cell of a matrix, run: staged beside the running version, swapped in under traffic, compared with a cold load.

Rules this module keeps:

- What counts as a refusal is a `HotglmError` of staging or committing. Anything else that goes wrong has failed.
- A cell that came out as declared says so; any other outcome raises, a cell that works against its declaration too.
- Whatever happens is recorded, once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hotglm.errors import HotglmError, IncompatibleError, Problem
from hotglm.model.recording import call_with
from hotglm.problem import describe_exception
from hotglm.slot.checks import Inputs
from hotglm.slot.slot import ModuleSlot
from hotglm.slot.source import Source
from hotglm.slot.staged import Staged
from hotglm.testing.assertions import (
    assert_no_recompile,
    assert_swap_equals_cold,
    find_codes,
    find_cold_differences,
    look_at,
    verify_unchanged,
)
from hotglm.testing.cells import Cell, CellResult, Outcome
from hotglm.testing.family import ModelFamily
from hotglm.testing.traffic import Tolerance, Traffic, describe_differences
from hotglm.version import Version

__all__ = ["CellRun"]

_OFF = "off"
_COMPILED = Tolerance(rtol=1e-4, atol=1e-5)
_COMPILED_HALF = Tolerance(rtol=2e-2, atol=2e-2)


class CellRun:
    """A cell that is to be run, and after `verify` the slot that it was run in.

    Attributes:
        cell: which one.
        family: code, weights and arguments of the versions.
        slot: the slot, with the incoming version live if it was taken; None before `verify`.
        result: what came out; None before `verify`.
        was_asked: whether `verify` was called.
    """

    def __init__(
        self,
        cell: Cell,
        family: ModelFamily,
        *,
        directory: Path,
        record: Callable[[CellResult], object],
        skip: Callable[[str], NoReturn],
    ) -> None:
        """Take what to run.

        Args:
            cell: which one.
            family: code, weights and arguments of the versions.
            directory: an empty one, for the release.
            record: gets the result.
            skip: ends the test with a reason, where the machine cannot run the cell.
        """
        self.cell = cell
        self.family = family
        self.slot: ModuleSlot | None = None
        self.result: CellResult | None = None
        self.was_asked = False
        self._directory = directory
        self._record = record
        self._skip = skip

    def verify(self) -> CellResult:
        """Run the cell and return the result, where it is as declared.

        Raises:
            AssertionError: it is not: it was refused or failed, was refused for another reason, or works although it
                was declared not to.
        """
        __tracebackhide__ = True
        started, self.was_asked = time.perf_counter(), True
        self._skip_if_impossible()
        result, cause = self._judge()
        self.result = replace(result, duration_s=time.perf_counter() - started)
        self._record(self.result)
        if not result.outcome.is_good:
            raise AssertionError(f"{self.cell.id} {result.outcome.value}. {result.message}") from cause
        return self.result

    def _judge(self) -> tuple[CellResult, BaseException | None]:
        cell, expected = self.cell, self.cell.expected
        try:
            with torch.no_grad():  # as a service runs
                found = self._run()
        except _RefusedError as refused:
            error, codes = refused.error, tuple(sorted(find_codes(refused.error)))
            if any(code in codes for code in expected):
                return CellResult(cell=cell, outcome=Outcome.REFUSED, codes=codes), None
            wanted = f"Expected a refusal for {' or '.join(expected)}" if expected else "Expected an update"
            message = f"{wanted}, got one refused for {', '.join(codes)}:\n{error}"
            result = CellResult(cell=cell, outcome=Outcome.REFUSED_UNEXPECTEDLY, codes=codes, message=message)
            return result, None  # the message has all that it says
        except Exception as error:  # noqa: BLE001 - the model's own code may raise anything; it is the cell that failed
            text = str(error) if isinstance(error, AssertionError) else describe_exception(error, limit=2000)
            return CellResult(cell=cell, outcome=Outcome.FAILED, message=text), error
        if not expected:
            return found, None
        message = (
            f"Expected a refusal for {' or '.join(expected)}, got an update that works. "
            "Remedy: drop the expectation from hotglm_matrix(expected=...); the cell then has to go on working."
        )
        return replace(found, outcome=Outcome.WORKS_UNEXPECTEDLY, message=message), None

    # -- the run -------------------------------------------------------------------------------------------------------

    def _run(self) -> CellResult:
        cell, family = self.cell, self.family
        running = self._fit(family.make_model(cell.running))
        inputs = self._fit_inputs(family.make_inputs(cell.running))
        release = family.write_release(cell.incoming, self._directory, name=cell.model)
        slot = self.slot = family.make_slot(running, name=cell.model, version=cell.running)
        self._compile(slot)
        with Traffic(slot, inputs, tolerance=self._tolerance) as traffic:
            staged = self._stage(slot, release, traffic)
            code_version = str(staged.generation.code_version)
            path = family.find_path(staged.module, incoming=cell.incoming, code_version=code_version)
            cold = family.start_cold(cell.running, cell.incoming, code_version=code_version)
            self._swap(slot, staged, traffic, cold=self._fit(cold))
            passes = traffic.num_passes
        return CellResult(cell=cell, outcome=Outcome.WORKS, code_version=code_version, path=path, num_passes=passes)

    def _stage(self, slot: ModuleSlot, release: Source, traffic: Traffic) -> Staged:
        before = look_at(slot, traffic.inputs)
        try:
            staged = slot.stage(release)
            self._require_capability(staged)
        except HotglmError as error:
            verify_unchanged(slot, before, inputs=traffic.inputs)
            traffic.wait_for_passes()
            raise _RefusedError(error) from error
        arrived = staged.version
        if arrived.local is None and arrived != Version(self.cell.incoming):  # a label stands for weights without one
            raise AssertionError(
                f"Expected a release of {self.cell.incoming}, got one of {arrived}. Remedy: correct make_release."
            )
        return staged

    def _swap(self, slot: ModuleSlot, staged: Staged, traffic: Traffic, *, cold: nn.Module) -> None:
        """Commit, go back and come again, with passes running all the time; compare with the cold load each time."""
        is_same_code = type(staged.module) is type(slot.live.module)
        number, old, before = staged.number, traffic.ask(), look_at(slot)["state"]
        if wrong := find_cold_differences(staged.module, cold, traffic.inputs, tolerance=self._tolerance):
            lines = "".join(f"\n  - {line}" for line in wrong)
            raise AssertionError(f"Expected the staged version to equal a cold load of it, got:{lines}")
        new = call_with(cold, traffic.inputs)
        watched = assert_no_recompile() if is_same_code and self._backend != _OFF else contextlib.nullcontext()
        with watched:
            traffic.announce(new)
            slot.commit(staged)
            traffic.settle()
            _verify_live(slot, number)
            for target, answer in ((slot.history[-2].number, old), (number, new)):
                traffic.announce(answer)
                slot.rollback(to=target)
                traffic.settle()
                _verify_live(slot, target)
                if target != number and (wrong := describe_differences(before, look_at(slot)["state"], name="state")):
                    lines = "".join(f"\n  - {line}" for line in wrong)
                    raise AssertionError(f"Expected the weights to be what they were after going back, got:{lines}")
        assert_swap_equals_cold(slot, cold, traffic.inputs, tolerance=self._tolerance)

    # -- axes ----------------------------------------------------------------------------------------------------------

    @property
    def _backend(self) -> str:
        return self.cell.axis("compile", _OFF)

    @property
    def _tolerance(self) -> Tolerance:
        asked = self.family.tolerance
        if self._backend in (_OFF, "eager"):  # the same operations, in the same order
            return asked
        least = _COMPILED_HALF if self.cell.axis("dtype") in ("float16", "bfloat16") else _COMPILED
        return Tolerance(rtol=max(asked.rtol, least.rtol), atol=max(asked.atol, least.atol))

    def _skip_if_impossible(self) -> None:
        device = torch.device(self.cell.axis("device", "cpu"))
        if device.type != "cpu" and not getattr(torch, device.type).is_available():
            self._skip(f"no {device} here")

    def _fit(self, module: nn.Module) -> nn.Module:
        dtype, device = self.cell.axis("dtype"), self.cell.axis("device", "cpu")
        module = module.eval().to(device)
        return module.to(getattr(torch, dtype)) if dtype else module

    def _fit_inputs(self, inputs: Inputs) -> Inputs:
        dtype, device = self.cell.axis("dtype"), self.cell.axis("device", "cpu")

        def fit(value: object) -> object:
            if not isinstance(value, torch.Tensor):
                return value
            moved = value.to(device)
            return moved.to(getattr(torch, dtype)) if dtype and value.is_floating_point() else moved

        fitted: Inputs = pytree.tree_map(fit, inputs)
        return fitted

    def _compile(self, slot: ModuleSlot) -> None:
        if self._backend != _OFF:
            slot.compile(backend=self._backend)

    def _require_capability(self, staged: Staged) -> None:
        capability = self.cell.axis("capability", "any")
        if capability != "any" and capability not in staged.contract.capabilities:
            problem = Problem(
                code="CAPABILITY_LOST", message=f"Expected capability {capability!r}, got none of that name"
            )
            staged.discard()
            raise IncompatibleError(
                f"Expected version {staged.version} to have what the cell asks for.",
                problems=[problem],
                remedy="declare it: @hotglm.versioned(..., capabilities=[...]).",
            )


def _verify_live(slot: ModuleSlot, number: int) -> None:
    if slot.live.number != number:  # two versions may answer alike
        raise AssertionError(f"Expected generation {number} to be live, got {slot.live.number}.")


class _RefusedError(Exception):
    """Staging refused; what did stands in `error`."""

    def __init__(self, error: HotglmError) -> None:
        super().__init__(str(error))
        self.error = error
