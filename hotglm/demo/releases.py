"""The files of the demo: two good releases, and five that must not go live.

Rules this module keeps:

- Each bad release is made from a good one by the one thing its title says, as it happens to people: a copy that was cut
  short, a training that diverged, a layer of another width, a changed interface, a bit that flipped.
- What a release must be refused with is written down here, before anything is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import hotglm
from hotglm.demo.classifier import Digits
from hotglm.demo.training import Data, measure_accuracy, train

__all__ = ["NEW", "OLD", "BadRelease", "Release", "load_model", "make_bad_releases", "make_release"]

OLD, NEW = "1.0.0", "1.1.0"

# The same architecture both times. The first version saw 60 digits and was stopped early; the second saw all of them.
_TRAINING = {
    OLD: {"num_images": 60, "num_steps": 35, "learning_rate": 0.05},
    NEW: {"num_images": 100_000, "num_steps": 220, "learning_rate": 0.1},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A good release: its version, its file, and the accuracy it was measured with when it was made."""

    version: str
    path: Path
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRelease:
    """A release that must be refused: what is wrong with it, and the error that must say so."""

    title: str
    path: Path
    error: type[hotglm.HotglmError]


def make_release(version: str, data: Data, folder: Path) -> Release:
    """Train `version` and save it as a safetensors file in `folder`."""
    settings = _TRAINING[version]
    model = train(
        data,
        num_images=int(settings["num_images"]),
        num_steps=int(settings["num_steps"]),
        learning_rate=settings["learning_rate"],
    )
    path = folder / f"digits-{version}.safetensors"
    hotglm.save_weights(model, path, version=version)
    return Release(version=version, path=path, accuracy=measure_accuracy(model, data))


def load_model(path: Path) -> Digits:
    """Return a classifier of its own with the weights of a release, loaded cold and without hotglm."""
    model = Digits()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(requires_grad=False)


def make_bad_releases(good: Release, folder: Path) -> tuple[BadRelease, ...]:
    """Spoil copies of `good` in five ways, in `folder`."""
    return (
        BadRelease(title="truncated file", path=_truncate(good, folder), error=hotglm.HeaderError),
        BadRelease(title="NaN in the weights", path=_poison(good, folder), error=hotglm.NonFiniteError),
        BadRelease(title="wrong shape", path=_widen(good, folder), error=hotglm.IncompatibleError),
        BadRelease(title="2.0.0, another interface", path=_rename(good, folder), error=hotglm.IncompatibleError),
        BadRelease(title="one flipped bit", path=_flip(good, folder), error=hotglm.DigestMismatchError),
    )


def _truncate(good: Release, folder: Path) -> Path:
    path = folder / "truncated.safetensors"
    content = good.path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def _poison(good: Release, folder: Path) -> Path:
    tensors = load_file(good.path)
    tensors["layers.2.weight"][17, 4] = float("nan")
    return _save(tensors, folder / "diverged.safetensors", version="1.2.0")


def _widen(good: Release, folder: Path) -> Path:
    tensors = load_file(good.path)
    weight = tensors["layers.6.weight"]
    tensors["layers.6.weight"] = torch.cat([weight, weight[:1]])  # 11 classes
    return _save(tensors, folder / "widened.safetensors", version="1.2.0")


def _rename(good: Release, folder: Path) -> Path:
    return _save(load_file(good.path), folder / "digits-2.0.0.safetensors", version="2.0.0")


def _flip(good: Release, folder: Path) -> Path:
    # Of a version of its own: what is live already, by the digests in the file, is copied from there and not read.
    path = _save({name: tensor * 1.01 for name, tensor in load_file(good.path).items()}, folder / "flipped.safetensors",
                 version="1.2.0")  # fmt: skip
    content = bytearray(path.read_bytes())
    content[len(content) // 2 // 4 * 4 + 3] ^= 0x02  # in the exponent of one weight, whose sign it leaves alone
    path.write_bytes(content)
    return path


def _save(tensors: dict[str, torch.Tensor], path: Path, *, version: str) -> Path:
    hotglm.save_weights(tensors, path, version=version, name="digits")
    return path
