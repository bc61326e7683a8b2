"""TOML in, by catalog name or path, and TOML out."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright import catalog
from meshwright.config.values import nearest
from meshwright.errors import UserError


def read(kind: catalog.Kind, source: str | Path, folder: Path = Path()) -> dict[str, Any]:
    """The table of a catalog entry, or of a file relative to `folder`; a missing `name` becomes the file's.

    A text that is a name of the catalog means the catalog, whatever lies in the working directory.
    """
    if isinstance(source, str) and source in catalog.names(kind):
        return {"name": source, **tomllib.loads(catalog.read(kind, source))}
    path = folder / source
    try:
        if path.is_dir():
            raise UserError(_refused_folder(path))
        if not path.exists():
            known = catalog.names(kind)
            near = nearest(str(source), known) or f": use a TOML file or one of {', '.join(known)}"
            raise UserError(f"{path} is neither a file nor in the catalog's {kind}{near}")
        return {"name": path.stem, **tomllib.loads(path.read_text(encoding="utf-8"))}
    except ValueError as error:  # of syntax, of UTF-8, or of an integer with thousands of digits
        raise UserError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _refused_folder(path: Path) -> str:
    if (path / "config.json").exists():
        return (
            f"{path} is a folder with a config.json of Hugging Face, which this version does not read: give a TOML file"
        )
    if (path / "job.toml").exists():
        return f"{path} is a run folder, not a file: give {path / 'job.toml'}"
    return f"{path} is a folder, not a TOML file"


def dumps(table: Mapping[str, Any]) -> str:
    """TOML text of a table: plain values first, then a section for each table of plain values.

    Tables inside those stand on one line.
    """
    plain = [f"{_key(key)} = {_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    sections = [
        "\n".join([f"[{_key(key)}]", *(f"{_key(name)} = {_value(inner)}" for name, inner in value.items())])
        for key, value in table.items()
        if isinstance(value, Mapping)
    ]
    return "\n\n".join(["\n".join(plain)] * bool(plain) + sections) + "\n"


def dumps_inline(key: str, table: Mapping[str, Any]) -> str:
    """A whole table on one line."""
    return f"{_key(key)} = {_value(table)}\n"


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(key)} = {_value(inner)}' for key, inner in value.items())} }}" if value else "{}"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL, which TOML does not allow bare
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)  # integers and finite floats


def _key(key: str) -> str:
    return key if key.isascii() and key.replace("_", "").replace("-", "").isalnum() else _value(key)
