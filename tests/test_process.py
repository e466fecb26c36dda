"""FAULTS K04, K05, K08 to K10, K14, K15: signals, exit, limits, clocks, flags and missing parts of a system."""

from __future__ import annotations

import builtins
import ctypes
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hotglm
from hotglm import seam
from hotglm.errors import SourceReadError
from hotglm.slot import memory
from hotglm.testing.waiting import wait_until
from support.scripts import run_script
from support.universal import Chain, World, make_state, universal


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as made:
        yield made


# -- K04: signals and the end of the interpreter -----------------------------------------------------------------------


ENDINGS = """
    import os, select, signal, threading, time
    import torch, hotglm
    from hotglm.testing.seams import hooked, only_nth
    from support.universal import Chain, make_state

    def start(point, ending, ready):
        # In a child: bring a stage to `point`, where it stays for ever, and tell the parent.
        reached = lambda *_: (os.write(ready, b"x"), threading.Event().wait())
        slot = hotglm.ModuleSlot(Chain(), name="chain", version="1.0.0")
        session = slot.acquire()
        generation = session.__enter__()
        hotglm.save_weights(make_state(1), "one.safetensors", version="1.0.1")
        if ending == "handler":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        policy, seam_hook = hotglm.StagePolicy(), lambda *_: None
        if point == "check":
            policy = hotglm.StagePolicy(checks=(reached,))
        elif point == "read":
            seam_hook = only_nth("preadv", 1, reached)
        elif point == "turn":
            threading.Thread(target=slot.update, args=("one.safetensors",), daemon=True,
                             kwargs={"policy": hotglm.StagePolicy(checks=(reached,))}).start()
        with hooked(seam_hook):
            if ending == "exit":
                threading.Thread(target=slot.update, args=("one.safetensors",), daemon=True,
                                 kwargs={"policy": policy}).start()
                os.read(go[0], 1)
                sys.exit(5)
            slot.update("one.safetensors", policy=policy)

    SIGNALS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "handler": signal.SIGTERM, "exit": None}
    CODES = {"interrupt": -signal.SIGINT, "terminate": -signal.SIGTERM, "handler": 7, "exit": 5}
    import tempfile
    os.chdir(tempfile.mkdtemp())
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with it ignored
    from hotglm.slot import stager
    stager._STOP_GRACE_S = 0.05
    go = os.pipe()
    for point in ("read", "check", "turn"):
        for ending, number in SIGNALS.items():
            ready = os.pipe()
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                start(point, ending, ready[1])
                raise SystemExit(99)
            assert select.select([ready[0]], [], [], 25)[0], (point, ending)
            os.read(ready[0], 1)
            begun = time.monotonic()
            os.kill(child, number) if number else os.write(go[1], b"x")
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code == CODES[ending], (point, ending, code)
            assert time.monotonic() - begun < 10, (point, ending)
    print("done")
"""


def test_a_process_that_is_told_to_end_in_the_middle_of_a_stage_ends_soon() -> None:
    """K04: SIGINT, SIGTERM, a handler that exits and plain exit end a process whose stage hangs, with a session open.

    Whether the stage hangs in a read or in a check, or waits for its turn; without a crash of the interpreter.
    """
    done = run_script(ENDINGS)
    assert done.returncode == 0, (done.stdout, done.stderr[-3000:])
    assert done.stdout.strip().endswith("done")
    assert "Fatal" not in done.stderr


def test_an_interrupt_that_does_not_wake_the_caller_ends_its_wait_all_the_same() -> None:
    """K04: a Ctrl-C in the gap before the system's wait is acted upon; here as an exception that wakes nobody."""
    reached, let_go, ended = threading.Event(), threading.Event(), threading.Event()
    slot = hotglm.ModuleSlot(Chain(), name="chain", version="1.0.0")

    def hang(module: object) -> None:
        reached.set()
        let_go.wait(60)

    def update() -> None:
        try:
            slot.update(make_state(1), version="1.0.1", policy=hotglm.StagePolicy(checks=(hang,)))
        except KeyboardInterrupt:
            ended.set()

    caller = threading.Thread(target=update, daemon=True)
    caller.start()
    assert reached.wait(30)
    ident = caller.ident or 0
    assert wait_until(lambda: sys._current_frames()[ident].f_code.co_name == "_wait")
    raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(KeyboardInterrupt))
    assert raised == 1
    try:
        assert ended.wait(30)
    finally:
        let_go.set()
    caller.join(30)
    assert slot.version == "1.0.0"


# -- K05, I10: memory --------------------------------------------------------------------------------------------------


def test_every_limit_on_address_space_gives_a_typed_refusal_or_a_whole_version() -> None:
    """K05, D20, I10: from no room at all upward, an update is refused with a typed error or succeeds; never a crash.

    After each refusal the old version answers as before, and with the limit gone the same update succeeds.
    """
    done = run_script(
        """
        import collections, os, resource, signal, tempfile
        import torch, hotglm
        from support.universal import Chain, make_state

        WIDTH = 512                                        # 3 MiB of weights
        torch.set_num_threads(1)
        os.chdir(tempfile.mkdtemp())
        state = make_state(1, width=WIDTH)
        hotglm.save_weights(state, "one.safetensors", version="1.0.1")
        chain = Chain(width=WIDTH)
        chain.load_state_dict(make_state(0, width=WIDTH))
        slot = hotglm.ModuleSlot(chain, name="chain", version="1.0.0")
        x = torch.ones(WIDTH)

        def attempt(room):
            with torch.no_grad():
                before = slot(x)
                nbytes = int(open("/proc/self/statm").read().split()[0]) * 4096
                hard = resource.getrlimit(resource.RLIMIT_AS)[1]
                resource.setrlimit(resource.RLIMIT_AS, (nbytes + room, hard))
                try:
                    slot.update("one.safetensors")
                    code = "ok"
                except hotglm.HotglmError as refusal:
                    code = refusal.code
                resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
                if code != "ok":
                    assert slot(x).equal(before) and str(slot.version) == "1.0.0"
                    slot.update("one.safetensors")
                assert str(slot.version) == "1.0.1" and not slot(x).equal(before)
            return code

        codes = {}
        for room in [*range(0, 96 << 20, 1 << 20), *range(96 << 20, 1 << 30, 31 << 20), 2 << 30]:
            pipe = os.pipe()
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                try:
                    os.write(pipe[1], attempt(room).encode())
                except BaseException as failure:
                    os.write(2, f"room {room}: {failure!r}\\n".encode())
                    os._exit(1)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            os.close(pipe[1])
            codes[room] = os.read(pipe[0], 100).decode() if status == 0 else f"status {status}"
            os.close(pipe[0])
        print(dict(collections.Counter(codes.values())))
        assert set(codes.values()) <= {"ok", "MEMORY", "THREAD_START"}, codes
        assert codes[0] == "MEMORY" and codes[2 << 30] == "ok", codes
        """
    )
    assert done.returncode == 0, (done.stdout, done.stderr[-3000:])
    assert "MEMORY" in done.stdout


# -- K08, K09: time ----------------------------------------------------------------------------------------------------


def test_a_wall_clock_that_jumps_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """K08: while the wall clock leaps by years in both directions, updates, refusals and waits go as ever."""
    leaps = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: (-1) ** next(leaps) * 1e9)
    number, path = world.write()
    world.publish(number)
    receipt = world.slot.update(path, policy=hotglm.StagePolicy(timeout_s=30))
    assert receipt.commit_s >= 0
    assert all(timing.duration_s >= 0 for timing in receipt.timings)
    world.slot.wait_drained(timeout_s=10)
    with universal(world, SourceReadError, code="NOT_FOUND"):
        world.slot.update(world.directory / "nothing")


def test_a_starved_process_takes_longer_and_does_not_fail() -> None:
    """K09: at the lowest priority, beside processes that burn every core, a stage with a time limit still succeeds."""
    done = run_script(
        """
        import os, signal
        import torch, hotglm
        from support.universal import Chain, make_state

        torch.set_num_threads(1)
        burners = []
        for _ in range(os.cpu_count() or 1):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                while True:
                    pass
            burners.append(child)
        try:
            os.nice(19)
            slot = hotglm.ModuleSlot(Chain(), name="chain", version="1.0.0")
            for number in range(1, 3):
                slot.update(make_state(number), version=f"1.0.{number}", policy=hotglm.StagePolicy(timeout_s=15))
            slot.wait_drained(timeout_s=15)
            print(slot.version)
        finally:
            for child in burners:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.0.2"


# -- K10, K14: interpreters --------------------------------------------------------------------------------------------

SCENARIO = """
    import os, sys, tempfile
    import torch, hotglm
    from support.universal import Chain, make_state

    os.chdir(tempfile.mkdtemp())
    chain = Chain()
    chain.load_state_dict(make_state(0))
    slot = hotglm.ModuleSlot(chain, name="ch\\u00e4in", version="1.0.0")
    x = torch.arange(8.0)
    zero = slot(x)
    name = "weights.safetensors"
    digests = hotglm.save_weights(make_state(1), name, version="1.0.1")
    receipt = slot.update(name)
    one = slot(x)
    codes = []
    for source, options in (
        ("nothing.safetensors", {}),
        ({"other": torch.ones(1)}, {"version": "1.0.2"}),
        ({**make_state(2), "layers.0.bias": torch.full((8,), float("nan"))}, {"version": "1.0.2"}),
        (make_state(2), {"version": "1.0.2", "policy": hotglm.StagePolicy(checks=(lambda module: False,))}),
        (make_state(2), {"version": "9"}),
        (name, {"digests": {"layers.0.bias": "sha256:0"}}),
    ):
        try:
            slot.update(source, **options)
        except hotglm.HotglmError as refusal:
            codes.append(refusal.code)
            str(refusal)
    same = bool(slot(x).equal(one)) and str(slot.version) == "1.0.1"
    slot.rollback()
    back = bool(slot(x).equal(zero)) and not one.equal(zero)
    print(ascii([codes, same, back, receipt.digest, sorted(digests.items())[0], str(slot.status()).count("held")]))
"""


def test_every_way_to_run_the_interpreter_gives_the_same_answers() -> None:
    """K10: under -O, -OO, -B, -I, other hash seeds and the C locale, refusals, digests and answers are the same."""
    ways: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
        "plain": ((), {"PYTHONHASHSEED": "0"}),
        "-OO -I -B": (("-OO", "-I", "-B"), {}),
        "-O, C": (
            ("-O",),
            {"PYTHONHASHSEED": "12345", "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        ),
    }
    answers = {}
    for name, (flags, env) in ways.items():
        done = run_script(SCENARIO, flags=flags, env=env)
        assert done.returncode == 0, (name, done.stderr)
        answers[name] = done.stdout
    assert len(set(answers.values())) == 1, answers
    assert "'NOT_FOUND'" in answers["plain"]
    assert "True, True" in answers["plain"]


def test_the_package_may_be_reloaded_or_imported_twice() -> None:
    """K14: after a reload a slot works on; two copies of the package serve side by side, each with its own stages."""
    done = run_script(
        """
        import importlib, os
        import torch, hotglm
        from support.universal import Chain, make_state

        x = torch.arange(8.0)
        slot = hotglm.ModuleSlot(Chain(), name="chain", version="1.0.0")
        first = hotglm.ModuleSlot
        importlib.reload(hotglm)
        assert hotglm.ModuleSlot is first
        slot.update(make_state(1), version="1.0.1")
        one = slot(x)

        old = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "hotglm"}
        again = importlib.import_module("hotglm")
        assert again.ModuleSlot is not first
        other = again.ModuleSlot(Chain(), name="chain", version="1.0.0")
        other.update(make_state(2), version="1.0.2")
        staged = other.stage(make_state(3), version="1.0.3")
        try:
            slot.commit(staged)
        except ValueError as refusal:  # an ArgumentError; by that name it is now another copy's
            print(refusal.code)
        other.commit(staged)
        slot.update(make_state(4), version="1.0.4")
        child = os.fork()
        if child == 0:
            slot.update(make_state(5), version="1.0.5")
            other.update(make_state(5), version="1.0.5")
            os._exit(0 if slot(x).equal(other(x)) else 1)
        assert os.waitpid(child, 0)[1] == 0
        slot.rollback()
        assert slot(x).equal(one)
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["BAD_ARGUMENT"]


# -- K15: a system with parts missing ----------------------------------------------------------------------------------


def refuse_proc(path: Any, *args: Any, **kwargs: Any) -> Any:
    if str(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(path)
    return builtins.open(path, *args, **kwargs)


@pytest.mark.parametrize("part", ["setpriority", "affinity", "populate", "hugepage", "proc"])
def test_an_absent_part_of_the_system_costs_speed_only(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K15: without thread priorities, affinity, madvise, huge pages or /proc, updates and refusals go as ever."""
    match part:
        case "setpriority":
            monkeypatch.delattr(os, "setpriority")
        case "affinity":
            monkeypatch.delattr(os, "sched_getaffinity")
        case "populate":
            monkeypatch.setattr(seam, "_madvise", None)
        case "hugepage":
            monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
        case _:
            monkeypatch.setattr(memory, "open", refuse_proc, raising=False)
    with World(tmp_path) as world:
        with universal(world, SourceReadError, code="NOT_FOUND"):
            world.slot.update(tmp_path / "nothing")
        world.rollback()


def test_a_system_that_forbids_priorities_is_served_all_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """K15: a sandbox that answers EPERM to setpriority costs the priority, not the update."""

    def forbid(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", forbid)
    world.update()
