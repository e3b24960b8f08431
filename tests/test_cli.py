import os
import subprocess
import sys

import pytest

import interlace
from interlace import cli
from interlace.launch import launched_by_torchrun

HEAVY = "{'torch', 'numpy', 'omegaconf', 'rich', 'yaml'}"


def run(*words, timeout=600, **options):
    command = [sys.executable, "-m", "interlace", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)


def mistake(capsys, *words):
    """The one message of a command line that must not even start a rank."""
    status = cli.main(list(words))
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.startswith("interlace: ") and "Traceback" not in err, err
    return err


# ---- fast and quiet -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    ["--help"], ["train", "--help"], ["convert", "--help"], ["bench", "--help"], ["--version"]], ids=" ".join)
def test_help_needs_no_torch(words):
    code = (f"import sys\nfrom interlace.cli import main\ntry: status = main({words})\n"
            f"except SystemExit as e: status = e.code\nassert not {HEAVY} & set(sys.modules)\nsys.exit(status)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and done.stderr == "", done.stderr


def test_import_needs_no_torch():
    code = f"import interlace as i, sys; i.UserError, i.__version__, dir(i); print({HEAVY} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_help_shows_every_command():
    text = run("--help").stdout
    assert all(word in text for word in ("train", "verify", "explain", "generate", "convert", "bench", "doctor", "tp=2"))
    for command in ("train", "verify", "explain", "generate", "convert", "bench", "doctor"):
        assert f"  interlace {command} " in run(command, "--help").stdout, "an example"


def test_public_names():
    assert interlace.rms_norm.__module__ == "interlace.kernels.rms_norm"
    assert interlace.kernels.rms_norm is interlace.rms_norm
    for name in interlace.__all__:
        assert name in dir(interlace)
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = interlace.nope


@pytest.mark.parametrize("streams", ["2>&-", ">&-", ">&- 2>&- <&-"])
def test_closed_streams(streams):
    code = "import sys; from interlace.cli import main; s = main(['explain']); t = open('/dev/null').fileno(); sys.exit(s or t < 3)"
    done = subprocess.run(["sh", "-c", f"exec {sys.executable} -c \"{code}\" {streams}"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


# ---- mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, wanted", [
    (["trian", "tp=2"], "unknown command trian; did you mean train?"),
    (["tp=2"], "unknown command tp=2; commands are train, verify, explain, generate, convert, bench, doctor"),
    (["train", "model.num_layer=3"], "did you mean model.num_layers?"),
    (["train", "tp=two"], "must be a whole number, got 'two'"),
    (["train", "--config", "/nope.yaml"], "--config must be a YAML file that can be read, got /nope.yaml"),
    (["train", "--nrpoc", "2"], "unknown argument --nrpoc; did you mean --nproc?"),
    (["train", "--tp=2"], "keys of the config have no dashes: tp=2"),
    (["train", "--optim.lr=1"], "keys of the config have no dashes: optim.lr=1"),
    (["train", "--tp", "2"], "unknown argument --tp; keys of the config have no dashes: tp=2"),
    (["train", "--tensor-model-parallel-size", "2"], "keys of the config have no dashes: model.tensor_model_parallel_size=2"),
    (["verify", "--num-layers=8"], "keys of the config have no dashes: model.num_layers=8"),
    (["train", "nproc=2"], "nproc is a flag of interlace train, no key of the config, got nproc=2; write --nproc 2"),
    (["train", "--out", ""], "--out must be a folder, got ''"),
    (["train", "tpp=2"], "unknown key tpp; did you mean tp?"), (["train", "modle=2"], "unknown key modle; did you mean model?"),
    (["verify", "--out", "x"], "unknown argument --out; see interlace verify --help"),
    (["train", "--nproc", "0"], "--nproc must be >= 1, got 0"),
    (["train", "tp=3"], "num_attention_heads must be a multiple of tensor_model_parallel_size"),
    (["train", "tp=2", "--nproc", "3"], "3"),
    (["train", "--data", "/nope/a", "/nope/b"], "2 problems"),
    (["train", "data.paths=/nope/a"], "must be files and folders that exist, got /nope/a"),
    (["verify", "--steps", "0"], "--steps must be >= 1, got 0"),
    (["explain", "tp=3"], "num_attention_heads must be a multiple of tensor_model_parallel_size"),
    (["train", "--nproc", "2", "ep=2", "model.num_moe_experts=3"], "num_moe_experts must be a multiple of expert_model_parallel_size"),
    (["train", "--nproc", "3", "ep=2", "model.num_moe_experts=4"], "expert_model_parallel_size must divide the ranks of a stage"),
    (["verify", "model.num_moe_experts=2", "model.moe_router_topk=3"], "moe_router_topk must be at most num_moe_experts"),
    (["explain", "model.moe_pad_expert_input_to_capacity=true"], "needs model.moe_expert_capacity_factor, got none"),
    (["verify", "model.num_moe_experts=2048"], "num_moe_experts must be at most 1024"),
    (["train", "model.num_moe_experts=4", "model.moe_router_topk=1"], "moe_router_pre_softmax must be true with moe_router_topk 1"),
    (["train", "model.moe_router_load_balancing_type=[aux_loss, none]"], "must name different losses, or none alone"),
    (["generate", "--top-k", "-1"], "--top-k must be >= 0, got -1"),
    (["generate", "--seed", "9" * 20], "--seed must be in [0, 2^63), got 999"),
    (["train", "--data", ".", "--out", "."], "data.paths must not be --out, got .: the run would read its own files"),
    (["train", "--data", "caf\udce9.txt"], "data.paths must have names in UTF-8"),
    (["generate", "tp=2"], "unknown argument tp=2"),
    (["convert", "--to-hf", "/nope/x", "--out", "/nope"], "--out must be the folder of a checkpoint"),
    (["convert", "--from-hf", "/nope"], "--from-hf must be a folder with config.json"),
    (["convert", "--to-hf", "x", "--form-hf", "y"], "unknown argument --form-hf; did you mean --from-hf?")])
def test_one_message(capsys, words, wanted):
    assert wanted in mistake(capsys, *words)


def test_all_layout_mistakes_at_once(capsys):
    assert mistake(capsys, "train", "tp=3", "model.ffn_hidden_size=700").count("must be a multiple") >= 2


def test_a_mistake_has_status_2_outside_too():
    done = run("train", "model.num_layer=3")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


def test_under_torchrun_one_process_speaks(capsys, monkeypatch):
    assert not launched_by_torchrun()
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert launched_by_torchrun()
    assert cli.main(["train", "tp=0"]) == 2 and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["train", "tp=0"]) == 2 and "must be >= 1" in capsys.readouterr().err


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 2 and "COMMAND" in capsys.readouterr().out


# ---- what is started ------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """What the command line hands to the launcher."""
    calls = []
    def launch(nproc, target, kwargs, **options):
        calls.append((nproc, target, kwargs, options))
        return 0
    monkeypatch.setattr("interlace.launch.launch", launch)
    return calls


@pytest.mark.parametrize("words, nproc", [
    ([], 1), (["tp=2"], 2), (["--nproc", "4", "tp=4", "sp=true"], 4), (["tp=2", "--out", "x", "sp=true"], 2)])
def test_ranks_follow_the_layout(launched, words, nproc):
    assert cli.main(["train", *words]) == 0 and launched[0][0] == nproc


def test_train_passes_config_and_data_on(launched, tmp_path):
    odd = tmp_path / "a=b.txt"
    odd.write_text("text")
    words = ["train", "--out", "o", "--data", str(tmp_path), str(odd), "optim.lr=3e-4", "--nproc", "1"]
    assert cli.main([*words, "seed.x"]) == 2
    assert cli.main(words) == 0
    (_, target, kwargs, options), = launched
    assert target == "interlace.models.train:train" and kwargs["out"] == "o" and "resume" in options["again"]
    assert kwargs["config"]["optim"]["lr"] == 3e-4 and kwargs["config"]["data"]["paths"] == [str(tmp_path), str(odd)]
    assert cli.main(["train", "--data", str(tmp_path), f"data.paths={tmp_path}"]) == 2
    own = tmp_path / "config.yaml"                                    # a run's own, with the text it began with
    own.write_text(f"data:\n  paths: [{tmp_path}]\n")
    assert cli.main(["train", "--config", str(own), "--out", "o", "--data", str(odd)]) == 0
    assert launched[-1][2]["config"]["data"]["paths"] == [str(odd)]


@pytest.mark.parametrize("words, wanted", [
    (["train", "optim.min_lr=0", "optim.sched.decay=constant"], "optim.min_lr (as optim.sched.decay=constant)"),
    (["verify", "model.moe_router_topk=1"], "model.moe_router_topk (as model.num_moe_experts=none)"),
    (["explain", "model.moe_router_topk=1"], "model.moe_router_topk (as model.num_moe_experts=none)"),
    (["train", "data.extensions=.py"], "data.extensions (as data.paths=[])"),
    (["train", "data.extensions=.py", "--data", __file__], ""), (["explain", "data.extensions=.py"], ""), (["train"], "")], ids=" ".join)
def test_fields_without_effect_are_named_once(launched, capsys, monkeypatch, words, wanted):
    assert cli.main(words) == 0
    assert capsys.readouterr().err == (f"interlace: set without effect: {wanted}\n" if wanted else "")
    for name, value in {"WORLD_SIZE": "1", "RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(words) == 0 and capsys.readouterr().err == ""     # rank 0 of torchrun has said it


def test_ctrl_c_in_one_process(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr("interlace.launch.launch", interrupt)
    assert cli.main(["train"]) == 130 and "run the same command again to resume" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    def bug(*_, **__):
        raise ZeroDivisionError("ours")
    monkeypatch.setattr("interlace.launch.launch", bug)
    assert cli.main(["verify"]) == 1 and "ZeroDivisionError: ours" in capsys.readouterr().err


def test_folders_of_the_house_in_the_way(tmp_path):
    """Started where folders have the names of ours: sys.path of a rank is the parent's."""
    for name in ("kernels", "models", "dropin", "parallel", "torch"):
        (tmp_path / name).mkdir()
    assert run("--version", cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}).returncode == 0
