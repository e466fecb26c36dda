"""Golden releases: made once, kept, and verified for ever, by the library and by the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm import testing
from hotglm.cli import main
from hotglm.errors import (
    ArgumentError,
    DefinitionError,
    DigestMismatchError,
    GoldenMismatchError,
    IncompatibleError,
    SourceError,
)
from hotglm.model import registry
from hotglm.testing.golden_tree import pack, plain, unpack
from hotglm.testing.traffic import describe_differences

NAME = "golden-ranker"


@dataclass
class Config:
    width: int = 3


@dataclass
class Output:
    logits: torch.Tensor
    extras: dict[str, Any]


@hotglm.versioned(NAME, "1.0.0", config=Config)
class Ranker(nn.Module):
    scale = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.width, 2)

    def forward(self, x: torch.Tensor, *, shift: float = 0.0) -> Output:
        logits = self.linear(x) * self.scale + shift
        return Output(logits=logits, extras={"best": logits.argmax(-1), "shape": tuple(x.shape), "none": None})


X = {"x": torch.arange(6.0).reshape(2, 3), "shift": 0.5}


def make_ranker(width: int = 3) -> Ranker:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Ranker(Config(width)).eval()


@pytest.fixture
def newer() -> Iterator[type[Ranker]]:
    """A newer version of the code, which goes when the test ends."""

    @hotglm.versioned(NAME, "1.1.0", config=Config)
    class Newer(Ranker):
        pass

    yield Newer
    registry._definitions[NAME].pop(hotglm.Version("1.1.0"))


def test_a_golden_is_read_as_it_was_made(tmp_path: Path) -> None:
    """Version, name, config, arguments, outputs and tolerance of a golden are what it was made with, bit for bit."""
    path = testing.make_golden(make_ranker(), tmp_path, inputs=X)
    assert path == tmp_path / NAME / "1.0.0"
    assert [*testing.find_goldens(tmp_path)] == [path]
    golden = testing.read_golden(path)
    assert (golden.name, str(golden.version), golden.config) == (NAME, "1.0.0", {"width": 3})
    assert describe_differences(X, golden.inputs) == []
    with torch.no_grad():
        output = make_ranker()(**X)
    assert golden.outputs["logits"].equal(output.logits)
    assert golden.outputs["extras"]["shape"] == (2, 3)
    assert golden.outputs["extras"]["none"] is None
    assert sorted(file.name for file in path.iterdir()) == ["golden.json", "tensors.safetensors", "weights.safetensors"]


def test_a_golden_loads_under_its_own_code_to_the_last_bit(tmp_path: Path) -> None:
    """The code that made a golden loads it, and gives the very same bits; nothing of the file is needed afterwards."""
    path = testing.make_golden(make_ranker(), tmp_path, inputs=X)
    proof = testing.verify_golden(testing.read_golden(path))
    assert proof.is_exact
    assert "bit for bit" in str(proof)
    assert testing.assert_goldens_load(tmp_path) == (proof,)


def test_newer_code_may_round_otherwise_and_no_more(tmp_path: Path, newer: type[Ranker]) -> None:
    """Under newer code an answer within the golden's tolerance will do, and one beyond it is named."""
    testing.make_golden(make_ranker(), tmp_path, inputs=X, tolerance=testing.Tolerance(rtol=1e-3))
    registry._definitions[NAME].pop(hotglm.Version("1.0.0"))  # as where the old class was deleted
    try:
        newer.scale = 1.0001
        (proof,) = testing.assert_goldens_load(tmp_path)
        assert not proof.is_exact
        assert str(proof.code_version) == "1.1.0"
        newer.scale = 1.1
        with pytest.raises(AssertionError, match=r"logits") as caught:
            testing.assert_goldens_load(tmp_path)
        assert f"{NAME} 1.0.0" in str(caught.value)
    finally:
        hotglm.versioned(NAME, "1.0.0", config=Config)(Ranker)


@dataclass
class WideConfig:
    size: int = 3


def test_a_golden_of_a_class_that_is_gone_comes_by_migration(tmp_path: Path) -> None:
    """A version whose class was deleted loads under today's class, weights and config by way of their migrations."""
    name = "golden-migrated"
    testing.make_golden(make_ranker(5), tmp_path, inputs={"x": torch.ones(2, 5)}, name=name, version="1.0")

    @hotglm.versioned(name, "2.0", config=WideConfig)
    class Today(nn.Module):
        def __init__(self, config: WideConfig) -> None:
            super().__init__()
            self.config = config
            self.head = nn.Linear(config.size, 2)

        def forward(self, x: torch.Tensor) -> Output:
            logits = self.head(x)
            return Output(logits=logits, extras={"best": logits.argmax(-1), "shape": tuple(x.shape), "none": None})

    migrations = hotglm.migrations_of(Today)
    migrations.state("1.0", "2.0", [hotglm.Rename(r"linear\.(.*)", r"head.\1")])
    migrations.config("1.0", "2.0", [hotglm.RenameField("width", "size")])
    (proof,) = testing.assert_goldens_load(tmp_path)
    assert (str(proof.code_version), proof.is_exact) == ("2.0", False)


def test_what_is_wrong_with_each_golden_is_named(tmp_path: Path) -> None:
    """Of several goldens each that fails is named; a declared one may, and one that loads again is reported."""
    testing.make_golden(make_ranker(), tmp_path, inputs=X)
    testing.make_golden(make_ranker(), tmp_path, inputs=X, version="1.0.1")
    testing.make_golden(
        nn.Linear(3, 2), tmp_path, inputs=torch.ones(3), name=NAME, version="1.0.2", config={"width": 3}
    )
    declared = {f"{NAME} 1.0.2": "TENSOR_MISSING"}
    assert len(testing.assert_goldens_load(tmp_path, expected=declared)) == 2
    with pytest.raises(AssertionError, match="TENSOR_MISSING"):
        testing.assert_goldens_load(tmp_path)
    with pytest.raises(AssertionError) as caught:
        testing.assert_goldens_load(
            tmp_path, expected={f"{NAME} 1.0.2": "SHAPE_CHANGED", f"{NAME} 1.0.1": "X", f"{NAME} 9.0.0": "X"}
        )
    for text in (f"{NAME} 1.0.2: ", f"{NAME} 1.0.1: expected a refusal", f"{NAME} 9.0.0: expected a golden"):
        assert text in str(caught.value)


def test_no_golden_at_all_is_a_failure(tmp_path: Path) -> None:
    """A directory without goldens, misspelt perhaps, does not count as one where all of them load."""
    with pytest.raises(AssertionError, match="got none"):
        testing.assert_goldens_load(tmp_path / "goldem")


def test_a_golden_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A golden that is there is not written over, and one that fails half-way leaves nothing behind."""
    path = testing.make_golden(make_ranker(), tmp_path, inputs=X)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(ArgumentError, match=r"no golden of .* yet"):
        testing.make_golden(make_ranker(), tmp_path, inputs=X)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    monkeypatch.setattr("hotglm.testing.goldens.describe_machine", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        testing.make_golden(make_ranker(), tmp_path, inputs=X, version="1.0.1")
    assert [file.name for file in path.parent.iterdir()] == ["1.0.0"]


@pytest.mark.parametrize("file", ["weights.safetensors", "tensors.safetensors"])
def test_a_file_that_was_changed_is_noticed(tmp_path: Path, file: str) -> None:
    """One changed byte in either file refuses the golden, and names the file."""
    path = testing.make_golden(make_ranker(), tmp_path, inputs=X)
    data = bytearray((path / file).read_bytes())
    data[-1] ^= 1
    (path / file).write_bytes(data)
    with pytest.raises(DigestMismatchError) as caught:
        testing.read_golden(path)
    assert caught.value.file == str(path / file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "hotglm.golden/2"}', '{"schema": "hotglm.golden/1"}'])
def test_a_document_that_is_no_golden_is_refused(tmp_path: Path, text: str) -> None:
    """Whatever stands in golden.json, reading it raises a typed error that names the file."""
    path = testing.make_golden(make_ranker(), tmp_path, inputs=X)
    (path / "golden.json").write_text(text)
    with pytest.raises(SourceError) as caught:
        testing.read_golden(path)
    assert caught.value.file == str(path / "golden.json")


def test_arguments_that_no_longer_fit_are_a_mismatch(tmp_path: Path) -> None:
    """A golden whose arguments today's code does not take is a mismatch that quotes the error."""
    golden = testing.read_golden(testing.make_golden(make_ranker(), tmp_path, inputs=X))

    class Renamed(Ranker):
        def forward(self, y: torch.Tensor) -> Output:  # type: ignore[override]
            return super().forward(y)

    with pytest.raises(GoldenMismatchError, match="unexpected keyword argument"):
        testing.verify_golden(golden, model=Renamed(Config()))


def test_a_golden_that_cannot_be_staged_or_built_says_why(tmp_path: Path) -> None:
    """Weights that today's code cannot hold, and a name that nobody registered, are typed errors."""
    golden = testing.read_golden(testing.make_golden(make_ranker(4), tmp_path, inputs=torch.ones(4)))
    with pytest.raises(IncompatibleError):
        testing.verify_golden(golden, model=nn.Linear(1, 1))
    other = testing.make_golden(nn.Linear(2, 2), tmp_path, inputs=torch.ones(2), name="nobody", version="1.0")
    with pytest.raises(DefinitionError, match="import the module"):
        testing.verify_golden(testing.read_golden(other))


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a\nb"])
def test_names_of_goldens_are_plain(tmp_path: Path, name: str) -> None:
    """A name that would lead out of the directory, or look like another, is refused."""
    with pytest.raises(ArgumentError):
        testing.make_golden(nn.Linear(2, 2), tmp_path, inputs=torch.ones(2), name=name, version="1.0")
    assert not [*tmp_path.iterdir()]


def test_trees_come_back_as_they_were() -> None:
    """unpack(*pack(x)) == plain(x), tensors bit for bit; what is no data is named, all of it."""
    value = {"a": (torch.tensor([0.0, -0.0]), [1, 2.5, True, "text", None], ()), "b": Output(torch.ones(1), {"c": []})}
    tree, tensors = pack(value, "x")
    json.dumps(tree)
    again = unpack(tree, tensors)
    assert describe_differences(plain(value), again) == []
    assert type(again["a"]) is tuple
    assert type(again["a"][1]) is list
    with pytest.raises(ArgumentError) as caught:
        pack({"a": object(), "b": {1: torch.ones(1)}}, "x")
    assert len(caught.value.problems) == 2


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_makes_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`golden make` records released weights, `golden verify` proves them, and fails with 1 once one is wrong."""
    weights, inputs, goldens = tmp_path / "w.safetensors", tmp_path / "in.safetensors", tmp_path / "goldens"
    hotglm.save_weights(make_ranker(), weights)
    hotglm.save_weights({"x": torch.ones(1, 3)}, inputs)
    words = ["golden", "make", str(goldens), "--weights", str(weights), "--inputs", str(inputs), "--import", __name__]
    assert main(words) == 0
    assert main(words) == 2
    verify = ["golden", "verify", str(goldens), "--import", __name__]
    assert main(verify) == 0
    assert "1 golden, 0 failed" in capsys.readouterr().out
    golden = goldens / NAME / "1.0.0"
    (golden / "tensors.safetensors").write_bytes(b"")
    assert main([*verify, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["is_good"]) == ("hotglm.goldens/1", False)
    assert document["goldens"][0]["code"] == "DIGEST_MISMATCH"
    assert main(["golden", "verify", str(tmp_path / "nowhere")]) == 1
    monkeypatch.setitem(sys.modules, "broken_module", None)
    assert main(["golden", "verify", str(goldens), "--import", "broken_module"]) == 2
    assert "broken_module" in capsys.readouterr().err


def test_the_command_asks_for_what_the_weights_do_not_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights without name and version, an unknown version and arguments that are no file are each refused."""
    weights, inputs = tmp_path / "w.safetensors", tmp_path / "in.safetensors"
    hotglm.save_weights(make_ranker().state_dict(), weights)
    hotglm.save_weights({"0": torch.ones(1, 3)}, inputs)
    words = ["golden", "make", str(tmp_path / "g"), "--weights", str(weights), "--inputs", str(inputs)]
    for more, text in (([], "pass --model"), (["--model", NAME, "--version", "7.0"], "--import")):
        assert main([*words, *more]) == 2
        assert text in capsys.readouterr().err
    named = [*words, "--model", NAME, "--version", "1.0.0"]
    assert main([*named, "--inputs", str(tmp_path / "none")]) == 2
    assert main(named) == 0
    golden = testing.read_golden(tmp_path / "g" / NAME / "1.0.0")
    assert describe_differences((torch.ones(1, 3),), golden.inputs) == []
