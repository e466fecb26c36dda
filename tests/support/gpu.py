"""What tests on a CUDA device share: a model that tells which version was read, and captures beside what is tested."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from hotglm.weights.ring import Window

__all__ = ["WIDTH", "Adder", "capturing", "forget_to_wait", "write_version"]

WIDTH = 1 << 20


class Adder(nn.Module):
    """Gives its weight back, plus its argument; every element tells which version was read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight + x


def write_version(directory: Path, number: int) -> Path:
    """Write weights for `Adder` that are all `number`."""
    path = directory / f"v{number}.safetensors"
    save_file({"weight": torch.full((WIDTH,), float(number))}, path)
    return path


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Have another thread capture and replay a graph over and over; what it raises is raised at the end."""
    problems: list[BaseException] = []
    stop, x = threading.Event(), torch.ones(64, 64, device="cuda")
    torch.mm(x, x)  # cuBLAS sets itself up outside of a capture

    def capture() -> None:
        try:
            while not stop.is_set():
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = x @ x
                graph.replay()
                assert float(y.sum()) == 64.0**3
        except BaseException as error:  # noqa: BLE001 - raised below, in the test's own thread
            problems.append(error)

    thread = threading.Thread(target=capture)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert problems == []


def forget_to_wait(window: Window, source: torch.Tensor) -> torch.Tensor:
    """Fetch, and give the window before the event of its copy: a planted bug, in place of `Window.fetch`."""
    target = window.tensor(0, source.numel())
    window.is_dirty = True
    window._ring.device.copy(source, target)
    return target
