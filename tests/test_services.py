"""Services on disk: a new process starts on what was confirmed, and what a process died on is not tried again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hotglm.errors import StoreConflictError, StoreError
from hotglm.release.services import Service
from hotglm.release.store import Store
from hotglm.release.store_opening import open_store
from support.releases import write_source

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a store of 1.0.0, 1.1.0 and 1.2.0."""
    made = open_store(tmp_path / "store", creates=True)
    for seed in range(3):
        made.publish(write_source(tmp_path / str(seed), seed=seed), name="ranker", version=f"1.{seed}.0")
    return made


@pytest.fixture
def service(store: Store) -> Service:
    return store.service("api")


def confirm(store: Store, version: str) -> None:
    with store.open_release(version) as release:
        store.service("api").begin(release).confirm()


def code_of_beginning(store: Store, version: str) -> str | None:
    """Return the code that a trial is refused with; None where it is not, and then it has failed."""
    with store.open_release(version) as release:
        try:
            store.service("api").begin(release).fail("asked")
        except StoreConflictError as error:
            return error.code
    return None


TRY = """
import sys
from hotglm.release.store_opening import open_store
store = open_store(sys.argv[1])
release = store.open_release(sys.argv[2])
trial = store.service("api").begin(release)
print("on trial", flush=True)
sys.stdin.read()
trial.confirm()
"""


def start_trial(store: Store, version: str) -> subprocess.Popen[str]:
    """Start a process that is on trial when this returns, and confirms when its input ends."""
    command = [sys.executable, "-c", TRY, store.path, version]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "on trial\n"
    return process


def test_a_service_starts_on_what_it_confirmed(store: Store, service: Service) -> None:
    """S10: before the first confirmation there is nothing; then the release that was confirmed last."""
    assert service.start() is None
    confirm(store, "1.0.0")
    confirm(store, "1.1.0")
    confirmed = service.start()
    assert confirmed is not None
    with store.open_release(confirmed.sequence) as release:
        assert (release.digest, str(release.manifest.version)) == (confirmed.digest, "1.1.0")


def test_a_process_that_died_on_trial_leaves_the_confirmed_release(store: Store, service: Service) -> None:
    """S11, I04: SIGKILL on trial: the next process starts on the confirmed release and may not try the same bytes."""
    confirm(store, "1.0.0")
    with start_trial(store, "1.1.0") as process:
        alive = service.start()  # another process of the pool starts meanwhile, and disturbs nothing
        assert alive is not None
        assert alive.version == "1.0.0"
        assert [trial.release.version for trial in service.read().trials] == ["1.1.0"]
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    after = service.start()
    assert after == alive
    state = service.read()
    assert state.trials == ()
    assert [(one.release.version, one.reason.split(",")[0]) for one in state.refused] == [
        ("1.1.0", "a process died while it tried it")
    ]
    assert code_of_beginning(store, "1.1.0") == "REFUSED"
    assert code_of_beginning(store, "1.2.0") is None


def test_a_trial_that_ends_well_is_confirmed(store: Store, service: Service) -> None:
    """S10: what a process of its own confirmed is what the next one starts on; nothing is left of the trial."""
    with start_trial(store, "1.1.0") as process:
        process.communicate("", timeout=30)
    assert process.returncode == 0
    confirmed = service.start()
    assert confirmed is not None
    assert confirmed.version == "1.1.0"
    assert sorted(path.name for path in Path(store.join("services")).iterdir()) == ["api.json"]


def test_one_death_refuses_the_release_for_the_whole_pool(store: Store, service: Service) -> None:
    """S11: while others try the same release, the death of one refuses it, and they cannot confirm it any more."""
    confirm(store, "1.0.0")
    with store.open_release("1.1.0") as release, service.begin(release) as trial:
        with start_trial(store, "1.1.0") as process:
            process.kill()
            process.wait(30)
        with pytest.raises(StoreConflictError) as refusal:
            trial.confirm()
        assert refusal.value.code == "REFUSED"
    confirmed = service.start()
    assert confirmed is not None
    assert confirmed.version == "1.0.0"


def test_a_failed_release_is_refused_until_it_is_forgiven(store: Store, service: Service) -> None:
    """S11: a failure is remembered with its reason, by the digest; other releases are not touched by it."""
    with store.open_release("1.1.0") as release:
        trial = service.begin(release)
        trial.fail("latency x10")
        for end in (trial.confirm, lambda: trial.fail("again")):
            with pytest.raises(StoreConflictError) as refusal:
                end()
            assert refusal.value.code == "NO_TRIAL"
        with pytest.raises(StoreConflictError, match="latency x10"):
            service.begin(release)
        service.forgive(release.digest)
        service.begin(release).confirm()


def test_a_trial_that_is_given_up_counts_as_a_death(store: Store, service: Service) -> None:
    """S11: leaving the body without `confirm` or `fail` is no success, and the release is not tried again."""
    with store.open_release("1.1.0") as release, service.begin(release):
        pass
    assert service.start() is None
    assert code_of_beginning(store, "1.1.0") == "REFUSED"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_that_is_forked_under_the_lock_does_not_keep_it(store: Store) -> None:
    """K01: forked in the middle of a change, a child that lives on keeps nobody from the next change."""
    read, write = os.pipe()
    with store.locked():
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent closes its end
            os._exit(0)
    try:
        quick = open_store(store.path, lock_timeout_s=0.05)
        assert quick.service("api").start() is None
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def test_services_do_not_know_each_other(store: Store) -> None:
    """What one service refuses or confirms is nothing to another."""
    with store.open_release("1.1.0") as release:
        store.service("a").begin(release).fail("no")
        store.service("b").begin(release).confirm()
    assert store.service("a").start() is None
    assert store.service("b").start() is not None


def test_a_damaged_record_is_refused(store: Store, service: Service) -> None:
    """B28: a record that is not what was written stops the start; it is never taken for "nothing was refused"."""
    confirm(store, "1.0.0")
    path = Path(store.join("services", "api.json"))
    content = path.read_text()
    for text in ("", content[:-20], content.replace('"confirmed"', '"confirmd"'), "\x00"):
        path.write_text(text)
        for ask in (service.start, service.read, store.collect_garbage):
            with pytest.raises(StoreError):
                ask()
    path.write_text(content)
    assert service.start() is not None
