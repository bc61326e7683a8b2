"""Writing a trace by formula: the pen that the scheme pages share.

A page states, in program order, what appears in memory, what is computed, what is sent and what is freed; sizes come
from `Sizes`. Nothing is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from meshwright.account import Compute, Event, Issue, Memory, Repeat, Trace, Wait
from meshwright.config.attention import Kernel, chosen_attention
from meshwright.config.tree import Layout, Model, Training

FLOAT32 = 4
INT64 = 8
FLOAT64 = 8
BOOL = 1

KEPT_OUTSIDE = "kept outside"
"""Category of what is saved by somebody outside of a region in which autograd keeps nothing."""

ITEMSIZES = {"float32": 4, "bf16": 2}
DTYPE_NAMES = {"float32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Group:
    """A mesh axis as formulas see it: its name in the account and its size."""

    axis: str
    size: int


@dataclass(frozen=True)
class Pipeline:
    """How a product is cut so that its communication runs under it (`schemes.matmul`)."""

    chunks: int
    """Pieces of a hop, or of a sum."""
    ring: Literal["unidirectional", "bidirectional"] = "unidirectional"

    @classmethod
    def of(cls, layout: Layout) -> Pipeline | None:
        """None where nothing is cut, or where it is not chosen yet."""
        if layout.overlap != "pipelined" or layout.tensor == 1:
            return None
        return cls(layout.overlap_chunks, layout.overlap_ring)


@dataclass(frozen=True)
class Sizes:
    """What one rank computes on in one micro-batch.

    B batch   S sequence/(R·U)   E d_model   F d_ff/T   H heads/T   K kv heads of this rank   D head_dim
    V vocabulary/T   T tensor   U ulysses   R ring
    """

    B: int
    S: int
    E: int
    F: int
    H: int
    K: int
    D: int
    V: int
    T: int
    precision: str
    """Compute precision."""
    kernel: Kernel
    """What computes attention."""
    seq_len: int
    """Tokens of a whole sequence, without padding: rows of a learned position table."""
    U: int = 1
    R: int = 1
    ring_rank: int = 0
    """This rank's coordinate on the ring: which blocks it computes."""
    ring_order: Literal["contiguous", "zigzag"] = "zigzag"
    split: bool = False
    """Whether norms and residuals are split along the sequence over the tensor axis (sequence parallelism)."""
    recompute: str = "none"
    """What backward computes again: none, selective or full."""
    loss_chunk: int = 0
    """Tokens whose logits exist at a time; 0 is all."""
    documents: bool = False
    """Whether attention stays within documents."""
    pipeline: Pipeline | None = None
    """How tensor-parallel products are cut; None: they are not."""
    halves: bool = False
    """Whether blocks run in two half-batches."""
    gathers: bool = False
    """Whether weights are gathered for each use, in the compute dtype, which is then their gradients', too (ZeRO-3)."""

    @classmethod
    def of(cls, model: Model, layout: Layout, training: Training, rank: int = 0) -> Sizes:
        """The sizes of a legal layout, on one rank."""
        T = layout.tensor
        return cls(
            B=training.batch // (layout.batch_ranks * training.accumulation),
            S=layout.padded(training.seq_len) // (layout.ring * layout.ulysses),
            E=model.d_model,
            F=model.d_ff // T,
            H=model.heads // T,
            K=max(1, model.kv_heads // T),
            D=model.head_dim,
            V=-(-model.vocab_size // T),
            T=T,
            precision=training.precision,
            kernel=chosen_attention(model, training).kernel,
            seq_len=training.seq_len,
            U=layout.ulysses,
            R=layout.ring,
            ring_rank=layout.coordinates(rank)["ring"],
            ring_order=layout.ring_order,
            split=layout.sequence_parallel and T > 1,
            recompute=layout.recompute,
            loss_chunk=training.loss_chunk,
            documents=training.documents == "separate",
            pipeline=Pipeline.of(layout),
            halves=layout.halves,
            gathers=layout.zero_stage >= 2,
        )

    @property
    def N(self) -> int:
        """Tokens inside tensor-parallel regions."""
        return self.B * self.S

    @property
    def M(self) -> int:
        """Tokens outside of them, in norms and the residual stream."""
        return self.N // self.T if self.split else self.N

    @property
    def exchanged(self) -> Sizes:
        """Inside attention, where ulysses has exchanged the sequence for heads."""
        return replace(self, S=self.S * self.U, H=self.H // self.U, K=max(1, self.K // self.U), U=1)

    @property
    def c(self) -> int:
        """Bytes of a number in the compute dtype."""
        return ITEMSIZES[self.precision]

    @property
    def dtype(self) -> str:
        """Name of the compute dtype in the account."""
        return DTYPE_NAMES[self.precision]

    @property
    def casts(self) -> bool:
        """Whether the compute dtype differs from the master dtype."""
        return self.c != FLOAT32

    @property
    def p(self) -> int:
        """Bytes of a number of a parameter as its function sees it, and of its gradient."""
        return self.c if self.gathers else FLOAT32

    @property
    def casts_weights(self) -> bool:
        """Whether a weight is cast where it is used."""
        return self.p != self.c

    @property
    def casts_gradients(self) -> bool:
        """Whether a gradient that was summed in float32 is cast to that of its parameter."""
        return self.p != FLOAT32

    @property
    def tensor(self) -> Group:
        """The tensor axis."""
        return Group("tensor", self.T)

    @property
    def ulysses(self) -> Group:
        """The ulysses axis."""
        return Group("ulysses", self.U)

    @property
    def ring(self) -> Group:
        """The ring axis."""
        return Group("ring", self.R)

    @property
    def wire_category(self) -> str:
        """Category of what leaves a tensor-parallel region, where nobody saves it."""
        return "communication_buffers" if self.T > 1 else "temporaries"


class Tape:
    """A trace being written. `at` sets site and phase; the other methods append events."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._phase = "forward"
        self._site = ""
        self._ticket = 0
        self.keeps = True
        """Whether autograd keeps what is saved."""
        self._held: list[dict[str, int]] = []
        self._queues: dict[str, int] = {}
        self.on_gradient: Callable[[str, int], None] | None = None
        """Told of every gradient of a parameter that autograd has added to where it lives: its site and bytes."""

    def trace(self) -> Trace:
        """What was written."""
        return Trace(tuple(self._events))

    @contextmanager
    def at(self, site: str | None = None, phase: str | None = None) -> Iterator[None]:
        """Attribute events inside to a site and a phase; None keeps the outer one."""
        outer = self._site, self._phase
        self._site, self._phase = site if site is not None else outer[0], phase or outer[1]
        yield
        self._site, self._phase = outer

    @contextmanager
    def repeat(self, times: int, *, first: int = 0, step: int = 1) -> Iterator[None]:
        """What is written inside happens `times` times; `*` in its sites counts from `first` by `step`."""
        with self.apart() as events:
            yield
        self.put(Repeat(times, tuple(events), first, step))

    @contextmanager
    def apart(self) -> Iterator[list[Event]]:
        """What is written inside goes to a list of its own, for the caller to `put` where it belongs."""
        outer, self._events = self._events, []
        yield self._events
        self._events = outer

    def put(self, repeat: Repeat) -> None:
        """Events that were written `apart`; of none or no times, nothing."""
        if repeat.times and repeat.events:
            self._events.append(repeat)

    @contextmanager
    def keeping_nothing(self) -> Iterator[None]:
        """Forward of a region that backward will compute again: autograd keeps nothing of what is inside."""
        outer, self.keeps = self.keeps, False
        yield
        self.keeps = outer

    # --- memory ---

    def alloc(self, nbytes: int, category: str = "temporaries") -> None:
        """A storage appears. What would be saved is temporary where autograd keeps nothing."""
        self._events.append(Memory(self._category(category), nbytes, self._phase, self._site))

    def free(self, nbytes: int, category: str = "temporaries") -> None:
        """A storage goes."""
        self._events.append(Memory(self._category(category), -nbytes, self._phase, self._site))

    def _category(self, category: str) -> str:
        if category == KEPT_OUTSIDE:
            return "saved_activations"
        return "temporaries" if category == "saved_activations" and not self.keeps else category

    def save(self, nbytes: int) -> None:
        """A storage appears that autograd keeps for backward."""
        self.alloc(nbytes, "saved_activations")

    def drop(self, nbytes: int, category: str = "temporaries") -> None:
        """The program lets go of what autograd may keep: freed, if it does not."""
        if not self.keeps:
            self.free(nbytes, category)

    def release(self, nbytes: int) -> None:
        """Autograd lets go of it."""
        self.free(nbytes, "saved_activations")

    def accumulate(self, nbytes: int, category: str = "temporaries") -> None:
        """Autograd has the gradient of a parameter: freed once added to where gradients live, unless it is held."""
        if self._held:
            self._held[-1][category] = self._held[-1].get(category, 0) + nbytes
        else:
            self.free(nbytes, category)
        if self.on_gradient is not None:
            self.on_gradient(self._site, nbytes)

    def hold_gradients(self) -> None:
        """From now on gradients of parameters stay as they were made, until they are taken. Calls nest."""
        self._held.append({})

    def take_gradients(self) -> dict[str, int]:
        """Bytes, by category, of the gradients held since the last `hold_gradients`: the caller's to free."""
        return self._held.pop()

    @contextmanager
    def holding(self, nbytes: int, category: str = "temporaries") -> Iterator[None]:
        """A storage that lives while the block runs."""
        self.alloc(nbytes, category)
        yield
        self.free(nbytes, category)

    # --- computation and communication ---

    def matmul(self, m: int, k: int, n: int, itemsize: int) -> None:
        """[m, k] @ [k, n]."""
        self._compute("matmul", 2 * m * k * n, (m * k + k * n + m * n) * itemsize)

    def attention(self, flops: int, nbytes: int) -> None:
        """The fused attention kernel."""
        self._compute("attention", flops, nbytes)

    def elementwise(self, nbytes: int) -> None:
        """Anything bound by memory; bytes are an estimate that nothing compares."""
        self._compute("elementwise", 0, nbytes)

    def _compute(self, kind: str, flops: int, nbytes: int) -> None:
        self._events.append(Compute(kind, flops, nbytes, self._phase, self._site))

    def all_reduce(self, group: Group, dtype: str, payload_bytes: int) -> int:
        """Sum in place over a group. Returns the ticket to `wait` for."""
        return self.issue("all_reduce", group, dtype, payload_bytes)

    def issue(self, operation: str, group: Group, dtype: str, payload_bytes: int, ticket: int = 0) -> int:
        """Put any collective on the wire. Returns the ticket to `wait` for: a new one, or that of a `queue`."""
        if group.size == 1:
            return 0
        ticket = ticket or self._new_ticket()
        self._events.append(
            Issue(operation, group.axis, group.size, dtype, payload_bytes, self._phase, self._site, ticket)
        )
        return ticket

    def queue(self, name: str) -> int:
        """The ticket of a queue: its first `wait` is for the first that was issued under it, and so on.

        So one iteration of a loop may wait for what another one has issued, and a step for what the last one has.
        """
        if name not in self._queues:
            self._queues[name] = self._new_ticket()
        return self._queues[name]

    def _new_ticket(self) -> int:
        self._ticket += 1
        return self._ticket

    def wait(self, ticket: int) -> None:
        """The result of a collective is needed."""
        if ticket:
            self._events.append(Wait(ticket, self._phase, self._site))
