"""When the formula sends and waits: buckets under backward, zero 1's parameters under forward, fully_shard's units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from meshwright.account import Compute, Event, Issue, Ledger, Wait
from meshwright.config.tree import Job, Layout, Training
from meshwright.planner.step import step_trace
from meshwright.verify.matrix import LONG_MODELS, MODELS, all_state_cases

EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
Flat = Sequence[Event]


def events_of(name: str, layout: Layout, device: str = "cpu", **training: int) -> Flat:
    settings = Training(batch=8 * training.get("accumulation", 1), seq_len=16, device=device, **training)  # type: ignore[arg-type]
    return list(step_trace(Job(model=(MODELS | LONG_MODELS)[name], layout=layout, training=settings)).expanded())


def module_of(parameter: str) -> str:
    """The site of its gradient: attention and MLP make those of all their products."""
    parts = parameter.split(".")
    return ".".join(parts[:3]) if parts[0] == "layers" else parts[0]


def last_site(events: Flat) -> str:
    return next(event.site for event in reversed(events) if isinstance(event, Compute))


def buckets_sent(events: Flat, operation: str) -> list[int]:
    """Where gradients are sent."""
    return [
        index
        for index, event in enumerate(events)
        if isinstance(event, Issue) and event.operation == operation and event.phase == "backward"
        if event.axis in ("replicate", "shard")
    ]


@EVERY_MODEL
@pytest.mark.parametrize("layout", [Layout(replicate=2), Layout(replicate=2, tensor=2), Layout(shard=2, zero=1)])
def test_a_gradient_is_sent_where_its_module_has_made_it(name: str, layout: Layout) -> None:
    events = events_of(name, replace(layout, gradients="per_parameter"))
    sent = buckets_sent(events, "all_reduce" if layout.replicate > 1 else "reduce_scatter")
    assert len(sent) > 20
    for index in sent:
        assert last_site(events[:index]) == module_of(events[index].site), "right after its backward"  # type: ignore[union-attr]


@EVERY_MODEL
def test_gradients_are_sent_in_the_last_micro_batch(name: str) -> None:
    events = events_of(name, Layout(replicate=2, gradients="per_parameter"), accumulation=3)
    lasts = [i for i, event in enumerate(events) if isinstance(event, Compute) and event.phase == "forward"]
    sent = buckets_sent(events, "all_reduce")
    assert sent and min(sent) > max(i for i in lasts if getattr(events[i], "site", "") == "norm")


def test_a_bucket_waits_for_the_last_of_its_gradients_and_for_the_bucket_before() -> None:
    """Four layers of 50 KiB each in buckets of 30 KiB: all but the last are sent before backward ends."""
    events = events_of("layernorm_bias_learned", Layout(replicate=2, bucket_mib=0.03))
    sent = buckets_sent(events, "all_reduce")
    sites = [events[index].site for index in sent]  # type: ignore[union-attr]
    assert len(sites) > 3 and sites == [f"bucket.{number}" for number in range(len(sites))]
    end = max(i for i, event in enumerate(events) if isinstance(event, Compute) and event.site == "embedding")
    assert sum(index < end for index in sent) == len(sent) - 1
    tickets = [events[index].ticket for index in sent]  # type: ignore[union-attr]
    assert [event.ticket for event in events[end:] if isinstance(event, Wait)][: len(tickets)] == tickets


@pytest.mark.parametrize("gradients", ["naive", "flat"])
def test_without_overlap_gradients_are_sent_after_backward(gradients: str) -> None:
    events = events_of("tied", Layout(replicate=2, gradients=gradients))  # type: ignore[arg-type]
    end = max(i for i, event in enumerate(events) if isinstance(event, Compute) and event.site == "embedding")
    sent = buckets_sent(events, "all_reduce")
    assert sent and min(sent) > end
    assert all(isinstance(events[index + 1], Wait) for index in sent)


@EVERY_MODEL
@pytest.mark.parametrize("accumulation", [1, 3])
def test_parameters_arrive_before_the_first_module_that_needs_them(name: str, accumulation: int) -> None:
    events = events_of(name, Layout(shard=2, zero=1, gradients="per_parameter"), accumulation=accumulation)
    gathers = {e.ticket: e.site for e in events if isinstance(e, Issue) and e.operation == "all_gather"}
    waits = [i for i, event in enumerate(events) if isinstance(event, Wait) and event.ticket in gathers]
    assert len(waits) == len(gathers) == len({event.ticket for event in map(events.__getitem__, waits)})  # type: ignore[union-attr]
    for index in waits:
        after = next(e.site for e in events[index:] if isinstance(e, Compute))
        unit = module_of(gathers[events[index].ticket])  # type: ignore[union-attr]
        layer = ".".join(unit.split(".")[:2])
        assert after.startswith(layer), "the next thing computed is the unit's own"


def test_the_number_of_tokens_is_waited_for_after_the_first_forward() -> None:
    events = events_of("tied", Layout(replicate=2), accumulation=2)
    counting = next(event for event in events if isinstance(event, Issue) and event.dtype == "int64")
    where = [i for i, event in enumerate(events) if isinstance(event, Wait) and event.ticket == counting.ticket]
    assert len(where) == 1
    phases = {event.phase for event in events[: where[0]] if isinstance(event, Compute) and event.site != "step"}
    assert phases == {"forward"}


# --- fully_shard ------------------------------------------------------------------------------------------------------


def of_unit(events: Flat, operation: str, site: str, phase: str) -> int:
    return next(
        i
        for i, e in enumerate(events)
        if isinstance(e, Issue) and (e.operation, e.site, e.phase) == (operation, site, phase)
    )


def first_compute(events: Flat, site: str, phase: str) -> int:
    return next(
        i for i, e in enumerate(events) if isinstance(e, Compute) and e.site.startswith(site) and e.phase == phase
    )


@pytest.mark.parametrize("layout", [Layout(shard=2), Layout(replicate=2, shard=2), Layout(shard=2, zero=2)])
def test_on_a_cpu_fully_shard_waits_at_once(layout: Layout) -> None:
    events = events_of("grouped_query", layout)
    units = [i for i, e in enumerate(events) if isinstance(e, Issue) and e.site.partition(".")[0] in ("layers", "root")]
    assert units
    for index in units:
        following = events[index + 1]
        assert isinstance(following, Wait) and following.ticket == events[index].ticket  # type: ignore[union-attr]


@pytest.mark.parametrize("prefetch", [1, 2])
def test_on_a_gpu_the_next_unit_is_gathered_under_the_one_before(prefetch: int) -> None:
    events = events_of("tied", Layout(shard=2, prefetch=prefetch), "cuda")
    for layer in (1, 2, 3):
        put = of_unit(events, "all_gather", f"layers.{layer}", "forward")
        assert put < first_compute(
            events, f"layers.{layer - prefetch}." if layer >= prefetch else "embedding", "forward"
        )
        back = of_unit(events, "all_gather", f"layers.{layer - 1}", "backward")
        assert back < first_compute(events, f"layers.{layer}.", "backward")


def test_on_a_gpu_a_reduction_is_waited_for_by_the_next() -> None:
    """So that it runs under the backward in between; with replicas, their sum follows it."""
    events = events_of("tied", Layout(replicate=2, shard=2), "cuda")
    for layer in (1, 2, 3):
        put = of_unit(events, "reduce_scatter", f"layers.{layer}", "backward")
        following = of_unit(events, "reduce_scatter", f"layers.{layer - 1}", "backward")
        ticket = events[put].ticket  # type: ignore[union-attr]
        waits = [i for i in range(put, following) if isinstance(events[i], Wait) and events[i].ticket == ticket]  # type: ignore[union-attr]
        assert len(waits) == 1
        assert waits[0] > first_compute(events, f"layers.{layer - 1}.", "backward")
        assert waits[0] < of_unit(events, "all_reduce", f"layers.{layer}", "backward") < following


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_everything_that_is_sent_is_waited_for_once(device: str) -> None:
    for case in all_state_cases():
        job = replace(case.job, training=replace(case.job.training, device=device))  # type: ignore[arg-type]
        trace = step_trace(job)
        events = list(trace.expanded())
        sent = Counter(event.ticket for event in events if isinstance(event, Issue))
        assert sent == Counter(event.ticket for event in events if isinstance(event, Wait)), case
        assert sum(Ledger.of(trace).rows.values()) == sum(sent.values())
