"""The typed tree of a job: what is trained, how it is laid out, on what, and with which settings.

Five frozen dataclasses, one owner for each field. A field's docstring is its help text on the command line.
Reading and writing files is `config.files`, overriding fields is `config.overrides`, legality is `config.legality`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from meshwright.config.attention import Attention

if TYPE_CHECKING:
    from meshwright.config.legality import Violation

AXES = ("pipeline", "replicate", "shard", "ring", "ulysses", "tensor")
"""Mesh axes in rank order: the last varies fastest, so tensor-parallel ranks are neighbours."""

TOKEN_AXES = ("replicate", "shard", "ring", "ulysses")
"""The axes that split tokens. Gradients of every parameter are summed over their product, the gradient group."""

STATE_AXES = ("shard", "ring", "ulysses")
"""The axes over which ZeRO shards states; `replicate` holds copies of the shards."""


@dataclass(frozen=True)
class RopeScaling:
    """Slower rotary frequencies for positions beyond those of the first training, as in Llama 3.1."""

    factor: float = 1.0
    """Divides the frequencies of long wavelengths (Llama 3.1: 8); 1 scales nothing."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_positions / low_freq_factor are long."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_positions / high_freq_factor keep their frequency; between, it is interpolated."""
    original_positions: int = 8192
    """Sequence length on which the unscaled frequencies were trained."""


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer by its dimensions and kinds."""

    name: str = ""
    """Name for people; nothing depends on it."""
    block: Literal["decoder", "ffn"] = "decoder"
    """decoder: attention and MLP with norms. ffn: two linear layers only, no vocabulary (planner and worksheets)."""
    layers: int = 4
    """Number of blocks."""
    d_model: int = 256
    """Width of the residual stream."""
    d_ff: int = 704
    """Width of the hidden layer of the MLP."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 4
    """Key and value heads; fewer than `heads` is grouped-query attention."""
    head_dim: int = 32
    """Width of a head."""
    vocab_size: int = 256
    """Number of tokens in the vocabulary, before padding."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and before the head."""
    norm_eps: float = 1e-5
    """Added to the mean square (or variance) inside the normalisation."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary embedding of queries and keys, or a learned table added to the token embedding."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = RopeScaling()
    """How the rotary frequencies are scaled for longer sequences; the default scales nothing."""
    mlp: Literal["gated_silu", "gelu"] = "gated_silu"
    """gated_silu: down(silu(gate(x)) * up(x)). gelu: down(gelu(up(x))), tanh form."""
    bias: bool = False
    """Biases in every linear layer, and in LayerNorm."""
    tied: bool = False
    """The head uses the embedding's weight."""


@dataclass(frozen=True)
class Layout:
    """Degrees of each mesh axis and the options of the schemes; the world is the product of the degrees."""

    replicate: int = 1
    """Copies of the model that split the batch (data parallelism)."""
    shard: int = 1
    """Ranks that split the batch and, with ring and ulysses, the states (ZeRO, FSDP)."""
    ring: int = 1
    """Ranks that split the sequence for ring attention."""
    ulysses: int = 1
    """Ranks that exchange the sequence for heads inside attention."""
    tensor: int = 1
    """Ranks that split each weight (Megatron tensor parallelism)."""
    pipeline: int = 1
    """Ranks that split the layers; not available yet."""
    gradients: Literal["naive", "flat", "per_parameter", "bucketed"] = "bucketed"
    """How gradients are summed with zero 0 and 1: each or all after backward, each or a bucket as soon as it is ready.
    Zero 2 and 3 sum a unit at a time."""
    bucket_mib: float | Literal["auto"] = 25.0
    """MiB of gradients in a bucket; auto is the best by the bucketing model and the constants of the cluster."""
    zero: int | Literal["auto"] = "auto"
    """What is sharded over shard × ring × ulysses: 1 optimiser states; 2 and 3 gradients and parameters, too.
    With 2, gathered parameters stay until backward. auto is 0 where shard = 1, else 3."""
    prefetch: int = 1
    """Units that zero 2 and 3 gather ahead of the one that computes."""
    sequence_parallel: bool = False
    """Split norms and the residual stream along the sequence over the tensor axis (Korthikanti et al. 2022)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it. selective: the attention core; full: whole blocks."""
    ring_order: Literal["contiguous", "zigzag"] = "zigzag"
    """How a ring divides the sequence: one chunk a rank, or one from either end, to balance the causal mask."""
    overlap: Literal["none", "pipelined", "auto"] = "auto"
    """pipelined cuts tensor-parallel products so that their communication runs under them; auto chooses by timeline.
    Of it, of overlap_chunks and prefetch, of half_batches and hierarchical where they are false, and of bucket_mib
    where that is auto, it takes what the simulated timeline finds fastest on the cluster, and sets them to it."""
    overlap_chunks: int = 4
    """Into how many pieces pipelined cuts each hop, or each sum, of a product."""
    overlap_ring: Literal["unidirectional", "bidirectional"] = "unidirectional"
    """Whether the pieces of a hop all go to the next rank, or the second half of them to the one before."""
    hierarchical: bool = False
    """Sum gradients inside each host first, then between hosts; needs several ranks of their group on each host."""
    half_batches: bool = False
    """Run each block in two halves of the micro-batch, one computing while the other communicates.
    It is tensor-parallel communication that hides so: nothing changes where tensor = 1."""

    @property
    def halves(self) -> bool:
        """Whether blocks run in two half-batches."""
        return self.half_batches and self.tensor > 1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return math.prod(self.degree(axis) for axis in AXES)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes of degree above 1 that split tokens, in mesh order: the gradient group."""
        return tuple(axis for axis in TOKEN_AXES if self.degree(axis) > 1)

    @property
    def gradient_axis(self) -> str:
        """Name of the flattened gradient group, such as `shard*ring`; empty for one rank."""
        return "*".join(self.token_axes)

    @property
    def gradient_group_size(self) -> int:
        """Ranks over which the gradient of a parameter is summed."""
        return math.prod(self.degree(axis) for axis in TOKEN_AXES)

    @property
    def zero_stage(self) -> int:
        """The stage of ZeRO: `zero`, or what auto stands for."""
        if self.zero == "auto":
            return 3 if self.shard > 1 else 0
        return self.zero

    @property
    def state_axes(self) -> tuple[str, ...]:
        """Axes of degree above 1 over which states are sharded, in mesh order; none at stage 0."""
        return tuple(axis for axis in STATE_AXES if self.zero_stage and self.degree(axis) > 1)

    @property
    def state_axis(self) -> str:
        """Name of the flattened group of ranks that share the states, such as `shard*ring`."""
        return "*".join(self.state_axes)

    @property
    def state_group_size(self) -> int:
        """Ranks among which the states of a parameter are divided."""
        return math.prod(self.degree(axis) for axis in self.state_axes)

    def state_coordinate(self, rank: int) -> int:
        """Which of the parts of the states a rank holds."""
        coordinates, index = self.coordinates(rank), 0
        for axis in self.state_axes:
            index = index * self.degree(axis) + coordinates[axis]
        return index

    @property
    def batch_ranks(self) -> int:
        """Number of parts into which the sequences of a batch are divided."""
        return self.replicate * self.shard

    @property
    def sequence_parts(self) -> int:
        """Number of equal parts into which a sequence must divide: ring (twice for zigzag) × ulysses × tensor."""
        chunks = 2 if self.ring > 1 and self.ring_order == "zigzag" else 1
        return chunks * self.ring * self.ulysses * (self.tensor if self.sequence_parallel else 1)

    def padded(self, seq_len: int) -> int:
        """The length to which `training.pad` fills up a sequence; a length that divides stays as it is."""
        return -(-seq_len // self.sequence_parts) * self.sequence_parts

    def degree(self, axis: str) -> int:
        """Degree of one mesh axis."""
        return getattr(self, axis)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank on every axis, `tensor` varying fastest."""
        coordinates = {}
        for axis in reversed(AXES):
            rank, coordinates[axis] = divmod(rank, self.degree(axis))
        return {axis: coordinates[axis] for axis in AXES}

    def stride(self, axis: str) -> int:
        """Distance in ranks between neighbours on an axis."""
        inner = AXES[AXES.index(axis) + 1 :]
        return math.prod(self.degree(name) for name in inner)

    def violations(self, model: Model, cluster: Cluster, training: Training) -> list[Violation]:
        """All rules that this layout breaks, each with its numbers and the nearest legal values."""
        from meshwright.config import legality  # which needs this module

        return legality.violations(self, model, cluster, training)


@dataclass(frozen=True)
class Link:
    """One tier of the network as one device sees it."""

    latency_seconds: float = 0.0
    """Fixed cost of one collective call on this tier."""
    bandwidth: float = 0.0
    """Bytes per second that one device sends, one way (over one link, if there are several)."""
    links: int = 1
    """Number of such links of a device (6 on a 3-D torus)."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or one CPU rank. Figures are published ones, dense, without sparsity."""

    name: str = "cpu"
    """Catalog name."""
    kind: Literal["cpu", "cuda", "tpu"] = "cpu"
    """Which backend of PyTorch runs it; tpu is planned only."""
    peak_flops: dict[str, float] = field(default_factory=dict)
    """Matmul FLOP/s by precision (`bf16`, `float32`); missing means unknown, and then MFU is not reported."""
    memory_bytes: int = 0
    """Memory of the device; 0 is unknown, then nothing is said to fit or not."""
    memory_bandwidth: float = 0.0
    """Bytes per second between the device and its memory."""
    efficiency: float = 0.5
    """Share of the peak that a model's matrix products reach."""
    source: str = ""
    """Where the figures come from."""


@dataclass(frozen=True)
class Cluster:
    """Hosts of equal devices joined by two tiers of links."""

    name: str = ""
    """Name for people; nothing depends on it."""
    device: Device = Device()
    """The device; in a file, the name of a catalog device or a table."""
    hosts: int = 1
    """Number of hosts."""
    devices_per_host: int = 1
    """Devices joined by `intra`."""
    intra: Link = Link()
    """Links inside a host (NVLink, ICI, shared memory)."""
    inter: Link = Link()
    """Links between hosts."""
    source: str = ""
    """Where the figures come from."""

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.hosts * self.devices_per_host


@dataclass(frozen=True)
class Training:
    """One run: its batch, precision, optimiser, data and limits."""

    batch: int = 16
    """Global batch, in sequences."""
    seq_len: int = 256
    """Tokens in a sequence."""
    pad: bool = False
    """Fill sequences up, without labels, to the next length that the layout divides, instead of refusing them."""
    documents: Literal["joined", "separate"] = "joined"
    """separate: attention stays within a document (a file of the corpus). joined: it sees all that came before."""
    accumulation: int = 1
    """Micro-batches a step; the batch divides by it."""
    precision: Literal["float32", "bf16"] = "float32"
    """Compute precision. Master weights, gradients and optimiser states are float32 in both."""
    reduce_precision: Literal["float32", "bf16"] = "float32"
    """Precision in which zero 2 and 3 sum gradients over ranks; the others sum in float32."""
    attention: Attention = "sdpa"
    """Attention kernel. sdpa: PyTorch's own fused one for the device. flash: ours, FlashAttention-2 in Triton. flex:
    PyTorch's FlexAttention, compiled. naive: none, scores are kept. auto: what device and shape allow; says what."""
    loss_chunk: int = 0
    """Tokens whose logits exist at a time, so that they are never whole; 0 computes them all at once."""
    steps: int = 100
    """Optimiser steps."""
    seed: int = 0
    """Seed of the initial weights and of the data order; the layout changes neither."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    final_learning_rate: float = 0.1
    """Learning rate at the last step, as a fraction of the peak; cosine in between."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    weight_decay: float = 0.1
    """AdamW's weight decay; norms and biases have none."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 clips nothing (the norm is still reported)."""
    data: str = ""
    """Text file or folder, read as bytes; empty is the standard library source of the running Python."""
    heldout_every: int = 50
    """Steps between evaluations on the held-out text; 0 evaluates only at the end."""
    heldout_sequences: int = 32
    """Sequences in one evaluation, the same ones for every layout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is CUDA if every rank has a GPU, else CPU; for planning, the kind of the cluster's device."""
    compile: bool = False
    """Compile the norms with torch.compile; what communicates stays eager, so the ledger is the same."""
    timeout_seconds: float = 600.0
    """A collective that waits longer ends the run."""
    trial_steps: int = 4
    """Pairs of steps by which a trial before the run compares what overlap = auto cut with nothing cut; 0 runs none."""


@dataclass(frozen=True)
class Job:
    """Everything a command needs: model, layout, cluster and training."""

    name: str = "job"
    """Name of the run folder."""
    model: Model = Model()
    """What is trained."""
    layout: Layout = Layout()
    """How it is laid out over ranks."""
    cluster: Cluster = Cluster()
    """On what it runs; in a file, the name of a catalog cluster or a table."""
    training: Training = Training()
    """How it is trained."""
