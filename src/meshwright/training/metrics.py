"""What is reported of a step. Loss and tokens per second are defined here and nowhere else; MFU is the planner's.

loss                    Σ token losses / number of labelled tokens of the global batch, in nats
heldout_bits_per_byte   the same over the held-out sequences, divided by ln 2; a token is a byte
tokens_per_s            tokens of the global batch / seconds of the step, reading data included, evaluation not
mfu                     model FLOPs of one rank / (seconds of the step · peak FLOP/s of its device at the precision)
                        (Chowdhery et al. 2022, appendix B; `planner.estimate.mfu`); None if unknown
exposed_seconds         communication that no computation hides: seconds in which rank 0's compute lane waits for it
                        (`comm.exposed`); None where that is not known
memory_bytes            on CUDA the most that the allocator held since the start, on a CPU the most that was resident
"""

from __future__ import annotations

import json
import math
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from meshwright.config.tree import Training


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl; None is null there."""

    step: int
    loss: float
    grad_norm: float
    tokens_per_s: float
    mfu: float | None = None
    exposed_seconds: float | None = None
    memory_bytes: int | None = None
    heldout_bits_per_byte: float | None = None

    def to_line(self) -> str:
        """JSON has no infinities: what is not finite becomes null."""
        values = asdict(self).items()
        return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values}) + "\n"


class MetricsFile:
    """metrics.jsonl: a whole line at a time, so that a run that is killed leaves no half of one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, metrics: StepMetrics) -> None:
        """Append one step."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(metrics.to_line())


def bits_per_byte(nats_per_token: float) -> float:
    """A loss over bytes in bits."""
    return nats_per_token / math.log(2)


def tokens_per_second(training: Training, step_seconds: float) -> float:
    """Throughput of the whole job."""
    return training.batch * training.seq_len / step_seconds


def memory_bytes(device: torch.device) -> int:
    """The most memory that this process held so far (see the head of this file)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
