"""What `--out` and `--trace` name, made and tried before any work is done for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshwright.errors import UserError


@contextmanager
def writable(option: str, path: Path, kind: str) -> Iterator[None]:
    """What the system refuses inside is the option's fault; `kind` is file or folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written ({error.strerror}): name a {kind} of yours") from None


def tried_folder(option: str, text: str) -> Path:
    """A folder that is there and takes files."""
    if not text:
        raise UserError(f'{option} = "" names no folder: give it one, such as {option} records')
    folder = Path(text)
    with writable(option, folder, "folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder
