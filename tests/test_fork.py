"""FAULTS K01 to K03: children of a process that serves, stages and computes in parallel."""

from __future__ import annotations

import io
import os
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

import hotglm
from support.scripts import run_script
from support.universal import Chain, make_state

CHILDREN = """
    import os, signal, threading
    import torch, hotglm
    from hotglm import seam
    from hotglm.testing.seams import hooked, only_nth, pause
    from support.universal import Chain, make_state

    def make(number):
        chain = Chain()
        chain.load_state_dict(make_state(number))
        return chain

    def expected(number):
        with torch.no_grad():
            return make(number)(X)

    def fork(work):
        # Run `work` in a child that must end within 20 s; return whether it came to its end.
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                work()
            except BaseException as failure:
                os.write(2, f"child: {failure!r}\\n".encode())
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status == 0, (work.__name__, status)

    X = torch.arange(8.0)
"""


def run_children(text: str) -> None:
    done = run_script(CHILDREN + text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done", (done.stdout, done.stderr)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_while_every_lock_is_held_passes_and_updates() -> None:
    """K01: forked while stage and passes run and every lock of the slot is held, a child serves, updates and goes back.

    The parent finishes its stage afterwards as if nothing had been.
    """
    run_children(
        """
    torch.set_num_threads(1)
    slot = hotglm.ModuleSlot(make(0), name="chain", version="1.0.0")
    slot.update(make_state(1), version="1.0.1")
    stop, reached, wakes = threading.Event(), threading.Event(), threading.Event()
    failures = []

    def read():
        while not stop.is_set():
            with torch.no_grad():
                if not slot(X).equal(expected(1)):
                    failures.append("torn")

    def update():
        receipts.append(slot.update("two.safetensors"))

    def child():
        with torch.no_grad():
            assert slot(X).equal(expected(1))
            slot.update(make_state(3), version="1.0.3")
            assert slot(X).equal(expected(3))
            slot.rollback()
            assert slot(X).equal(expected(1))
        heard = []
        slot.subscribe(heard.append)()
        slot.status()
        slot.close()

    os.chdir(os.environ["TMPDIR_OF_TEST"])
    hotglm.save_weights(make_state(2), "two.safetensors", version="1.0.2")
    receipts, readers = [], [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    with hooked(only_nth("preadv", 1, pause(reached, wakes))):
        updater = threading.Thread(target=update)
        updater.start()
        assert reached.wait(30)
        core = slot._core
        with core.admission._writer, core.subscribers._lock, core.stager._gate:
            fork(child)
        for _ in range(3):
            fork(child)
        wakes.set()
        stop.set()  # before the update becomes visible
        for reader in readers:
            reader.join()
        updater.join()
    assert str(slot.version) == "1.0.2" and failures == [], failures
    with torch.no_grad():
        assert slot(X).equal(expected(2))
    print("done")
    """.replace('os.environ["TMPDIR_OF_TEST"]', "__import__('tempfile').mkdtemp()")
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_after_torch_ran_in_parallel_does_not_hang() -> None:
    """K02: the parent's OpenMP threads are not there in a child; its passes run on one thread, to the same answer."""
    run_children("""
    torch.set_num_threads(2)
    big = torch.nn.Linear(1024, 1024)
    slot = hotglm.ModuleSlot(big, name="big", version="1.0.0")
    x = torch.ones(512, 1024)
    with torch.no_grad():
        answer = slot(x)

    def child():
        assert torch.get_num_threads() == 1
        with torch.no_grad():
            assert torch.allclose(slot(x), answer, rtol=1e-4, atol=1e-4)
            slot.update({name: tensor.clone() for name, tensor in slot.state_dict().items()}, version="1.0.1")
            assert torch.allclose(slot(x), answer, rtol=1e-4, atol=1e-4)

    fork(child)
    assert torch.get_num_threads() == 2
    print("done")
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_workers_forked_from_one_parent_converge_to_one_version() -> None:
    """K03: four workers of a preloading server each load the same file and end with the same digest."""
    run_children("""
    import tempfile
    slot = hotglm.ModuleSlot(make(0), name="chain", version="1.0.0")
    os.chdir(tempfile.mkdtemp())
    hotglm.save_weights(make_state(5), "five.safetensors", version="1.0.5")

    def child():
        receipt = slot.update("five.safetensors")
        with torch.no_grad():
            assert slot(X).equal(expected(5))
        os.write(pipe[1], (receipt.digest + "\\n").encode())

    pipe = os.pipe()
    for _ in range(4):
        fork(child)
    os.close(pipe[1])
    digests = os.read(pipe[0], 10_000).decode().split()
    assert len(digests) == 4 and len(set(digests)) == 1, digests
    assert str(slot.version) == "1.0.0"
    print("done")
    """)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_slot_goes_to_a_worker_of_multiprocessing(method: str) -> None:
    """K03: a slot that is an argument of a new process serves and updates there, and the parent's is not touched."""
    done = run_script(
        """
        import multiprocessing, os, sys
        import torch, hotglm
        from support.fork_worker import serve
        from support.universal import Chain, make_state

        context = multiprocessing.get_context(sys.argv[1])
        slot = hotglm.ModuleSlot(Chain(), name="chain", version="1.0.0")
        slot.update(make_state(1), version="1.0.1")
        before = slot(torch.arange(8.0))
        answers = context.Queue()
        worker = context.Process(target=serve, args=(slot, answers))
        worker.start()
        print(answers.get(timeout=60))
        worker.join(60)
        assert worker.exitcode == 0
        assert str(slot.version) == "1.0.1" and slot(torch.arange(8.0)).equal(before)
        """,
        method,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.0.2"]


def test_sending_a_slot_to_another_process_does_not_share_its_live_memory() -> None:
    """P5: pickling a slot for another process leaves the live weights in memory that is the slot's alone."""
    slot = hotglm.ModuleSlot(Chain(), name="chain", version="1.0.0")
    slot.update(make_state(1), version="1.0.1")
    before = [parameter.data_ptr() for parameter in slot.parameters()]
    answer = slot(torch.arange(8.0))
    ForkingPickler(io.BytesIO()).dump(slot)
    assert [parameter.data_ptr() for parameter in slot.parameters()] == before
    assert slot(torch.arange(8.0)).equal(answer)
