"""transformers' Trainer over a Llama at tp=2 on 2 CPU ranks: python examples/trainer.py   (tiny, random weights: no download)"""
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import interlace
import interlace.hf


def main(rank, world, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}   # as torchrun does
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
    torch.set_num_threads(1)                                          # two ranks share this machine
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)                                              # or from_pretrained(...) on every rank
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                                         num_key_value_heads=2, vocab_size=256, pad_token_id=None))
    ids = torch.randint(256, (32, 32))
    mesh = interlace.Mesh.build(interlace.Layout(world=world, tp=world))
    report = interlace.replace_(model, mesh)                          # before Trainer makes its optimizer
    check = interlace.verify(model, {"input_ids": ids[:2], "labels": ids[:2], "use_cache": False})
    arguments = TrainingArguments(output_dir=f"{folder}/out", max_steps=5, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True,
                                  save_only_model=True, report_to="none", disable_tqdm=True, logging_strategy="no", seed=0)
    trainer = interlace.hf.Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    losses = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: losses.append(loss := compute(*args, **kwargs)) or loss
    trainer.train()
    trainer.save_model(f"{folder}/saved")                             # whole, from rank 0: stock transformers loads it
    if rank == 0:
        for step, loss in enumerate(losses):
            print(f"step {step}  loss {loss.item():.4f}")
        again = LlamaForCausalLM.from_pretrained(f"{folder}/saved")
        print(report, check, f"saved {sum(p.numel() for p in again.parameters())} parameters", sep="\n\n")
    dist.destroy_process_group()
    if not check.ok:
        raise SystemExit("the split model differs from the whole one")


if __name__ == "__main__":
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as e:
        sys.exit(f"examples/trainer.py needs transformers and accelerate, got {e}; pip install accelerate transformers")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, args=(2, folder), nprocs=2)
