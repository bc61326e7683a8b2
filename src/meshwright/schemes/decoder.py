"""A decoder composed from the scheme pages, once: `model.decoder` by formula.

The order of the calls is the order of the program; backward is the exact reverse. The site of each piece is its
module's name; the L equal blocks are written as one `Repeat`.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.config.tree import Model
from meshwright.schemes.local import Activation, AttentionCore, Norm, Rope
from meshwright.schemes.tape import FLOAT32, Sizes, Tape
from meshwright.schemes.tensor import ColumnLinear, CrossEntropy, Embedding, RowLinear

SAVED = "saved_activations"


@dataclass(frozen=True)
class Block:
    """Norm, attention, norm, MLP."""

    model: Model
    sizes: Sizes

    def forward(self, tape: Tape, site: str) -> None:
        """Makes the next residual stream; the present one stays, saved by the first norm."""
        m, s = self.model, self.sizes
        with tape.at(f"{site}.attention_norm"):
            self.norm.forward(tape)
        with tape.at(f"{site}.attention"):
            rotated = "temporaries" if m.positions == "rope" else SAVED
            self.qkv.forward(tape, (rotated, rotated, SAVED))
            if m.positions == "rope":
                Rope(s, s.H).forward(tape)
                Rope(s, s.K).forward(tape)
            AttentionCore(s).forward(tape)
            self.output.forward(tape)
        self._add(tape, site)
        with tape.at(f"{site}.mlp_norm"):
            self.norm.forward(tape)
        with tape.at(f"{site}.mlp"):
            self.up.forward(tape, (SAVED,) * len(self.up.features))
            Activation(s, m.mlp).forward(tape)
            self.down.forward(tape)
        self._add(tape, site)

    def backward(self, tape: Tape, site: str) -> None:
        """Turns the gradient of the next residual stream into that of the present one."""
        m, s = self.model, self.sizes
        with tape.at(f"{site}.mlp"):
            self.down.backward(tape, release_input=True)
            Activation(s, m.mlp).backward(tape)
            self.up.backward(tape)
        with tape.at(f"{site}.mlp_norm"):
            self.norm.backward(tape, dh_category=s.wire_category, residual=True)
        with tape.at(f"{site}.attention"):
            self.output.backward(tape, release_input=False)  # attention holds its output too
            AttentionCore(s).backward(tape)
            if m.positions == "rope":
                Rope(s, s.K).backward(tape)
                Rope(s, s.H).backward(tape)
            self.qkv.backward(tape)
        with tape.at(f"{site}.attention_norm"):
            self.norm.backward(tape, dh_category=s.wire_category, residual=True)

    def _add(self, tape: Tape, site: str) -> None:
        """The residual sum, saved by the next norm; frees the branch's output."""
        s = self.sizes
        with tape.at(site):
            tape.save(s.N * s.E * s.c)
            tape.elementwise(3 * s.N * s.E * s.c)
            tape.free(s.N * s.E * s.c, s.wire_category)

    @property
    def norm(self) -> Norm:
        """Either norm."""
        return Norm(self.sizes, self.model.norm, self.model.bias)

    @property
    def qkv(self) -> ColumnLinear:
        """Query, key and value."""
        s = self.sizes
        return ColumnLinear(s, (s.H * s.D, s.K * s.D, s.K * s.D), self.model.bias)

    @property
    def output(self) -> RowLinear:
        """Attention's output projection."""
        return RowLinear(self.sizes, self.sizes.H * self.sizes.D, self.model.bias)

    @property
    def up(self) -> ColumnLinear:
        """Gate and up, or up alone."""
        return ColumnLinear(
            self.sizes, (self.sizes.F,) * Activation(self.sizes, self.model.mlp).num_inputs, self.model.bias
        )

    @property
    def down(self) -> RowLinear:
        """The MLP's output projection."""
        return RowLinear(self.sizes, self.sizes.F, self.model.bias)


@dataclass(frozen=True)
class Decoder:
    """The whole model for one micro-batch."""

    model: Model
    sizes: Sizes

    def forward(self, tape: Tape) -> None:
        """Embedding to loss."""
        m, s = self.model, self.sizes
        learned = m.positions == "learned"
        with tape.at("embedding", "forward"):
            Embedding(s).forward(tape, s.wire_category if learned else SAVED)
        if learned:
            with tape.at("positions", "forward"):
                self._add_positions(tape)
        else:
            with tape.at("", "forward"):
                tape.save(self.rotary_bytes)
        with tape.repeat(m.layers), tape.at(phase="forward"):
            Block(m, s).forward(tape, "layers.*")
        with tape.at("norm", "forward"):
            self._norm.forward(tape)
        with tape.at("head", "forward"):
            self._head.forward(tape, ("logits",))
        with tape.at("loss", "forward"):
            CrossEntropy(s).forward(tape)

    def backward(self, tape: Tape) -> None:
        """Loss to embedding."""
        m, s = self.model, self.sizes
        with tape.at("loss", "backward"):
            CrossEntropy(s).backward(tape)
        with tape.at("head", "backward"):
            self._head.backward(tape, dy_category="logits")
            if m.tied:
                tape.alloc(s.V * s.E * FLOAT32)  # waits in the engine for the embedding's share of the gradient
        with tape.at("norm", "backward"):
            self._norm.backward(tape, dh_category=s.wire_category, residual=False)
        with tape.repeat(m.layers, first=m.layers - 1, step=-1), tape.at(phase="backward"):
            Block(m, s).backward(tape, "layers.*")
        if m.positions == "learned":
            with tape.at("positions", "backward"):
                table = s.S * s.E * FLOAT32
                with tape.holding(table), tape.holding(table):
                    tape.elementwise(s.N * s.E * s.c + 4 * table)
        else:
            with tape.at("layers.0.attention", "backward"):
                tape.release(self.rotary_bytes)
        with tape.at("embedding", "backward"):
            Embedding(s).backward(tape)
            if m.tied:
                tape.free(s.V * s.E * FLOAT32)

    @property
    def rotary_bytes(self) -> int:
        """Cosines and sines, shared by all layers."""
        return self.sizes.S * self.sizes.D * FLOAT32

    def _add_positions(self, tape: Tape) -> None:
        s = self.sizes
        rows = s.S * s.E
        if s.casts:
            tape.alloc(rows * FLOAT32)
        with tape.holding(rows * s.c):
            if s.casts:
                tape.free(rows * FLOAT32)
            tape.save(s.N * s.E * s.c)
            tape.elementwise(2 * s.N * s.E * s.c + rows * (2 * FLOAT32 + s.c))
        tape.free(s.N * s.E * s.c, s.wire_category)

    @property
    def _norm(self) -> Norm:
        return Norm(self.sizes, self.model.norm, self.model.bias)

    @property
    def _head(self) -> ColumnLinear:
        return ColumnLinear(self.sizes, (self.sizes.V,), biased=False)
