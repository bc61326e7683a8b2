"""Which attention kernel runs: what `training.attention` asks for, what a device and a shape allow, and why.

    naive            product, mask and softmax one after the other; keeps the probabilities      any device, any shape
    sdpa_cpu         torch's fused kernel for CPUs                                               CPU, any shape
    sdpa_flash       torch's FlashAttention-2                        CUDA, 16 bit, head_dim a multiple of 8 up to 256
    sdpa_efficient   torch's memory-efficient attention                         CUDA, float32, head_dim a multiple of 4
    flash            FlashAttention-2 in Triton, ours                           CUDA, head_dim one of FLASH_HEAD_DIMS
    flex             torch's FlexAttention, compiled                                    CUDA, head_dim 16 or more

The mask of separate documents is taken by sdpa_cpu alone. Nothing falls back in silence: what the asked kernel cannot
take is refused, and `auto` says what it took, and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from meshwright.config.tree import Model, Training

Attention = Literal["naive", "sdpa", "flash", "flex", "auto"]
"""What can be asked for."""

Kernel = Literal["naive", "sdpa_cpu", "sdpa_flash", "sdpa_efficient", "flash", "flex"]
"""What runs."""

FLASH_HEAD_DIMS = (16, 32, 64, 128, 256)
"""For which our kernel has tiles."""

FLEX_LEAST_HEAD_DIM = 16

_NAMES: dict[Kernel, str] = {
    "naive": "separate operations",
    "sdpa_cpu": "torch's kernel for CPUs",
    "sdpa_flash": "torch's kernel for 16 bits on CUDA",
    "sdpa_efficient": "torch's kernel for float32 on CUDA",
    "flash": "our kernel",
    "flex": "torch's FlexAttention",
}


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel of a job and what decided it."""

    asked: Attention
    kernel: Kernel
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.reason}"

    def to_json(self) -> dict[str, str]:
        """As `plan --json` has it."""
        return {"asked": self.asked, "kernel": self.kernel, "reason": self.reason}


@dataclass(frozen=True)
class AttentionCall:
    """What decides about the kernel: a device, a shape and a mask."""

    device_kind: str
    """cpu; anything else is accounted for as CUDA."""
    half: bool
    """Whether the compute dtype has 16 bits."""
    head_dim: int
    separate: bool = False
    """Whether a document sees itself only."""

    @classmethod
    def of(cls, model: Model, training: Training) -> AttentionCall:
        """Of a job."""
        separate = training.documents == "separate"
        return cls(training.device, training.precision == "bf16", model.head_dim, separate)

    def choose(self, attention: Attention) -> AttentionChoice:
        """The kernel and the reason, whether or not the kernel can take the call (see `refusals`)."""
        if attention != "auto":
            return AttentionChoice(attention, self._kernel(attention), "as asked")
        if self.device_kind == "cpu":
            return AttentionChoice("auto", "sdpa_cpu", "torch's kernel is the only fused one on a CPU")
        if not self.half:
            return AttentionChoice("auto", "sdpa_efficient", "flash is tuned for 16 bits, and this is float32")
        if self.head_dim not in FLASH_HEAD_DIMS:
            reason = f"flash takes head_dim {_listed(FLASH_HEAD_DIMS)}, not {self.head_dim}"
            return AttentionChoice("auto", "sdpa_flash", reason)
        return AttentionChoice("auto", self._kernel("flash"), f"16 bits and head_dim {self.head_dim} on CUDA")

    def _kernel(self, attention: Literal["naive", "sdpa", "flash", "flex"]) -> Kernel:
        if attention == "sdpa":
            if self.device_kind == "cpu":
                return "sdpa_cpu"
            return "sdpa_flash" if self.half else "sdpa_efficient"
        return attention

    def refusals(self, attention: Attention) -> list[tuple[str, str]]:
        """(name of the rule, message) for each reason why the kernel that would run cannot."""
        broken, others = self._broken(attention), self._others()
        return [(rule, f"{message}: use {fix.format(others=others)}") for rule, message, fix in broken]

    def advised(self) -> list[Attention]:
        """What can be asked for instead, and run: on a CPU not our kernel, which is interpreted there."""
        names: list[Attention] = [name for name in get_args(Attention) if not self._broken(name)]
        return [name for name in names if name != "flash" or self.device_kind != "cpu"]

    def _others(self) -> str:
        """What is advised, in words."""
        if self.separate and self.device_kind != "cpu":
            return f"{replace(self, device_kind='cpu')._others()} with training.device cpu"
        return f"training.attention {_listed(self.advised())}"

    def _broken(self, attention: Attention) -> list[tuple[str, str, str]]:
        """(name of the rule, value and rule in words, what to use, where `others` are those that are advised)."""
        kernel, found = self.choose(attention).kernel, []
        asked, separate = f"training.attention = {attention}", "training.documents = separate"
        if kernel == "flex" and self.device_kind == "cpu":
            rule = "has no backward on a CPU (torch compiles it for GPUs only)"
            found.append(("attention_device", f"{asked} {rule}", "{others}"))
        if legal := self._unmet_head_dims(kernel):
            value = f"model.head_dim = {self.head_dim} with {asked}"
            rule = f"is not {legal} (no other is taken by {_NAMES[kernel]})"
            found.append(("attention_head_dim", f"{value} {rule}", "{others}"))
        if self.separate and attention not in ("sdpa", "auto"):
            rule = "has no mask (only sdpa's kernel takes that of documents)"
            fix = "{others}, or training.documents joined"
            found.append(("attention_documents", f"{separate} with {asked} {rule}", fix))
        if self.separate and self.device_kind != "cpu":
            rule = "needs training.device = cpu (no attention kernel for GPUs takes its mask yet)"
            fix = "training.documents joined, or training.device cpu"
            found.append(("documents_device", f"{separate} {rule}", fix))
        return found

    def _unmet_head_dims(self, kernel: Kernel) -> str:
        """What `head_dim` would have to be; empty if it is."""
        if kernel == "flash":
            return "" if self.head_dim in FLASH_HEAD_DIMS else _listed(FLASH_HEAD_DIMS)
        if kernel == "flex":
            return "" if self.head_dim >= FLEX_LEAST_HEAD_DIM else f"{FLEX_LEAST_HEAD_DIM} or more"
        if kernel == "sdpa_flash":
            return "" if self.head_dim % 8 == 0 and self.head_dim <= 256 else "a multiple of 8 up to 256"
        if kernel == "sdpa_efficient":
            return "" if self.head_dim % 4 == 0 else "a multiple of 4"
        return ""


def chosen_attention(model: Model, training: Training) -> AttentionChoice:
    """What a job's `training.attention` comes to."""
    return AttentionCall.of(model, training).choose(training.attention)


def _listed(values: Sequence[object]) -> str:
    """`1, 2 or 4`."""
    *head, tail = map(str, values)
    return f"{', '.join(head)} or {tail}" if head else tail
