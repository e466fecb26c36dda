"""The peer that restarts: the same classifier in a process of its own, asked over a local socket.

Rules this module keeps:

- The server is what a restart deserves: it imports torch and the model and nothing of the demo beside, loads the
  weights, says that it is ready, and ends when it is told to, after the requests in flight.
- A client connects for each request, as a load balancer's health probe does; no retry hides a failure.
- The socket is a file in the demo's own folder; nothing leaves the machine, and nothing outlives `Service`.
"""

from __future__ import annotations

import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors.torch import load_file

import hotglm
from hotglm.demo.classifier import NUM_CLASSES, NUM_PIXELS, Digits

__all__ = ["Service", "ServiceError"]

_SHEET_NBYTES = 16 * NUM_PIXELS * 4
_LOGITS_NBYTES = 16 * NUM_CLASSES * 4
_TIMEOUT_S = 30.0


class ServiceError(Exception):
    """The service did not start, or gave no answer."""


class Service:
    """A process that serves one release at a time; leaving the `with` block ends it."""

    def __init__(self, folder: Path) -> None:
        """Name the socket in `folder`; starts nothing yet."""
        self._address = str(folder / "digits.socket")
        self._process: subprocess.Popen[str] | None = None

    def start(self, release: Path) -> None:
        """Start the process on `release` and return once it answers.

        Raises:
            ServiceError: it ended before it was ready.
        """
        command = [sys.executable, "-m", __name__, str(release), self._address]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_make_environment()
        )
        output = self._process.stdout
        line = output.readline() if output else ""
        if line.strip() != "ready":
            self.stop()
            raise ServiceError(f"Expected the service to become ready, got {line!r}.")

    def stop(self) -> None:
        """Ask the process to end and wait until it has; does nothing where none runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()

    def ask(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of a sheet, from whichever process answers; callable from any thread.

        Raises:
            OSError: nobody answered.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(self._address)
            connection.sendall(images.numpy().tobytes())
            content = _receive(connection, _LOGITS_NBYTES)
        return torch.frombuffer(content, dtype=torch.float32).view(-1, NUM_CLASSES)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process."""
        self.stop()


def _make_environment() -> dict[str, str]:
    """Return this environment, with hotglm importable in the child from where it was imported here."""
    root = str(Path(hotglm.__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, path] if path else [root])}


def _receive(connection: socket.socket, nbytes: int) -> bytearray:
    content = bytearray()
    while len(content) < nbytes:
        part = connection.recv(nbytes - len(content))
        if not part:
            raise ConnectionResetError(f"Expected {nbytes} bytes, got {len(content)}.")
        content += part
    return content


# -- the process -------------------------------------------------------------------------------------------------------


class _Handler(socketserver.BaseRequestHandler):
    """Answers one request."""

    server: _Server  # type: ignore[mutable-override]  # narrowed, as socketserver means it to be

    def handle(self) -> None:
        """Read a sheet, classify it, write the logits."""
        try:
            content = _receive(self.request, _SHEET_NBYTES)
        except ConnectionError:
            return  # the client left before it had asked
        images = torch.frombuffer(content, dtype=torch.float32).view(-1, NUM_PIXELS)
        with torch.inference_mode():
            logits = self.server.model(images)
        self.request.sendall(logits.numpy().tobytes())


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A thread for each request; closing waits for those in flight."""

    request_queue_size = 128

    def __init__(self, address: str, model: Digits) -> None:
        super().__init__(address, _Handler)
        self.model = model


def _serve(release: str, address: str) -> None:
    torch.set_num_threads(1)
    model = Digits()
    model.load_state_dict(load_file(release))
    Path(address).unlink(missing_ok=True)
    with _Server(address, model.eval().requires_grad_(requires_grad=False)) as server:
        # From another thread, because `shutdown` waits for `serve_forever`, which runs in the one that gets the signal.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        threading.Thread(target=_stop_with_parent, args=(server,), daemon=True).start()
        print("ready", flush=True)
        server.serve_forever(poll_interval=0.01)


def _stop_with_parent(server: _Server) -> None:
    """Wait for the end of standard input, which the parent holds open for as long as it lives, and stop."""
    os.read(0, 1)  # not `sys.stdin`, whose lock must not be held when the interpreter ends
    server.shutdown()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
