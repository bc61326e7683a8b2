"""The command line in: one dataclass a command, and a parser that finds every mistake at once.

An option is either a command's own (`--devices 64`, `--json`) or a field of the job by its path (`--layout.tensor 2`,
`--cluster h100x64`), with a space or `=` before its value, dashes or underscores in its name. Values are read by the
same strict function as fields. tyro writes the help from these classes; it does not parse, as its messages are boxes
of several lines and ours are one line each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from meshwright import catalog
from meshwright.cli.benches import BENCHES
from meshwright.cli.worksheets import WORKSHEETS
from meshwright.config import overrides
from meshwright.config.values import WrongValueError, nearest, parse
from meshwright.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OfJob:
    """Options of all commands that take a JOB."""

    job: str
    """A TOML file, or a name of the catalog such as quickstart or llama3-8b."""
    overrides: list[tuple[str, str]] = field(default_factory=list, init=False)
    """Fields of the job set on the command line, as (path, text)."""

    @property
    def typed(self) -> set[str]:
        """Layout fields that were set on the command line."""
        return {path.removeprefix("layout.") for path, _ in self.overrides if path.startswith("layout.")}


@dataclass(frozen=True, kw_only=True)
class Plan(OfJob):
    """Price layouts by formula: memory, traffic, time of a step, and why; illegal ones with the rule they break."""

    devices: int | None = None
    """Search all tensor × replicate layouts of so many devices; degrees that are given stay. None: the job's own."""
    top: int | None = None
    """Keep so many layouts, the best ones."""
    trace: str | None = None
    """Also write the timeline of the best layout's step to this file, for chrome://tracing or ui.perfetto.dev."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Rehearse(OfJob):
    """Execute the real training step for one rank of any world, on fake tensors and a fake wire, and account for it."""

    world: int | None = None
    """Number of ranks; what the given degrees leave goes to layout.replicate."""
    rank: int = 0
    """Which rank to be."""
    out: str | None = None
    """Also write the account to rehearsal.json in this folder."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Layout(OfJob):
    """Show where everything is: rank to host and mesh coordinates, and which part of each parameter a rank holds."""

    world: int | None = None
    """Number of ranks; what the given degrees leave goes to layout.replicate."""
    rank: int = 0
    """Whose parts to show; --json has all."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Verify(OfJob):
    """Run the layout on CPU ranks here; compare ledgers, loss and gradients with formula, rehearsal and one device."""

    processes: int | None = None
    """Number of ranks to start; must be the product of the degrees."""
    shrink: bool = False
    """Verify a smaller model of the same kinds and divisibility."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Train(OfJob):
    """Train a job on this machine, one process a rank; plan and rehearsal come first, the run is compared with them."""

    processes: int | None = None
    """Number of ranks to start; must be the product of the degrees."""
    runs: str = "runs"
    """Folder in which the run's folder is made."""


@dataclass(frozen=True, kw_only=True)
class Schemes:
    """Compare what the schemes split, send, keep and overlap, for one block of a transformer in bf16."""

    seq: int
    """Tokens in a whole sequence."""
    hidden: int
    """Width of the residual stream."""
    degree: int
    """Ranks that each scheme divides the block over."""
    batch: int = 1
    """Sequences of a micro-batch, shared by the ranks (data parallelism: of each rank)."""
    heads: int | None = None
    """Query heads. None: heads of 128, or narrower where that gives each rank whole ones."""
    kv_heads: int | None = None
    """Key and value heads. None: as many as query heads."""
    json: bool = False
    """Print one JSON object and nothing else."""


class Worksheet:
    """Work an exercise of the field by formula; NAME says which, and each has its own options."""


class Bench:
    """Measure a piece on this machine; NAME says which, and each has its own options."""


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Run a COMMAND on emulated hosts on this Linux machine, with links of a chosen rate between and inside them."""

    hosts: int = 2
    """Emulated hosts; each is a network namespace."""
    ranks: int = 1
    """Ranks of COMMAND on each host."""
    rate: str | None = None
    """What a host sends and receives at most, such as 400mbit. None: no limit."""
    intra_rate: str | None = None
    """What the ranks of one host send each other at most, all together. None: no limit."""
    bare: bool = False
    """Start COMMAND, any program, once on each host, with MASTER_ADDR, MASTER_PORT, NODE_RANK and NNODES set."""
    clean: bool = False
    """Remove what labs left whose process was killed, and run nothing."""
    command: list[str] = field(default_factory=list, init=False)
    """What stands after --: what torchrun takes, such as -m meshwright.training quickstart."""


COMMANDS: dict[str, type[Any]] = {
    "plan": Plan,
    "rehearse": Rehearse,
    "layout": Layout,
    "verify": Verify,
    "train": Train,
    "schemes": Schemes,
    "worksheet": Worksheet,
    "bench": Bench,
    "lab": Lab,
}

MEMBERS: dict[str, Mapping[str, type[Any]]] = {"worksheet": WORKSHEETS, "bench": BENCHES}
"""Commands whose first word, a NAME, chooses the class of options."""

_POSITIONAL = "job"
_AT_LEAST_ONE = ("devices", "top", "world", "processes", "hosts", "ranks")
_NOT_OPTIONS = ("overrides", "command")

T = TypeVar("T")


def split_command(name: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and what follows `--`, if it is a command that runs another."""
    own = list(arguments)
    if name != "lab" or "--" not in own:
        return own, []
    at = own.index("--")
    return own[:at], own[at + 1 :]


def choose_member(command: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The NAME that stands among the arguments of a command with members, None if none does, and the others.

    Raises UserError if there is no such member.
    """
    members = MEMBERS[command]
    kinds = {name: kind for cls in members.values() for name, kind in _kinds(cls).items()}
    for i in range(len(arguments)):
        if words := _split(kinds, arguments[: i + 1])[0]:
            name = words[0].replace("_", "-")
            if name not in members:
                fix = nearest(name, members) or f": use one of {', '.join(members)}"
                raise UserError(f"{words[0]} is not a {command}{fix}")
            return name, [*arguments[:i], *arguments[i + 1 :]]
    return None, list(arguments)


def parse_options(cls: type[T], command: str, arguments: Sequence[str]) -> T:
    """The options object from the arguments of a command, or of a member (`worksheet linear-pair`), without its name.

    Raises UserError with a line for each mistake.
    """
    kinds = _kinds(cls)
    words, pairs, mistakes = _split(kinds, arguments)
    takes_job = issubclass(cls, OfJob)
    settings = [setting.path for setting in overrides.fields()] if takes_job else []
    values: dict[str, Any] = {}
    set_fields = []
    for name, text in pairs:
        if name in kinds and name != _POSITIONAL:
            try:
                values[name] = _value(name, text, kinds[name])
            except WrongValueError as error:
                mistakes.append(f"{_option(name)} {error}")
        elif takes_job and ("." in name or name in settings):
            set_fields.append((name, text))
        else:
            mistakes.append(_unknown(name, command, kinds, settings))
    if takes_job and words:
        values[_POSITIONAL] = words.pop(0)
    mistakes += [f"{word!r} is one argument too many for {command}: leave it out" for word in words]
    if mistakes := mistakes or _missing(cls, command, values):
        raise UserError("\n".join(mistakes))
    given = cls(**values)
    if isinstance(given, OfJob):
        given.overrides.extend(set_fields)
    return given


def print_members(command: str) -> None:
    """The help of a command with members: a line for each of them."""
    members = MEMBERS[command]
    width = max(map(len, members))
    print(f"usage: meshwright {command} NAME [--option value ...]\n\n{COMMANDS[command].__doc__}\n")
    for name, cls in members.items():
        print(f"  {name:<{width}}  {(cls.__doc__ or '').partition(chr(10))[0]}")
    print(f"\nmeshwright {command} NAME --help explains one of them.")


def print_help(cls: type[Any], command: str) -> None:
    """The help of one command, and after it every field that can be set."""
    import tyro

    config = [tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName]
    if _POSITIONAL in _kinds(cls):
        config.append(tyro.conf.PositionalRequiredArgs)
    with suppress(SystemExit):  # tyro's way to end after a help text
        tyro.cli(cls, prog=f"meshwright {command}", description=cls.__doc__, args=["--help"], config=config)
    if cls is Lab:
        print("\nusage: meshwright lab [options] -- COMMAND, which is what torchrun takes, or with --bare a program:\n")
        print("  meshwright lab --hosts 2 --ranks 2 --rate 400mbit -- -m meshwright.training quickstart")
        print("  meshwright lab --hosts 2 --rate 400mbit --bare -- sh -c 'echo $NODE_RANK of $NNODES, $MASTER_ADDR'")
    if issubclass(cls, OfJob):
        print("\nAny field of the job can be set, for instance --layout.tensor 2 (booleans take true or false):\n")
        for setting in overrides.fields():
            print(f"  --{setting.path:<33} {setting.help.splitlines()[0]}")


# --- parsing ----------------------------------------------------------------------------------------------------------


def _kinds(cls: type[Any]) -> dict[str, Any]:
    """Own options and their types, without the None of those that may be left out."""
    hints = {name: kind for name, kind in get_type_hints(cls).items() if name not in _NOT_OPTIONS}
    return {name: _without_none(kind) for name, kind in hints.items()}


def _without_none(kind: Any) -> Any:
    choices = get_args(kind)
    return next(choice for choice in choices if choice is not NoneType) if NoneType in choices else kind


def _split(kinds: dict[str, Any], arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Words, (name, text) pairs with names in underscores, and mistakes. A flag alone is `true`."""
    words, pairs, mistakes = [], [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or argument == "-":
            words.append(argument)
            continue
        name, equals, text = argument.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if equals:
            pairs.append((name, text))
        elif kinds.get(name) is bool:
            pairs.append((name, rest.pop(0) if rest and rest[0] in ("true", "false") else "true"))
        elif rest and not _is_option(rest[0]):
            pairs.append((name, rest.pop(0)))
        elif name in kinds or "." in name:
            mistakes.append(f"{_option(name)} has no value (options are --name value or --name=value): give it one")
        else:
            pairs.append((name, ""))
    return words, pairs, mistakes


def _is_option(text: str) -> bool:
    """-3 is a value."""
    return text.startswith("-") and not text[1:2].isdigit()


def _value(name: str, text: str, kind: Any) -> Any:
    value = parse(text, kind)
    if name in _AT_LEAST_ONE and isinstance(value, int) and value < 1:
        raise WrongValueError("a whole number above 0", value)
    return value


def _option(name: str) -> str:
    return f"--{name}" if "." in name else f"--{name.replace('_', '-')}"


def _unknown(name: str, command: str, kinds: dict[str, Any], settings: list[str]) -> str:
    own = [_option(own) for own in kinds if own != _POSITIONAL]
    known = [*own, *(f"--{path}" for path in settings)]
    listed = f": use one of {', '.join(own)}" + (", or a field of the job" if settings else "")
    family = MEMBERS.get(command.partition(" ")[0], {})
    if others := [member for member, cls in family.items() if name in _kinds(cls)]:
        return f"{_option(name)} is not an option of {command} (it is one of {', '.join(others)}){listed}"
    return f"{_option(name)} is not an option of {command}{nearest(_option(name), known) or listed}"


def _missing(cls: type[Any], command: str, values: dict[str, Any]) -> list[str]:
    """A line for each thing that must be given and was not."""
    required = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    needs = {"job": f"a JOB: give a TOML file, or one of {', '.join(catalog.names('models'))}"}
    return [
        f"{command} needs {needs.get(name, f'{_option(name)}: give it a whole number')}"
        for name in required
        if name not in values
    ]
