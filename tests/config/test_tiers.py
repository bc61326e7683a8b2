"""How groups lie on hosts, by hand and against the coordinates of ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshwright.config.tiers import Tiers, gradient_tiers, groups, on_hosts, shares, tiers
from meshwright.config.tree import AXES, Layout

degrees = st.sampled_from([1, 1, 2, 3, 4])
layouts = st.builds(Layout, replicate=degrees, shard=degrees, ring=degrees, ulysses=degrees, tensor=degrees)
some_axes = st.sets(st.sampled_from(AXES), min_size=1).map(lambda axes: tuple(axis for axis in AXES if axis in axes))


def test_groups_by_hand() -> None:
    layout = Layout(replicate=2, ring=2, tensor=2)
    assert list(groups(layout, ["replicate"])) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert list(groups(layout, ["replicate", "ring"])) == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert list(groups(layout, ["replicate", "tensor"])) == [(0, 1, 4, 5), (2, 3, 6, 7)]


@given(layout=layouts, axes=some_axes)
def test_a_group_is_the_ranks_that_differ_on_its_axes_only(layout: Layout, axes: tuple[str, ...]) -> None:
    found = list(groups(layout, axes))
    assert sorted(rank for group in found for rank in group) == list(range(layout.world))
    for group in found:
        assert list(group) == sorted(group)
        others = {tuple(layout.coordinates(rank)[axis] for axis in AXES if axis not in axes) for rank in group}
        assert len(others) == 1
    assert len(found[0]) == tiers_size(layout, axes)


def tiers_size(layout: Layout, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in axes:
        size *= layout.degree(axis)
    return size


def test_hosts_by_hand() -> None:
    assert on_hosts((0, 2, 4, 6), 4) == ((0, 2), (4, 6))
    assert on_hosts((1, 5), 4) == ((1,), (5,))
    assert on_hosts((0, 1, 2, 3, 4, 5), 4) == ((0, 1, 2, 3), (4, 5))


def test_tiers_by_hand() -> None:
    assert tiers(Layout(replicate=8), ["replicate"], 4) == Tiers(intra=4, inter=2)
    assert tiers(Layout(replicate=8), ["replicate"], 2) == Tiers(intra=2, inter=4)
    assert tiers(Layout(replicate=4, tensor=2), ["replicate"], 4) == Tiers(intra=2, inter=2)
    assert tiers(Layout(replicate=2, ring=2), ["replicate", "ring"], 2) == Tiers(intra=2, inter=2)
    assert tiers(Layout(replicate=8), ["replicate"], 8) is None, "one host"
    assert tiers(Layout(replicate=2, tensor=4), ["replicate"], 4) is None, "one on each host"
    assert tiers(Layout(replicate=6), ["replicate"], 4) is None, "4 and 2"
    assert tiers(Layout(replicate=4), [], 2) is None, "no group"


def test_groups_that_lie_in_different_ways() -> None:
    """Ranks 0 to 2, 3 to 5 and 6 to 8 on hosts of 4: of the first group all are on one host."""
    assert shares(Layout(ring=3, replicate=3), ["ring"], 4) == [(3,), (1, 2), (2, 1)]
    assert tiers(Layout(ring=3, replicate=3), ["ring"], 4) is None


def test_gradients_are_summed_by_tiers_only_if_asked() -> None:
    assert gradient_tiers(Layout(replicate=4), 2) is None
    assert gradient_tiers(Layout(replicate=4, hierarchical=True), 2) == Tiers(2, 2)
