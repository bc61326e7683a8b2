"""When buckets are on the wire: gradients under a step's last backward, zero 1's parameters under the next forward.

    gradients    a bucket is sent where the last of its gradients becomes final, after all buckets before it, and
                 waited for when backward is over (strategies per_parameter and bucketed, `schemes.replicate`)
    parameters   a bucket's gather is waited for by the first module of the next forward that needs something of it
                 (`schemes.shard`)

Layers are alike but for what is sent or waited for between them: a layer is written once, cut where gradients become
final, and its pieces are put together again around what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from meshwright.account import Event, Repeat
from meshwright.schemes.params import ParamSpec
from meshwright.schemes.replicate import Bucket
from meshwright.schemes.shard import in_order_of_need, parameters_queue
from meshwright.schemes.tape import FLOAT32, Group, Tape
from meshwright.schemes.units import Run, Units


class Sums(Protocol):
    """How a bucket is summed (one collective, or `schemes.hierarchical`)."""

    def send(self, bucket: Bucket) -> Any:
        """Put it on the wire; what `finish` needs."""
        ...

    def finish(self, bucket: Bucket, sent: Any) -> None:
        """Wait for it."""
        ...


@dataclass(frozen=True)
class OneCollective:
    """All-reduce or reduce-scatter."""

    tape: Tape
    operation: str
    group: Group

    def send(self, bucket: Bucket) -> int:
        """Its ticket."""
        with self.tape.at(bucket.site, "backward"):
            return self.tape.issue(self.operation, self.group, "float32", bucket.numel * FLOAT32)

    def finish(self, bucket: Bucket, sent: int) -> None:
        """Wait for it."""
        with self.tape.at(bucket.site, "backward"):
            self.tape.wait(sent)


@dataclass
class Sending:
    """The buckets of one step, sent in their order."""

    parts: Sequence[Bucket]
    specs: Sequence[ParamSpec]
    """All parameters in order of registration: gradients become final in its reverse."""
    sums_on: Callable[[Tape], Sums]
    handed_sites: tuple[str, ...] = ()
    """Where the gradient of a parameter is made that becomes final somewhere else: of a tied head."""
    final_bytes: int = field(default=0, init=False)
    """Of all gradients that are final."""
    _sent: list[Any] = field(default_factory=list, init=False)
    _sums: Sums | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        final, total = {}, 0
        for spec in reversed(self.specs):
            total += spec.local_numel * FLOAT32
            final[spec.name] = total
        self.total_bytes = total
        self._due = [max(final[spec.name] for spec in bucket.members) for bucket in self.parts]

    def is_due(self, final_bytes: int) -> bool:
        """Whether a bucket is to be sent once so much is final."""
        return len(self._sent) < len(self.parts) and self._due[len(self._sent)] <= final_bytes

    def send(self, tape: Tape, final_bytes: int) -> None:
        """Every bucket that is due."""
        self._sums = self._sums or self.sums_on(tape)
        self.final_bytes = final_bytes
        while self.is_due(final_bytes):
            self._sent.append(self._sums.send(self.parts[len(self._sent)]))

    def finish(self) -> None:
        """Backward is over: wait for all."""
        assert self._sums is not None and len(self._sent) == len(self.parts)
        for bucket, sent in zip(self.parts, self._sent, strict=True):
            self._sums.finish(bucket, sent)


class BucketUnits(Units):
    """One micro-batch in which buckets are waited for, or sent, or both."""

    def __init__(self, sending: Sending | None, arriving: Mapping[str, Sequence[Bucket]] | None = None) -> None:
        """`arriving`: what each module waits for (`needed_by`)."""
        self._sending, self._arriving = sending, arriving or {}

    # --- parameters ---

    def enter_module(self, tape: Tape, name: str) -> None:
        with tape.at(name, "forward"):
            for bucket in self._arriving.get(name, ()):
                tape.wait(tape.queue(parameters_queue(bucket)))

    def forward_layers(self, tape: Tape, layers: int, write: Callable[[Run], None]) -> None:
        with tape.apart() as body:
            write(Run(0, 1))
        layer, first = tuple(body), 0
        for index in range(layers):
            if f"layers.{index}" in self._arriving:
                tape.put(Repeat(index - first, layer, first))
                first = index
                self.enter_module(tape, f"layers.{index}")
        tape.put(Repeat(layers - first, layer, first))

    # --- gradients ---

    def reenter_model(self, tape: Tape) -> None:
        if self._sending is not None:
            tape.on_gradient = lambda site, nbytes: self._final(tape, site, nbytes)

    def _final(self, tape: Tape, site: str, nbytes: int) -> None:
        assert self._sending is not None
        if site not in self._sending.handed_sites:
            self._sending.send(tape, self._sending.final_bytes + nbytes)

    def backward_layers(self, tape: Tape, layers: int, write: Callable[[Run], None]) -> None:
        if self._sending is None:
            super().backward_layers(tape, layers, write)
            return
        if layers > 1:
            self._send_under(tape, range(layers - 1, 0, -1), _Layer.of(tape, write, Run(layers - 1, 1)))
        self._send_under(tape, range(1), _Layer.of(tape, write, Run(0, 1)))

    def _send_under(self, tape: Tape, indices: range, layer: _Layer) -> None:
        """Layers that are alike; those under which nothing is sent stay together."""
        sending = self._sending
        assert sending is not None
        alike = 0
        for index in indices:
            before = sending.final_bytes
            if not sending.is_due(before + layer.nbytes):
                sending.final_bytes, alike = before + layer.nbytes, alike + 1
                continue
            tape.put(Repeat(alike, layer.between(0), index + alike, -1))
            alike, start = 0, 0
            for end, nbytes in layer.borders:
                if sending.is_due(before + nbytes):
                    tape.put(Repeat(1, layer.between(start, end), index, -1))
                    start = end
                    sending.send(tape, before + nbytes)
            tape.put(Repeat(1, layer.between(start), index, -1))
            sending.final_bytes = before + layer.nbytes
        tape.put(Repeat(alike, layer.between(0), indices[-1] + alike - 1, -1))

    def reduce_model(self, tape: Tape) -> None:
        """A tied table has become final, too."""
        if self._sending is not None:
            tape.on_gradient = None
            self._sending.send(tape, self._sending.total_bytes)


class _Layer:
    """The backward of a layer, and where in it gradients become final."""

    def __init__(self, events: Sequence[Event], borders: Sequence[tuple[int, int]]) -> None:
        self.borders = borders
        """(number of events before it, bytes of gradients of this layer that are final then)."""
        self._events, self._pieces = events, dict[tuple[int, int], tuple[Event, ...]]()

    @classmethod
    def of(cls, tape: Tape, write: Callable[[Run], None], run: Run) -> _Layer:
        """As `write` writes it."""
        borders: list[tuple[int, int]] = []
        outer = tape.on_gradient
        with tape.apart() as events:

            def final(site: str, nbytes: int) -> None:
                borders.append((len(events), nbytes + (borders[-1][1] if borders else 0)))

            tape.on_gradient = final
            write(run)
        tape.on_gradient = outer
        return cls(tuple(events), borders)

    @property
    def nbytes(self) -> int:
        """Bytes of its gradients."""
        return self.borders[-1][1]

    def between(self, start: int, end: int | None = None) -> tuple[Event, ...]:
        """Some of its events: the same object each time, so that folds over a trace need look at it once."""
        place = start, len(self._events) if end is None else end
        if place not in self._pieces:
            self._pieces[place] = tuple(self._events[slice(*place)])
        return self._pieces[place]


def needed_by(parts: Sequence[Bucket], names: Sequence[str]) -> dict[str, list[Bucket]]:
    """What each module waits for, of parameters in order of registration: a bucket is the first's that needs it."""
    needed: dict[str, list[Bucket]] = {}
    position = {name: index for index, name in enumerate(names)}
    for bucket in in_order_of_need(parts, names):
        first = min((spec.name for spec in bucket.members), key=lambda name: position[name])
        needed.setdefault(_module(first), []).append(bucket)
    return needed


def _module(parameter: str) -> str:
    """The unit of a parameter: its layer, or the module outside of the layers."""
    parts = parameter.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
