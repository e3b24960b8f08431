"""The kernels of dispatch and combine, interpreted by several processes, with random stalls and NaN where nobody should read; and against
their step table. Under the public ops: test_dispatch.py. Values are small integers, as in test_comm_kernels.py."""
import pytest
import torch
from ranks import run

from interlace.kernels import dispatch, route_plan

pytestmark = pytest.mark.skipif(not dispatch.INTERPRET, reason="needs TRITON_INTERPRET=1")
if dispatch.INTERPRET:
    from interpreted import recorded, stalls
    from test_comm_kernels import DTYPES, _compare, _virtual, ints, make

    from interlace.kernels.comm import protocol, triton_moe

MOE = [(5, 19, 2, 2), (1, 300, 3, 1), (7, 8, 1, 3)]                    # tokens, features, slots a token, experts a rank


def _routes(g, world, T, K, per):
    """What all ranks know: ids [world * T, K], some dropped, the last rank without tokens; and each rank's plan of its own experts."""
    ids = torch.randint(-1, world * per, (world * T, K), generator=g, dtype=torch.int32)
    ids[(world - 1) * T:] = -1
    plans = [route_plan(torch.where(ids // per == r, ids - r * per, -1), per, align=2) for r in range(world)]
    return ids, [(p.row_of_slot, p.slot_of_row[:int(p.offsets[-1])]) for p in plans]


def _moe(rank, world):
    most = max(needs for T, H, K, per in MOE for needs in (
        triton_moe.needs(T, H, torch.float32)[0], triton_moe.needs(world * T * K + 2 * per, H, torch.float32, world * T * K)[0]))
    pads = [make(world, op, [(most, 1)]) for op in ("dispatch", "combine")]
    g = torch.Generator().manual_seed(world)
    with stalls(rank):
        for i, (T, H, K, per) in enumerate(MOE):
            dt, (ids, maps) = DTYPES[i % 3], _routes(g, world, T, K, per)
            x, residual = ints(g, dt, world * T, H), ints(g, dt, world * T, H)
            ys = [ints(g, dt, len(slots), H) for _, slots in maps]
            mine, n = slice(rank * T, rank * T + T * (rank < world - 1)), T * (rank < world - 1)
            rows = triton_moe.dispatch(pads[0], x[mine].clone(), *maps[rank], T)
            slots = maps[rank][1].long()
            assert torch.equal(rows, torch.where(slots[:, None] < 0, 0, x[slots // K])), f"dispatch {dt} {T} {H} {K}"
            o = triton_moe.combine(pads[1], ys[rank], residual[mine].clone() if i % 2 else None, ids, maps[rank][0], n, world * per)
            want = residual.double() if i % 2 else torch.zeros(world * T, H, dtype=torch.float64)
            for y, (row_of_slot, _) in zip(ys, maps):
                want += torch.cat([y, y.new_zeros(1, H)])[row_of_slot.long()].double().sum(1)
            assert torch.equal(o, want[mine].to(dt)), f"combine {dt} {T} {H} {K}"
            for pad in pads:                                          # the call before this one has ended on every rank
                pad.buffer(int(pad.local[0]) & 1 ^ 1).fill_(0xff)


@pytest.mark.parametrize("world", [2, 3, 5, 8, *(pytest.param(w, marks=pytest.mark.slow) for w in (4, 6, 7))])
def test_dispatch_and_combine_interpret(world):
    run(world, _moe, world)


@pytest.mark.parametrize("rank", [0, 2])
def test_dispatch_kernels_interpret_follow_their_table(rank):
    world, T, H = 3, 4, 256                                           # a token is a cell
    pads, slots = _virtual(world, "dispatch", (T * H * 4, 4)), torch.arange(world * T, dtype=torch.int32)
    with recorded(pads, H * 4) as events:
        triton_moe.dispatch(pads[rank], torch.ones(T, H), slots.view(-1, 1), slots, T)
    _compare(protocol.fetch(rank, world, 1, T, programs=2), events)
    assert pads[rank].local[0] == 1 and not pads[rank].local[1:].any()
