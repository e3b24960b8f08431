"""`make cuda-build-check`: interlace as it was installed beside a CUDA build of torch, on a machine that needs no GPU. csrc/cuda is built
for every target and loads, its ops are registered, their fakes run; the doctor says so. Exit status 1 where one of these does not hold."""
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs

from interlace.kernels import dispatch
from interlace.kernels.comm import multicast_ar

TARGETS = ["sm_80", "sm_90a", "sm_100a"]


def check(what: str, ok: bool, found: object) -> None:
    print(f"{'ok' if ok else 'FAILED'}: {what}: {found}")
    if not ok:
        sys.exit(1)


def main() -> None:
    library = Path(dispatch.__file__).parent / "_cuda.so"
    check("a CUDA build of torch", torch.version.cuda is not None, f"torch {torch.__version__}, GPUs here: {torch.cuda.device_count()}")
    info = dispatch.build_info()["cuda"]
    check("_build.json", info["built"] and info["arches"] == TARGETS, info)
    listed = subprocess.run([knobs.nvidia.cuobjdump.path, "--list-elf", str(library)], capture_output=True, text=True).stdout
    found = sorted(set(re.findall(r"sm_\d+", listed)))
    check("machine code in the library", found == sorted(t.rstrip("a") for t in TARGETS), found)
    check("the library loads", dispatch.CUDA, library)
    ops = {op: torch._C._dispatch_has_kernel_for_dispatch_key(f"interlace::{op}", "CUDA") for op in dispatch.CUDA_ONLY}
    check("ops of csrc/cuda, and whether they are registered", bool(ops) and all(ops.values()), ops)

    with FakeTensorMode():
        new = lambda n, dtype: torch.empty(n, dtype=dtype, device="cuda")     # noqa: E731
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = new(1000, dtype)
            made = torch.ops.interlace.multicast_ar(x, x, new(8, torch.int64), new(9, torch.int32), new(6, torch.int32), 1, 0, 1, 0,
                                                    multicast_ar.needs(x, 8, True)[0], 1, 0, True, 1)
            check(f"fake of multicast_ar in {dtype}", made is None, made)
    try:
        x = torch.ones(8)
        torch.ops.interlace.multicast_ar(x, x, x, x, x, 1, 0, 1, 0, 1, 1, 0, True, 1)
        check("multicast_ar refuses CPU tensors", False, "it ran")
    except NotImplementedError as e:
        check("multicast_ar refuses CPU tensors", "multicast_ar" in str(e), str(e).splitlines()[0][:120])

    said = subprocess.run([sys.executable, "-m", "interlace", "doctor", "--json"], capture_output=True, text=True, cwd="/").stdout
    tiers = json.loads(said)["tiers"]
    check("interlace doctor", all(t["loads"] for t in tiers.values()), {k: t["why"] for k, t in tiers.items()})


if __name__ == "__main__":
    main()
