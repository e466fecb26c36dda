"""One process of a pool that follows a store: `python -m support.watch_worker STORE`.

It says on its standard output what it serves whenever that changes, as a line `VERSION live|confirmed` (the version
that passes answer as, not the one that the slot claims), and ends when its standard input does.
"""

from __future__ import annotations

import sys
import threading

import torch

import hotglm
from support.universal import Chain, make_state

__all__ = ["NUM_WEIGHTS", "POLICY"]

NUM_WEIGHTS = 13
POLICY = hotglm.WatchPolicy(interval_s=0.02, trial_s=0.05, retry_s=0.02, max_retry_s=0.2)


def main(path: str) -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    chain = Chain()
    chain.load_state_dict(make_state(0))
    slot = hotglm.ModuleSlot(chain, name="chain", version="1.0.0")
    store = hotglm.open_store(path)
    confirmed_before = store.service("pool").start()
    watcher = hotglm.watch(slot, store, service="pool", policy=POLICY)
    if confirmed_before is not None and str(slot.version) != confirmed_before.version:
        now = store.service("pool").start()
        assert now is not None and str(slot.version) == now.version, (slot.version, confirmed_before, now)
    done = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
    print(f"started {slot.version}", flush=True)
    said = ""
    while not done.wait(0.01):
        with slot.acquire() as generation, torch.no_grad():
            text = f"{generation.version} {generation.module(torch.arange(8.0)).tolist()[0]:.1f}"
        if text != said:
            said = text
            print(text, flush=True)
    watcher.close()
    print(f"ended {slot.version}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
