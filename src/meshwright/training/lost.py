"""A lost peer in one line: which rank, on which host, what it was needed for, and what to do.

Of all ranks that fail, most have lost nobody but a survivor who left before them. `find` asks all those that may be the
culprit (`comm.lifeline`), and names whoever does not answer, not whoever brings the news.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshwright.comm.failure import CollectiveError
from meshwright.comm.lifeline import Answer, Lifeline

_SILENT = ("mute", "unreachable")


class LostPeer(RuntimeError):
    """This rank cannot go on, because others are gone; its text is for the user."""

    def __init__(self, text: str, *, patient: bool = False) -> None:
        super().__init__(text)
        self.patient = patient
        """Whether somebody else probably knows better, and should speak first."""


@dataclass(frozen=True)
class Loss:
    """A collective that failed on this rank, and what the others said when they were asked."""

    rank: int
    world: int
    call: str
    others: tuple[int, ...]
    """Who else takes part in it."""
    seconds: float
    timeout_seconds: float
    answers: Mapping[int, Answer]
    told: frozenset[int] = frozenset()
    """Of whom others have said that they are gone."""
    addresses: Mapping[int, str] | None = None

    def in_state(self, *states: str) -> list[int]:
        """The ranks that were found so."""
        return [rank for rank, answer in sorted(self.answers.items()) if answer.state in states]

    @property
    def gone(self) -> list[int]:
        """Who does not answer, or else of whom others say so."""
        said = self.told.union(*(answer.lost for answer in self.answers.values())) - {self.rank}
        return self.in_state(*_SILENT) or sorted(said)

    def peer(self) -> LostPeer:
        """What to say, and whether to wait before saying it."""
        if self._is_alone():
            link = f"the link of this host{self._at(self.rank)} is gone, or all the others are"
            return LostPeer(f"{self._no_answer(self.gone)}: {link}; mend it and start the job again", patient=True)
        if self.gone:
            return LostPeer(f"{self._no_answer(self.gone)}: {self._why(self.gone)}; mend that and start the job again")
        if ended := self.in_state("ended"):
            whose = "its process has" if len(ended) == 1 else "their processes have"
            return LostPeer(
                f"{self.call} lost {self._named(ended)}: {whose} ended, see the message there", patient=True
            )
        if hidden := self.in_state("unknown"):
            return LostPeer(
                f"{self._no_answer(hidden)}, and {self._named(hidden)} cannot be asked, as no address of "
                f"{'its host is' if len(hidden) == 1 else 'their hosts is'} known: look there first"
            )
        late = [rank for rank in self.others if self._answer(rank).doing != self.call] or list(self.others)
        return LostPeer(
            f"{self._no_answer(late)}, though all ranks answer: {self._doings(late)}; if that is only slow, raise "
            "training.timeout_seconds"
        )

    def _no_answer(self, ranks: list[int]) -> str:
        if self.seconds >= 0.9 * self.timeout_seconds:
            within = f"within {self.timeout_seconds:g} s (training.timeout_seconds)"
        else:
            within = f"and failed after {self.seconds:.1f} s"
        if set(ranks) & set(self.others):
            return f"{self.call} got no answer from {self._named(ranks)} {within}"
        return f"{self.call} got no answer {within}, for those in it wait for {self._named(ranks)}"

    def _why(self, ranks: list[int]) -> str:
        its = "its" if len(ranks) == 1 else "their"
        if all(self._answer(rank).state == "mute" for rank in ranks):
            return f"{its} host answers and {its} process does not, it is stopped or hangs"
        return f"{its} host or its link is gone"

    def _doings(self, ranks: list[int]) -> str:
        parts = []
        for rank in ranks:
            answer = self._answer(rank)
            where = f"in {answer.doing}" if answer.doing else "in no collective"
            parts.append(f"rank {rank} has been {where} for {answer.seconds:.0f} s")
        return ", ".join(parts)

    def _answer(self, rank: int) -> Answer:
        return self.answers.get(rank, Answer("unknown"))

    def _is_alone(self) -> bool:
        """Whether no other host is reached, of several."""
        own = self._at(self.rank)
        elsewhere = {rank for rank in range(self.world) if rank != self.rank and self._at(rank) != own}
        return len({self._at(rank) for rank in elsewhere}) > 1 and elsewhere <= set(self.in_state("unreachable"))

    def _named(self, ranks: list[int]) -> str:
        return " and ".join(f"rank {rank}{self._at(rank)}" for rank in ranks)

    def _at(self, rank: int) -> str:
        address = (self.addresses or {}).get(rank)
        return f" ({address})" if address else ""


def find(error: CollectiveError, lifeline: Lifeline, world: int, timeout_seconds: float) -> LostPeer:
    """Ask who is gone, tell the survivors, and put it in words. Takes a few seconds at most."""
    others = tuple(error.call.others())
    answers = lifeline.ask(others)
    states = [answer.state for answer in answers.values()]
    if "alive" not in states or not any(answer.state in _SILENT or answer.lost for answer in answers.values()):
        # Is nobody reached at all, or does somebody else hold up those that are?
        answers |= lifeline.ask(_besides(world, (lifeline.rank, *others)))
    addresses = {rank: lifeline.address(rank) for rank in range(world)}
    loss = Loss(
        lifeline.rank,
        world,
        str(error.call),
        others,
        error.seconds,
        timeout_seconds,
        answers,
        lifeline.told,
        addresses,
    )
    lost = loss.peer()
    if loss.gone and not lost.patient:
        lifeline.tell(_besides(world, (lifeline.rank, *loss.gone)), loss.gone)
    return lost


def _besides(world: int, ranks: Iterable[int]) -> list[int]:
    return sorted(set(range(world)) - set(ranks))
