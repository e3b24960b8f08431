"""A Hugging Face Llama at tp=2 + sp on 2 CPU ranks: python examples/llama_tp2.py   (a tiny one with random weights: no download)"""
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import interlace


def main(rank, world, store):
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM
    torch.set_num_threads(1)                                          # two ranks share this machine
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)                                              # or from_pretrained(...) on every rank
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                                         num_key_value_heads=2, vocab_size=256, pad_token_id=None))
    ids = torch.randint(256, (2, 32))
    mesh = interlace.Mesh.build(interlace.Layout(world=world, tp=world))
    report = interlace.replace_(model, mesh, sequence_parallel=True)  # heads, features, vocabulary and tokens split; kernels fused
    check = interlace.verify(model, {"input_ids": ids, "labels": ids, "use_cache": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)        # made after replace_
    for step in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    model.eval()
    words = model.generate(ids[:, :4], attention_mask=torch.ones_like(ids[:, :4]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    interlace.restore_(model)                                         # whole again: save_pretrained writes stock files
    if rank == 0:
        print(report, check, f"generated {words[0].tolist()}", sep="\n\n")
    dist.destroy_process_group()
    if not check.ok:
        raise SystemExit("the split model differs from the whole one")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, args=(2, f"{folder}/store"), nprocs=2)
