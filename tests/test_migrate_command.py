"""Migrating and stamping weights on disk: bitwise what a migrated load gives, atomic, and told before it is done."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hotglm
from hotglm.cli import main
from hotglm.commands.progress import ProgressBar
from hotglm.migration.expression import Source
from hotglm.migration.plan import StatePlan
from hotglm.progress import Progress
from hotglm.release.files import open_weights
from hotglm.weights.digest import digest_tensor
from hotglm.weights.dtypes import TORCH_DTYPES
from hotglm.weights.migration import load_migrated
from hotglm.weights.proof import LoadOptions
from hotglm.weights.workers import count_cores
from support import family
from support.peak import read_peak
from support.spares import Spare

TESTS = Path(__file__).parent


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _save_family(version: str, path: Path) -> Path:
    state, config = family.make_checkpoint(version), family.make_config(version)
    hotglm.save_weights(state, path, version=version, name=family.NAME, config=config)
    return path


def _load(path: Path, plan: StatePlan) -> dict[str, torch.Tensor]:
    """Return what a migrated load brings into the arena."""
    like = {name: torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) for name, spec in plan.specs.items()}
    spare = Spare(like)
    with open_weights(path) as files:
        load_migrated(files, plan, spare.targets, lease=spare.lease, options=LoadOptions())
    return {name: spare[name] for name in plan.outputs}


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype is other[name].dtype
        and one[name].shape == other[name].shape
        and digest_tensor(one[name]) == digest_tensor(other[name])
        for name in one
    )


# -- the function ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", family.VERSIONS)
@pytest.mark.parametrize("old", family.VERSIONS)
def test_on_disk_and_on_load_are_the_same(old: str, new: str, tmp_path: Path) -> None:
    """A file migrated on disk holds bitwise what the reference makes, with its version, config and digests."""
    source, target = _save_family(old, tmp_path / "old.safetensors"), tmp_path / "new.safetensors"
    digests = hotglm.migrate_weights(source, target, migrations=family.MIGRATIONS, to=new)
    found, expected = load_file(target), family.convert(family.make_checkpoint(old), old, new)
    assert _same(found, expected)
    metadata = _metadata(target)
    assert metadata["hotglm.version"] == new
    assert json.loads(metadata["hotglm.config"]) == family.make_config(new)
    assert json.loads(metadata["hotglm.digests"]) == digests
    assert digests == {name: digest_tensor(tensor) for name, tensor in expected.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.safetensors", "old.safetensors"]


def _mix(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"mixed": given["x"].T.contiguous() * 3, "rest": given["x"][0].clone()}


def test_every_operation_gives_the_same_bytes_on_disk_and_on_load(tmp_path: Path) -> None:
    """Whatever the operation, the bytes of the migrated file are those of the migrated load."""
    torch.manual_seed(0)
    state = {
        "old.w": torch.randn(3, 4),
        "qkv": torch.randn(6, 4),
        "a": torch.randn(2, 3),
        "b": torch.randn(2, 3),
        "s0": torch.randn(4),
        "s1": torch.randn(4),
        "un": torch.randn(2, 5),
        "tr": torch.randn(2, 3),
        "pe": torch.randn(2, 3, 4),
        "re": torch.randn(2, 6),
        "sl": torch.randn(5, 3),
        "pa": torch.randn(3, 2).bfloat16(),
        "ca": torch.randn(7).bfloat16(),
        "sc": torch.randn(3, 3).half(),
        "t0": torch.ones(3),
        "t1": torch.ones(3),
        "ut": torch.randn(3),
        "dr": torch.randn(2),
        "x": torch.randn(2, 3),
        "flag": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
    }
    spec = hotglm.TensorSpec
    steps = hotglm.Migrations("all")
    steps.state(
        "1",
        "2",
        [
            hotglm.Rename(r"old\.(.*)", r"new.\1"),
            hotglm.Split("qkv", ("q", "k", "v")),
            hotglm.Concatenate(("a", "b"), "ab", dim=1),
            hotglm.Stack(("s0", "s1"), "s"),
            hotglm.Unstack("un", ("u0", "u1")),
            hotglm.Transpose("tr", 0, 1),
            hotglm.Permute("pe", (2, 0, 1)),
            hotglm.Reshape("re", (3, 4)),
            hotglm.Slice("sl", 0, 1, 4),
            hotglm.Pad("pa", 1, before=1, after=2, value=0.1),
            hotglm.Cast("ca", "float32"),
            hotglm.Scale("sc", 0.5),
            hotglm.Tie(("t0", "t1")),
            hotglm.Untie(("ut", "ut2")),
            hotglm.Drop("dr"),
            hotglm.Add("zero", (2, 2), "float16", hotglm.Zeros()),
            hotglm.Add("drawn", (5, 5), "bfloat16", hotglm.Normal(0.02, 3)),
            hotglm.Add("copied", initialiser=hotglm.Copy("ut")),
            hotglm.Apply(
                _mix,
                ["x"],
                {"mixed": spec(dtype="float32", shape=(3, 2)), "rest": spec(dtype="float32", shape=(3,))},
            ),
        ],
    )
    path = tmp_path / "w.safetensors"
    hotglm.save_weights(state, path, version="1")
    with open_weights(path) as files:
        specs = {name: spec(dtype=at.entry.torch_dtype, shape=at.entry.shape) for name, at in files.tensors.items()}
    plan = steps.plan("1", "2").plan_state(specs)
    assert sum(not isinstance(output, Source) for output in plan.outputs.values()) > 15
    loaded = _load(path, plan)
    hotglm.migrate_weights(path, tmp_path / "new.safetensors", migrations=steps, to="2")
    assert _same(load_file(tmp_path / "new.safetensors"), loaded)
    assert torch.equal(loaded["mixed"], state["x"].T * 3)
    assert torch.equal(loaded["tr"], state["tr"].T)


def test_shards_and_directories_become_one_file(tmp_path: Path) -> None:
    """A directory of Hugging Face with shards and a config becomes one file that carries the migrated config."""
    state = family.make_checkpoint("1.4")
    names = sorted(state)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, some in shards.items():
        save_file({name: state[name] for name in some}, tmp_path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, some in shards.items() for name in some}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(family.make_config("1.4")))
    target = tmp_path / "new" / "model.safetensors"
    target.parent.mkdir()
    with pytest.raises(hotglm.UnknownVersionError, match="--from"):
        hotglm.migrate_weights(tmp_path, target, migrations=family.MIGRATIONS, to="3.0")
    hotglm.migrate_weights(tmp_path, target, migrations=family.MIGRATIONS, to="3.0", version="1.4")
    assert _same(load_file(target), family.convert(state, "1.4", "3.0"))
    assert _metadata(target)["format"] == "pt"
    assert json.loads(_metadata(target)["hotglm.config"]) == family.make_config("3.0")
    slot = family.make_slot("3.0")
    assert slot.update(target).migration == ()


def test_a_file_can_be_migrated_in_its_place(tmp_path: Path) -> None:
    """Source and target may be one file; up and down again it holds the same tensors, digests and config."""
    path = _save_family("1.0", tmp_path / "w.safetensors")
    before, state = _metadata(path), load_file(path)
    hotglm.migrate_weights(path, path, migrations=family.MIGRATIONS, to="3.0")
    assert _same(load_file(path), family.make_checkpoint("3.0"))
    hotglm.migrate_weights(path, path, migrations=family.MIGRATIONS, to="1.0")
    assert _same(load_file(path), state)
    assert {key: _parse(text) for key, text in _metadata(path).items()} == {k: _parse(t) for k, t in before.items()}


def _parse(text: str) -> Any:
    return json.loads(text) if text.startswith("{") else text


def test_what_fails_leaves_the_target_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are not the promised ones, ties that are none, a full disk: the target stays, with nothing beside."""
    target = tmp_path / "target.safetensors"
    target.write_bytes(b"precious")
    path = _save_family("1.4", tmp_path / "w.safetensors")

    def verify_nothing_happened() -> None:
        assert target.read_bytes() == b"precious"
        assert sorted(file.name for file in tmp_path.iterdir()) == ["target.safetensors", "w.safetensors"]

    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(hotglm.DigestMismatchError):
        hotglm.migrate_weights(path, target, migrations=family.MIGRATIONS, to="1.0")
    verify_nothing_happened()
    state = family.make_checkpoint("3.0")
    state["head.weight"][0, 0] += 1
    hotglm.save_weights(state, path, version="3.0")
    with pytest.raises(hotglm.TensorValueError, match="TIE_CONFLICT"):
        hotglm.migrate_weights(path, target, migrations=family.MIGRATIONS, to="2.1")
    verify_nothing_happened()
    with pytest.raises(hotglm.NoPathError):
        hotglm.migrate_weights(path, target, migrations=family.MIGRATIONS, to="3.0", version="0.5")
    verify_nothing_happened()

    def fail(fd: int, data: Any, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="No space"):
        hotglm.migrate_weights(path, target, migrations=family.MIGRATIONS, to="3.0")
    verify_nothing_happened()


def test_a_migration_on_disk_holds_one_unit_at_a_time(tmp_path: Path) -> None:
    """However large the file, memory is that of the threads' largest units: operands, and one output."""
    nbytes, num_tensors = 8 << 20, 10
    save_file({f"w{i}": torch.ones(nbytes // 16, 4) for i in range(num_tensors)}, tmp_path / "w.safetensors")
    steps = hotglm.Migrations("turned")
    steps.state("1", "2", [hotglm.Transpose(r"w(\d)", 0, 1)])
    peak = read_peak(
        lambda: hotglm.migrate_weights(
            tmp_path / "w.safetensors", tmp_path / "new.safetensors", migrations=steps, to="2", version="1"
        )
    )
    assert peak < min(4, count_cores()) * 2 * nbytes + (4 << 20), peak


@pytest.mark.parametrize("length", [25, 26, 30, 400])
def test_long_chains_of_operations_are_the_same_on_disk(length: int, tmp_path: Path) -> None:
    """Outputs that share many operations, up to more than Python recurses, are each what they are on load."""
    steps = hotglm.Migrations("long")
    chain: list[Any] = []
    for index in range(length):
        chain += [hotglm.Scale("w", 1.1 if index % 2 else 0.9), hotglm.Transpose("w", 0, 1)]
    parts = [hotglm.Split("w", ("a", "b", "c"), dim=1), hotglm.Scale("b", 0.3), hotglm.Scale("c", 0.7)]
    steps.state("1", "2", [*chain, *parts])
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.randn(6, 6, generator=torch.Generator().manual_seed(0))}, path)
    plan = steps.plan("1", "2").plan_state({"w": hotglm.TensorSpec(dtype="float32", shape=(6, 6))})
    loaded = _load(path, plan)
    hotglm.migrate_weights(path, tmp_path / "new.safetensors", migrations=steps, to="2", version="1")
    assert _same(load_file(tmp_path / "new.safetensors"), loaded)
    expected = load_file(path)["w"]
    for index in range(length):
        expected = (expected * (1.1 if index % 2 else 0.9)).T
    assert _same(loaded, {"a": expected[:, :2], "b": expected[:, 2:4] * 0.3, "c": expected[:, 4:] * 0.7})


def test_progress_ends_at_the_size_of_the_source(tmp_path: Path) -> None:
    """Progress grows to the bytes of the source and never beyond."""
    path = _save_family("1.0", tmp_path / "w.safetensors")
    seen: list[tuple[int, int]] = []
    hotglm.migrate_weights(
        path,
        tmp_path / "new.safetensors",
        migrations=family.MIGRATIONS,
        to="3.0",
        progress=lambda done, total: seen.append((done, total)),
    )
    with open_weights(path) as files:
        total = files.total_nbytes
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_versions_of_modules_follow(tmp_path: Path) -> None:
    """The versions of torch's modules in the migrated file stand under the paths that the modules have there."""
    model = torch.nn.ModuleDict({"old": torch.nn.BatchNorm1d(2), "same": torch.nn.Linear(2, 2)})
    steps = hotglm.Migrations("norms")
    steps.state("1", "2", [hotglm.Rename(r"old\.(.*)", r"new.\1")])
    hotglm.save_weights(model, tmp_path / "w.safetensors", version="1")
    hotglm.migrate_weights(tmp_path / "w.safetensors", tmp_path / "n.safetensors", migrations=steps, to="2")
    told = json.loads(_metadata(tmp_path / "n.safetensors")["hotglm.module_versions"])
    assert told["new"] == 2


# -- the commands ------------------------------------------------------------------------------------------------------


def test_the_command_writes_what_the_function_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`migrate` prints the path, writes the file and ends with 0; `--json` is one document."""
    path, target = _save_family("1.0", tmp_path / "w.safetensors"), tmp_path / "new.safetensors"
    words = ["migrate", str(path), str(target), "--to", "3.0", "--migrations", "support.family:Family30"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "1.4 -> 2.0" in out
    assert "wrote" in out
    assert _same(load_file(target), family.make_checkpoint("3.0"))
    first = target.read_bytes()
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "hotglm.migrate/1"
    assert [step["direction"] for step in document["steps"]] == ["up"] * 4
    assert document["digests"] == json.loads(_metadata(target)["hotglm.digests"])
    assert target.read_bytes() == first


def test_a_dry_run_reads_headers_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--dry-run` prints the path and every resulting tensor, from a file whose data need not even be right."""
    path = _save_family("1.4", tmp_path / "w.safetensors")
    data = bytearray(path.read_bytes())
    data[-8:] = b"\xff" * 8
    path.write_bytes(data)
    words = ["migrate", str(path), "--to", "1.0", "--migrations", "support.family:MIGRATIONS", "--dry-run"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "encoder.layers.1.v.weight" in out
    assert "max_seq_len" in out
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {tensor["name"] for tensor in document["tensors"]} == set(family.make_checkpoint("1.0"))
    assert document["written"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--migrations", "nonsense"], "MODULE:ATTRIBUTE"),
        (["--migrations", "no_such_module_here:x"], "No module named"),
        (["--migrations", "support.family:NAME"], "Expected migrations at"),
        (["--migrations", "support.family:nothing"], "has no attribute"),
        (["--migrations", "support.family:MIGRATIONS", "--to", "99"], "wrote"),
        (["--migrations", "support.family:MIGRATIONS", "--to", "3.0", "--from", "0.1"], "NoPathError"),
        (["--migrations", "support.family:MIGRATIONS", "--to", "x"], "VersionSyntaxError"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be imported, no path, no version: exit code 2, one text on standard error, nothing written."""
    path = _save_family("1.4", tmp_path / "w.safetensors")
    code = main(["migrate", str(path), str(tmp_path / "new.safetensors"), "--to", "1.0", *words])
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
    assert code == (0 if said == "wrote" else 2)
    assert (tmp_path / "new.safetensors").exists() == (code == 0)


def test_a_target_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without DST and without a dry run nothing is done."""
    path = _save_family("1.4", tmp_path / "w.safetensors")
    assert main(["migrate", str(path), "--to", "1.0", "--migrations", "support.family:MIGRATIONS"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_stamp_changes_the_header_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`stamp` writes version and name; tensors and other metadata stay, and so does the file if there is a target."""
    path, target = tmp_path / "w.safetensors", tmp_path / "stamped.safetensors"
    state = {"a": torch.randn(3, 3), "b": torch.arange(5, dtype=torch.int8)}
    save_file(state, path, metadata={"format": "pt"})
    before = path.read_bytes()
    assert main(["stamp", str(path), str(target), "--version", "1.4", "--name", "ranker"]) == 0
    assert "1.4" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert _metadata(target) == {"format": "pt", "hotglm.version": "1.4", "hotglm.name": "ranker"}
    assert _same(load_file(target), state)
    assert main(["stamp", str(path), "--version", "2.0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "2.0"
    assert _metadata(path)["hotglm.version"] == "2.0"
    assert _same(load_file(path), state)
    assert main(["stamp", str(path), "--version", "nonsense"]) == 2
    assert _metadata(path)["hotglm.version"] == "2.0"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stamped.safetensors", "w.safetensors"]


def test_shards_are_not_stamped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several shards are refused with what to do instead."""
    for number in (1, 2):
        save_file({f"w{number}": torch.ones(1)}, tmp_path / f"model-{number}.safetensors")
    weight_map = {f"w{number}": f"model-{number}.safetensors" for number in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert main(["stamp", str(tmp_path), "--version", "1"]) == 2
    assert "2 shards" in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_for_terminals_and_plain_ascii() -> None:
    """A terminal gets one line that is written over and cleared; a pipe or a closed stream gets nothing."""
    terminal, pipe = _Terminal(), io.StringIO()
    for stream in (terminal, pipe, None):
        with ProgressBar(stream) as bar:
            bar.show(1, 4)
            bar.show(4, 4)
    text = terminal.getvalue()
    assert pipe.getvalue() == ""
    assert "25%" in text
    assert "100%" in text
    assert text.isascii()
    assert "\n" not in text
    assert text.endswith(" \r")


def test_the_bar_names_the_part_it_is_at() -> None:
    """What a release or a stage tells is shown with the name of its part; a line fits a narrow terminal."""
    terminal = _Terminal()
    with ProgressBar(terminal) as bar:
        for part in ("copy", "verify"):
            bar.tell(Progress(part=part, done_nbytes=2**20, total_nbytes=2**20))
    lines = terminal.getvalue().split("\r")
    assert [line.split("[")[0].strip() for line in lines[1:3]] == ["copy", "verify"]
    assert all(len(line) < 80 for line in lines)
    assert "MiB/s" in lines[1]


def test_help_and_dry_run_need_no_torch(tmp_path: Path) -> None:
    """`--help`, `stamp` and a dry run with migrations that need no torch work where torch is not installed."""
    (tmp_path / "steps.py").write_text(
        "import hotglm\nsteps = hotglm.Migrations('m')\nsteps.state('1', '2', [hotglm.Rename('a', 'b')])\n"
    )
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    code = """
import sys
sys.modules["torch"] = None
from hotglm.cli import main
try:
    main(["migrate", "--help"])
except SystemExit as end:
    assert end.code == 0
assert main(["stamp", "w.safetensors", "--version", "1"]) == 0
assert main(["migrate", "w.safetensors", "--to", "2", "--migrations", "steps:steps", "--dry-run"]) == 0
"""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 -> 2" in done.stdout
