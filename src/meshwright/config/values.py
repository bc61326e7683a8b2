"""Strict conversion of plain values (from TOML) and of text (from the command line) to the fields of the tree.

Nothing is guessed: a bool is not an integer, 2.5 is not an integer, an unknown key is refused with its path and the
nearest legal name, and all mistakes of a file are reported at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from cattrs import Converter
from cattrs.cols import mapping_structure_factory
from cattrs.errors import AttributeValidationNote, BaseValidationError, ForbiddenExtraKeysError, IterableValidationNote
from cattrs.gen import make_dict_structure_fn

from meshwright.errors import UserError

T = TypeVar("T")


class WrongValueError(ValueError):
    """A value that its field does not take; the path is added by whoever knows it."""

    def __init__(self, expected: str, value: object):
        super().__init__(f"= {shown(value)} is not {expected}")


def structure(raw: object, cls: type[T], origin: str) -> T:
    """The dataclass `cls` from a table; all wrong keys and values at once, each with its path and `origin`."""
    try:
        return _converter.structure(raw, cls)
    except BaseValidationError as error:
        lines = (f"{origin}: {line}" for line in _lines(error, ""))
        raise UserError("\n".join(lines)) from None
    except WrongValueError as error:
        raise UserError(f"{origin} {error}") from None


def parse(text: str, kind: Any) -> Any:
    """A value of the type of a field from the text of an option; `WrongValueError` if it is none."""
    if kind is bool:
        choices = {"true": True, "false": False}
        if text.lower() not in choices:
            raise WrongValueError(described(bool), text)
        return choices[text.lower()]
    if kind is int or kind is float:
        for number in (int, float):
            try:
                return _STRICT[kind](number(text), kind)
            except ValueError:
                continue
        raise WrongValueError(described(kind), text)
    if _is_literal(kind):
        return _literal(text if text in get_args(kind) else text.replace("-", "_"), kind)
    if _is_number_or_word(kind):
        number, words = get_args(kind)
        try:
            return parse(text, words if text in get_args(words) else number)
        except WrongValueError:
            raise WrongValueError(described(kind), text) from None
    return text


def is_mapping(kind: Any) -> bool:
    """Whether a field is a table of free keys, such as `peak_flops`."""
    return get_origin(kind) is dict


def described(kind: Any) -> str:
    """The type of a field in words: `a whole number`, `one of naive, flat`, `a number or auto`."""
    if _is_literal(kind):
        choices = get_args(kind)
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if _is_number_or_word(kind):
        return " or ".join(described(choice) for choice in get_args(kind))
    if is_dataclass(kind) or is_mapping(kind):
        return "a table"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


def shown(value: object) -> str:
    """A value as TOML would print it, near enough."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def nearest(name: str, names: Iterable[str]) -> str:
    """`: did you mean llama3-8b?`, or nothing where no name is near."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.65)
    return f": did you mean {close[0]}?" if close else ""


def nearest_path(path: str, paths: Iterable[str]) -> str:
    """The same for dotted paths, by their last parts: first in the same section, then in all."""
    section, _, last = path.rpartition(".")
    split = [known.rpartition(".") for known in paths]
    for among in ([parts for parts in split if parts[0] == section], split):
        by_last = {parts[2]: "".join(parts) for parts in reversed(among)}
        if close := difflib.get_close_matches(last, by_last, n=1, cutoff=0.65):
            return f": did you mean {by_last[close[0]]}?"
    return ""


def _lines(error: BaseException, path: str) -> Iterator[str]:
    """One line for each mistake in a tree of cattrs errors."""
    if isinstance(error, ForbiddenExtraKeysError):
        legal = [_join(path, field.name) for field in fields(error.cl)]
        for key in sorted(error.extra_fields):
            unknown = _join(path, key)
            fix = nearest_path(unknown, legal) or f": use one of {', '.join(legal)}"
            yield f"{unknown} is not a field{fix}"
    elif isinstance(error, BaseValidationError):
        for inner in error.exceptions:
            yield from _lines(inner, _join(path, _step(inner)))
    elif isinstance(error, WrongValueError):
        yield f"{path} {error}"
    else:
        raise error


def _step(error: BaseException) -> str:
    """The field or key under which cattrs met an error, from the note that it leaves."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return note.name
        if isinstance(note, IterableValidationNote):
            return str(note.index)
    return ""


def _is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _is_number_or_word(kind: Any) -> bool:
    """Whether a field is such as `float | Literal["auto"]`."""
    number, *words = get_args(kind) or (None,)
    return number in (int, float) and len(words) == 1 and _is_literal(words[0])


def _join(path: str, step: str) -> str:
    return f"{path}.{step}" if path and step else path or step


def _integer(value: object, _: Any) -> int:
    if isinstance(value, float) and value.is_integer():  # 80e9 reads better than eleven digits
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongValueError(described(int), value)
    return value


def _number(value: object, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WrongValueError(described(float), value)
    return float(value)


def _instance(value: object, kind: Any) -> Any:
    if type(value) is not kind:
        raise WrongValueError(described(kind), value)
    return value


def _literal(value: object, kind: Any) -> Any:
    if value not in get_args(kind):
        raise WrongValueError(described(kind), value)
    return value


def _number_or_word(value: object, kind: Any) -> Any:
    number, words = get_args(kind)
    if value in get_args(words):
        return value
    try:
        return _STRICT[number](value, number)
    except WrongValueError:
        raise WrongValueError(described(kind), value) from None


_STRICT: dict[Any, Callable[[object, Any], Any]] = {int: _integer, float: _number, bool: _instance, str: _instance}


def _table(kind: Any, inner: Callable[[Any, Any], Any]) -> Callable[[object, Any], Any]:
    """`inner`, reached only by tables."""

    def structure_table(value: object, _: Any) -> Any:
        if not isinstance(value, Mapping):
            raise WrongValueError(described(kind), value)
        return inner(value, kind)

    return structure_table


def _make_converter() -> Converter:
    converter = Converter()
    for kind, hook in _STRICT.items():
        converter.register_structure_hook(kind, hook)
    converter.register_structure_hook_func(_is_literal, _literal)
    converter.register_structure_hook_func(_is_number_or_word, _number_or_word)
    converter.register_structure_hook_factory(
        is_dataclass,
        lambda kind: _table(kind, make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)),
    )
    converter.register_structure_hook_factory(
        is_mapping,
        lambda kind: _table(kind, mapping_structure_factory(kind, converter)),
    )
    return converter


_converter = _make_converter()
