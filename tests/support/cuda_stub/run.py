"""Run something under a CUDA build of torch on a machine without a device: builds the stub and puts it before CUDA.

    PYTHONPATH=. python tests/support/cuda_stub/run.py -m pytest -m gpu tests/gpu

What runs is torch's own CUDA code: streams, events, allocator, graphs, copies. CUDA itself does not (`stub.c`). The
kernels that torch launches are carried out on the processor (`simulated_kernels.py`). So it finds calls that torch does
not take, waits that are missing, calls that end a capture, contexts on devices that nobody uses, blocks that end the
process. It says nothing of what a driver does, and nothing of speed.

Needs torch for CUDA 13 as its wheels bring it, with the headers of the runtime and of triton, and a C compiler.

    FAKE_CUDA_LAG_US   how late copies are, at random around so many microseconds; 0
    FAKE_CUDA_MEMORY   bytes of each of the two devices; 8e9
    FAKE_CUDA_TRACE    say who makes a context on which device
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def build(directory: Path) -> Path:
    """Compile the stub, under the name of the driver's library."""
    packages = Path(sysconfig.get_paths()["purelib"])
    patterns = ("nvidia/*/include/cuda_runtime_api.h", "triton/backends/nvidia/include/cuda_runtime_api.h")
    headers = [str(found.parent) for pattern in patterns for found in packages.glob(pattern)]  # triton's have `crt/`
    library = directory / "libcuda.so.1"
    include = [f"-I{path}" for path in headers]
    command = ["cc", "-shared", "-fPIC", "-O1", *include, "-o", str(library), str(HERE / "stub.c"), "-lpthread"]
    subprocess.run(command, check=True)
    return library


def main(arguments: list[str]) -> int:
    """Run Python with `arguments` over the stub; return its exit status."""
    with tempfile.TemporaryDirectory(prefix="hotglm-cuda-stub-") as directory:
        library = build(Path(directory))
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [directory, os.environ.get("LD_LIBRARY_PATH")])),
            "LD_PRELOAD": str(library),
            "PYTEST_PLUGINS": "simulated_kernels",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        return subprocess.run([sys.executable, *arguments], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
