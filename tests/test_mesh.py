"""The rank arithmetic as integers, against the groups that Megatron's RankGenerator makes; Mesh.build on real ranks."""
import itertools
import re

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run

from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Axis, Mesh, groups_of, rank_table

AXES = ("tp", "dp", "pp", "ep", "edp")


def rows(text):
    """ "0-3 4,6" -> [(0, 1, 2, 3), (4, 6)] """
    def row(group):
        ends = [[int(n) for n in part.split("-")] for part in group.split(",")]
        return tuple(r for e in ends for r in range(e[0], e[-1] + 1))
    return [row(g) for g in text.split()]


VECTORS = {
    "world 16, tp 2, pp 2, ep 4": (Layout(16, tp=2, pp=2, ep=4), {
        "tp": "0,1 2,3 4,5 6,7 8,9 10,11 12,13 14,15",
        "dp": "0,2,4,6 1,3,5,7 8,10,12,14 9,11,13,15",
        "pp": "0,8 1,9 2,10 3,11 4,12 5,13 6,14 7,15",
        "ep": "0-3 4-7 8-11 12-15",
        "edp": "0,4 1,5 2,6 3,7 8,12 9,13 10,14 11,15",
        "mp": "0,1,8,9 2,3,10,11 4,5,12,13 6,7,14,15",
        "embd": "0,8 1,9 2,10 3,11 4,12 5,13 6,14 7,15"}),
    "world 16, tp 2, pp 4 (the classic example)": (Layout(16, tp=2, pp=4), {
        "tp": "0,1 2,3 4,5 6,7 8,9 10,11 12,13 14,15",
        "dp": "0,2 1,3 4,6 5,7 8,10 9,11 12,14 13,15",
        "pp": "0,4,8,12 1,5,9,13 2,6,10,14 3,7,11,15",
        "ep": " ".join(map(str, range(16))),
        "edp": "0-3 4-7 8-11 12-15",
        "mp": "0,1,4,5,8,9,12,13 2,3,6,7,10,11,14,15",
        "embd": "0,12 1,13 2,14 3,15"}),
    "ep over all of a stage, more than dp": (Layout(8, tp=4, ep=8), {
        "tp": "0-3 4-7", "dp": "0,4 1,5 2,6 3,7", "pp": "0 1 2 3 4 5 6 7", "ep": "0-7", "edp": "0 1 2 3 4 5 6 7",
        "mp": "0-3 4-7", "embd": "0 1 2 3 4 5 6 7"}),
    "ep that is no multiple of tp": (Layout(6, tp=2, ep=3), {
        "tp": "0,1 2,3 4,5", "dp": "0,2,4 1,3,5", "pp": "0 1 2 3 4 5", "ep": "0-2 3-5", "edp": "0,3 1,4 2,5",
        "mp": "0,1 2,3 4,5", "embd": "0 1 2 3 4 5"}),
    "one rank": (Layout(), dict.fromkeys((*AXES, "mp", "embd"), "0")),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_groups_of_megatron(name):
    layout, want = VECTORS[name]
    assert rank_table(layout) == {axis: rows(text) for axis, text in want.items()}


def test_groups_of_by_another_order():
    """Megatron's tp-pp-dp mapping of the same 16 ranks: the function knows sizes and an order, not this mesh."""
    sizes = {"dp": 4, "pp": 2, "tp": 2}
    assert groups_of(sizes, ("pp",))[:2] == [(0, 2), (1, 3)]
    assert groups_of(sizes, ("dp",))[0] == (0, 4, 8, 12)
    assert groups_of(sizes, ("tp", "pp"))[0] == (0, 1, 2, 3)
    assert groups_of(sizes, ("dp", "pp", "tp")) == [tuple(range(16))]
    assert groups_of(sizes, ()) == [(r,) for r in range(16)]


@st.composite
def layouts(draw):
    tp, dp, pp = (draw(st.integers(1, n)) for n in (6, 5, 4))
    ep = draw(st.sampled_from([d for d in range(1, tp * dp + 1) if tp * dp % d == 0]))
    return Layout(tp * dp * pp, tp=tp, pp=pp, ep=ep)


@given(layouts())
def test_every_axis_partitions_the_world(layout):
    table = rank_table(layout)
    for axis in (*AXES, "mp"):
        assert sorted(r for group in table[axis] for r in group) == list(range(layout.world)), axis
        assert all(list(g) == sorted(g) for g in table[axis]), axis
    sizes = {"tp": layout.tp, "dp": layout.dp, "pp": layout.pp, "ep": layout.ep,
             "edp": layout.dp * layout.tp // layout.ep, "mp": layout.tp * layout.pp}
    assert {axis: {len(g) for g in table[axis]} for axis in sizes} == {axis: {n} for axis, n in sizes.items()}


@given(layouts())
def test_strides(layout):
    """tp innermost, then dp, then pp; ep innermost, then edp, then pp."""
    table = rank_table(layout)
    strides = {"tp": 1, "dp": layout.tp, "pp": layout.tp * layout.dp, "ep": 1, "edp": layout.ep}
    for axis, stride in strides.items():
        assert all(b - a == stride for g in table[axis] for a, b in itertools.pairwise(g)), axis


@given(layouts())
def test_experts_refold_the_ranks_of_a_stage(layout):
    table = rank_table(layout)
    n = layout.tp * layout.dp
    for stage in (set(range(s * n, s * n + n)) for s in range(layout.pp)):
        for one, other in (("tp", "dp"), ("ep", "edp")):
            a, b = ([set(g) for g in table[axis] if set(g) & stage] for axis in (one, other))
            assert all(g <= stage for g in a + b)                     # no group leaves its stage
            assert set().union(*a) == set().union(*b) == stage
            assert all(len(x & y) == 1 for x in a for y in b)         # a grid: each row meets each column once


@given(layouts())
def test_tied_embeddings_join_the_first_and_the_last_stage(layout):
    table = rank_table(layout)
    n = layout.tp * layout.dp
    assert table["embd"] == [(r, r + n * (layout.pp - 1))[:min(2, layout.pp)] for r in range(n)]


def test_the_one_process_mesh():
    mesh = Mesh.build(Layout())
    assert mesh == Mesh()
    assert all(getattr(mesh, a) == Axis(a, 1, 0, (0,), None) for a in AXES)
    with pytest.raises(AttributeError):
        mesh.tp = Axis("tp", 2)


def test_a_layout_of_another_size_than_the_world():
    with pytest.raises(ValueError, match="got 4 ranks in the layout and 1 in the world; start 4 ranks or change"):
        Mesh.build(Layout(4, tp=4))


def _build(rank, layout):
    mesh, table = Mesh.build(layout), rank_table(layout)
    sizes = {**vars(layout), "dp": layout.dp, "edp": layout.dp * layout.tp // layout.ep}
    for name in AXES:
        axis = getattr(mesh, name)
        assert axis.name == name and axis.ranks in table[name] and axis.ranks[axis.rank] == rank
        assert axis.size == len(axis.ranks) == sizes[name]
        if axis.size == 1:
            assert axis.group is None
            continue
        assert tuple(dist.get_process_group_ranks(axis.group)) == axis.ranks
        assert dist.get_rank(axis.group) == axis.rank
        x = torch.tensor([1 << rank])
        dist.all_reduce(x, group=axis.group)
        assert x.item() == sum(1 << r for r in axis.ranks)            # exactly these ranks, each once


@pytest.mark.parametrize("layout", [Layout(2, tp=2), Layout(2, pp=2), Layout(2, tp=2, ep=2), Layout(2),
                                    Layout(4, tp=2, pp=2, ep=2), Layout(4, tp=2, ep=2), Layout(4, tp=4, ep=2),
                                    Layout(4, tp=2, ep=4)],
                         ids=lambda a: f"world{a.world}-tp{a.tp}-pp{a.pp}-ep{a.ep}")
def test_build(layout):
    run(layout.world, _build, layout)


def _wrong_size(rank):
    with pytest.raises(ValueError, match=re.escape("got 4 ranks in the layout and 2 in the world")):
        Mesh.build(Layout(4, tp=2))


def test_build_with_a_wrong_world():
    run(2, _wrong_size)


@pytest.mark.parametrize("layout, wanted", [
    (Layout(1, tp=3), "tp x pp must divide the 1 ranks, got 3 x 1"), (Layout(1, tp=1, pp=2), "must divide the 1 ranks, got 1 x 2"),
    (Layout(1, ep=3), "ep must divide the dp x tp = 1 ranks of a stage, got ep=3"),
    (Layout(1, tp=0, ep=-2), "the sizes of a layout must be >= 1, got tp=0, ep=-2")])
def test_build_refuses_what_does_not_fit(layout, wanted):
    """Each rank trained alone: tp=3 of 2 ranks made axes of one."""
    with pytest.raises(ValueError, match=re.escape(wanted)):
        Mesh.build(layout)


def _two_refuse(rank):
    """Each of the two made axes of one rank for these, and trained alone."""
    for layout, wanted in ((Layout(2, tp=3), "must divide the 2 ranks, got 3 x 1"), (Layout(2, tp=2, pp=2), "got 2 x 2"),
                           (Layout(2, ep=3), "dp x tp = 2 ranks of a stage, got ep=3"), (Layout(2, tp=2, ep=4), "got ep=4")):
        with pytest.raises(ValueError, match=re.escape(wanted)):
            Mesh.build(layout)
    assert Mesh.build(Layout(2, tp=2, ep=2)).tp.size == 2


def test_build_refuses_what_does_not_fit_two_ranks():
    run(2, _two_refuse)
