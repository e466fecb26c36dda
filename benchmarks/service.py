"""A small service, as somebody would write one: loads a model, answers over a Unix socket, swaps on demand.

`python -m benchmarks.service ADDRESS WEIGHTS NBYTES NUM_TENSORS`. Each line that a client sends is one request: `pass`
runs a pass, `update PATH` updates the slot; the answer is `done`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socketserver
import sys

import torch

import hotglm
from benchmarks.models import Stack

__all__ = ["main"]


class _Handler(socketserver.StreamRequestHandler):
    """One client, in a thread of its own."""

    def handle(self) -> None:
        """Answer line by line until the client leaves."""
        server = self.server
        assert isinstance(server, _Server)
        for line in self.rfile:
            word, _, path = line.decode().strip().partition(" ")
            if word == "update":
                server.slot.update(path)
            else:
                with torch.no_grad():
                    server.slot(server.x)
            self.wfile.write(b"done\n")


class _Server(socketserver.ThreadingUnixStreamServer):
    """The socket, and the slot behind it."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: str, slot: hotglm.ModuleSlot, x: torch.Tensor) -> None:
        """Listen from now on."""
        self.slot = slot
        self.x = x
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
        super().__init__(address, _Handler)


def main(address: str, path: str, nbytes: int, num_tensors: int) -> None:
    """Load the weights, then serve until SIGTERM."""
    torch.set_num_threads(1)
    slot = hotglm.ModuleSlot(Stack(nbytes=nbytes, num_tensors=num_tensors), name="service", version="1.0.0")
    slot.update(path)
    module = slot.live.module
    assert isinstance(module, Stack)
    with _Server(address, slot, torch.zeros(1, module.side)) as server:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # passes that run are cut off, as by any supervisor
        server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
