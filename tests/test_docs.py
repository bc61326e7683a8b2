"""The docs' transcripts are what the commands print, and their tables what the account folds to."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from meshwright.account import Footprint, Ledger, Memory, Trace, Work
from meshwright.cli import main
from meshwright.config.tree import Layout, Model, Training
from meshwright.schemes.activation_memory import Sizes as PaperSizes
from meshwright.schemes.activation_memory import Variant, formula, layer_bytes
from meshwright.schemes.decoder import Block
from meshwright.schemes.loss import ChunkedCrossEntropy, CrossEntropy
from meshwright.schemes.recompute import RerunBlock
from meshwright.schemes.table import saved_bytes
from meshwright.schemes.tape import Sizes, Tape
from meshwright.schemes.tensor import ColumnLinear

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.glob("*/*.md"))


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


# --- transcripts ------------------------------------------------------------------------------------------------------


def transcripts() -> Iterator[tuple[str, str, str]]:
    """(page, command, what it is said to print) of each fenced block that begins with a prompt."""
    for page in PAGES:
        for command, output in re.findall(r"^```\w*\n\$ ([^\n]+)\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL):
            yield page, command, output


def printed(command: str) -> str:
    """Standard output of `meshwright ...` or `python -c CODE`, in this process; space at the ends of lines left out."""
    program, *arguments = shlex.split(command)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if program == "meshwright":
            assert main(arguments) == 0
        else:
            flag, code = arguments
            assert (program, flag) == ("python", "-c")
            exec(code, {})
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


@pytest.mark.parametrize(("page", "command", "output"), list(transcripts()))
def test_transcripts(page: str, command: str, output: str) -> None:
    assert printed(command) == output


def test_every_prompt_is_a_transcript() -> None:
    """None is written in a way that the test above would not find."""
    assert sum(text_of(page).count("\n$ ") for page in PAGES) == len(list(transcripts())) >= 5


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", text_of(page))
    assert [target for target in targets if not (DOCS / page).parent.joinpath(target).is_file()] == []


# --- tables -----------------------------------------------------------------------------------------------------------


def check_table(page: str, rows: list[list[object]]) -> None:
    """The page has these rows, one below the other; whole numbers are written with commas."""
    lines = ("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row) for row in rows)
    table = "".join(line + " |\n" for line in lines).replace("|  |", "| |").replace("|  |", "| |")
    assert table in text_of(page), f"{page} should have\n{table}"


def gpt_layer(seq: int, batch: int, hidden: int, heads: int, layout: Layout) -> Trace:
    """Forward and backward of a layer of GPT's kind in bf16 on a GPU."""
    model = Model(
        d_model=hidden,
        d_ff=4 * hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        norm="layernorm",
        positions="learned",
        mlp="gelu",
    )
    sizes = Sizes.of(model, layout, Training(batch=batch, seq_len=seq, precision="bf16", device="cuda"))
    whole, tape = Block(model, sizes), Tape()
    block = RerunBlock(whole) if layout.recompute == "full" else whole
    with tape.at(phase="forward"):
        block.forward(tape, "layers.0")
    with tape.at(phase="backward"):
        block.backward(tape, "layers.0")
    return tape.trace()


class Kept(NamedTuple):
    """A row of recompute.md: the paper's variant, our letters, and the same in Python."""

    variant: Variant | None
    letters: str
    formula: Callable[[int, int, int, int, int], int]


KEPT = {
    ("none", False): Kept(
        Variant("", ("tensor",)),
        "sbh(8 + 24/t) + 16sb + 4asb/t + 24",
        lambda s, b, h, a, t: 8 * s * b * h + 24 * s * b * h // t + 16 * s * b + 4 * a * s * b // t + 24,
    ),
    ("none", True): Kept(
        Variant("", ("tensor", "sequence")),
        "sbh(32/t) + 16sb/t + 4asb/t + 24",
        lambda s, b, h, a, t: 32 * s * b * h // t + 16 * s * b // t + 4 * a * s * b // t + 24,
    ),
    ("selective", False): Kept(
        Variant("", ("tensor",), "selective"),
        "sbh(8 + 24/t) + 16sb",
        lambda s, b, h, a, t: 8 * s * b * h + 24 * s * b * h // t + 16 * s * b,
    ),
    ("selective", True): Kept(
        Variant("", ("tensor", "sequence"), "selective"),
        "sbh(32/t) + 16sb/t",
        lambda s, b, h, a, t: 32 * s * b * h // t + 16 * s * b // t,
    ),
    ("full", False): Kept(Variant("", (), "full"), "sbh(2)", lambda s, b, h, a, t: 2 * s * b * h),
    ("full", True): Kept(None, "sbh(2/t)", lambda s, b, h, a, t: 2 * s * b * h // t),
}

PAPERS_22B = (2048, 4, 6144, 64, 8)


def kept_bytes(recompute: str, split: bool, sizes: tuple[int, int, int, int, int]) -> int:
    seq, batch, hidden, heads, tensor = sizes
    layout = Layout(tensor=tensor, sequence_parallel=split, recompute=recompute)  # type: ignore[arg-type]
    return saved_bytes(gpt_layer(seq, batch, hidden, heads, layout))


@pytest.mark.parametrize("sizes", [PAPERS_22B, (2048, 1, 12288, 96, 8), (512, 3, 256, 8, 2)])
@pytest.mark.parametrize(("recompute", "split"), KEPT)
def test_closed_forms_of_recompute(recompute: str, split: bool, sizes: tuple[int, int, int, int, int]) -> None:
    assert kept_bytes(recompute, split, sizes) == KEPT[recompute, split].formula(*sizes)


def test_table_of_recompute() -> None:
    """Ours is the tape's, theirs the worksheet's."""
    rows: list[list[object]] = []
    for (recompute, split), row in KEPT.items():
        paper: tuple[object, object] = ("", "")
        if row.variant is not None:
            paper = formula(row.variant), layer_bytes(row.variant, PaperSizes(*PAPERS_22B))
        ours = kept_bytes(recompute, split, PAPERS_22B)
        rows.append([recompute, "yes" if split else "no", row.letters, ours, *paper])
    check_table("schemes/recompute.md", rows)


def test_prose_of_recompute() -> None:
    """What selective and full recomputation save and cost in the 22B layer, and under Ulysses."""
    text = " ".join(text_of("schemes/recompute.md").split())
    none, selective, full = (kept_bytes(recompute, False, PAPERS_22B) for recompute in ("none", "selective", "full"))
    assert f"it saves {none - selective:,} bytes, {(none - selective) / none:.2%}".replace("%", " %") in text
    assert f"saves {1 - full / none:.0%} (".replace("%", " %") in text
    split, split_full = (kept_bytes(recompute, True, PAPERS_22B) for recompute in ("none", "full"))
    assert f"({1 - split_full / split:.0%} under".replace("%", " %") in text
    s, b, h, a, t = PAPERS_22B
    work = Work.of(gpt_layer(s, b, h, a, Layout(tensor=t, recompute="selective")))
    share = work.flops(phase="recompute") / work.flops(phase="forward")
    assert share == pytest.approx(s / (6 * h + s), rel=1e-12)
    assert f"costs {share:.1%} of forward".replace("%", " %") in text


SENT_AGAIN = {
    "tensor": (Layout(tensor=8, recompute="full"), 12 * 7 / 8),
    "sequence": (Layout(tensor=8, sequence_parallel=True, recompute="full"), 14 * 7 / 8),
    "ulysses": (Layout(ulysses=8, recompute="full"), 12 * 7 / 8 / 8),
    "ulysses, selective": (Layout(ulysses=8, recompute="selective"), 8 * 7 / 8 / 8),
}


@pytest.mark.parametrize("name", SENT_AGAIN)
def test_what_recomputation_sends_in_all(name: str) -> None:
    layout, times = SENT_AGAIN[name]
    assert Ledger.of(gpt_layer(1024, 1, 1024, 8, layout)).wire_bytes() == 2 * times * 1024 * 1024


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_hops_run_again(recompute: str) -> None:
    rows = Ledger.of(gpt_layer(1024, 1, 1024, 8, Layout(ring=8, recompute=recompute))).rows  # type: ignore[arg-type]
    assert sum(n * key.wire_bytes for key, n in rows.items() if key.phase == "recompute") == 2 * 2 * 7 * 128 * 1024


def test_table_of_context() -> None:
    rows: list[list[object]] = []
    for ulysses in (1, 2, 4, 8):
        trace = gpt_layer(4096, 1, 4096, 32, Layout(ulysses=ulysses, ring=8 // ulysses))
        calls, sent = ({"forward": 0, "backward": 0} for _ in range(2))
        for key, n in Ledger.of(trace).rows.items():
            calls[key.phase] += n
            sent[key.phase] += n * key.wire_bytes
        rows.append([f"{ulysses} × {8 // ulysses}", *calls.values(), *sent.values()])
    check_table("schemes/context.md", rows)


def logits_bytes(chunk: int) -> tuple[int, int]:
    """Of 8192 tokens: what head and loss keep in category `logits`, and its peak, alone on a tape."""
    model = Model(d_model=4096, vocab_size=128_256)
    training = Training(batch=1, seq_len=8192, precision="bf16", device="cuda", loss_chunk=chunk)
    sizes, tape = Sizes.of(model, Layout(tensor=8), training), Tape()
    head, loss, chunked = (
        ColumnLinear(sizes, (sizes.V,), False),
        CrossEntropy(sizes, sizes.N),
        ChunkedCrossEntropy(sizes),
    )
    if chunk:
        chunked.forward(tape)
    else:
        head.forward(tape, ("logits",))
        loss.forward(tape)
    kept = sum(e.delta_bytes for e in tape.trace().expanded() if isinstance(e, Memory) and e.category == "logits")
    if chunk:
        chunked.backward(tape)
    else:
        loss.backward(tape)
        head.backward(tape, dy_categories=("logits",))
    return kept, Footprint.of(tape.trace()).bytes["logits"]


def test_table_of_loss() -> None:
    check_table("schemes/loss.md", [["0 (whole)", *logits_bytes(0)], ["1024", *logits_bytes(1024)]])


def test_closed_forms_of_loss() -> None:
    """As loss.md has them, but for the loss itself, a float64, and a few scalars and rows of 17 bytes a token."""
    N, E, V, C = 8192, 4096, 128_256 // 8, 1024
    kept, peak = logits_bytes(0)
    assert (kept, peak) == (2 * N * V + 4 * N + 8, pytest.approx(8 * N * V, rel=2e-4))
    kept, peak = logits_bytes(C)
    assert kept == 2 * N * E + 4 * E * V + 8
    assert peak == pytest.approx(4 * E * V + 2 * N * E + max(8 * C * V, 2 * (E + C) * V), rel=1e-6)
