"""Text as training data: any file or folder, read byte by byte, memory-mapped, in an order that no layout changes.

A corpus is a list of files in a fixed order, seen as one long string of bytes. The last 5 % are held out.

    which files    one file named directly: itself. A folder: every file below it, in the order of names, without hidden
                   files and folders (a leading dot), links to folders, empty and binary files (a NUL among the first
                   8 KiB, git's rule). Nothing named: the `*.py` files of the running Python's standard library, without
                   installed packages and tests.
    training       sample k of step s is a sequence at a random offset, drawn from (seed, s, k) and nothing else
    held out       `heldout_sequences` sequences at even distances, the same in every evaluation and for every layout

Which sequences of a global batch are whose is `training.shard`'s to say. Files are mapped where they lie, so there is
nothing to copy, to cache or to race for.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import math
import os
import struct
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from meshwright.config.tree import Job
from meshwright.errors import UserError
from meshwright.parallel.loss import IGNORE
from meshwright.training.shard import local_sequences, split_sequences
from meshwright.training.step import Batch

HELDOUT_PERCENT = 5
NUM_BYTE_VALUES = 256
_PROBE_BYTES = 8192
_LIBRARY_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


# --- the corpus -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Files in order, and where each ends in their concatenation."""

    name: str
    files: tuple[Path, ...]
    ends: tuple[int, ...]

    @classmethod
    def open(cls, source: str) -> Corpus:
        """The corpus that `training.data` names. Raises UserError if it is missing, unreadable, or has no text."""
        name = source or "the standard library's source"
        try:
            files = _text_files(Path(source)) if source else _library_files(Path(sysconfig.get_paths()["stdlib"]))
            sizes = [(file, file.stat().st_size) for file in files]
        except OSError as error:
            where = "" if error.filename in (None, source) else f" ({error.filename})"
            raise UserError(
                f"training.data = {name} cannot be read: {error.strerror}{where}: "
                f"name a text file or folder that you can read"
            ) from None
        sizes = [(file, size) for file, size in sizes if size]
        if not sizes:
            raise UserError(
                f"training.data = {name} holds 0 bytes of text (empty and binary files do not count): "
                f"name a text file or folder"
            )
        return cls(name, tuple(file for file, _ in sizes), tuple(itertools.accumulate(size for _, size in sizes)))

    @property
    def num_bytes(self) -> int:
        """Length of the concatenation."""
        return self.ends[-1]

    @property
    def heldout(self) -> range:
        """The last 5 %."""
        return range(self.num_bytes - self.num_bytes * HELDOUT_PERCENT // 100, self.num_bytes)

    @property
    def train(self) -> range:
        """Everything before the held-out part."""
        return range(self.heldout.start)

    @property
    def fingerprint(self) -> str:
        """Equal for corpora of the same files of the same sizes in the same order, wherever the folder lies."""
        root = os.path.commonpath([file.parent for file in self.files])
        listing = [
            f"{file.relative_to(root).as_posix()}\0{end}" for file, end in zip(self.files, self.ends, strict=True)
        ]
        return hashlib.sha256("\n".join(listing).encode("utf-8", "surrogateescape")).hexdigest()

    def read(self, start: int, count: int) -> np.ndarray:
        """Bytes `start` to `start + count` of the concatenation."""
        parts, index = [], bisect.bisect_right(self.ends, start)
        while count > 0:
            begin = self.ends[index - 1] if index else 0
            part = _mapped(self.files[index])[start - begin : start - begin + count]
            parts.append(part)
            start, count, index = start + len(part), count - len(part), index + 1
        return np.concatenate(parts)

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """For each byte from `start`, where its file begins, counted from `start`; 0 for what began before."""
        offsets = np.arange(start, start + count)
        begins = np.concatenate([[0], np.asarray(self.ends, dtype=np.int64)])
        return np.maximum(begins[np.searchsorted(begins, offsets, side="right") - 1] - start, 0)


@functools.lru_cache(maxsize=1024)
def _mapped(file: Path) -> np.ndarray:
    return np.memmap(file, dtype=np.uint8, mode="r")


def _text_files(root: Path) -> Sequence[Path]:
    if not root.exists():
        raise UserError(
            f"training.data = {root} does not exist: name a text file or a folder, or leave it empty for the default"
        )
    if not root.is_dir():
        if root.is_file():
            root.open("rb").close()  # says now if it cannot be read
        return [root]
    return [file for file in _walk(root, skips=set()) if _is_text(file)]


def _library_files(root: Path) -> Sequence[Path]:
    return [file for file in _walk(root, _LIBRARY_SKIPS) if file.suffix == ".py"]


def _walk(root: Path, skips: set[str]) -> Iterator[Path]:
    """Files below `root`, each folder's entries in the order of their names."""
    for entry in sorted(root.iterdir()):
        if entry.name.startswith(".") or entry.name in skips:
            continue
        if entry.is_dir():
            if not entry.is_symlink():
                yield from _walk(entry, skips)
        elif entry.is_file():
            yield entry


def _is_text(file: Path) -> bool:
    with file.open("rb") as stream:
        return b"\0" not in stream.read(_PROBE_BYTES)


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """The corpus as one rank reads it for a job."""

    job: Job
    corpus: Corpus
    rank: int = 0

    @classmethod
    def open(cls, job: Job, rank: int = 0) -> Text:
        """Find the corpus. Raises UserError if bytes are not tokens of the model, or are too few."""
        _check_vocabulary(job)
        corpus = Corpus.open(job.training.data)
        _check_length(corpus, job.training.seq_len)
        return cls(job, corpus, rank)

    def batch(self, step: int, device: torch.device | str = "cpu") -> Batch:
        """This rank's micro-batches of a step."""
        training = self.job.training
        choices = len(self.corpus.train) - training.seq_len
        micro_batches = local_sequences(self.job, self.job.layout.coordinates(self.rank))
        starts = [[_draw(training.seed, step, k) % choices for k in sequences] for sequences in micro_batches]
        return self._read(starts, device)

    def heldout(self, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """This rank's part of the held-out sequences, in batches of one micro-batch, of the shape that training has.

        The last is filled up with sequences without labels, so that the set is the same for every layout.
        """
        training, starts = self.job.training, self._heldout_starts()
        size = training.batch // training.accumulation
        rounds = math.ceil(len(starts) / size)
        whole = replace(self.job, training=replace(training, batch=rounds * size, accumulation=rounds))
        for sequences in local_sequences(whole, self.job.layout.coordinates(self.rank)):
            batch = self._read([[starts[min(k, len(starts) - 1)] for k in sequences]], device)
            batch.labels[:, [k >= len(starts) for k in sequences]] = IGNORE
            yield batch

    def _heldout_starts(self) -> list[int]:
        part, seq_len = self.corpus.heldout, self.job.training.seq_len
        count = min(self.job.training.heldout_sequences, (len(part) - 1) // seq_len)
        room = len(part) - 1 - seq_len
        return [part.start + room * k // max(count - 1, 1) for k in range(count)]

    def _read(self, starts: Sequence[Sequence[int]], device: torch.device | str) -> Batch:
        """Micro-batches of the sequences that begin at these offsets."""
        seq_len = self.job.training.seq_len
        rows = np.stack([np.stack([self.corpus.read(start, seq_len + 1) for start in micro]) for micro in starts])
        text = torch.from_numpy(rows).to(device, torch.int64)
        tokens, labels, first = text[..., :-1], text[..., 1:], None
        if self.job.training.documents == "separate":
            begins = np.stack(
                [np.stack([self.corpus.document_starts(s, seq_len + 1) for s in micro]) for micro in starts]
            )
            first = torch.from_numpy(begins).to(device)
            labels = labels.masked_fill(first[..., 1:] != first[..., :-1], IGNORE)  # no document predicts the next one
            first = first[..., :-1]
        return split_sequences(tokens, labels, self.job, self.job.layout.coordinates(self.rank), first)


def _draw(seed: int, step: int, sample: int) -> int:
    """64 random bits; a hash, because its values will not change with a library's version."""
    return int.from_bytes(hashlib.blake2b(struct.pack("<qqq", seed, step, sample), digest_size=8).digest(), "little")


def _check_vocabulary(job: Job) -> None:
    if job.model.vocab_size < NUM_BYTE_VALUES:
        raise UserError(
            f"model.vocab_size = {job.model.vocab_size} is below {NUM_BYTE_VALUES} (text is read as bytes): "
            f"use {NUM_BYTE_VALUES} or more"
        )


def _check_length(corpus: Corpus, seq_len: int) -> None:
    shortest, needed = min(len(corpus.train), len(corpus.heldout)), seq_len + 1
    if shortest >= needed:
        return
    fixes = [f"use at least {math.ceil(needed * 100 / HELDOUT_PERCENT)} bytes"]
    if shortest >= 2:
        fixes.append(f"or training.seq_len up to {shortest - 1}")
    raise UserError(
        f"training.data = {corpus.name} has {corpus.num_bytes} bytes, {len(corpus.train)} to train on and "
        f"{len(corpus.heldout)} held out (the last {HELDOUT_PERCENT} %); each part needs one sequence and a byte, "
        f"training.seq_len + 1 = {needed}: {' '.join(fixes)}"
    )
