"""The command line: its output, its errors in one line each, its exit codes; most of it in this process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest

from meshwright import __version__
from meshwright.cli import main
from meshwright.cli.options import COMMANDS
from meshwright.cli.worksheets import WORKSHEETS

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: Capture, *arguments: str) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    return json.loads(out)


def spawn(
    *arguments: str, code: str = "import sys; from meshwright.cli import main; sys.exit(main(sys.argv[1:]))"
) -> Any:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


# --- what goes wrong --------------------------------------------------------------------------------------------------

MISTAKES = {
    "no such command": ("plna", "quickstart"),
    "no such command at all": ("fly",),
    "no job": ("plan",),
    "unknown job": ("plan", "quikstart"),
    "too many arguments": ("plan", "quickstart", "small"),
    "mistyped option": ("plan", "quickstart", "--devcies", "4"),
    "option of another command": ("train", "quickstart", "--shrink"),
    "a field without its section": ("plan", "quickstart", "--tensor", "2"),
    "mistyped field": ("plan", "quickstart", "--layout.tensr", "2"),
    "mistyped section": ("plan", "quickstart", "--layuot.tensor=2"),
    "text for a number": ("plan", "quickstart", "--devices", "many"),
    "fraction for a whole number": ("plan", "quickstart", "--layout.tensor", "2.5"),
    "zero": ("plan", "quickstart", "--devices", "0"),
    "no value": ("plan", "quickstart", "--devices"),
    "no value before an option": ("plan", "quickstart", "--layout.tensor", "--json"),
    "wrong choice": ("plan", "quickstart", "--training.precision", "fp8"),
    "unknown cluster": ("plan", "quickstart", "--cluster", "h100x9"),
    "tensor does not divide": ("plan", "quickstart", "--layout.tensor", "3"),
    "attention and layout": (
        *("plan", "quickstart", "--training.attention", "flash", "--model.head-dim", "48", "--layout.tensor", "3"),
    ),
    "attention and layout to verify": ("verify", "quickstart", "--training.attention=flex", "--layout.tensor=3"),
    "GPUs to verify on": ("verify", "quickstart", "--training.device", "cuda", "--layout.tensor", "8"),
    "two rules at once": ("rehearse", "quickstart", "--layout.tensor", "3", "--layout.replicate", "5"),
    "no legal layout": ("plan", "quickstart", "--devices", "7"),
    "world": ("rehearse", "quickstart", "--layout.tensor", "4", "--world", "6"),
    "world of typed degrees": ("layout", "quickstart", "--layout.replicate", "2", "--world", "6"),
    "rank": ("rehearse", "quickstart", "--rank", "1"),
    "processes to verify": ("verify", "quickstart", "--layout.tensor", "2", "--processes", "3"),
    "processes to train": ("train", "quickstart", "--layout.tensor", "2", "--processes", "3"),
    "ffn to rehearse": ("rehearse", "xxl-ffn"),
    "ffn to train": ("train", "xxl-ffn"),
    "missing sizes": ("schemes", "--seq", "4096"),
    "schemes degree": ("schemes", "--seq", "4096", "--hidden", "1024", "--degree", "3"),
    "no worksheet": ("worksheet", "--json"),
    "unknown worksheet": ("worksheet", "linear-pairs"),
    "unknown worksheet at all": ("worksheet", "--tensor", "4", "fly"),
    "help of an unknown worksheet": ("worksheet", "activation", "--help"),
    "two worksheets": ("worksheet", "linear-pair", "activation-memory"),
    "option of another worksheet": ("worksheet", "activation-memory", "--d-ff", "4096"),
    "flag of another worksheet": ("worksheet", "--run", "activation-memory"),
    "mistyped option of a worksheet": ("worksheet", "activation-memory", "--hiden", "4096"),
    "worksheet degree": ("worksheet", "linear-pair", "--tensor", "3"),
    "worksheet sizes": ("worksheet", "activation-memory", "--heads", "60", "--tensor", "7", "--seq=0", "--batch=0"),
    "sizes of fsdp-memory": ("worksheet", "fsdp-memory", "--model", "llama3-8b", "--tokens=0", "--device-gb=-1"),
    "model of fsdp-memory": ("worksheet", "fsdp-memory", "--model", "xxl-fn"),
    "sizes of bucket": ("worksheet", "bucket", "--gradient-bytes=0", "--bandwidth=0", "--seconds-per-call=-1"),
    "worksheet beyond memory": ("worksheet", "linear-pair", "--d-model", "100000000", "--run"),
    "beyond range": ("plan", "quickstart", "--layout.replicate", "1000000000000"),
    "world beyond range": ("rehearse", "quickstart", "--world", "1000000000000"),
    "name too long": ("plan", "x" * 5000),
    "separate documents on a GPU": ("plan", "llama3-8b", "--training.documents", "separate"),
    "separate documents rehearsed for a GPU": ("rehearse", "llama3-8b", "--training.documents=separate"),
}

NUM_LINES = {
    "missing sizes": 2,
    "schemes degree": 2,
    "tensor does not divide": 3,
    "two rules at once": 4,
    "attention and layout": 4,
    "attention and layout to verify": 4,
    "no legal layout": 4,
    "worksheet sizes": 4,
    "sizes of fsdp-memory": 3,
    "sizes of bucket": 3,
}
"""Where not one: a degree of 3 breaks the rules of heads, KV heads and d_ff."""

EXPECTED = {
    "no such command": "plna is not a command: did you mean plan?",
    "no such command at all": f"fly is not a command: use one of {', '.join(COMMANDS)}",
    "too many arguments": "'small' is one argument too many for plan: leave it out",
    "mistyped option": "--devcies is not an option of plan: did you mean --devices?",
    "option of another command": (
        "--shrink is not an option of train: use one of --processes, --runs, or a field of the job"
    ),
    "a field without its section": "--tensor is not an option of plan: did you mean --layout.tensor?",
    "mistyped field": "layout.tensr is not a field: did you mean layout.tensor?",
    "mistyped section": "layuot.tensor is not a field: did you mean layout.tensor?",
    "text for a number": '--devices = "many" is not a whole number',
    "fraction for a whole number": 'layout.tensor = "2.5" is not a whole number',
    "zero": "--devices = 0 is not a whole number above 0",
    "no value": "--devices has no value (options are --name value or --name=value): give it one",
    "no value before an option": "--layout.tensor has no value (options are --name value or --name=value): give it one",
    "no worksheet": f"worksheet needs a NAME: give one of {', '.join(WORKSHEETS)}",
    "unknown worksheet": "linear-pairs is not a worksheet: did you mean linear-pair?",
    "unknown worksheet at all": f"fly is not a worksheet: use one of {', '.join(WORKSHEETS)}",
    "help of an unknown worksheet": "activation is not a worksheet: did you mean activation-memory?",
    "two worksheets": "'activation-memory' is one argument too many for worksheet linear-pair: leave it out",
    "option of another worksheet": (
        "--d-ff is not an option of worksheet activation-memory (it is one of linear-pair): "
        "use one of --seq, --batch, --hidden, --heads, --tensor, --json"
    ),
    "flag of another worksheet": (
        "--run is not an option of worksheet activation-memory (it is one of linear-pair): "
        "use one of --seq, --batch, --hidden, --heads, --tensor, --json"
    ),
    "mistyped option of a worksheet": (
        "--hiden is not an option of worksheet activation-memory: did you mean --hidden?"
    ),
    "rank": "--rank 1 is not in a world of 1 (ranks count from 0): use 0 to 0",
    "processes to verify": (
        "--processes 3 is not the product of the degrees, tensor 2 = 2: use --processes 2, or change a degree"
    ),
    "processes to train": (
        "--processes 3 is not the product of the degrees, tensor 2 = 2: use --processes 2, or change a degree"
    ),
    "world": (
        "--world 6 is not divisible by tensor 4 = 4, the product of the degrees other than replicate: use 4 or 8"
    ),
    "world of typed degrees": (
        "--world 6 is not the product of the degrees, replicate 2 = 2: use --world 2, or leave out layout.replicate"
    ),
    "separate documents on a GPU": (
        "training.documents = separate needs training.device = cpu (no attention kernel for GPUs takes its mask yet): "
        "use training.documents joined, or training.device cpu"
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_line_on_stderr(mistake: str, capsys: Capture) -> None:
    code, out, err = run(capsys, *MISTAKES[mistake])
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == len(set(lines)) == NUM_LINES.get(mistake, 1), err
    if mistake in EXPECTED:
        assert lines == [EXPECTED[mistake]]


def test_all_mistakes_of_options_come_at_once(capsys: Capture) -> None:
    _, _, err = run(capsys, "plan", "quickstart", "--devices", "x", "--topp", "1", "--top", "0")
    assert len(err.splitlines()) == 3


def test_a_file_with_an_unknown_key(tmp_path: Path, capsys: Capture) -> None:
    job = tmp_path / "job.toml"
    job.write_text("[layout]\ntensr = 2\n")
    code, _, err = run(capsys, "plan", str(job))
    assert code == 2
    assert err == f"{job}: layout.tensr is not a field: did you mean layout.tensor?\n"


def test_xxl_ffn_is_refused_with_the_reason(capsys: Capture) -> None:
    for command in ("rehearse", "layout", "verify", "train"):
        code, _, err = run(capsys, command, "xxl-ffn")
        assert code == 2
        assert "no vocabulary and no loss to train" in err


def test_an_unwritable_folder(tmp_path: Path, capsys: Capture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    code, _, err = run(capsys, "rehearse", "quickstart", "--out", str(blocked / "folder"))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith(f"--out {blocked / 'folder'} cannot be written")


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meshwright.planner.search.plan", interrupt)
    assert main(["plan", "quickstart"]) == 130


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-m", "meshwright", "plan", "llama3-8b", "--devices", "64", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == "{"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("command", ["rehearse quickstart --json", "plan quickstart", "--help"])
def test_a_full_disk_is_a_line(command: str) -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "meshwright", *command.split()]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "the output cannot be written: No space left on device\n")


# --- what goes right --------------------------------------------------------------------------------------------------


def test_version_and_help(capsys: Capture) -> None:
    assert run(capsys, "--version") == (0, f"meshwright {__version__}\n", "")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: Capture) -> None:
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert f"meshwright {command}" in out
    assert ("--layout.tensor" in out) == (command not in ("bench", "lab", "schemes", "worksheet"))
    assert "overrides" not in out


def test_plan_as_json(capsys: Capture) -> None:
    found = run_json(capsys, "plan", "llama3-8b", "--devices", "64", "--top", "3")
    assert len(found["layouts"]) == 3
    assert {"rule", "count", "example", "fix"} == found["rejected"][0].keys()
    row = found["layouts"][0]["ledger"][0]
    assert set(row) == {
        *("operation", "axis", "group_size", "phase", "site", "dtype"),
        *("count", "payload_bytes", "wire_bytes"),
    }


def test_a_model_that_does_not_fit_is_reported(capsys: Capture) -> None:
    layout = run_json(capsys, "plan", "gpt3-175b")["layouts"][0]
    assert layout["fits"] is False
    assert layout["missing_bytes"] == layout["memory_bytes"] - 80_000_000_000


@pytest.mark.parametrize("option", ["--layout.tensor=2", "--layout.tensor 2", "--layout.tensor 4 --layout.tensor 2"])
def test_fields_in_every_spelling(option: str, capsys: Capture) -> None:
    found = run_json(capsys, "plan", *option.split(), "quickstart")
    assert found["layouts"][0]["layout"]["tensor"] == 2


def test_dashes_and_underscores(capsys: Capture) -> None:
    for name in ("--training.seq-len", "--training.seq_len"):
        work = run_json(capsys, "plan", "quickstart", name, "128")["layouts"][0]["work"]
        assert work["by_kind"]["attention"]["calls"] == 2 * 4
    for name in ("--d-model", "--d_model"):
        assert run_json(capsys, "worksheet", "linear-pair", name, "512")["inputs"]["d_model"] == 512


def test_a_typed_degree_stays_in_a_search(capsys: Capture) -> None:
    found = run_json(capsys, "plan", "quickstart", "--devices", "4", "--layout.tensor", "2")
    assert [row["layout"]["replicate"] for row in found["layouts"]] == [2]


def test_cluster_by_name(capsys: Capture) -> None:
    assert run_json(capsys, "plan", "quickstart", "--cluster", "h100x64")["cluster"] == "h100x64"


def test_separate_documents_on_a_cpu(capsys: Capture) -> None:
    words = ("plan", "llama3-8b", "--training.documents", "separate", "--training.device", "cpu")
    assert len(run_json(capsys, *words)["layouts"]) == 1


def test_plan_for_people(capsys: Capture) -> None:
    code, out, _ = run(capsys, "plan", "llama3-8b", "--devices", "64")
    assert code == 0
    assert "replicate 8 × tensor 8" in out
    assert "use 4, 8, 16 or 32" in out
    assert "note: 64 devices need 8 hosts" in out
    assert "\x1b[" not in out


def test_rehearse(tmp_path: Path, capsys: Capture) -> None:
    options = (
        "rehearse",
        "quickstart",
        "--layout.tensor",
        "2",
        "--world",
        "4",
        "--rank",
        "3",
        "--out",
        str(tmp_path / "new"),
    )
    account = run_json(capsys, *options)
    assert (account["source"], account["rank"], account["world"]) == ("rehearsed", 3, 4)
    assert account["time_model"] == "timeline"
    assert account["timeline"]["step_seconds"] > 0
    assert json.loads((tmp_path / "new" / "rehearsal.json").read_text()) == account
    planned = run_json(capsys, "plan", "quickstart", "--layout.tensor", "2", "--layout.replicate", "2")["layouts"][0]
    assert account["ledger"] == planned["ledger"]


def test_what_auto_takes_is_said(capsys: Capture) -> None:
    job = ("quickstart", "--model.layers=1", "--training.attention=auto", "--training.device=cuda")
    chosen = {
        "asked": "auto",
        "kernel": "sdpa_efficient",
        "reason": "flash is tuned for 16 bits, and this is float32",
    }
    for command in ("plan", "rehearse"):
        assert run_json(capsys, command, *job)["attention"] == chosen
    code, out, _ = run(capsys, "rehearse", *job)
    assert code == 0
    assert "training.attention = auto takes sdpa_efficient: flash is tuned for 16 bits, and this is float32\n" in out


def test_rehearse_for_people(capsys: Capture) -> None:
    code, out, _ = run(capsys, "rehearse", "quickstart", "--layout.tensor", "2")
    assert code == 0
    for words in ("tensor", "saved activations", "peak in", "fits into", "backward", "step:"):
        assert words in out


def test_layout(capsys: Capture) -> None:
    found = run_json(capsys, "layout", "quickstart", "--layout.tensor", "2", "--world", "4")
    assert [rank["coordinates"]["tensor"] for rank in found["ranks"]] == [0, 1, 0, 1]
    code, out, _ = run(capsys, "layout", "quickstart", "--layout.tensor", "2", "--rank", "1")
    assert code == 0
    assert "layers.*.mlp.down.weight  × 4" in out
    assert "352:704" in out


def test_layout_of_a_large_world_stays_readable(capsys: Capture) -> None:
    _, out, _ = run(capsys, "layout", "llama3-8b", "--layout.tensor", "8", "--world", "512")
    assert "and 496 more" in out
    assert len(out.splitlines()) < 60


def test_schemes(capsys: Capture) -> None:
    found = run_json(capsys, "schemes", "--seq", "128", "--hidden", "256", "--degree", "2")
    assert [row["calls_forward"] for row in found["schemes"]] == [2, 4, 8, 16, 4, 2, 2, 2, 0, 0, 0, 0, 0, 1, 1]
    assert found["inputs"] == {"seq": 128, "hidden": 256, "degree": 2, "batch": 1, "heads": 2, "kv_heads": 2}
    assert set(found["schemes"][0]) == {
        *("scheme", "splits", "operation", "calls_forward", "calls_backward", "calls_optimiser"),
        *(
            "elements",
            "elements_forward",
            "elements_backward",
            "elements_optimiser",
            "bytes",
            "wire_bytes",
            "payload_bytes",
            "saved_bytes",
        ),
        *("overlaps", "when_seq_grows", "when_degree_grows", "when_both_grow"),
    }
    code, out, _ = run(capsys, "schemes", "--seq", "128", "--hidden", "256", "--degree", "2")
    assert code == 0
    for row in found["schemes"]:
        assert out.count(row["scheme"]) >= 2, "in both tables"
    assert all(note in out.splitlines() for note in found["notes"])


def test_schemes_fit_into_a_terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 columns: cells fold, none is cut."""
    monkeypatch.setattr("meshwright.cli.show.PLAIN_WIDTH", 100)
    for degree in ("1", "8", "64"):
        words = ["--seq", str(2**21), "--hidden", str(2**17), "--degree", degree, "--heads", str(2**10)]
        _, out, _ = run(capsys, "schemes", *words)
        assert max(map(len, out.splitlines())) <= 101
        assert "…" not in out


@pytest.mark.parametrize("name", WORKSHEETS)
def test_help_of_worksheets(name: str, capsys: Capture) -> None:
    _, listed, _ = run(capsys, "worksheet", "--help")
    assert f"  {name} " in listed
    code, out, err = run(capsys, "worksheet", name, "--help")
    assert (code, err) == (0, "")
    assert f"meshwright worksheet {name}" in out
    own = {f"--{field.name.replace('_', '-')}" for field in fields(cast(Any, WORKSHEETS[name]))}
    assert set(re.findall(r"--[a-z][a-z-]*", out)) - {"--help"} == own


def test_name_of_a_worksheet_in_every_place(capsys: Capture) -> None:
    for words in (
        "activation_memory --tensor 4",
        "--tensor 4 activation-memory",
        "--json activation-memory --tensor=4",
    ):
        assert run_json(capsys, "worksheet", *words.split())["inputs"]["tensor"] == 4


def test_activation_memory(capsys: Capture) -> None:
    found = run_json(capsys, "worksheet", "activation-memory")
    assert set(found) == {"name", "inputs", "figures"}
    assert found["name"] == "activation-memory"
    assert found["inputs"] == {"seq": 2048, "batch": 4, "hidden": 6144, "heads": 64, "tensor": 8}
    assert found["figures"]["bytes_per_layer"]["tensor_sequence_selective"] == 213_909_504
    code, out, _ = run(capsys, "worksheet", "activation-memory")
    assert code == 0
    assert "213,909,504" in out


def test_worksheet(capsys: Capture) -> None:
    found = run_json(capsys, "worksheet", "linear-pair")
    assert found["name"] == "linear-pair"
    assert found["figures"]["column_row"]["wire_elements_per_rank"] == 3_145_728
    code, out, _ = run(capsys, "worksheet", "linear-pair")
    assert code == 0
    assert "3,145,728" in out


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("bucket", "40,000,000 B"),
        ("fsdp-memory", "219,848,638,464"),
        ("fsdp-roofline", "C/W = 2750 FLOPs a byte"),
        ("zero", "31.41"),
    ],
)
def test_worksheets_on_paper(name: str, figure: str, capsys: Capture) -> None:
    found = run_json(capsys, "worksheet", name)
    assert set(found) == {"name", "inputs", "figures"}
    assert found["name"] == name
    assert {*found["inputs"], "json"} == {field.name for field in fields(cast(Any, WORKSHEETS[name]))}
    code, out, _ = run(capsys, "worksheet", name)
    assert code == 0
    assert figure in out


def test_verify_exits_1_where_something_differs(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    class Report:
        agree = False

        def to_json(self) -> dict[str, Any]:
            return {"agree": False}

        def text(self) -> str:
            return "DO NOT AGREE"

    monkeypatch.setattr("meshwright.verify.verify.verify", lambda *_, **__: Report())
    assert run(capsys, "verify", "quickstart", "--json") == (1, '{"agree": false}\n', "")
    assert run(capsys, "verify", "quickstart") == (1, "DO NOT AGREE\n", "")


# --- torch stays out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("rehearse", "--help"),
        ("plan", "llama3-8b", "--devices", "64", "--json"),
        ("plan", "llama3-8b", "--devices", "64"),
        ("layout", "quickstart"),
        ("schemes", "--seq", "128", "--hidden", "256", "--degree", "2"),
        ("worksheet", "--help"),
        ("worksheet", "linear-pair"),
        ("worksheet", "activation-memory"),
        ("worksheet", "fsdp-memory"),
        ("rehearse", "quickstart", "--layout.tensor", "3"),
        ("train", "quickstart", "--layout.tensr", "3"),
    ],
)
def test_no_torch(arguments: tuple[str, ...]) -> None:
    check = "import sys; from meshwright.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = spawn(*arguments, code=check)
    assert done.returncode == 0, done.stderr


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "meshwright", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"meshwright {__version__}\n")
