"""Compiled models: swaps compile nothing, staging warms up what passes will need, and the receipt counts (P10, G14)."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import IncompatibleError, SlotStateError, UncopyableError, UnswappableError
from hotglm.model import compiled
from support.compiled_fixtures import fresh_dynamo
from support.compiled_models import KINDS, NUM_SWAPS, WIDTH, Model, draw, make, make_cold
from support.swaps import same_bits

__all__ = ["fresh_dynamo"]  # a fixture for every test here

X = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)
TESTS = Path(__file__).resolve().parent
NAMES = [*(f"eager: {kind}" for kind in KINDS), "inductor: nested", "inductor: dynamic"]


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What 20 swaps of every kind have counted, in a process in which compiling raises."""
    return run_swaps(NAMES, directory=tmp_path_factory.mktemp("inductor"))


def run_swaps(names: list[str], *, directory: Path) -> Any:
    """Run the program of `support/compiled_models.py`, with a cache of compiled code of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "support.compiled_models", *names],
        cwd=TESTS,
        env={
            **os.environ,
            "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
            "TORCHINDUCTOR_CACHE_DIR": str(directory),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def make_slot(kind: str = "in place", **settings: Any) -> hotglm.ModuleSlot:
    """Return a slot around a model that is compiled in one of the ways, by Dynamo alone."""
    return hotglm.ModuleSlot(make(kind, backend="eager"), version="1.0.0", **settings)


def count_frames() -> int:
    """Return how many frames Dynamo was given to compile so far."""
    return int(torch._dynamo.utils.counters["frames"]["total"])


@pytest.mark.parametrize("name", NAMES)
def test_swaps_compile_nothing(name: str, swapped: Any) -> None:
    """20 swaps compile nothing, where compiling raises, and each generation answers like a cold load, bit for bit."""
    found = dict(swapped[name])
    assert found.pop("first") >= 1
    assert found == {"frames": 0, "recompiles": 0, "since": 0, "wrong": 0, "swaps": NUM_SWAPS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_swaps_of_every_kind_under_inductor(kind: str, tmp_path: Path) -> None:
    """The same with generated code, for every kind."""
    name = f"inductor: {kind}"
    found = run_swaps([name], directory=tmp_path)[name]
    assert (found["frames"], found["recompiles"], found["since"], found["wrong"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["module", "regional", "container"])
def test_code_compiled_before_the_slot_is_found_again(kind: str) -> None:
    """A model that was warmed up before it was given to a slot is not compiled again, but torch's own containers."""
    model = make(kind, backend="eager")
    with torch.no_grad():
        expected = model(X)
        before = count_frames()
        slot = hotglm.ModuleSlot(model, version="1.0.0")
        assert same_bits(slot(X), expected)
    assert count_frames() - before == (1 if kind == "container" else 0)


def test_a_swap_that_compiles_anew_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: twins that are compiled by a compiler of their own are counted, by torch and in the receipt."""

    def compile_anew(_: object, module: nn.Module) -> compiled.CompiledCall:
        own = torch.compile(Model(), backend=lambda graph, _: graph.forward)
        recipe = compiled.find_recipe(own)
        assert recipe is not None
        return compiled.CompiledCall(module, recipe)

    slot = make_slot()
    slot(X)
    monkeypatch.setattr(compiled, "bind", compile_anew)
    receipt = slot.update(draw(slot, 1), version="1.0.1", policy=hotglm.StagePolicy(warm_up=(X,)))
    assert receipt.recompiles == 1
    assert "compiled: 1" in receipt.explain()


def test_names_and_class_are_those_of_the_model() -> None:
    """A slot around what torch.compile returned has the model's own names, class and signature."""
    slot = make_slot("regional, wrapped")
    assert set(slot.state_dict()) == set(Model().state_dict())
    whole = make_slot("module")
    assert type(whole.live.module) is Model
    assert whole.name == "Model"
    assert whole.live.contract.call == hotglm.contract_of(Model()).call


def test_what_staging_compiles_is_in_the_receipt() -> None:
    """Inputs of another kind in the warm-up are compiled for in staging; passes then find the code."""
    slot = make_slot()
    slot(X)
    policy = hotglm.StagePolicy(warm_up=(X, X.clone().requires_grad_()))
    receipt = slot.update(draw(slot, 1), version="1.0.1", policy=policy)
    assert receipt.recompiles == 1
    slot(X.clone().requires_grad_())
    assert slot.status().recompiles == 0
    again = slot.update(draw(slot, 2), version="1.0.2", policy=policy)
    assert again.recompiles == 0
    assert again.to_dict()["recompiles"] == 0


def test_what_a_pass_compiles_is_in_the_status() -> None:
    """A pass that nothing prepared for compiles on the live path; the status says so until the next swap."""
    slot = make_slot()
    slot(X)
    slot.update(draw(slot, 1), version="1.0.1")
    slot(X.clone().requires_grad_())
    assert slot.status().recompiles == 1
    slot.update(draw(slot, 2), version="1.0.2")
    slot(X.clone().requires_grad_())
    assert slot.status().recompiles == 0


def test_compilations_of_others_are_not_counted() -> None:
    """What another thread compiles during a stage is not in the receipt."""
    slot = make_slot()
    slot(X)

    def compile_elsewhere(_: nn.Module) -> None:
        thread = threading.Thread(target=lambda: make("module", backend="aot_eager")(X))
        thread.start()
        thread.join()

    before = count_frames()
    receipt = slot.update(draw(slot, 1), version="1.0.1", policy=hotglm.StagePolicy(checks=(compile_elsewhere,)))
    assert count_frames() > before
    assert receipt.recompiles == 0


class Wider(Model):
    """New code for the same weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; x: (batch, WIDTH)."""
        return super().forward(x) + 1


def test_new_code_is_compiled_in_staging_in_the_mode_of_the_passes() -> None:
    """New code is compiled like the live one, while it is staged, in the modes of the passes, not of the caller."""
    slot = make_slot("nested", accept="major")
    with torch.inference_mode():
        slot(X)
    receipt = slot.update(Wider().eval(), version="2.0.0", policy=hotglm.StagePolicy(warm_up=(X,)))
    assert receipt.recompiles == 1
    assert type(slot.live.module) is Wider
    before = count_frames()
    with torch.inference_mode():
        slot(X)
    assert count_frames() == before
    assert slot.status().recompiles == 0


def test_new_code_without_a_warm_up_is_told() -> None:
    """Where new code is to be compiled and nothing can be run to do so, the verdict says that the first pass will."""
    slot = make_slot(accept="major")
    slot(X)
    receipt = slot.update(Wider().eval(), version="2.0.0")
    assert receipt.verdict is not None
    found = [finding for finding in receipt.verdict.findings if finding.code == "COMPILES_LATER"]
    assert len(found) == 1
    assert "warm_up" in found[0].remedy
    slot(X)
    assert slot.status().recompiles == 1
    same = slot.update(draw(slot, 1), version="2.0.1")
    assert same.verdict is not None
    assert not [finding for finding in same.verdict.findings if finding.code == "COMPILES_LATER"]


def test_a_module_that_is_offered_compiled_stays_as_it_is() -> None:
    """A source that torch.compile returned is taken for the module behind it, compiled its way; it is not changed."""
    slot = hotglm.ModuleSlot(Model().eval(), version="1.0.0", accept="major")
    offered: Any = make("module", backend="eager")
    expected = offered(X)
    receipt = slot.update(offered, version="2.0.0", policy=hotglm.StagePolicy(warm_up=(X,)))
    assert receipt.recompiles == 0
    assert slot.live.module._compiled_call_impl is not None
    assert offered._orig_mod._compiled_call_impl is None
    assert same_bits(slot(X), expected)


def test_another_dtype_is_refused_and_requires_grad_is_counted() -> None:
    """Weights of another dtype are refused; freezing the live ones recompiles once, and that is counted."""
    slot = make_slot()
    before = slot(X)
    with pytest.raises(IncompatibleError):
        slot.update({name: tensor.double() for name, tensor in draw(slot, 1).items()}, version="1.0.1")
    assert same_bits(slot(X), before)
    slot.live.module.requires_grad_(requires_grad=False)
    receipt = slot.update(draw(slot, 1), version="1.0.1", policy=hotglm.StagePolicy(warm_up=(X,)))
    assert receipt.recompiles == 1
    assert slot.update(draw(slot, 2), version="1.0.2").recompiles == 0


def test_slot_compile_reaches_every_generation() -> None:
    """`slot.compile()` compiles the live generation, those held and those to come; a rollback compiles nothing."""
    slot = hotglm.ModuleSlot(Model().eval(), version="1.0.0")
    slot.update(draw(slot, 1), version="1.0.1")
    slot.compile(backend="eager")
    slot(X)
    before = count_frames()
    for number in (2, 3):
        slot.update(draw(slot, number), version=f"1.0.{number}")
        assert same_bits(slot(X), make_cold("in place", slot.state_dict(), backend="eager")(X))
    slot.rollback()
    slot(X)
    assert count_frames() == before
    copied = copy.deepcopy(slot)
    assert same_bits(copied(X), slot(X))
    assert copied.live.module._compiled_call_impl is not None
    assert count_frames() == before


@pytest.mark.parametrize("kind", ["module", "in place", "nested"])
def test_generations_are_freed_without_the_garbage_collector(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled generation that nobody holds is gone at once: its compiled call is no circle (P9)."""
    slot = make_slot(kind)
    slot(X)
    gc.collect()
    monkeypatch.setattr(gc, "collect", lambda: 0)  # staging would call it
    gc.disable()
    try:
        for number in (1, 2):
            slot.update(draw(slot, number), version=f"1.0.{number}")
        old = weakref.ref(slot.live.module)
        for number in (3, 4, 5):
            slot.update(draw(slot, number), version=f"1.0.{number}")
        assert old() is None
    finally:
        gc.enable()


def test_a_compiled_call_does_not_outlive_its_module() -> None:
    """The call alone keeps no module; using it then says so."""
    slot = make_slot()
    call: Any = slot.live.module._compiled_call_impl
    alone = compiled.CompiledCall(Model(), call.recipe)
    with pytest.raises(ReferenceError, match="keep the module"):
        alone(X)


@pytest.mark.parametrize("kind", ["module", "regional", "nested", "dynamic"])
def test_swaps_in_place_compile_nothing(kind: str) -> None:
    """Where the tensors stay where they are, compiled code stays as well, and answers from the new weights."""
    slot = make_slot(kind, swap=hotglm.InPlace())
    policy = hotglm.StagePolicy(warm_up=(X,))
    with torch.no_grad():
        slot(X)
        for number in (1, 2, 3):
            before, state = count_frames(), draw(slot, number)
            receipt = slot.update(state, version=f"1.0.{number}", policy=policy)
            found = slot(X)
            assert (count_frames() - before, receipt.recompiles) == (0, 0)
            assert same_bits(found, make_cold(kind, state, backend="eager")(X))


# -- compiled parts that do not call what they stand for ---------------------------------------------------------------


def test_the_module_behind_a_compiled_one_may_not_be_assigned() -> None:
    """Assigning `_orig_mod` changes nothing that is called; it is refused on a slot, and found in what one is given."""
    wrapped: Any = make("module", backend="eager")
    before = wrapped(X)
    wrapped._orig_mod = Model().eval()
    assert same_bits(wrapped(X), before)  # the hazard: the old module goes on answering
    with pytest.raises(UnswappableError, match="_orig_mod"):
        hotglm.ModuleSlot(wrapped, version="1.0.0")
    slot = make_slot("module")
    before = slot(X)
    with pytest.raises(SlotStateError, match="behind the compiled one"):
        slot._orig_mod = Model()
    assert same_bits(slot(X), before)


def test_a_module_with_the_call_of_another_is_refused() -> None:
    """A module that was made from the attributes of a compiled one goes on calling that one."""
    model = make("in place", backend="eager")
    other: Any = Model().eval()
    vars(other).update({**vars(model), "_modules": dict(vars(other)["_modules"])})
    assert same_bits(other(X), model(X))  # the hazard: its own parts are never asked
    with pytest.raises(UnswappableError, match="that of another module"):
        hotglm.ModuleSlot(other, version="1.0.0")


def test_a_call_that_torch_has_not_made_is_refused() -> None:
    """What stands where torch puts a compiled call, and is none, is refused when it is met."""
    model: Any = Model()
    model._compiled_call_impl = model._call_impl
    with pytest.raises(UnswappableError, match=r"made by torch\.compile"):
        hotglm.ModuleSlot(model, version="1.0.0")
    slot = hotglm.ModuleSlot(Model().eval(), version="1.0.0")
    before = slot(X)
    part: Any = slot.live.module.get_submodule("head")
    part._compiled_call_impl = part._call_impl
    with pytest.raises(UncopyableError, match=r"torch\.compile has made"):
        slot.update(draw(slot, 1), version="1.0.1")
    assert same_bits(slot(X), before)


def test_a_compiled_module_inside_itself_is_refused() -> None:
    """A module that keeps its own compiled form as a part has no end."""
    model: Any = Model()
    model.fast = torch.compile(model, backend="eager")
    with pytest.raises(UnswappableError, match="inside the module"):
        hotglm.ModuleSlot(model, version="1.0.0")


def test_staging_has_the_settings_of_its_caller() -> None:
    """What torch is set to in the context of the caller of `stage` holds in warm-up and checks as well."""
    seen: list[int] = []
    slot = make_slot()
    policy = hotglm.StagePolicy(checks=(lambda _: seen.append(torch._dynamo.config.recompile_limit),))
    with torch._dynamo.config.patch(recompile_limit=77):
        slot.update(draw(slot, 1), version="1.0.1", policy=policy)
    assert seen == [77]
