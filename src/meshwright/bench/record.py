"""Benchmark records: the one writer and the schema of `benchmarks/NAME/DEVICE-DATE.json`.

    {"name": "agreement", "date": "2026-01-31",
     "environment": {"python", "torch", "platform", "cpu", "cores", "device"},
     "command": "meshwright bench ...",
     "rows": [{"layout": "tensor 2", ...,                          the setting: any keys, plain values
               "samples": [...], "unit": "s", "median": ..., "spread": ...,   if something was measured
               "limit": ..., "limit_kind": "most|least", "percent_of_limit": ...,   if a limit is known
               "failed": "why"}, ...]}                             if it did not work: a row stays in the grid

A record holds every sample, and is overwritten by nothing but the run that it is of.
`python -m meshwright.bench.record check` validates them all.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

FOLDER = Path("benchmarks")
NOT_REACHED = "not reached: the run was cut off"
LimitKind = Literal["most", "least"]

_RECORD = {"name": str, "date": str, "environment": dict, "command": str, "rows": list}
_ENVIRONMENT = {"python": str, "torch": str, "platform": str, "cpu": str, "cores": int, "device": str}
_MEASURED = ("samples", "unit", "median", "spread")
_LIMITED = ("limit", "limit_kind", "percent_of_limit")
_STEM = re.compile(r"(?P<device>[a-z0-9.-]+)-(?P<date>\d{4}-\d{2}-\d{2})(-\d+)?")


def row(
    *,
    samples: Sequence[float] = (),
    unit: str = "",
    limit: float | None = None,
    limit_kind: LimitKind = "most",
    failed: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """A row of a record. `limit` is the most (a bandwidth) or the least (a time) that the hardware allows."""
    result = dict(settings)
    if samples:
        result |= {
            "samples": list(samples),
            "unit": unit,
            "median": statistics.median(samples),
            "spread": spread(samples),
        }
    if samples and limit is not None:
        percent = percent_of_limit(result["median"], limit, limit_kind)
        result |= {"limit": limit, "limit_kind": limit_kind, "percent_of_limit": percent}
    if failed:
        result["failed"] = failed
    return result


def spread(samples: Sequence[float]) -> float:
    """Distance between the quartiles: the width of the middle half of the samples."""
    if len(samples) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return upper - lower


def percent_of_limit(median: float, limit: float, limit_kind: LimitKind) -> float:
    """100 is as good as the hardware allows."""
    return 100 * (median / limit if limit_kind == "most" else limit / median)


def of(name: str, command: str, rows: Sequence[dict[str, Any]], device: str = "") -> dict[str, Any]:
    """A record of today; `device` is the accelerator's name, the CPU's if empty."""
    date, environment = datetime.date.today().isoformat(), _environment(device)
    return {"name": name, "date": date, "environment": environment, "command": command, "rows": list(rows)}


def write(name: str, command: str, rows: Sequence[dict[str, Any]], device: str = "", folder: Path = FOLDER) -> Path:
    """Write a record of today and return its path; arguments as of `of`."""
    record = of(name, command, rows, device)
    return _save(record, _new_path(record, folder))


@dataclass
class Growing:
    """A record that is written anew whenever a part of its run is done, so that a run that is cut off leaves it."""

    name: str
    command: str
    device: str
    """As of `of`."""
    folder: Path = FOLDER
    path: Path | None = None
    """Where it was written."""

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """All rows, those of parts that are not done yet among them: `not_reached`."""
        record = of(self.name, self.command, rows, self.device)
        if self.path is None:
            self.path = _new_path(record, self.folder)
        elif stem := _STEM.fullmatch(self.path.stem):
            record["date"] = stem["date"]
        _save(record, self.path)


def not_reached(**settings: Any) -> dict[str, Any]:
    """The row of a part that is not done yet: it stays in a record whose run was cut off."""
    return row(**settings, failed=NOT_REACHED)


def _new_path(record: dict[str, Any], folder: Path) -> Path:
    stem = f"{_slug(record['environment']['device'])}-{record['date']}"
    path = folder / record["name"] / f"{stem}.json"
    repeat = 1
    while path.exists():
        repeat += 1
        path = folder / record["name"] / f"{stem}-{repeat}.json"
    return path


def _save(record: dict[str, Any], path: Path) -> Path:
    """All of it or nothing, whenever the process is killed."""
    if found := list(problems(record, path)):
        raise ValueError("\n".join(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def problems(record: Any, path: Path) -> Iterator[str]:
    """Everything wrong with a record at `path`: missing keys, wrong types, figures that their samples contradict."""
    wrong = list(_table(record, _RECORD, "record"))
    if not wrong:
        wrong += _table(record["environment"], _ENVIRONMENT, "environment")
    if wrong:
        yield from wrong
        return
    if unknown := sorted(set(record) - set(_RECORD)):
        yield f"unknown keys {', '.join(unknown)}"
    stem = _STEM.fullmatch(path.stem)
    expected = (record["name"], _slug(record["environment"]["device"]), record["date"])
    if not stem or (path.parent.name, stem["device"], stem["date"]) != expected:
        yield f"the path is not {expected[0]}/{expected[1]}-{expected[2]}.json"
    if not record["rows"]:
        yield "no rows"
    for index, entry in enumerate(record["rows"]):
        yield from (f"rows[{index}]: {problem}" for problem in _row_problems(entry))


def check(folder: Path = FOLDER) -> list[str]:
    """Problems of every record under a folder, each line with its path."""
    lines = []
    for path in sorted(folder.rglob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            lines.append(f"{path}: not JSON: {error}")
        else:
            lines += [f"{path}: {problem}" for problem in problems(record, path)]
    return lines


def _row_problems(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield "not a table"
        return
    for key, value in entry.items():
        if not _is_plain(value):
            yield f"{key} is not a plain, finite value or a list of such"
    if "failed" in entry and not (isinstance(entry["failed"], str) and entry["failed"]):
        yield "failed does not say why"
    for group in (_MEASURED, _LIMITED):
        present = [key for key in group if key in entry]
        if present and len(present) < len(group):
            yield f"has {', '.join(present)} without {', '.join(key for key in group if key not in entry)}"
            return
    if "samples" in entry:
        yield from _measured_problems(entry)
    elif "limit" in entry:
        yield "has a limit without samples"


def _measured_problems(entry: dict[str, Any]) -> Iterator[str]:
    samples = entry["samples"]
    if not (isinstance(samples, list) and samples and all(_is_number(sample) for sample in samples)):
        yield "samples is not a list of numbers"
        return
    expected = {"median": statistics.median(samples), "spread": spread(samples)}
    if "limit" in entry:
        if not (_is_number(entry["limit"]) and entry["limit"] > 0 and entry["limit_kind"] in ("most", "least")):
            yield "limit is not a number above 0 with limit_kind most or least"
            return
        if expected["median"] > 0:
            expected["percent_of_limit"] = percent_of_limit(expected["median"], entry["limit"], entry["limit_kind"])
    for key, value in expected.items():
        if not (_is_number(entry[key]) and math.isclose(entry[key], value, rel_tol=1e-6, abs_tol=1e-12)):
            yield f"{key} = {entry[key]} is not that of its samples, {value}"


def _table(table: Any, keys: Mapping[str, type], where: str) -> Iterator[str]:
    if not isinstance(table, dict):
        yield f"{where} is not a table"
        return
    for key, kind in keys.items():
        if key not in table:
            yield f"{where} has no {key}"
        elif type(table[key]) is not kind or table[key] == "":
            yield f"{where}.{key} is not a {kind.__name__} with content"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | bool) or _is_number(value)


def _environment(device: str) -> dict[str, Any]:
    cpu = _cpu_name()
    return {
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": num_cores(),
        "device": device or cpu,
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _slug(device: str) -> str:
    """`NVIDIA H200` → `nvidia-h200`."""
    return re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-.")


def main(arguments: Sequence[str]) -> int:
    """`check [FOLDER]`: 0 if every record is sound, 1 if not, 2 for anything else."""
    if not arguments or arguments[0] != "check" or len(arguments) > 2:
        print("usage: python -m meshwright.bench.record check [FOLDER]", file=sys.stderr)
        return 2
    lines = check(Path(arguments[1]) if len(arguments) > 1 else FOLDER)
    print("\n".join(lines), file=sys.stderr, end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
