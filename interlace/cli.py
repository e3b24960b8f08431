"""The command line: `interlace train | verify | explain | generate | convert | bench | doctor`.

Exit status: 0 fine, 1 a check or a run failed, 2 the user's mistake, 130 Ctrl-C. The parent checks config, layout and
data paths before any rank starts, and imports no torch: `interlace --help` answers at once.
"""
from __future__ import annotations

import argparse
import os
import sys
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

from .parallel.errors import RunError, UserError, missing_package, nearest

if TYPE_CHECKING:
    from .models.config import Config

DESCRIPTION = """\
Train a GPT split over several ranks, on CPUs or GPUs. A parallelism is a number in the config:

  interlace train                                       one rank, Python's standard library as the text
  interlace train tp=2 sp=true                          2 ranks: tensor + sequence parallel
  interlace train --config gpt.yaml --data my_text/     your config, your text
  interlace generate --out runs/default --prompt "def " sample from what was trained
  interlace convert --out runs/default --to-hf hf/      its newest checkpoint for Hugging Face transformers
  interlace bench --quick                               every kernel against its peers, on this machine
"""
OVERRIDES = """\
key=value sets a key of the config, on top of --config:
  model.num_layers=8  optim.lr=3e-4  optim.sched.warmup_steps=100  trainer.max_steps=1000  trainer.precision=bf16
  tp=2                model.tensor_model_parallel_size     sp=true   model.sequence_parallel
  pp=2, vpp=2, ep=2   model.pipeline_, virtual_pipeline_, expert_model_parallel_size
Every key with its default is in the config.yaml that a run writes to its --out folder.
"""
FLAGS = ("--config", "--nproc", "--out", "--data", "--steps", "--prompt", "--tokens", "--temperature", "--top-k", "--schedule",
         "--seed", "--quick", "--device", "--against", "--threshold", "--explain", "--resume", "--roofs", "--seconds", "--list", "--static",
         "--accept", "--json", "--profile", "--to-hf", "--from-hf")
RESUME = "run the same command again to resume"


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="interlace", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str, examples: str, config: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.\n\n{examples}",
                                  epilog=OVERRIDES if config else None, formatter_class=raw)
        if config:
            sub.add_argument("--config", metavar="FILE", help="YAML with sections model, optim, data, trainer")
            sub.add_argument("--nproc", metavar="N", type=int, help="ranks on this machine (default: tp * pp; more are "
                             "data parallel; under torchrun: its world)")
            sub.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the config")
        return sub

    d = " (default: %(default)s)"
    train = command("train", "train a GPT, or resume it from --out", """\
  interlace train --out runs/a tp=2 sp=true
  interlace train --data book.txt src/ trainer.max_steps=500
  torchrun --nproc-per-node 4 -m interlace train tp=4""")
    train.add_argument("--out", metavar="DIR", default="runs/default", help="metrics.jsonl, config.yaml, loss.png and "
                       "checkpoints go there; a run found there goes on" + d)
    train.add_argument("--data", metavar="PATH", nargs="+", help="text: files, folders (default: Python's own source)")
    train.add_argument("--profile", metavar="STEPS", type=int, nargs="?", const=3, help="trace this many steps after the first two "
                       "into trace.json and trace.png: compute, communication and waiting of every rank (without a number: 3)")
    verify = command("verify", "show that a layout computes what one process computes, in float64", """\
  interlace verify tp=2 sp=true
  interlace verify --config gpt.yaml tp=4 --steps 3""")
    verify.add_argument("--steps", metavar="N", type=int, default=5, help="optimizer steps to compare" + d)
    explain = command("explain", "print ranks, groups, bytes on each axis per step and memory per rank; starts nothing", """\
  interlace explain tp=2 sp=true --nproc 8
  interlace explain pp=4 --schedule pipeline.png""")
    explain.add_argument("--schedule", metavar="PNG", nargs="?", const="", help="the timeline of the pipeline instead: text with the "
                         "share in which ranks wait, and a picture where a path is given")
    generate = command("generate", "sample text from a trained run", """\
  interlace generate --out runs/a --prompt 'def '""", config=False)
    generate.add_argument("--out", metavar="DIR", default="runs/default", help="the folder of the run, or of one checkpoint of it" + d)
    generate.add_argument("--prompt", metavar="TEXT", default="", help="text to continue (default: none)")
    generate.add_argument("--tokens", metavar="N", type=int, default=200, help="most tokens to add" + d)
    generate.add_argument("--temperature", metavar="X", type=float, default=0.8, help="0: the likeliest token" + d)
    generate.add_argument("--top-k", metavar="N", type=int, default=50, help="choose among N tokens; 0: all" + d)
    generate.add_argument("--seed", metavar="N", type=int, default=0, help="of the choices" + d)
    convert = command("convert", "turn a checkpoint into a Hugging Face folder, or one into a run to train on", """\
  interlace convert --out runs/a --to-hf hf/
  interlace convert --out runs/a/checkpoints/step-00000100 --to-hf hf/
  interlace convert --from-hf hf/ --out runs/b""", config=False)
    convert.add_argument("--out", metavar="DIR", default="runs/default", help="the folder of the run, or of one checkpoint of it" + d)
    way = convert.add_mutually_exclusive_group(required=True)
    way.add_argument("--to-hf", metavar="DIR", help="write config.json and safetensors there; bit for bit")
    way.add_argument("--from-hf", metavar="DIR", help="a folder with those: a Llama, Mixtral or GPT-2; --out becomes a run at step 0")
    _bench_flags(command("bench", "time the kernels against their peers; --static: what the compiler makes of them, without a GPU", """\
  interlace bench --quick
  interlace bench rms_norm gemm_ar --nproc 2 --explain
  interlace bench rms_norm --against bench/results/my-machine/rms_norm.jsonl
  interlace bench trace gemm_ar --nproc 2
  interlace bench --static --out report/""", config=False), d)
    doctor = command("doctor", "say what runs here, on what, and why not on more; test two ranks", """\
  interlace doctor
  interlace doctor --json > report.json""", config=False)
    doctor.add_argument("--json", action="store_true", help="one object on stdout, for a bug report")
    return parser


def _bench_flags(bench: argparse.ArgumentParser, d: str) -> None:
    bench.add_argument("ops", nargs="*", metavar="OP", help="benches to run (default: all; see --list); after the word trace: "
                       "benches to trace, as a timeline of every rank")
    bench.add_argument("--quick", action="store_true", help="small shapes, minutes for all of them, no torch.compile")
    bench.add_argument("--nproc", metavar="N", type=int, help="ranks of the communication ops (default: 2)")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    bench.add_argument("--against", metavar="FILE", help="an older <op>.jsonl of this machine, or a folder of them; exit 1 "
                       "when ours got slower")
    bench.add_argument("--threshold", metavar="X", type=float, default=1.10, help="time now over time then that is too much" + d)
    bench.add_argument("--explain", action="store_true", help="tell which path every communication op took, and why")
    bench.add_argument("--resume", action="store_true", help="go on with the run that was interrupted, of the same code")
    bench.add_argument("--seconds", metavar="S", type=float, help="measure for this long, every op for its share; shapes that do not "
                       "fit in are left out, and said so")
    bench.add_argument("--roofs", action="store_true", help="measure this machine's roofs again")
    bench.add_argument("--list", action="store_true", help="print the benches and stop")
    bench.add_argument("--out", metavar="DIR", help="rows, roofs and plots go there, of --static static.json (default: rows to "
                       "bench/results/<machine>, static.json to the cache folder)")
    bench.add_argument("--seed", metavar="N", type=int, default=0, help="of the random data" + d)
    bench.add_argument("--static", action="store_true", help="registers, spills, 16-byte accesses, time at the roof; no GPU needed")
    bench.add_argument("--accept", action="store_true", help="--static: make this the golden file of tests/")


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns its exit status. argparse itself exits on --help (0) and a bad flag value (2)."""
    _open_streams()
    parser = _parser()
    if word := _no_command(sys.argv[1:] if argv is None else argv):
        print(f"interlace: {word}", file=sys.stderr, flush=True)
        return 2
    args, loose = parser.parse_known_args(argv)
    try:
        _no_strangers(parser, args, loose)
        if args.version:
            from . import __version__
            print(f"interlace {__version__}")
            return 0
        if args.command is None:
            parser.print_help()
            return 2
        return _COMMANDS[args.command](args)
    except (UserError, RunError) as e:
        from .launch import speaks
        if speaks() or isinstance(e, RunError):
            print(f"interlace: {e}", file=sys.stderr, flush=True)
        return 2 if isinstance(e, UserError) else 1
    except KeyboardInterrupt:
        print(f"\ninterlace: interrupted; {RESUME if args.command == 'train' else 'run the same command again'}",
              file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:                                           # interlace explain | head
        sys.stderr.close()
        return 1
    except Exception as e:
        if text := missing_package(e):
            print(f"interlace: {text}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        return 1


def _open_streams() -> None:
    """A stream that was closed (2>&-) becomes /dev/null: else the next file that is opened would take its number."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if fd else "r", encoding="utf-8"))


def _no_command(argv: list[str]) -> str:
    """What to say of a first word that is no command, "" where it is one: argparse would name them all, and no near one."""
    word = argv[0] if argv else ""
    if not word or word.startswith("-") or word in _COMMANDS:
        return ""
    close = nearest(word, _COMMANDS)
    return f"unknown command {word}; " + (f"did you mean {close}?" if close else f"commands are {', '.join(_COMMANDS)}")


def _no_strangers(parser: argparse.ArgumentParser, args: argparse.Namespace, loose: list[str]) -> None:
    """key=value after --data PATH ..., which argparse hands to --data or to nobody; flags that do not exist; flags without dashes."""
    if hasattr(args, "overrides"):
        args.overrides += [text for text in loose if not text.startswith("-")]
        loose = [text for text in loose if text.startswith("-")]
    if getattr(args, "data", None):
        args.overrides += [text for text in args.data if _is_override(text)]
        args.data = [text for text in args.data if not _is_override(text)]
    flags = [f for f in FLAGS if hasattr(args, f[2:].replace("-", "_"))]
    if loose:
        raise UserError(f"unknown argument {loose[0]}; {_way_out(args, loose[0], flags)}")
    for text in getattr(args, "overrides", ()):
        flag, equals, value = text.partition("=")
        if equals and f"--{flag}" in flags:
            raise UserError(f"{flag} is a flag of interlace {args.command}, no key of the config, got {text}; write --{flag} {value}")
    if not getattr(args, "out", None) and getattr(args, "out", None) is not None:
        raise UserError(f"--out must be a folder, got {args.out!r}; leave it out for the default, or write --out . for this one")


def _way_out(args: argparse.Namespace, argument: str, flags: list[str]) -> str:
    """What to write instead of a flag that does not exist: a key of the config (Megatron's --num-layers 8 too), or the nearest flag."""
    from .models.config import key_of
    flag, equals, value = argument.partition("=")
    close, word = nearest(flag, flags), flag.lstrip("-").replace("-", "_")
    if hasattr(args, "overrides") and (key := key_of(word)):
        value = value or next((text for text in args.overrides if "=" not in text), "...")
        return f"keys of the config have no dashes: {key}={value}"
    if equals and ("." in flag or not close):
        return f"keys of the config have no dashes: {argument.lstrip('-')}"
    return f"did you mean {close}?" if close else f"see interlace {args.command or ''} --help".replace("  ", " ")


def _is_override(text: str) -> bool:
    from pathlib import Path
    head, equals, _ = text.partition("=")
    return bool(equals) and head.replace(".", "").replace("_", "").isalnum() and not Path(text).exists()


def _config(args: argparse.Namespace) -> tuple[Config, int]:
    """(config, world), checked as far as can be without torch; fields that change nothing are named."""
    from .launch import default_nproc, speaks
    from .models.config import load_config
    from .models.idle import without_effect
    from .parallel.layout import Layout
    config = load_config(args.config, args.overrides)
    if getattr(args, "data", None):
        if any(o.partition("=")[0].strip() == "data.paths" for o in args.overrides):   # a run's own config.yaml holds those it began with
            raise UserError("the text must be given once, got both --data and data.paths; keep one")
        config = replace(config, data=replace(config.data, paths=args.data))
    m = config.model
    ranks = m.tensor_model_parallel_size * m.pipeline_model_parallel_size
    world = args.nproc if args.nproc is not None else default_nproc(ranks)
    if world < 1:
        raise UserError(f"--nproc must be >= 1, got {world}")
    Layout.from_config(config, world)
    if speaks() and (fields := without_effect(config, reads_text=args.command == "train")):
        print(f"interlace: set without effect: {fields}", file=sys.stderr, flush=True)
    return config, world


def _train(args: argparse.Namespace) -> int:
    from .launch import launch
    from .models.config import to_dict
    from .models.data import check_paths
    if args.profile is not None and args.profile < 1:
        raise UserError(f"--profile must be >= 1, the steps to trace, got {args.profile}")
    config, world = _config(args)
    check_paths(config.data.paths, args.out)
    kwargs = {"config": to_dict(config), "out": args.out, "profile": args.profile or 0}
    return launch(world, "interlace.models.train:train", kwargs, again=RESUME,
                  **({"grace": 20.0} if args.profile else {}))        # a trace is written on the way out


def _verify(args: argparse.Namespace) -> int:
    from .launch import launch
    from .models.config import to_dict
    if args.steps < 1:
        raise UserError(f"--steps must be >= 1, got {args.steps}")
    config, world = _config(args)
    return launch(world, "interlace.models.verify:verify", {"config": to_dict(config), "steps": args.steps})


def _explain(args: argparse.Namespace) -> int:
    if args.schedule is not None and _is_override(args.schedule):     # --schedule pp=2: a key of the config, not a picture
        args.overrides, args.schedule = [*args.overrides, args.schedule], ""
    config, world = _config(args)
    if args.schedule is not None:
        from .models.schedule import show
        print(show(config, world, args.schedule))
        return 0
    from .models.explain import explain
    print(explain(config, world))
    if config.model.tensor_model_parallel_size > 1:                   # imports torch, which the rest does without
        from .models.paths import predicted
        from .parallel.layout import Layout
        print("\npath of each call that is fused with its product, over tp on this machine")
        print("\n".join(f"    {line}" for line in predicted(config, Layout.from_config(config, world))))
    return 0


def _generate(args: argparse.Namespace) -> int:
    from .rank import call
    for name, holds, rule in (("tokens", args.tokens >= 1, ">= 1"), ("temperature", args.temperature >= 0, ">= 0"),
                              ("top-k", args.top_k >= 0, ">= 0"), ("seed", 0 <= args.seed < 2**63, "in [0, 2^63)")):
        if not holds:
            raise UserError(f"--{name} must be {rule}, got {getattr(args, name.replace('-', '_'))}")
    return call("interlace.models.generate:main", {k: getattr(args, k) for k in (
        "out", "prompt", "tokens", "temperature", "top_k", "seed")})


def _convert(args: argparse.Namespace) -> int:
    from .rank import call
    return call("interlace.models.hf:main", {"out": args.out, "to": args.to_hf, "source": args.from_hf})


def _bench(args: argparse.Namespace) -> int:
    from importlib import import_module  # bench sees all, so nobody imports it by name
    if args.static:
        return int(import_module(".bench.static", __package__).main(args.out, accept=args.accept))
    if args.accept:
        raise UserError("--accept needs --static: it makes that report the golden file; add --static")
    if args.ops[:1] == ["trace"]:
        return int(import_module(".bench.trace", __package__).main(args))
    return int(import_module(".bench.command", __package__).main(args))


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import main
    return main(as_json=args.json)


_COMMANDS = {"train": _train, "verify": _verify, "explain": _explain, "generate": _generate, "convert": _convert,
             "bench": _bench, "doctor": _doctor}
