"""From published to live: a watcher that polls or hears events, against a reload loop; and a burst of 12 000.

The reload loop is what services write: it looks at the time of one file, loads it and calls `load_state_dict` on the
live model. It polls as often as the watcher does. It verifies nothing and tears passes; here only its time counts.
"""

from __future__ import annotations

import importlib.util
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from safetensors.torch import load_file

import hotglm
from benchmarks.bench import MIB, Bench, Row, Sample, alternate, at_most, describe_size
from benchmarks.files import make_weights
from benchmarks.models import Stack
from hotglm.events import CommittedEvent, Event
from hotglm.manifest import format_manifest
from hotglm.manifest_fields import MANIFEST_NAME
from hotglm.release.store_reading import release_name
from hotglm.watching.follow import parse_follow
from hotglm.watching.scanning import Scanner

__all__ = ["BurstProbe", "LatencyProbe", "measure"]

_NUM_TENSORS = 32
_BURST = 12_000
_PEER = "a loop that polls one file's time, load_state_dict(load_file)"


def measure(bench: Bench) -> list[Row]:
    """Return the rows."""
    files = [make_weights(bench, nbytes=bench.size(64 * MIB), num_tensors=_NUM_TENSORS, seed=seed) for seed in (1, 2)]
    plain = {**asdict(files[0]), "other": files[1].path, "directory": bench.directory}
    interval_s = 0.05 if bench.quick else 0.5
    rounds = bench.rounds(15)
    found = bench.ask_once("benchmarks.watching:LatencyProbe", "run", rounds=rounds, interval_s=interval_s, **plain)
    burst = bench.ask_once(
        "benchmarks.watching:BurstProbe", "run", num=60 if bench.quick else _BURST, interval_s=2 * interval_s, **plain
    )
    size = describe_size(files[0].nbytes)
    return [
        *(_compare(size, interval_s, found, how) for how in ("polling", "events") if how in found),
        *_describe_burst(burst, 2 * interval_s),
    ]


def _compare(size: str, interval_s: float, found: dict[str, list[float]], how: str) -> Row:
    ours, peer = Sample.of(found[how]), Sample.of(found["peer"])
    half = f"half an interval ({interval_s / 2 * 1e3:.0f} ms) is waiting, on average"
    return Row(
        group="watching",
        name=f"published to live, {size}, {how}",
        hotglm=ours,
        peer=peer,
        peer_name=_PEER,
        unit="ms",
        ratio=peer.median / ours.median,
        ratio_name="peer / hotglm",
        note="hotglm verifies every tensor and answers in one version; " + (half if how == "polling" else "no waiting"),
    )


def _describe_burst(found: dict[str, Any], interval_s: float) -> list[Row]:
    ratio = max(0.0, found["live_s"] - found["load_s"]) / interval_s
    looks = Sample.of(found["looks"])
    return [
        Row(
            group="watching",
            name=f"a burst of {found['num']} releases: last one published to live",
            hotglm=Sample.of([found["live_s"]]),
            peer=Sample.of([found["load_s"]]),
            peer_name="the load of that release alone",
            unit="ms",
            ratio=ratio,
            ratio_name="time beyond the load, in poll intervals",
            target="<= 1 interval",
            met=at_most(ratio, 1),
            note=f"interval {interval_s * 1e3:.0f} ms; {found['skipped']} skipped, {found['commits']} went live",
        ),
        Row(
            group="watching",
            name=f"one look at {found['num']} releases, nothing new",
            hotglm=looks,
            peer=Sample.of(found["listings"]),
            peer_name="parsing every name at each look",
            unit="ms",
            ratio=Sample.of(found["listings"]).median / looks.median,
            ratio_name="peer / hotglm",
            note=f"the first look takes {found['first_s'] * 1e3:.0f} ms",
        ),
    ]


class LatencyProbe:
    """Publishes again and again, and notes when each version is live on every side."""

    def __init__(
        self, *, path: str, other: str, directory: str, nbytes: int, num_tensors: int, rounds: int, interval_s: float
    ) -> None:
        """Remember the files; the sides are made when they are measured."""
        self._files = (path, other)
        self._directory = directory
        self._size = {"nbytes": nbytes, "num_tensors": num_tensors}
        self._rounds, self._interval_s = rounds, interval_s
        self._random = random.Random(7)

    def run(self) -> dict[str, list[float]]:
        """Return the seconds from published to live, by side."""
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            peer = _Reloader(os.path.join(directory, "live.safetensors"), Stack(**self._size), self._interval_s)
            kinds = ["polling", *(["events"] if importlib.util.find_spec("watchfiles") else [])]
            watched = {
                kind: _Watched(os.path.join(directory, kind), Stack(**self._size), self._policy(kind)) for kind in kinds
            }
            sides = {kind: self._side(one) for kind, one in watched.items()} | {"peer": self._side(peer)}
            try:
                for side in sides.values():
                    side()
                found = alternate(sides, rounds=self._rounds)
            finally:
                for one in watched.values():
                    one.close()
                peer.close()
        return {name: list(sample.values) for name, sample in found.items()}

    def _policy(self, kind: str) -> hotglm.WatchPolicy:
        if kind == "events":
            return hotglm.WatchPolicy(interval_s=60.0, uses_events=True, debounce_s=0.001)
        return hotglm.WatchPolicy(interval_s=self._interval_s)

    def _side(self, one: _Watched | _Reloader) -> Callable[[], float]:
        def publish() -> float:
            time.sleep(self._random.random() * self._interval_s)  # at any moment between two looks
            return one.publish(self._files[one.num % 2])

        return publish


class _Watched:
    """A store and a slot that follows it."""

    def __init__(self, path: str, model: Stack, policy: hotglm.WatchPolicy) -> None:
        self.num = 0
        self._live = _Moment()
        self._store = hotglm.open_store(path, creates=True)
        self._slot = hotglm.ModuleSlot(model, name="stack", version="1.0.0")
        self._slot.subscribe(self._hear)
        self._watcher = hotglm.watch(self._slot, self._store, follow=">=1,<2", policy=policy)

    def publish(self, file: str) -> float:
        """Publish the next version, and return in how many seconds after that it was live."""
        self.num += 1
        self._live.clear()
        self._store.publish(file, name="stack", version=f"1.0.{self.num}")
        published_s = time.monotonic()
        live_s = self._live.wait()
        assert str(self._slot.version) == f"1.0.{self.num}"
        return max(0.0, live_s - published_s)

    def close(self) -> None:
        self._watcher.close()

    def _hear(self, event: Event) -> None:
        if isinstance(event, CommittedEvent) and event.version == f"1.0.{self.num}":
            self._live.note(event.at_s)


class _Reloader:
    """A thread that polls one file and loads it into the live model."""

    def __init__(self, path: str, model: Stack, interval_s: float) -> None:
        self.num = 0
        self._path, self._model, self._interval_s = path, model, interval_s
        self._live = _Moment()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def publish(self, file: str) -> float:
        """Put another file in place, and return in how many seconds after that it was loaded."""
        self.num += 1
        self._live.clear()
        with open(file, "rb") as source, open(f"{self._path}.new", "wb") as target:
            while chunk := source.read(16 * MIB):
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        os.replace(f"{self._path}.new", self._path)
        published_s = time.monotonic()
        return max(0.0, self._live.wait() - published_s)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        seen = 0
        while not self._stop.wait(self._interval_s):
            try:
                found = os.stat(self._path).st_mtime_ns
            except FileNotFoundError:
                continue
            if found != seen:
                seen = found
                self._model.load_state_dict(load_file(self._path))
                self._live.note(time.monotonic())


class _Moment:
    """When something happened, for one who waits for it."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._at_s = 0.0

    def clear(self) -> None:
        self._event.clear()

    def note(self, at_s: float) -> None:
        self._at_s = at_s
        self._event.set()

    def wait(self) -> float:
        assert self._event.wait(120), "it never went live"
        return self._at_s


class BurstProbe:
    """Publishes thousands of releases at once, of which only the last one matters."""

    def __init__(
        self, *, path: str, other: str, directory: str, nbytes: int, num_tensors: int, num: int, interval_s: float
    ) -> None:
        """Remember what to publish."""
        self._files = (path, other)
        self._directory = directory
        self._size = {"nbytes": nbytes, "num_tensors": num_tensors}
        self._num, self._interval_s = num, interval_s

    def run(self) -> dict[str, Any]:
        """Return what was found, in seconds."""
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            policy = hotglm.WatchPolicy(interval_s=self._interval_s)
            watched = _Watched(os.path.join(directory, "store"), Stack(**self._size), policy)
            try:
                watched.publish(self._files[0])
                found = self._flood(watched)
            finally:
                watched.close()
            return {**found, **self._look(watched)}

    def _flood(self, watched: _Watched) -> dict[str, Any]:
        with watched._store.open_release("1.0.1") as first:
            for number in range(2, self._num + 2):
                _publish_copy(first, watched._store, number)
        watched.num = self._num + 1
        live_s = watched.publish(self._files[1])
        counts = watched._watcher.status().counts
        timings = watched._slot.stage(watched._store.find_release(f"1.0.{watched.num}").path).timings
        load_s = sum(timing.duration_s for timing in timings)
        return {"live_s": live_s, "load_s": load_s, "skipped": counts.skipped, "commits": counts.commits}

    def _look(self, watched: _Watched) -> dict[str, Any]:
        store, follow = watched._store, parse_follow(">=1,<2")
        scanner = Scanner(store, follow)
        looks = [_time(lambda: scanner.scan(lambda _: False)) for _ in range(6)]
        listings = [_time(lambda: Scanner(store, follow).scan(lambda _: False)) for _ in range(5)]
        return {"num": self._num, "first_s": looks[0], "looks": looks[1:], "listings": listings}


def _publish_copy(release: hotglm.Release, store: hotglm.Store, number: int) -> None:
    """Publish the content of a release under another number and version, as fast as a disk takes it."""
    manifest = replace(release.manifest, version=hotglm.Version(f"1.0.{number}"), sequence=number)
    made = store.join("tmp", f"{number}")
    os.mkdir(made)
    for name in manifest.files:
        os.link(release.find_path(name), os.path.join(made, name))
    with open(os.path.join(made, MANIFEST_NAME), "wb") as file:
        file.write(format_manifest(manifest))
    os.rename(made, store.join("releases", release_name(number, manifest.version)))


def _time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
