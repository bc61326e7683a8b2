"""Groups of a layout are made once: gloo keeps threads and connections for each. All have the job's timeout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import ranked_mesh

from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Layout


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(ring=2, ulysses=2), Layout(replicate=2, ring=2)], ids=str)
def test_a_second_world_has_the_groups_of_the_first(ranks: Callable[[int], Ranks], layout: Layout) -> None:
    assert all(ranks(layout.world).run(ranked_mesh.same_groups, layout))


@pytest.mark.parametrize("layout", [Layout(ring=2, ulysses=2), Layout(replicate=2, tensor=2)], ids=str)
def test_every_group_has_the_default_groups_timeout(ranks: Callable[[int], Ranks], layout: Layout) -> None:
    """torch gives half an hour to groups that do not ask: a rank that waits for a lost one would wait so long."""
    for answers in ranks(4).run(ranked_mesh.timeouts, layout):
        assert len(answers) >= 2 and all(answers)
