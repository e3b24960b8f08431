"""A Hugging Face Mixtral at tp=2, ep=2 on 2 CPU ranks: python examples/mixtral_ep2.py   (a tiny one with random weights: no download)"""
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import interlace


def main(rank, world, store):
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
    torch.set_num_threads(1)                                          # two ranks share this machine
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)                                              # or from_pretrained(...) on every rank
    model = MixtralForCausalLM(MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                             num_key_value_heads=2, num_local_experts=8, vocab_size=256, pad_token_id=None))
    ids = torch.randint(256, (2, 32))
    mesh = interlace.Mesh.build(interlace.Layout(world=world, tp=2, ep=2))
    report = interlace.replace_(model, mesh, sequence_parallel=True)  # 4 of 8 experts a rank; token rows travel to them and back
    check = interlace.verify(model, {"input_ids": ids, "labels": ids, "use_cache": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)        # made after replace_
    for step in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    interlace.restore_(model)                                         # whole again: save_pretrained writes stock files
    if rank == 0:
        print(report, check, sep="\n\n")
    dist.destroy_process_group()
    if not check.ok:
        raise SystemExit("the split model differs from the whole one")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, args=(2, f"{folder}/store"), nprocs=2)
