"""From arguments to an exit code: 0 done, 1 a check failed or output was lost, 2 bad input, 130 interrupted."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Sequence

from meshwright import __version__
from meshwright.errors import UserError

_HELP = ("-h", "--help")
_BROKEN_PIPE = 141  # as a shell counts a process that SIGPIPE ended
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. A mistake of the user's is one line on stderr for each, never a traceback."""
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        _drop_output()
        return _BROKEN_PIPE
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        print(f"the output cannot be written: {error.strerror}", file=sys.stderr)
        _drop_output()
        return 1
    return code


def _drop_output() -> None:
    """Send what stdout still holds nowhere, or the interpreter complains as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in _HELP:
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"meshwright {__version__}")
        return 0
    from meshwright.cli.options import (
        COMMANDS,
        MEMBERS,
        choose_member,
        parse_options,
        print_help,
        print_members,
        split_command,
    )

    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        fix = f"did you mean {close[0]}?" if close else f"use one of {', '.join(COMMANDS)}"
        raise UserError(f"{name} is not a command: {fix}")
    rest, command = split_command(name, rest)
    wants_help = any(argument in _HELP for argument in rest)
    rest = [argument for argument in rest if argument not in _HELP]
    cls, words = COMMANDS[name], name
    if name in MEMBERS:
        member, rest = choose_member(name, rest)
        if member is None and wants_help:
            print_members(name)
            return 0
        if member is None:
            raise UserError(f"{name} needs a NAME: give one of {', '.join(MEMBERS[name])}")
        cls, words = MEMBERS[name][member], f"{name} {member}"
    if wants_help:
        print_help(cls, words)
        return 0
    from meshwright.cli import commands

    given = parse_options(cls, words, rest)
    if command:
        given.command.extend(command)
    return getattr(commands, name)(given)


def overview() -> str:
    """What there is."""
    from meshwright.cli.options import COMMANDS

    lines = [f"  {name:<10} {(cls.__doc__ or '').partition(chr(10))[0]}" for name, cls in COMMANDS.items()]
    return "\n".join(
        [
            "usage: meshwright COMMAND [JOB] [--option value ...] [--section.field value ...]",
            "",
            "Plan, rehearse and run transformer training across a mesh of devices, with one account of it all.",
            "",
            *lines,
            "",
            "meshwright COMMAND --help explains one command; meshwright --version prints the version.",
        ]
    )
