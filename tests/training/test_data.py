"""Data: what is read, what is held out, and that no layout changes it."""

from __future__ import annotations

import errno
import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny import MODEL, job, write_text

from meshwright.config.tree import Job, Layout
from meshwright.errors import UserError
from meshwright.parallel.loss import IGNORE
from meshwright.training.data import Corpus, Text
from meshwright.training.shard import local_sequences, unshard
from meshwright.training.step import Batch

LAYOUTS = [
    Layout(replicate=r, shard=s, tensor=t) for r, s, t in itertools.product((1, 2, 4), (1, 2), (1, 2)) if r * s < 8
]


def sequences(text: Text, step: int) -> dict[bytes, int]:
    """The tokens and labels of a rank's batch, counted."""
    batch = text.batch(step)
    rows = torch.stack((batch.tokens, batch.labels)).flatten(1, 2).unbind(1)
    counted: dict[bytes, int] = {}
    for row in rows:
        counted[row.numpy().tobytes()] = counted.get(row.numpy().tobytes(), 0) + 1
    return counted


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_micro_batch_is_divided_once(layout: Layout, accumulation: int) -> None:
    ranks = [layout.coordinates(rank) for rank in range(0, layout.world, layout.tensor)]
    parts = [local_sequences(job(layout, accumulation=accumulation), coordinates) for coordinates in ranks]
    size = 8 // accumulation
    for index, micro_batch in enumerate(zip(*parts, strict=True)):
        assert sorted(itertools.chain(*micro_batch)) == list(range(index * size, (index + 1) * size))


def test_tensor_ranks_share_their_part() -> None:
    layout = Layout(replicate=2, tensor=4)
    parts = [local_sequences(job(layout), layout.coordinates(rank)) for rank in range(8)]
    assert parts == [[range(4)]] * 4 + [[range(4, 8)]] * 4


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("layout", [Layout(replicate=2), Layout(shard=2, tensor=2), Layout(tensor=2)], ids=str)
def test_the_global_batch_is_the_same_for_every_layout(tmp_path: Path, layout: Layout, accumulation: int) -> None:
    data = write_text(tmp_path / "text")
    whole = sequences(Text.open(job(data=data)), step=7)
    parts: dict[bytes, int] = {}
    for rank in range(0, layout.world, layout.tensor):
        text = Text.open(job(layout, data=data, accumulation=accumulation), rank)
        assert text.batch(7).tokens.shape == (accumulation, 8 // layout.batch_ranks // accumulation, 16)
        for row, count in sequences(text, step=7).items():
            parts[row] = parts.get(row, 0) + count
    assert parts == whole


def test_order_depends_on_seed_and_step_only(tmp_path: Path) -> None:
    data = write_text(tmp_path / "text")
    batch = Text.open(job(data=data)).batch(3)
    assert torch.equal(Text.open(job(data=data)).batch(3).tokens, batch.tokens)
    assert not torch.equal(Text.open(job(data=data)).batch(4).tokens, batch.tokens)
    assert not torch.equal(Text.open(job(data=data, seed=1)).batch(3).tokens, batch.tokens)


def test_labels_are_the_next_bytes_and_never_held_out(tmp_path: Path) -> None:
    data = write_text(tmp_path / "text", 400)  # 380 to train on: some sequence must come close to the end
    text, content = Text.open(job(data=data)), Path(data).read_bytes()
    for step in range(50):
        batch = text.batch(step)
        for tokens, labels in zip(batch.tokens[0], batch.labels[0], strict=True):
            assert bytes(tokens.tolist() + labels[-1:].tolist()) in content[:380]
            assert torch.equal(tokens[1:], labels[:-1])


@pytest.mark.parametrize("layout", [Layout(), Layout(replicate=2), Layout(replicate=4, tensor=2)], ids=str)
def test_heldout_set_is_the_same_for_every_layout(tmp_path: Path, layout: Layout) -> None:
    data = write_text(tmp_path / "text")
    labelled = []
    for rank in range(0, layout.world, layout.tensor):
        for batch in Text.open(job(layout, data=data), rank).heldout():
            labelled += [row.tolist() for row in batch.labels[0] if (row != IGNORE).all()]
    content = Path(data).read_bytes()
    expected = [list(content[3800 + s * 183 // 4 :][1:17]) for s in range(5)]
    assert len(labelled) == 5
    assert sorted(labelled) == sorted(expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_heldout_tokens_stay_bytes(tmp_path: Path, rank: int) -> None:
    """One sequence a rank and an odd number of them: the filler has no labels, and its tokens are untouched."""
    lone = job(Layout(replicate=2), data=write_text(tmp_path / "text"), batch=2, heldout_sequences=3, seq_len=32)
    batches = list(Text.open(lone, rank).heldout())
    assert [batch.tokens.shape for batch in batches] == [(1, 1, 32)] * 2
    assert all((batch.tokens >= 0).all() for batch in batches)
    assert [int((batch.labels == IGNORE).sum()) for batch in batches] == [0, 32 * rank]


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / "a.txt").write_text("first ")
    (tmp_path / "b" / "x.md").write_bytes(b"s\xe9cond ")
    (tmp_path / "b" / "image").write_bytes(b"PNG\0")
    (tmp_path / "empty").touch()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    corpus = Corpus.open(str(tmp_path))
    assert corpus.read(0, corpus.num_bytes).tobytes() == b"first s\xe9cond third"
    assert corpus.read(5, 3).tobytes() == b" s\xe9"


def test_the_fingerprint_is_of_the_text_not_of_its_place(tmp_path: Path) -> None:
    for name, size in (("one", 400), ("two", 400), ("three", 401)):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name / "text", size)
    one, two, three = (Corpus.open(str(tmp_path / name)).fingerprint for name in ("one", "two", "three"))
    assert one == two != three


def test_the_default_is_the_standard_library() -> None:
    corpus = Corpus.open("")
    assert corpus.num_bytes > 1_000_000
    assert {file.suffix for file in corpus.files} == {".py"}
    assert not [file for file in corpus.files if {"site-packages", "test"} & set(file.parts)]


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "count", "expected"),
    [
        (0, 8, [0, 0, 0, 3, 4, 4, 4, 4]),
        (1, 6, [0, 0, 2, 3, 3, 3]),  # what began before begins at 0
        (2, 3, [0, 1, 2]),
        (3, 1, [0]),
        (3, 3, [0, 1, 1]),
        (4, 4, [0, 0, 0, 0]),
        (6, 2, [0, 0]),
        (7, 1, [0]),
    ],
)
def test_where_documents_begin(tmp_path: Path, start: int, count: int, expected: list[int]) -> None:
    """Files of 3, 1, 0 and 4 bytes: an empty one is no document."""
    for name, content in (("a", "abc"), ("b", "d"), ("c", ""), ("d", "efgh")):
        (tmp_path / name).write_text(content)
    corpus = Corpus.open(str(tmp_path))
    assert corpus.read(0, 8).tobytes() == b"abcdefgh"
    assert corpus.document_starts(start, count).tolist() == expected


FILE_LENGTHS = [5, 1, 9, 40, 1, 1, 3, 12] * 24


def write_documents(folder: Path) -> str:
    """Short files whose concatenation has no two equal sequences; returns the folder's name."""
    folder.mkdir()
    content, end = Path(write_text(folder / "text", sum(FILE_LENGTHS))).read_bytes(), 0
    (folder / "text").unlink()
    for number, length in enumerate(FILE_LENGTHS):
        (folder / f"{number:03}").write_bytes(content[end : end + length])
        end += length
    return str(folder)


def beginnings_of(data: str, tokens: list[int]) -> list[int]:
    """The first byte of the document of each byte of a sequence and of the one after it, from the files' lengths."""
    content = b"".join((Path(data) / f"{number:03}").read_bytes() for number in range(len(FILE_LENGTHS)))
    assert content.count(bytes(tokens)) == 1
    start = content.index(bytes(tokens))
    begins: list[int] = []
    for length in FILE_LENGTHS:
        begins += [len(begins)] * length
    return [max(begin - start, 0) for begin in begins[start : start + len(tokens) + 1]]


def parts_of(data: str, layout: Layout, documents: str, step: int, **training: Any) -> list[Batch]:
    separate = job(layout, data=data, documents=documents, **training)
    return [Text.open(separate, rank).batch(step) for rank in range(layout.world)]


DIVIDED = Layout(ring=2, ulysses=2)
"""Zigzag over 16 positions: chunks of four, of which ring rank 0 has the first and the last."""

ATTENDED = [[0, 1, 2, 3, 12, 13, 14, 15]] * 2 + [[4, 5, 6, 7, 8, 9, 10, 11]] * 2
"""By rank: both ulysses ranks of a ring rank attend with all that it has."""


@pytest.mark.parametrize("accumulation", [1, 2])
def test_separate_documents_are_divided_with_the_batch(tmp_path: Path, accumulation: int) -> None:
    data, num_boundaries = write_documents(tmp_path / "folder"), 0
    for step in range(4):
        joined = parts_of(data, Layout(), "joined", step)[0]
        whole = job(DIVIDED, accumulation=accumulation)
        parts = parts_of(data, DIVIDED, "separate", step, accumulation=accumulation)
        assert torch.equal(unshard([part.tokens for part in parts], whole), joined.tokens[0])
        begins = torch.tensor([beginnings_of(data, row.tolist()) for row in joined.tokens[0]])
        for part, attended in zip(parts, ATTENDED, strict=True):
            assert part.first is not None
            assert (part.first.shape, part.first.dtype) == ((accumulation, 8 // accumulation, 8), torch.int64)
            assert torch.equal(part.first.flatten(0, 1), begins[:, attended])
        crosses = begins[:, 1:] != begins[:, :-1]
        num_boundaries += int(crosses.sum())
        labels = unshard([part.labels for part in parts], whole)
        assert torch.equal(labels, joined.labels[0].masked_fill(crosses, IGNORE))
    assert num_boundaries > 32


@pytest.mark.parametrize("layout", [Layout(), DIVIDED], ids=["1", "divided"])
def test_joined_documents_are_not_told_apart(tmp_path: Path, layout: Layout) -> None:
    for part in parts_of(write_documents(tmp_path / "folder"), layout, "joined", 0):
        assert part.first is None
        assert (part.labels != IGNORE).all()


def test_one_file_is_one_document(tmp_path: Path) -> None:
    (part,) = parts_of(write_text(tmp_path / "text"), Layout(), "separate", 0)
    assert part.first is not None
    assert not part.first.any()
    assert (part.labels != IGNORE).all()


def test_padding_is_a_document_of_its_own(tmp_path: Path) -> None:
    """14 tokens on four ranks of four: the last two positions belong to no sequence."""
    parts = parts_of(write_documents(tmp_path / "folder"), DIVIDED, "separate", 0, seq_len=14, pad=True)
    for part, attended in zip(parts, ATTENDED, strict=True):
        assert part.first is not None
        assert [(row >= 14).tolist() for row in part.first[0]] == [[p >= 14 for p in attended]] * 8


def test_heldout_sequences_of_separate_documents(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "folder")
    found = []
    for batch in Text.open(job(data=data, documents="separate")).heldout():
        assert batch.first is not None
        for tokens, labels, first in zip(batch.tokens[0], batch.labels[0], batch.first[0], strict=True):
            begins = torch.tensor(beginnings_of(data, tokens.tolist()))
            assert torch.equal(first, begins[:-1])
            if (labels != IGNORE).any():
                assert torch.equal(labels == IGNORE, begins[1:] != begins[:-1])
                found.append(labels)
    assert len(found) == 5


# --- what is refused --------------------------------------------------------------------------------------------------


def message(job: Job) -> str:
    with pytest.raises(UserError) as caught:
        Text.open(job)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_path(tmp_path: Path) -> None:
    assert f"{tmp_path}/nowhere does not exist" in message(job(data=f"{tmp_path}/nowhere"))


def test_a_name_that_is_too_long() -> None:
    long = "x" * 5000
    assert message(job(data=long)).startswith(f"training.data = {long} cannot be read: File name too long: name a text")


@pytest.mark.parametrize("method", ["open", "iterdir"])
def test_an_unreadable_file_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """By a patch, as nothing is unreadable to root."""
    inner = tmp_path / "inner"
    inner.mkdir()
    file = Path(write_text(inner / "text"))
    refused = {"open": file, "iterdir": inner}[method]
    before = getattr(Path, method)

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        if path == refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return before(path, *arguments, **named)

    monkeypatch.setattr(Path, method, refuse)
    assert f"{tmp_path} cannot be read: Permission denied ({refused}): name a" in message(job(data=str(tmp_path)))
    assert f"{refused} cannot be read: Permission denied: name a" in message(job(data=str(refused)))


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "holds 0 bytes of text" in message(job(data=str(tmp_path)))


def test_a_corpus_shorter_than_a_sequence(tmp_path: Path) -> None:
    error = message(job(data=write_text(tmp_path / "text", 200)))
    assert "200 bytes, 190 to train on and 10 held out" in error
    assert error.endswith("training.seq_len + 1 = 17: use at least 340 bytes or training.seq_len up to 9")
    assert Text.open(job(data=write_text(tmp_path / "text", 340)))


def test_a_vocabulary_smaller_than_a_byte(tmp_path: Path) -> None:
    data = write_text(tmp_path / "text")
    assert "model.vocab_size = 100 is below 256" in message(job(model=replace(MODEL, vocab_size=100), data=data))
