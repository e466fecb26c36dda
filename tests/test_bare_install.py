"""What works with nothing but the core dependencies, and what an sdist carries."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from support.scripts import run_script
from test_docs_examples import find_blocks

ROOT = Path(__file__).resolve().parent.parent

BLOCKED = """
import sys
sys.modules["numpy"] = None  # as where it is not installed
sys.modules["sklearn"] = None
"""


def test_the_quick_start_runs_without_numpy(tmp_path: Path) -> None:
    """The first example of the README, saving and updating, needs none of the extras."""
    (_, code), *_ = find_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "save_weights" in code
    assert "slot.update" in code
    done = run_script(f"{BLOCKED}\nimport os\nos.chdir(sys.argv[1])\n{code}\nprint('done')\n", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
    assert (tmp_path / "ranker-1.0.1.safetensors").exists()


@pytest.mark.parametrize("blocked", ["numpy", "sklearn"])
def test_the_demo_names_its_extra(blocked: str, tmp_path: Path) -> None:
    """Where numpy or scikit-learn is missing, the demo ends with 2 and says what to install, without a traceback."""
    done = run_script(
        f"""
        import os, sys
        sys.modules[{blocked!r}] = None
        os.chdir(sys.argv[1])
        from hotglm.cli import main
        sys.exit(main(["demo", "--quick"]))
        """,
        str(tmp_path),
    )
    assert done.returncode == 2
    assert "MissingExtraError" in done.stderr
    assert "hotglm[demo]" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_sdist_carries_its_tests_and_pages(tmp_path: Path) -> None:
    """Whoever unpacks an sdist can run the tests with the same pins and read the pages."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "results")
    shutil.copytree(ROOT, copy, ignore=ignored)
    build = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt", "tests/conftest.py"}
    for folder, suffix in (("hotglm", ".py"), ("tests", ".py"), ("docs", ".md"), ("docs", ".png")):
        wanted |= {str(path.relative_to(copy)) for path in (copy / folder).rglob(f"*{suffix}")}
    assert wanted - names == set()
