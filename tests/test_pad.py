"""A pad's addresses where its memory does not begin its allocation. What pads are for: test_comm_kernels.py, test_comm_gpu.py."""
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed._symmetric_memory as symm_mem

from interlace.kernels.comm import pad


@pytest.mark.parametrize("multicast", [0, 0x9000])
def test_peers_are_where_this_ranks_memory_lies_in_its_allocation(multicast, monkeypatch):
    block = torch.zeros(1024, dtype=torch.uint8)
    memory = block[256:]
    handle = SimpleNamespace(buffer_ptrs=[0x5000, block.data_ptr(), 0x7000], multicast_ptr=multicast)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="u"))
    monkeypatch.setattr(symm_mem, "empty", lambda *_, **__: memory)
    monkeypatch.setattr(symm_mem, "rendezvous", lambda *_: handle)
    monkeypatch.setattr(pad, "_exchange", lambda here, group: [here, here, "elsewhere"])
    made = SimpleNamespace(device=None, total=768, group=None, rank=1)
    assert pad.Pad._rendezvous(made) == [0x5100, memory.data_ptr(), 0x7100]
    assert made.multicast == (0x9100 if multicast else 0) and made.share == 2
