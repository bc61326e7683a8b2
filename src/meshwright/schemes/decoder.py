"""A decoder composed from the scheme pages, once: `model.decoder` by formula.

The order of the calls is the order of the program; backward is the exact reverse. The site of each piece is its
module's name; the L equal blocks are written as one `Repeat`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshwright.config.tree import Model
from meshwright.schemes.context import SAVED, ContextAttention
from meshwright.schemes.halves import HalvedBlock
from meshwright.schemes.local import Activation, Norm, Rope
from meshwright.schemes.loss import ChunkedCrossEntropy, CrossEntropy
from meshwright.schemes.recompute import RerunBlock
from meshwright.schemes.tape import FLOAT32, Sizes, Tape
from meshwright.schemes.tensor import ColumnLinear, Embedding, RowLinear
from meshwright.schemes.units import Run, Units


@dataclass(frozen=True)
class Block:
    """Norm, attention, norm, MLP."""

    model: Model
    sizes: Sizes

    @property
    def stream_bytes(self) -> int:
        """Bytes of the residual stream, and of a norm's output."""
        return self.sizes.M * self.sizes.E * self.sizes.c

    def forward(self, tape: Tape, site: str, *, out_category: str = SAVED) -> None:
        """Makes the next residual stream; the present one stays, saved by the first norm."""
        m, s = self.model, self.sizes
        attention, activation = ContextAttention(s), Activation(s, m.mlp)
        with tape.at(f"{site}.attention_norm"):
            self.norm.forward(tape)
        with tape.at(f"{site}.attention"):
            rotated = attention.input_category if m.positions == "learned" else "temporaries"
            self.qkv.forward(tape, (rotated, rotated, attention.input_category))
            if m.positions == "rope":
                Rope(s, s.H).forward(tape, attention.input_category)
                Rope(s, s.K).forward(tape, attention.input_category)
            attention.forward(tape)
            self.output.forward(tape)
            tape.drop(s.N * s.H * s.D * s.c)
        self._add(tape, site, SAVED)
        with tape.at(f"{site}.mlp_norm"):
            self.norm.forward(tape)
            tape.drop(self.stream_bytes)  # the first norm's output
        with tape.at(f"{site}.mlp"):
            self.up.forward(tape, (SAVED,) * len(self.up.features))
            activation.forward(tape)
            self.down.forward(tape)
            tape.drop((activation.num_inputs + 1) * activation.nbytes)
        self._add(tape, site, out_category)
        tape.drop(2 * self.stream_bytes)  # the second norm's output, and the stream between

    def backward(self, tape: Tape, site: str, *, rotary_bytes: int = 0, holds_gradient: bool = False) -> None:
        """Turns the gradient of the next residual stream into that of the present one.

        `rotary_bytes` of tables are used here for the last time. `holds_gradient`: somebody outside holds the gradient
        that comes in, and frees it.
        """
        m, s, attention = self.model, self.sizes, ContextAttention(self.sizes)
        dkv = attention.dkv_category
        with tape.at(f"{site}.mlp"):
            self.down.backward(tape, release_input=True)
            Activation(s, m.mlp).backward(tape)
            self.up.backward(tape)
        with tape.at(f"{site}.mlp_norm"):
            self.norm.backward(tape, dh_category=s.wire_category, residual=not holds_gradient)
        with tape.at(f"{site}.attention"):
            self.output.backward(tape, release_input=not attention.shares_out)
            attention.backward(tape)
            if m.positions == "rope":
                Rope(s, s.K).backward(tape, dkv)
                Rope(s, s.H).backward(tape)
                tape.release(rotary_bytes)
            self.qkv.backward(
                tape, dy_categories=("temporaries", dkv if m.positions == "learned" else "temporaries", dkv)
            )
        with tape.at(f"{site}.attention_norm"):
            self.norm.backward(tape, dh_category=s.wire_category, residual=True)

    def _add(self, tape: Tape, site: str, category: str) -> None:
        """The residual sum, saved by the next norm; frees the branch's output."""
        with tape.at(site):
            tape.alloc(self.stream_bytes, category)
            tape.elementwise(3 * self.stream_bytes)
            tape.free(self.stream_bytes, self.sizes.wire_category)

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
    """The whole model for one micro-batch, whose parameters are there, or are gathered by `units`."""

    model: Model
    sizes: Sizes
    units: Units = Units()

    def forward(self, tape: Tape) -> None:
        """Embedding to loss."""
        m, s, units = self.model, self.sizes, self.units
        units.enter_model(tape)
        learned = m.positions == "learned"
        units.enter_module(tape, "embedding")
        with tape.at("embedding", "forward"):
            Embedding(s).forward(tape, s.wire_category if learned else SAVED)
        if learned:
            units.enter_module(tape, "positions")
            with tape.at("positions", "forward"):
                self._add_positions(tape)
        else:
            with tape.at("", "forward"):
                tape.save(self.rotary_bytes)
        units.forward_layers(tape, m.layers, lambda run: self._layer_forward(tape, run))
        units.enter_module(tape, "norm")
        with tape.at("norm", "forward"):
            self._norm.forward(tape, "temporaries" if s.loss_chunk else SAVED)
        units.enter_module(tape, "head")
        if s.loss_chunk:
            with tape.at("loss", "forward"):
                ChunkedCrossEntropy(s).forward(tape)
            with tape.at("", "forward"):
                tape.free(s.M * s.E * s.c)  # the norm's output, of which the loss has kept the gradient
        else:
            with tape.at("head", "forward"):
                self._head.forward(tape, ("logits",))
            with tape.at("loss", "forward"):
                CrossEntropy(s, s.N).forward(tape)
        units.leave_model(tape)

    def backward(self, tape: Tape) -> None:
        """Loss to embedding."""
        m, s, units = self.model, self.sizes, self.units
        units.reenter_model(tape)
        if s.loss_chunk:
            with tape.at("loss", "backward"):
                ChunkedCrossEntropy(s).backward(tape)
        else:
            with tape.at("loss", "backward"):
                CrossEntropy(s, s.N).backward(tape)
            with tape.at("head", "backward"):
                self._head.backward(tape, dy_categories=("logits",))
        with tape.at("norm", "backward"):
            dh_category = ChunkedCrossEntropy(s).dh_category if s.loss_chunk else s.wire_category
            self._norm.backward(tape, dh_category=dh_category, residual=False)
        units.backward_layers(tape, m.layers, lambda run: self._layer_backward(tape, run))
        if m.positions == "learned":
            with tape.at("positions", "backward"):
                table, rows = s.seq_len * s.E * FLOAT32, s.M // s.B * s.E * FLOAT32
                tape.alloc(table)
                with tape.holding(rows):
                    tape.elementwise(s.M * s.E * s.c + 3 * table + rows)
                if s.casts_gradients:
                    tape.alloc(s.seq_len * s.E * s.p)
                    tape.free(table)
                tape.accumulate(s.seq_len * s.E * s.p)
        with tape.at("embedding", "backward"):
            Embedding(s).backward(tape, tied=m.tied)
        units.reduce_model(tape)

    def _layer_forward(self, tape: Tape, run: Run) -> None:
        with tape.at(phase="forward"):
            self.units.enter_layer(tape, run)
            self._block.forward(tape, "layers.*")
            self.units.leave_layer(tape)

    def _layer_backward(self, tape: Tape, run: Run) -> None:
        tables = self.rotary_bytes if run.first == 0 and self.model.positions == "rope" else 0
        with tape.at(phase="backward"):
            self.units.reenter_layer(tape, run)
            self._block.backward(tape, "layers.*", rotary_bytes=tables)
            self.units.reduce_layer(tape, run)

    @property
    def rotary_bytes(self) -> int:
        """Cosines and sines, shared by all layers."""
        return self.sizes.S * self.sizes.D * FLOAT32

    def _add_positions(self, tape: Tape) -> None:
        s = self.sizes
        rows = s.M // s.B * s.E
        if s.casts_weights:
            tape.alloc(rows * FLOAT32)
        with tape.holding(rows * s.c):
            if s.casts_weights:
                tape.free(rows * FLOAT32)
            tape.save(s.M * s.E * s.c)
            tape.elementwise(2 * s.M * s.E * s.c + rows * (2 * FLOAT32 + s.c))
        tape.free(s.M * s.E * s.c, s.wire_category)

    @property
    def _block(self) -> Block | HalvedBlock | RerunBlock:
        s = self.sizes
        block = HalvedBlock(Block(self.model, replace(s, B=s.B // 2))) if s.halves else Block(self.model, s)
        return RerunBlock(block) if self.sizes.recompute == "full" else block

    @property
    def _norm(self) -> Norm:
        return Norm(self.sizes, self.model.norm, self.model.bias)

    @property
    def _head(self) -> ColumnLinear:
        return ColumnLinear(self.sizes, (self.sizes.V,), biased=False)
