"""The config of a run: frozen dataclasses with NeMo's and Megatron's words, read from YAML and `key=value` overrides.

    config = load_config("gpt.yaml", ["model.tensor_model_parallel_size=2", "optim.lr=3e-4"])

A field's annotation is its rule: a range, a set of words, None when it may be left out. Rules between fields of the
layout (divisibility, world size) stand in parallel/layout.py. No torch here: the parent checks before ranks start.
"""
import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..parallel.errors import UserError, nearest, raise_problems
from ..parallel.layout import balancing

__all__ = ["Config", "DataConfig", "ModelConfig", "OptimConfig", "SchedConfig", "TrainerConfig", "from_dict",
           "key_of", "load_config", "to_dict", "to_yaml"]


@dataclass(frozen=True)
class Range:
    """lo <= value, value < below, value > above: in an annotation, what a number must keep to."""

    lo: float | None = None
    below: float | None = None
    above: float | None = None

    def holds(self, x: float) -> bool:
        return ((self.lo is None or x >= self.lo) and (self.below is None or x < self.below)
                and (self.above is None or x > self.above))

    def __str__(self) -> str:
        parts = ((">=", self.lo), (">", self.above), ("<", self.below))
        return " and ".join(f"{sign} {limit}" for sign, limit in parts if limit is not None)


@dataclass(frozen=True)
class Spelled:
    """Other spellings of the words of a Literal."""

    words: tuple[tuple[str, str], ...]


Count = Annotated[int, Range(lo=1)]
CountOrZero = Annotated[int, Range(lo=0)]
Flag = Annotated[int, Range(lo=0, below=2)]
Positive = Annotated[float, Range(above=0)]
PositiveOrZero = Annotated[float, Range(lo=0)]
Probability = Annotated[float, Range(lo=0, below=1)]
Fraction = Annotated[float, Range(above=0, below=1)]
Balancing = Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"]
Seed = Annotated[int, Range(lo=0, below=2**32)]
Schedule = Annotated[Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"], Spelled((
    ("GPipe", "gpipe"), ("1F1B", "1f1b"), ("Interleaved1F1B", "interleaved_1f1b"),
    ("InterleavedZeroBubble", "interleaved_zero_bubble"), ("ZBVZeroBubble", "zbv_zero_bubble")))]
Precision = Annotated[Literal["fp32", "bf16", "float64"], Spelled((
    ("32", "fp32"), ("32-true", "fp32"), ("float32", "fp32"), ("bf16-mixed", "bf16"), ("bfloat16", "bf16"),
    ("64", "float64"), ("64-true", "float64"), ("fp64", "float64")))]


class _Checked:
    """A config built in Python is checked like one read from a file."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            name, hint = f"{_SECTION[type(self)]}.{f.name}".lstrip("."), _HINTS[type(self)][f.name]
            try:
                object.__setattr__(self, f.name, _value(name, getattr(self, f.name), hint))
            except UserError as e:
                problems.append(str(e))
        raise_problems(type(self).__name__, problems or self._between())

    def _between(self) -> list[str]:
        return []


@dataclass(frozen=True)
class ModelConfig(_Checked):
    num_layers: Count = 4                                       # transformer blocks
    hidden_size: Count = 256                                    # features of the residual stream
    ffn_hidden_size: Count | None = None                        # None: 4 * hidden; swiglu 8/3 * hidden up to x64
    num_attention_heads: Count = 8                              # query heads
    num_query_groups: Count | None = None                       # key / value heads; None: one per query head
    kv_channels: Count | None = None                            # features of one head; None: hidden / heads
    seq_length: Count = 256                                     # tokens of one sample
    vocab_size: Count | None = None                             # None: the tokenizer's
    make_vocab_size_divisible_by: Count = 128                   # the embedding is padded to a multiple of this
    normalization: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    layernorm_epsilon: Positive = 1e-5                          # of either norm
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"   # gelu_tanh: GPT-2's gelu_new
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    rotary_base: Positive = 10000.0                             # rope only
    share_embeddings_and_output_weights: bool = False           # one matrix for input and output
    add_bias_linear: bool = False                               # bias in attention, MLPs and the shared expert; experts have none
    hidden_dropout: Probability = 0.0                           # after embedding, attention and mlp
    attention_dropout: Probability = 0.0                        # of attention probabilities
    init_method_std: PositiveOrZero = 0.02                      # of initial weights
    recompute_granularity: Literal["full"] | None = None        # full: keep each block's input, recompute the rest
    tensor_model_parallel_size: Count = 1                       # tp: ranks that share one layer
    sequence_parallel: bool = False                             # sp: split norms and dropout over the sequence; tp > 1
    pipeline_model_parallel_size: Count = 1                     # pp: stages
    virtual_pipeline_model_parallel_size: Count | None = None   # vpp: chunks (stages) of one pp rank
    pipeline_parallel_schedule: Schedule | None = None          # None: 1f1b, or interleaved_1f1b with vpp > 1
    num_layers_in_first_pipeline_stage: Count | None = None     # None: spread evenly
    num_layers_in_last_pipeline_stage: Count | None = None      # None: spread evenly
    expert_model_parallel_size: Count = 1                       # ep: ranks that share one layer's experts
    num_moe_experts: Count | None = None                        # experts of a layer; None: a dense model
    moe_router_topk: Count = 2                                  # experts one token goes to
    moe_layer_freq: Count | tuple[Flag, ...] = 1                # every n-th layer has experts, or a list: 1 experts, 0 dense
    moe_ffn_hidden_size: Count | None = None                    # width of an expert; None: ffn_hidden_size
    moe_shared_expert_intermediate_size: Count | None = None    # width of an expert that every token goes to; None: none
    moe_shared_expert_gate: bool = False                        # its output times a sigmoid of the token
    moe_router_score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    moe_router_pre_softmax: bool = False                        # softmax over all experts, then top-k; false: the other way round
    moe_router_norm_topk_prob: bool | None = None               # probs of a token sum to 1; None: for sigmoid, sqrtsoftplus and topk > 1
    moe_router_num_groups: Count | None = None                  # choose within the best groups of experts
    moe_router_group_topk: Count | None = None                  # how many groups
    moe_router_topk_scaling_factor: Positive = 1.0              # of the probs
    moe_router_enable_expert_bias: bool = False                 # balance by a bias on the choice, moved after each step
    moe_router_bias_update_rate: PositiveOrZero = 1e-3          # how far
    moe_router_load_balancing_type: Balancing | tuple[Balancing, ...] = "aux_loss"   # over a micro-batch, a sample, the step so far
    moe_aux_loss_coeff: PositiveOrZero | tuple[PositiveOrZero, ...] = 1e-2   # weight of that loss, or of each in a list
    moe_z_loss_coeff: PositiveOrZero = 0.0                      # weight of mean(logsumexp(logits)^2)
    moe_input_jitter_eps: Fraction | None = None                # training: the router sees its input times 1 +- eps
    moe_router_force_load_balancing: bool = False               # benches: every expert gets the same load
    moe_enable_routing_replay: bool = False                     # choices can be recorded and replayed; recompute takes the first pass's
    moe_expert_capacity_factor: Positive | None = None          # most tokens of an expert over its fair share; None: all
    moe_token_drop_policy: Literal["probs", "position"] = "probs"   # which stay
    moe_pad_expert_input_to_capacity: bool = False              # buffers of that capacity: no shape depends on the routing
    micro_batch_size: Count = 4                                 # samples of one forward pass of a data-parallel rank
    global_batch_size: Count = 16                               # samples of one step on all ranks

    @property
    def ffn_size(self) -> int:
        """ffn_hidden_size with its default filled in."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64 if self.activation == "swiglu" else 4 * self.hidden_size

    @property
    def query_groups(self) -> int:
        """num_query_groups with its default filled in."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def moe_ffn_size(self) -> int:
        """moe_ffn_hidden_size with its default filled in."""
        return self.moe_ffn_hidden_size or self.ffn_size

    @property
    def balancing(self) -> dict[str, float]:
        """{loss that balances experts: its weight}, those of weight 0 left out."""
        return balancing(self.moe_router_load_balancing_type, self.moe_aux_loss_coeff)

    def _between(self) -> list[str]:
        wrong = []
        if self.num_moe_experts is not None and self.activation == "gelu_tanh":
            wrong.append("model.activation must be swiglu or gelu with experts, got gelu_tanh; set model.activation=gelu")
        try:
            balancing(self.moe_router_load_balancing_type, self.moe_aux_loss_coeff)
        except ValueError as e:
            wrong.append(f"model.{e}")
        if self.moe_pad_expert_input_to_capacity and self.moe_expert_capacity_factor is None:
            wrong.append("model.moe_pad_expert_input_to_capacity needs model.moe_expert_capacity_factor, got none; set it to 1.25")
        if self.moe_shared_expert_gate and self.moe_shared_expert_intermediate_size is None:
            wrong.append("model.moe_shared_expert_gate needs model.moe_shared_expert_intermediate_size (the shared expert that it weighs), "
                         "got none; set it, or model.moe_shared_expert_gate=false")
        if self.moe_router_norm_topk_prob is False and self.moe_router_score_function == "softmax" and not self.moe_router_pre_softmax:
            wrong.append("model.moe_router_norm_topk_prob=false needs model.moe_router_pre_softmax=true (softmax over the chosen experts "
                         "sums to 1), got false; set it to true, or model.moe_router_norm_topk_prob=none")
        if self.num_moe_experts is not None and isinstance(self.moe_layer_freq, tuple) and not any(self.moe_layer_freq):
            wrong.append(f"model.moe_layer_freq must have a 1 where model.num_moe_experts={self.num_moe_experts}, got "
                         f"{list(self.moe_layer_freq)}; set model.num_moe_experts=none for a dense model")
        return wrong

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        if self.num_moe_experts is None:
            return False
        freq = self.moe_layer_freq
        return bool(freq[layer]) if isinstance(freq, tuple) else layer % freq == 0

    @property
    def chunks(self) -> int:
        """Stages of one pp rank."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def schedule(self) -> str:
        """pipeline_parallel_schedule with its default filled in."""
        return self.pipeline_parallel_schedule or ("1f1b" if self.chunks == 1 else "interleaved_1f1b")

    @property
    def head_dim(self) -> int:
        """kv_channels with its default filled in (rounded down: parallel/layout.py demands divisibility)."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class SchedConfig(_Checked):
    warmup_steps: CountOrZero = 20                              # steps from 0 to lr
    decay: Literal["cosine", "linear", "constant"] = "cosine"   # from lr to min_lr after the warm-up
    decay_steps: Count | None = None                            # step that reaches min_lr, > warmup_steps; None: trainer.max_steps

    def _between(self) -> list[str]:
        if self.decay == "constant" or self.decay_steps is None or self.decay_steps > self.warmup_steps:
            return []                                                 # a run may end in its warm-up: a smoke test
        return [f"optim.sched.decay_steps must be > optim.sched.warmup_steps (the rate falls between them), got {self.decay_steps} and "
                f"{self.warmup_steps}; set optim.sched.warmup_steps={self.decay_steps // 10}, or a later decay_steps"]


@dataclass(frozen=True)
class OptimConfig(_Checked):
    name: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3                                         # peak, after the warm-up
    min_lr: PositiveOrZero = 1e-4                               # at the end, <= lr
    weight_decay: PositiveOrZero = 0.1                          # on matrices, not on norms and biases
    betas: tuple[Probability, Probability] = (0.9, 0.95)        # decay of the two moments
    eps: Positive = 1e-8                                        # in the denominator
    clip_grad: PositiveOrZero = 1.0                             # largest global gradient norm; 0: off
    use_distributed_optimizer: bool = False                     # zero1: each rank of dp keeps and steps 1/dp of AdamW's state
    ddp_bucket_size: Count | None = None                        # gradients reduced in one call; None: 1/64, at least 2**20
    sched: SchedConfig = field(default_factory=SchedConfig)

    def _between(self) -> list[str]:
        if self.min_lr <= self.lr or self.sched.decay == "constant":
            return []
        return [f"optim.min_lr must be <= optim.lr, got {self.min_lr:g} > {self.lr:g}; "
                f"set optim.min_lr={self.lr / 10:g}"]


@dataclass(frozen=True)
class DataConfig(_Checked):
    paths: tuple[str, ...] = ()                                 # files, folders; empty: Python's standard library
    tokenizer: str = "bytes"                                    # bytes, or the path of a Hugging Face tokenizer.json
    extensions: tuple[str, ...] | None = None                   # in a folder, like .py; None: all UTF-8 text


@dataclass(frozen=True)
class TrainerConfig(_Checked):
    max_steps: Count = 200                                      # optimizer steps
    precision: Precision = "fp32"                               # of matrix products and activations
    seed: Seed = 1234                                           # of weights, data order and dropout
    log_every_n_steps: Count = 1                                # steps between lines of metrics.jsonl
    save_every_n_steps: CountOrZero = 100                       # steps between checkpoints; 0: only the last step
    keep_checkpoints: Count = 3                                 # newest checkpoints kept in --out
    async_save: bool = True                                     # write them beside the steps; false: each step that saves waits
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"        # auto: cuda when every local rank has a GPU


@dataclass(frozen=True)
class Config(_Checked):
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def decay_steps(self) -> int:
        """optim.sched.decay_steps with its default filled in."""
        return self.optim.sched.decay_steps or self.trainer.max_steps


ALIASES = {"tp": "model.tensor_model_parallel_size", "pp": "model.pipeline_model_parallel_size",
           "vpp": "model.virtual_pipeline_model_parallel_size", "sp": "model.sequence_parallel",
           "ep": "model.expert_model_parallel_size", "zero1": "optim.use_distributed_optimizer"}
_SECTION = {Config: "", ModelConfig: "model", OptimConfig: "optim", SchedConfig: "optim.sched", DataConfig: "data",
            TrainerConfig: "trainer"}
_HINTS = {cls: typing.get_type_hints(cls, include_extras=True) for cls in _SECTION}
_KEYS = {f"{section}.{name}": hint for cls, section in _SECTION.items() if section for name, hint in _HINTS[cls].items()
         if not isinstance(hint, type) or not issubclass(hint, _Checked)}

# ---- one value ------------------------------------------------------------------------------------------------


def _value(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it, or a UserError: what must hold, what came, the way out."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):                     # T | None
        if type(None) in args and (value is None or str(value).lower() == "none"):
            return None
        kinds = [a for a in args if a is not type(None)]              # a list where one may come, and one came
        listed = isinstance(value, (list, tuple))
        return _value(name, value, next((a for a in kinds if (typing.get_origin(a) is tuple) == listed), kinds[0]))
    if origin is Annotated:
        spelled = dict(next((m.words for m in args[1:] if isinstance(m, Spelled)), ()))
        value = _value(name, spelled.get(str(value), value), args[0])
        bad = [m for m in args[1:] if isinstance(m, Range) and not m.holds(value)]
        if bad:
            raise UserError(f"{name} must be {bad[0]}, got {value!r}")
        return value
    if origin is Literal:
        return _word(name, value, args)
    if origin is tuple:
        return _tuple(name, value, args)
    if hint is bool and not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, got {value!r}")
    if hint is int:
        return _int(name, value)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, got {value!r}")
        return float(value)
    if hint is str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float, Path)) or value == "":
            raise UserError(f"{name} must be text, got {value!r}")
        return str(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise UserError(f"{name} must be {hint.__name__}, got {value!r}")
    return value


def _word(name: str, value: Any, words: tuple[str, ...]) -> str:
    if value in words:
        return value
    close = nearest(str(value), words)
    hint = f"; did you mean {close}?" if close else ""
    one_of = words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    raise UserError(f"{name} must be {one_of}, got {value!r}{hint}")


def _int(name: str, value: Any) -> int:
    whole = isinstance(value, float) and value.is_integer()           # 1e3
    if isinstance(value, bool) or not (isinstance(value, int) or whole):
        raise UserError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def _tuple(name: str, value: Any, args: tuple) -> tuple:
    if isinstance(value, (str, Path)) and args[0] is str:
        value = (value,)
    many = args[-1] is Ellipsis
    if not isinstance(value, (list, tuple)) or (not many and len(value) != len(args)):
        wanted = "a list such as [a, b]" if many else f"a list of {len(args)} numbers"
        raise UserError(f"{name} must be {wanted}, got {value!r}")
    return tuple(_value(f"{name}[{i}]", v, args[0] if many else args[i]) for i, v in enumerate(value))


# ---- reading and writing --------------------------------------------------------------------------------------


def load_config(path: str | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The config of YAML file `path` (None: the defaults) with `section.key=value` overrides on top.

    Raises: UserError that holds every unknown key and every bad value at once.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    if path is not None:
        values.update(_flat(_read_yaml(path), problems, str(path)))
    for text in overrides:
        values.update(_override(text, problems))
    return _build(values, problems)


def from_dict(tree: dict[str, Any]) -> Config:
    """What `to_dict` gave, as a config again."""
    problems: list[str] = []
    return _build(_flat(tree, problems, "the config"), problems)


def _build(values: dict[str, Any], problems: list[str]) -> Config:
    """The config of {full key: value}, or one UserError: `problems` and every value that breaks its field's rule."""
    sections: dict[str, dict[str, Any]] = {section: {} for section in _SECTION.values()}
    for key, value in values.items():
        section, name = key.rsplit(".", 1)
        try:
            sections[section][name] = _value(key, value, _KEYS[key])
        except UserError as e:
            problems.append(str(e))
    raise_problems("config", problems)

    def made(cls: type[_Checked], **more: Any) -> Any:
        try:
            return cls(**sections[_SECTION[cls]], **more)
        except UserError as e:                                        # the sections after it may be wrong too
            problems.extend(e.problems)
            return cls()
    parts = (made(ModelConfig), made(OptimConfig, sched=made(SchedConfig)), made(DataConfig), made(TrainerConfig))
    raise_problems("config", problems)
    return Config(*parts)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists, numbers and strings, in the order of the fields."""
    def plain(x: Any) -> Any:
        return {k: plain(v) for k, v in x.items()} if isinstance(x, dict) else list(x) if isinstance(x, tuple) else x
    return plain(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    """Text that `load_config` reads back to an equal config."""
    from omegaconf import OmegaConf
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def _read_yaml(path: str) -> dict[Any, Any]:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError
    try:
        loaded = OmegaConf.load(path)
        if isinstance(loaded, DictConfig):
            return OmegaConf.to_container(loaded, resolve=True)  # type: ignore[return-value]
    except OSError as e:
        raise UserError(f"--config must be a YAML file that can be read, got {path}: {e.strerror or e}") from None
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as e:
        raise UserError(f"--config must be valid YAML, got {path}: {' '.join(str(e).split())}") from None
    raise UserError(f"--config must hold sections (model:, optim:, data:, trainer:), got {path} that holds a list")


def _override(text: str, problems: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        problems.append(f"an override must be key=value, got {text!r}; example: model.num_layers=8")
        return {}
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=True)
    except (YAMLError, OmegaConfBaseException) as e:
        problems.append(f"the value of {text!r} must be YAML: {' '.join(str(e).split())}; put it in quotes")
        return {}
    return _flat({key.strip(): parsed["value"]}, problems, "the command line")  # type: ignore[index,call-overload]


def _flat(tree: dict[Any, Any], problems: list[str], source: str, prefix: str = "") -> dict[str, Any]:
    """{"model": {"tp": 2}} -> {"model.tensor_model_parallel_size": 2}; unknown keys go to `problems`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in _SECTION.values():
            if isinstance(value, dict):
                found = _flat(value, problems, source, key + ".")
            elif value is None:                                       # an empty section
                continue
            else:
                problems.append(f"{key} is a section: it must hold keys such as {_first(key)}, got {value!r}")
                continue
        else:
            full = ALIASES.get(key.removeprefix("model."), key)
            if full not in _KEYS:
                problems.append(_unknown(key))
                continue
            found = {full: value}
        for full in flat.keys() & found.keys():
            problems.append(f"{full} is given twice in {source}, as {flat[full]!r} and {found[full]!r}; keep one")
        flat.update(found)
    return flat


def key_of(word: str) -> str:
    """The key that a word alone names, as it is written on the command line: an alias, a key, or a key's last word; "" for none."""
    return word if word in ALIASES or word in _KEYS else next((k for k in _KEYS if k.rsplit(".", 1)[1] == word), "")


def _first(section: str) -> str:
    return next(k for k in _KEYS if k.rsplit(".", 1)[0] == section)


def _unknown(key: str) -> str:
    """Nearest key: in the section the user named, then by its last word in any section, then by the whole."""
    section, _, last = key.rpartition(".")
    here = {k.rsplit(".", 1)[1]: k for k in _KEYS if k.rsplit(".", 1)[0] == section}
    words, sections = {k.rsplit(".", 1)[1]: k for k in _KEYS}, [s for s in _SECTION.values() if s]
    near = last if last in words else nearest(last, [*here, *ALIASES] if section == "model" else here)
    near = near or nearest(last, words)
    close = here.get(near) or ALIASES.get(near) or words[near] if near else nearest(key, _KEYS if here else [*_KEYS, *sections, *ALIASES])
    if close:
        return f"unknown key {key}; did you mean {close}?"
    if here:
        return f"unknown key {key}; section {section} has: {', '.join(here)}"
    return f"unknown key {key}; sections are {', '.join(sections)}"
