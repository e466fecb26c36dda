"""The report: one table for people (Markdown) and the same with every measurement for machines (JSON).

Rules this module keeps: pure, but for `describe_machine`. A report names who ran what on which hardware with which
versions at which commit under what load, so that a figure can be repeated or doubted.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import getpass
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.bench import Row, Sample

__all__ = ["describe_machine", "name_report", "to_json", "to_markdown"]

_SCALES = {"ns": 1e9, "us": 1e6, "ms": 1e3}
_SYMBOLS = {"us": "µs", "x": "x"}
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def describe_machine(rows: Sequence[str] = ()) -> dict[str, str]:
    """Return who runs this, on what, with which versions, and how busy the machine is now.

    Args:
        rows: the groups that are measured; empty means all.
    """
    command = " ".join(["python -m benchmarks", *(["--rows " + ",".join(rows)] if rows else [])])
    found = {
        "run by": f"{_ask_git('config', 'user.name') or getpass.getuser()} (`{command}`)",
        **({"rows": ",".join(rows)} if rows else {}),
        "at": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _describe_commit(),
        "machine": f"{_read_field('/proc/cpuinfo', 'model name')}, {len(os.sched_getaffinity(0))} cores, "
        f"{int(_read_field('/proc/meminfo', 'MemTotal').split()[0]) >> 20} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "safetensors")),
        "load before": describe_load(),
    }
    return {**found, **({"devices": devices} if (devices := _describe_devices()) else {})}


def _describe_devices() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    query = [command, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    return "; ".join(done.stdout.splitlines()) if done.returncode == 0 else ""


def describe_load() -> str:
    """Return the load averages and the share of time that the hypervisor took, both since the machine can say."""
    with open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return f"{load} (1, 5, 15 min), {100 * ticks[7] / max(1, sum(ticks)):.2f} % stolen since boot"


def _describe_commit() -> str:
    commit = _ask_git("rev-parse", "--short=12", "HEAD") or "unknown"
    return (
        f"{commit}, with uncommitted changes" if _ask_git("status", "--porcelain", "hotglm", "benchmarks") else commit
    )


def _ask_git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _read_field(path: str, key: str) -> str:
    with open(path) as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith(key)), "unknown")


def name_report(machine: Mapping[str, str]) -> str:
    """Return the stem of a report's files: device or cores, date, and the groups and parts where it has not all.

    Example:
        >>> name_report({"machine": "AMD EPYC, 2 cores, 23 GiB", "at": "2026-11-20 12:00 UTC"})
        'cpu-2core-2026-11-20'
        >>> name_report({"devices": "NVIDIA H200, 143771 MiB", "rows": "device", "at": "2026-11-20 12:00 UTC"})
        'nvidia-h200-2026-11-20-device'
    """
    if "devices" in machine:
        where = re.sub(r"[^a-z0-9]+", "-", machine["devices"].partition(",")[0].lower())
    else:
        cores = re.search(r"(\d+) cores", machine["machine"])
        where = f"cpu-{cores.group(1) if cores else '?'}core"
    named = [machine.get(key, "").replace(",", "-") for key in ("rows", "parts")]
    return "-".join(part for part in (where, machine["at"].split()[0], *named) if part)


def to_markdown(rows: Iterable[Row], machine: Mapping[str, str]) -> str:
    """Return the report as Markdown: the machine, the table, and a note for each row that has one."""
    found = list(rows)
    judged = [row for row in found if row.met is not None]
    num_met = sum(1 for row in judged if row.met)
    lines = ["# Benchmarks", "", f"{num_met} of {len(judged)} targets met.", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    lines += [
        "",
        "Medians, with the 10th and 90th percentile in brackets. Each row is measured against its peer in the same",
        "run, in turns. A row without a target is a control, or shows how the peer fares under other conditions.",
        "",
        "| # | name | hotglm | peer | ratio | target | met |",
        "|---:|---|---:|---:|---:|---|---|",
    ]
    lines += [_write_row(number, row) for number, row in enumerate(found, start=1)]
    lines += ["", "## Notes", ""]
    lines += [
        f"{number}. Peer: {row.peer_name}. Ratio: {row.ratio_name}. {row.note}".rstrip()
        for number, row in enumerate(found, start=1)
    ]
    return "\n".join(lines) + "\n"


def _write_row(number: int, row: Row) -> str:
    met = {True: "yes", False: "**no**", None: ""}[row.met]
    cells = (
        str(number),
        row.name,
        _write_sample(row.hotglm, row.unit),
        f"{_write_sample(row.peer, row.unit)}<br>{row.peer_name}",
        f"{_write_number(row.ratio)}x",
        row.target,
        met,
    )
    return f"| {' | '.join(cells)} |"


def _write_sample(sample: Sample, unit: str) -> str:
    scale = _SCALES.get(unit, 1.0)
    middle, low, high = (_write_number(value * scale) for value in (sample.median, sample.low, sample.high))
    spread = f" [{low}, {high}]" if len(sample.values) > 1 else ""
    return f"{middle} {_SYMBOLS.get(unit, unit)}{spread}"


def _write_number(value: float) -> str:
    """Write a figure with three digits that count, or all of a larger one."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def to_json(rows: Iterable[Row], machine: Mapping[str, str]) -> str:
    """Return the report as JSON, every single measurement included."""
    return json.dumps({"machine": dict(machine), "rows": [_as_data(row) for row in rows]}, indent=1) + "\n"


def _as_data(row: Row) -> dict[str, Any]:
    return {
        **dataclasses.asdict(row),
        "hotglm": {"median": row.hotglm.median, "values": row.hotglm.values},
        "peer": {"median": row.peer.median, "values": row.peer.values},
    }
