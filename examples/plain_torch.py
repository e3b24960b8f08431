"""A plain torch model on 2 ranks, split by a plan: python examples/plain_torch.py   (starts its own ranks, CPU, half a minute)"""
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import interlace


class MLP(nn.Module):
    def __init__(self, width=64, layers=3):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.ups = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.downs = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))

    def forward(self, x):
        for norm, up, down in zip(self.norms, self.ups, self.downs):
            x = x + down(torch.relu(up(norm(x))))
        return x


def main(rank, world, store):
    torch.set_num_threads(1)                                          # two ranks share this machine
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)                                              # the same whole model on every rank
    model, x, y = MLP(), torch.randn(32, 64), torch.randn(32, 64)
    mesh = interlace.Mesh.build(interlace.Layout(world=world, tp=world))
    report = interlace.replace_(model, mesh, plan={"ups.*": "column", "downs.*": "row"})
    check = interlace.verify(model, x)                                # against the whole model, every gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)          # made after replace_
    for step in range(5):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    interlace.restore_(model)                                         # whole again, trained
    if rank == 0:
        print(report, check, sep="\n\n")
    dist.destroy_process_group()
    if not check.ok:
        raise SystemExit("the split model differs from the whole one")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, args=(2, f"{folder}/store"), nprocs=2)
