"""Fields set from the command line by their dotted path: `--layout.tensor 2`, `--cluster h100x8`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from typing import Any, get_type_hints

from meshwright.config import tree
from meshwright.config.hardware import load_cluster, load_device
from meshwright.config.tree import Cluster, Device, Job
from meshwright.config.values import WrongValueError, is_mapping, nearest_path, parse
from meshwright.errors import UserError

_LOADERS = {Cluster: load_cluster, Device: load_device}
"""Sections that can be set as a whole, by catalog name or file."""


@dataclass(frozen=True)
class Setting:
    """One thing that can be set: a field of the tree, or a whole section by its catalog name."""

    path: str
    kind: Any
    default: Any
    help: str


def apply_overrides(job: Job, overrides: Sequence[tuple[str, str]]) -> Job:
    """A new job with fields replaced; every mistake at once.

    Whole sections go first (`--cluster.hosts 8 --cluster h100x8` is one cluster of 8 hosts), then the order given.
    """
    mistakes = []
    for path, text in sorted(((_normal(path), text) for path, text in overrides), key=lambda item: item[0].count(".")):
        try:
            job = _replaced(job, path.split("."), _parsed(path, text))
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return job


@cache
def fields() -> tuple[Setting, ...]:
    """Everything that can be set, in the order of the tree, with its help."""
    return tuple(_settings(Job(), ""))


def _settings(owner: Any, prefix: str) -> Iterator[Setting]:
    helps = _docstrings()[type(owner).__name__]
    for name, kind in get_type_hints(type(owner)).items():
        path, default = f"{prefix}{name}", getattr(owner, name)
        if not is_dataclass(kind) or kind in _LOADERS:
            yield Setting(path, kind, default, helps[name])
        if is_dataclass(kind):
            yield from _settings(default, f"{path}.")


@cache
def _docstrings() -> dict[str, dict[str, str]]:
    """Class → field → the text that stands under the field in `tree`."""
    texts: dict[str, dict[str, str]] = {}
    for owner in ast.parse(inspect.getsource(tree)).body:
        if isinstance(owner, ast.ClassDef):
            texts[owner.name] = {
                field.target.id: inspect.cleandoc(text.value.value)
                for field, text in zip(owner.body, owner.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                if isinstance(text.value.value, str)
            }
    return texts


def _normal(path: str) -> str:
    return path.removeprefix("--").replace("-", "_")


def _parsed(path: str, text: str) -> Any:
    """The value that `text` gives to the field at `path`."""
    settings = {setting.path: setting for setting in fields()}
    table, _, key = path.rpartition(".")
    if path in settings:
        kind = settings[path].kind
    elif table in settings and is_mapping(settings[table].kind) and key:
        kind = float  # cluster.device.peak_flops.bf16
    elif members := [known for known in settings if known.startswith(f"{path}.")]:
        raise UserError(f"{path} is a section, not a field: set {', '.join(members)}")
    else:
        raise UserError(f"{path} is not a field{nearest_path(path, settings) or _choices(table, settings)}")
    if kind in _LOADERS:
        return _LOADERS[kind](text)
    if is_mapping(kind):
        raise UserError(f"{path} is a table: set one of its entries, such as {path}.bf16")
    try:
        return parse(text, kind)
    except WrongValueError as error:
        raise UserError(f"{path} {error}") from None


def _choices(section: str, paths: Iterable[str]) -> str:
    """The fields of a section; the sections, where it is none."""
    members = [path for path in paths if path.rpartition(".")[0] == section]
    return f": use one of {', '.join(members if section and members else get_type_hints(Job))}"


def _replaced(owner: Any, steps: list[str], value: Any) -> Any:
    """`owner` with the field at the end of `steps` replaced, and every dataclass on the way."""
    step, rest = steps[0], steps[1:]
    if isinstance(owner, dict):
        return {**owner, step: value}
    return replace(owner, **{step: _replaced(getattr(owner, step), rest, value) if rest else value})
