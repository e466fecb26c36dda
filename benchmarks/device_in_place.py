"""Swaps in place on a device: how long passes are held back, beside what the device and the bus can do.

Passes are held back for two copies of every byte: an exchange keeps what it replaces. So its peer is two plain copies
of the same tensors on the device, measured in the same run; and, as what a service would do without a staged image, a
copy of pinned host memory into the existing storages. `commit()` itself returns after a third copy, while passes run
again; it has a row of its own, without a target.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import torch
from torch import nn

import hotglm
from benchmarks.bench import Bench, Row, Sample, describe_size
from benchmarks.device_setting import Setting, timed, to_row

__all__ = ["measure"]

_PIN_NBYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class _Commits:
    """What commits in place took: the exchange, the gate, and the call."""

    copied: Sample
    closed: Sample
    call: Sample


def measure(bench: Bench, setting: Setting) -> list[Row]:
    """Return the rows of issue 3 that concern commits in place."""
    module = setting.build()
    parameters = [parameter.detach() for parameter in module.parameters()]
    plain = Sample.of([_copy_twice(parameters) for _ in range(bench.rounds(7))])
    pinned = Sample.of([_copy_from_host(parameters) for _ in range(bench.rounds(3))])
    _let_go()
    staged_there = _commit(module, setting, rounds=bench.rounds(7), swap=hotglm.InPlace(image="device"))
    _let_go()
    staged_here = _commit(module, setting, rounds=bench.rounds(3), swap=hotglm.InPlace(image="host"))
    return _compare(setting, staged_there, staged_here, plain=plain, pinned=pinned)


def _let_go() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _compare(setting: Setting, there: _Commits, here: _Commits, *, plain: Sample, pinned: Sample) -> list[Row]:
    size = describe_size(setting.nbytes)
    return [
        to_row(
            f"commit, in place, the exchange of {size}: each byte is copied twice",
            ours=there.copied,
            peer=plain,
            peer_name="two plain device copies of the same tensors",
            ratio=plain.median / there.copied.median,
            ratio_name="rate / device copy rate",
            limit=0.8,
        ),
        to_row(
            f"commit, in place, passes held back, {size}",
            ours=there.closed,
            peer=pinned,
            peer_name="pinned host memory into the existing storages",
            ratio=pinned.median / there.closed.median,
            ratio_name="peer / hotglm",
            limit=15,
        ),
        _plain_row(f"commit(), in place, {size}", ours=there.call, peer=pinned),
        _plain_row(f"commit, in place, image on the host, passes held back, {size}", ours=here.closed, peer=pinned),
    ]


def _plain_row(name: str, *, ours: Sample, peer: Sample) -> Row:
    return Row(
        group="device",
        name=name,
        hotglm=ours,
        peer=peer,
        peer_name="pinned host memory into the existing storages",
        unit="ms",
        ratio=peer.median / ours.median,
        ratio_name="peer / hotglm",
    )


def _copy_twice(parameters: list[torch.Tensor]) -> float:
    others = [torch.empty_like(parameter) for parameter in parameters]

    def copy() -> None:
        for sources, targets in ((parameters, others), (others, parameters)):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)

    copy()
    return timed(copy)


def _copy_from_host(parameters: list[torch.Tensor]) -> float:
    """Copy as many bytes as the model has from 1 GiB of pinned memory, again and again."""
    host = torch.empty(_PIN_NBYTES // 2, dtype=torch.bfloat16, pin_memory=True).zero_()
    numel = parameters[0].numel()
    pieces = [piece for piece in torch.split(host, numel) if piece.numel() == numel]

    def copy() -> None:
        for index, parameter in enumerate(parameters):
            parameter.view(-1).copy_(pieces[index % len(pieces)], non_blocking=True)

    return timed(copy)


def _commit(module: nn.Module, setting: Setting, *, rounds: int, swap: hotglm.InPlace) -> _Commits:
    """Commit in turns the two files; a graph that was captured before replays what is live after each."""
    slot = hotglm.ModuleSlot(module, name="m", version="1.0.0", swap=swap, policy=hotglm.StagePolicy(reuse=False))
    x = torch.randn(8, setting.side, dtype=torch.bfloat16, device="cuda")
    graph, found = _capture(slot, x)
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    records, calls = [], []
    for number in range(rounds + 1):
        staged = slot.stage(setting.paths[number % 2], version=f"1.0.{number + 1}")
        torch.cuda.synchronize()
        started = time.perf_counter()
        receipt = slot.commit(staged)
        calls.append(time.perf_counter() - started)
        assert receipt.in_place is not None
        records.append(receipt.in_place)
        graph.replay()
        assert torch.equal(found, slot(x)), "a graph must replay what a pass reads, bit for bit"
        assert receipt.in_place.addresses_stable
    assert addresses == [parameter.data_ptr() for parameter in module.parameters()]
    return _Commits(
        copied=Sample.of([record.copied_s for record in records[1:]]),  # the first one makes streams, and events
        closed=Sample.of([record.closed_s for record in records[1:]]),
        call=Sample.of(calls[1:]),
    )


def _capture(slot: nn.Module, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        slot(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found: torch.Tensor = slot(x)
    return graph, found
