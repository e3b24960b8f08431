"""No kernel gets worse unseen: the compiler's figures against static_golden.json (of this Triton version), without a GPU."""
import json

import pytest
import torch

from interlace import cli
from interlace.bench import static
from interlace.bench.static_cases import CASES
from interlace.kernels import dispatch

compiles = pytest.mark.skipif(dispatch.INTERPRET or not hasattr(dispatch.triton, "__version__"), reason="no Triton compiler in this mode")


def row(**change):
    base = {"kernel": "a._kernel", "case": "8x8", "dtype": "bf16", "arch": "sm_90"}
    return base | {"regs": 100, "spill": 0, "smem": 0, "mma": 4, "wide": 1.0} | change


# ---- every kernel is there ------------------------------------------------------------------------------------


def test_every_kernel_has_a_case():
    declared = {f"{case.op}.{kernel}" for case in CASES for kernel in case.floor}
    missing, gone = static.defined_kernels() - declared, declared - static.defined_kernels()
    assert not missing, (f"{', '.join(sorted(missing))}: every @triton.jit kernel must have a Case in bench/static_cases.py; "
                         "add one, then `interlace bench --static --accept`")
    assert not gone, f"{', '.join(sorted(gone))}: bench/static_cases.py names kernels that are no more; take them out"


def test_kernels_are_counted_without_their_helpers(tmp_path):
    (tmp_path / "comm").mkdir()
    (tmp_path / "comm" / "x.py").write_text(
        "@triton.jit\ndef _help(a): return a\n@triton.jit(do_not_specialize=['n'])\ndef _kernel(p, n): _help(p)\ndef plain(): _kernel(1)\n"
        "@triton.autotune([], key=[])\n@triton.jit\ndef _tuned(p): tl.load(p)\n")
    assert static.defined_kernels(tmp_path) == {"comm.x._kernel", "comm.x._tuned"}


# ---- nothing got worse ----------------------------------------------------------------------------------------


def check(arch):
    version = dispatch.triton.__version__
    book = json.loads(static.GOLDEN.read_text())
    if not any(k.endswith(f" {arch}") for k in book.get(version, ())):
        pytest.skip(f"no golden rows for {arch} of Triton {version}: interlace bench --static --accept")
    rows = list(static.compiled_rows([arch]))
    problems = static.compare(rows, book[version])
    assert not problems, "\n".join([*problems, static.ACCEPT])
    launched = [r for r in rows if "floor" in r]
    short = [static.row_id(r) for r in launched if r["over_floor"] < 0.99]
    assert not short, f"{short}: a launch must be given at least the bytes its floor says; correct the floor in bench/static_cases.py"
    assert all(0 < r["occupancy"] <= 1 and r["roof_us"] > 0 for r in launched)


@compiles
@pytest.mark.timeout(1500)                                            # without a cache: 200 compilations
def test_no_kernel_got_worse():
    check("sm_90")


@compiles
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_no_kernel_got_worse_elsewhere(arch):
    check(arch)


@pytest.mark.parametrize("change, wanted", [
    ({"spill": 8}, "must not spill more than 0 bytes a thread, got 8"), ({"regs": 111}, "registers must stay within 10% of 100, got 111"),
    ({"wide": 0.5}, "100.0% of its bytes must go through 16-byte accesses, got 50.0%"), ({"mma": 0}, "must use tensor cores"),
    ({"case": "new"}, "is not in the golden file")])
def test_worse_is_told(change, wanted):
    problems = static.compare([row(**change)], static.golden_of([row()]))
    assert any(wanted in p for p in problems), problems


def test_better_other_arches_and_small_changes_are_fine():
    golden = static.golden_of([row(), row(arch="sm_80"), row(spill=8, dtype="fp32")])
    assert static.compare([row(regs=110, wide=0.999), row(dtype="fp32", regs=50)], golden) == []
    assert static.compare([], golden) == [] and len(static.compare([row()], golden)) == 1


def test_rows_of_cuda_sources_need_nvcc():
    golden = static.golden_of([row(), row(kernel="cuda/a")])
    assert static.compare([row()], golden) == []
    assert static.compare([row(), row(kernel="cuda/b")], golden) == [
        "cuda/a 8x8 bf16 sm_90: is in the golden file and is no more", "cuda/b 8x8 bf16 sm_90: is not in the golden file"]


# ---- how it is measured ---------------------------------------------------------------------------------------

PTX = """
 @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
 ld.global.L1::evict_last.v2.b32 { %r5, %r6 }, [ %rd5 + 0 ];
 ld.acquire.sys.global.b32 %r7, [%rd2];
 @%p1 st.global.v8.b32 [ %rd9 + 0 ], { ... };
 st.shared.v4.b32 [%r1], {};
 st.global.b16 [ %rd10 + 0 ], %rs1;
 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
 wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {...}; mma.sync.aligned.m16n8k16 {...}; tcgen05.mma.cta_group::1 [..];
"""


def test_ptx_is_read():
    found = static.read_ptx(PTX)
    assert found["accesses"] == {"32": 1, "16": 2, "8": 1, "4": 1, "2": 1} and found["mma"] == 3
    assert found["wide"] == round(64 / 78, 4)
    assert static.read_ptx(PTX, [2, 4, 8])["accesses"] == {"32": 1, "16": 2} and static.read_ptx("")["wide"] == 1


def test_scalars_are_found():
    text = ("%a = tt.load %p, %m : !tt.ptr<i64> loc(1)\n%b = tt.load %q : tensor<8x!tt.ptr<bf16>, #blocked> loc(2)\n"
            "tt.store %p, %v : !tt.ptr<f32> loc(3)\n%c = tt.load %t : !tt.ptr<bf16>\n")
    assert static.scalars(text) == [8, 4, 2]


@pytest.mark.parametrize("regs, smem, warps, share", [(32, 0, 4, 1.0), (255, 0, 4, 0.125), (128, 0, 16, 0.25), (64, 0, 32, 0.5),
                                                      (32, 100 << 10, 8, 0.25), (33, 0, 4, 0.75)])
def test_occupancy(regs, smem, warps, share):
    assert static.occupancy(regs, smem, warps, static.ROOFS["sm_90"]) == share


@compiles
def test_a_launch_is_specialised_as_triton_does():
    case = next(c for c in CASES if c.op == "rms_norm" and "_bwd_kernel" in c.floor)
    launch, = static._record(case.launch, torch.bfloat16, sms=132)
    assert launch.name == "rms_norm._bwd_kernel" and launch.programs == 4 * 132 and launch.options == {"num_warps": 16}
    assert launch.signature["dy_ptr"] == "*bf16" and launch.signature["dw_ptr"] == "*fp32" and launch.signature["N"] == "i32"
    assert launch.constexprs == {"DH": False, "BLOCK_D": 8192}
    assert {i for i, in launch.attrs} == {i for i, kind in enumerate(launch.signature.values()) if kind not in ("constexpr", "fp32")}


# ---- the command ----------------------------------------------------------------------------------------------


@compiles
def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("interlace.bench.static_cases.CASES", [c for c in CASES if c.op == "swiglu"])
    monkeypatch.setattr(static, "GOLDEN", tmp_path / "golden.json")
    monkeypatch.setattr(static, "cache_folder", lambda: tmp_path / "cache")
    assert static.main(tmp_path / "out", ["sm_90"]) == 0 and "nothing to compare with" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "static.json").read_text())["rows"]
    assert len([r for r in rows if not r["kernel"].startswith("cuda/")]) == 8 and rows[0]["roof"] == "H200 SXM, datasheet"
    monkeypatch.setattr(static, "_compile", lambda *_: pytest.fail("compiled again"))
    assert static.main(tmp_path / "out", ["sm_90"], accept=True) == 0
    book = json.loads(static.GOLDEN.read_text())
    (regs,) = {next(iter(book.values()))["swiglu._fwd_kernel 8192x28672 bf16 sm_90"]["regs"]}
    static.GOLDEN.write_text(static.GOLDEN.read_text().replace(f'"regs": {regs}', '"regs": 1'))
    capsys.readouterr()
    assert static.main(tmp_path / "out", ["sm_90"]) == 1
    out, err = capsys.readouterr()
    assert f"registers must stay within 10% of 1, got {regs}" in err and "--accept" in err and "swiglu._fwd_kernel" in out


def test_bad_input(capsys, tmp_path):
    assert cli.main(["bench", "--accept"]) == 2 and "--accept needs --static" in capsys.readouterr().err
    (tmp_path / "file").touch()
    if not dispatch.INTERPRET:
        assert cli.main(["bench", "--static", "--out", str(tmp_path / "file")]) == 2
        assert "--out must be a folder" in capsys.readouterr().err


@compiles
def test_an_unknown_arch():
    with pytest.raises(static.UserError, match="arches must be among sm_80, sm_90, sm_100, got sm_70"):
        list(static.compiled_rows(["sm_70"]))


def test_interpreted_it_refuses(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRET", True)
    with pytest.raises(static.UserError, match="TRITON_INTERPRET must not be 1"):
        static.main()


@pytest.mark.skipif(not static.shutil.which("nvcc"), reason="no nvcc")
def test_cuda_sources_are_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(static, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "copy.cu").write_text("__global__ void copy(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }\n")
    found, = static._cuda_rows(["sm_90"], "", tmp_path)
    assert found["kernel"] == "cuda/copy" and found["accesses"] == {"16": 2} and found["spill"] == 0 and found["regs"] > 0
    (tmp_path / "copy.cu").write_text("nonsense")
    with pytest.raises(static.RunError, match=r"copy.cu must compile for sm_90a"):
        list(static._cuda_rows(["sm_90"], "", tmp_path))
