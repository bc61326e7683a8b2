"""Who is to blame for a collective that failed: rank by rank what others answer, and the sentence made of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest
import ranked_failures

from meshwright.comm import lifeline
from meshwright.comm.failure import Call
from meshwright.comm.lifeline import Answer, Endpoint, Lifeline, own_address
from meshwright.comm.ranks import Ranks
from meshwright.training.lost import Loss

CALL = Call("all_reduce", "replicate", "layers.3.mlp", "backward", None)
WAITS = Answer("alive", str(CALL), 19.0)
MUTE, UNREACHABLE, ENDED = Answer("mute"), Answer("unreachable"), Answer("ended")


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trio(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Lifeline]]:
    """Three ranks that know each other; questions are given up soon."""
    monkeypatch.setattr(lifeline, "ANSWER_SECONDS", 0.5)
    lines = [Lifeline(rank, "127.0.0.1") for rank in range(3)]
    with ExitStack() as stack:
        for line in lines:
            stack.callback(line.close)
            line.meet([other.endpoint for other in lines], token="this job")
        yield lines


def test_who_answers_says_what_it_waits_for(trio: list[Lifeline]) -> None:
    trio[1].begin(CALL)
    trio[2].begin(CALL)
    trio[2].end(CALL)
    answers = trio[0].ask([1, 2])
    assert [(a.state, a.doing) for a in answers.values()] == [("alive", str(CALL)), ("alive", "")]


def test_what_one_tells_all_know(trio: list[Lifeline]) -> None:
    trio[1].tell([0], lost=[2])
    assert trio[0].told == {2}
    assert trio[2].ask([0])[0].lost == (2,)


def test_who_has_closed_has_ended(trio: list[Lifeline]) -> None:
    trio[2].close()
    assert {rank: answer.state for rank, answer in trio[0].ask([1, 2]).items()} == {1: "alive", 2: "ended"}


def test_who_listens_and_does_not_answer_is_mute() -> None:
    """As a stopped process: its host completes the connection."""
    asking = Lifeline(0, "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoints = [asking.endpoint, Endpoint("127.0.0.1", silent.getsockname()[1]), Endpoint("", 1)]
        asking.meet(endpoints, token="this job")
        assert {rank: a.state for rank, a in asking.ask([1, 2]).items()} == {1: "mute", 2: "unknown"}
    asking.close()


def test_another_job_on_the_same_port_is_not_a_rank(trio: list[Lifeline]) -> None:
    trio[1]._token = "another job"
    assert trio[0].ask([1])[1] == ENDED


def test_addresses() -> None:
    assert own_address("10.77.0.1", one_host=True) == "127.0.0.1"
    assert not own_address("127.0.0.1", one_host=False).startswith("127.")


# --- sentences --------------------------------------------------------------------------------------------------------


def said(
    answers: Mapping[int, Answer], others: tuple[int, ...] = (1,), seconds: float = 20.0, **more: Any
) -> tuple[str, bool]:
    world = more.pop("world", 1 + len(answers))
    addresses = {rank: f"10.77.0.{rank + 1}" for rank in range(world)} | more.pop("addresses", {})
    peer = Loss(0, world, str(CALL), others, seconds, 20.0, answers, addresses=addresses, **more).peer()
    return str(peer), peer.patient


HEAD = "all_reduce over replicate in backward at layers.3.mlp"
WITHIN = "within 20 s (training.timeout_seconds)"
AGAIN = "mend that and start the job again"
STOPPED = "its host answers and its process does not, it is stopped or hangs"


def test_a_host_that_is_gone() -> None:
    text = f"{HEAD} got no answer from rank 1 (10.77.0.2) {WITHIN}: its host or its link is gone; {AGAIN}"
    assert said({1: UNREACHABLE}) == (text, False)


def test_a_process_that_is_stopped() -> None:
    assert said({1: WAITS, 2: MUTE}, (1, 2)) == (
        f"{HEAD} got no answer from rank 2 (10.77.0.3) {WITHIN}: {STOPPED}; {AGAIN}",
        False,
    )


def test_the_culprit_and_not_the_messenger() -> None:
    """Rank 1 closed its connections, because it had lost rank 2, which this collective has nothing to do with."""
    text = f"{HEAD} got no answer and failed after 3.0 s, for those in it wait for rank 2 (10.77.0.3)"
    assert said({1: ENDED, 2: MUTE}, seconds=3.0) == (f"{text}: {STOPPED}; {AGAIN}", False)
    gone = f"{text}: its host or its link is gone; {AGAIN}"
    assert said({1: ENDED}, seconds=3.0, world=3, told=frozenset({2})) == (gone, False)
    assert said({1: Answer("alive", lost=(2,))}, seconds=3.0, world=3) == (gone, False)


def test_a_rank_that_ended_is_left_to_its_launcher() -> None:
    text = f"{HEAD} lost rank 1 (10.77.0.2): its process has ended, see the message there"
    assert said({1: ENDED, 2: WAITS}) == (text, True)


def test_who_reaches_no_other_host_suspects_itself() -> None:
    """And lets them speak first. Its own host's ranks it does reach."""
    answers = {1: UNREACHABLE, 2: UNREACHABLE, 3: WAITS}
    text, patient = said(answers, (1, 2), addresses={3: "10.77.0.1"})
    assert patient
    assert text == (
        f"{HEAD} got no answer from rank 1 (10.77.0.2) and rank 2 (10.77.0.3) {WITHIN}: the link of this host "
        "(10.77.0.1) is gone, or all the others are; mend it and start the job again"
    )
    assert not said({**answers, 4: WAITS}, (1, 2), addresses={3: "10.77.0.1"})[1]


def test_a_rank_that_cannot_be_asked() -> None:
    """It is not said to answer."""
    assert said({1: Answer("unknown"), 2: WAITS}, (1, 2)) == (
        f"{HEAD} got no answer from rank 1 (10.77.0.2) {WITHIN}, and rank 1 (10.77.0.2) cannot be asked, as no address "
        "of its host is known: look there first",
        False,
    )


def test_a_rank_that_is_late() -> None:
    answers = {1: WAITS, 2: Answer("alive", "", 21.2), 3: WAITS}
    assert said(answers, (1, 2, 3)) == (
        f"{HEAD} got no answer from rank 2 (10.77.0.3) {WITHIN}, though all ranks answer: rank 2 has been in no "
        "collective for 21 s; if that is only slow, raise training.timeout_seconds",
        False,
    )


def test_on_one_host_addresses_are_left_out() -> None:
    assert said({1: MUTE}, addresses={0: "", 1: ""})[0].startswith(f"{HEAD} got no answer from rank 1 within")


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["all_reduce", "shift"])
def test_a_rank_that_does_not_come_to_a_collective(operation: str) -> None:
    """The group's timeout ends it; what failed is known, and the backend's error with it."""
    with Ranks(3, timeout_seconds=60) as pool:
        first, late, last = pool.run(ranked_failures.late_on_one, operation)
    assert late is None
    for rank, (text, others, has_cause) in ((0, first), (2, last)):
        assert text.startswith(f"{operation} over replicate in backward at layers.0 failed after")
        assert others == sorted({0, 1, 2} - {rank})
        assert has_cause
