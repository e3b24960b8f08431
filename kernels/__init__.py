"""Fused operators. Every op is `<op>.py` here, `test_<op>.py` in tests/, `bench_<op>.py` in bench/."""
if __name__ == "kernels":
    raise ImportError("import interlace.kernels, not kernels: the repo root is on sys.path")
from .adamw import adamw, adamw_ref
from .attention import attention, attention_ref
from .clamped_swiglu import clamped_swiglu, clamped_swiglu_ref
from .cross_entropy import cross_entropy, cross_entropy_ref
from .dropout import dropout, dropout_ref
from .experts import expert_mlp, expert_mlp_ref
from .gated import gated, gated_ref
from .gelu import gelu, gelu_ref
from .grad_norm import grad_norm, grad_square_sum, grad_square_sum_ref
from .grouped_gemm import grouped_gemm, grouped_gemm_ref, grouped_wgrad, grouped_wgrad_ref
from .jitter import jitter, jitter_ref
from .layer_norm import add_layer_norm, add_layer_norm_ref, layer_norm, layer_norm_ref
from .permute import permute, permute_ref
from .rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from .rope import rope, rope_ref, rope_tables
from .route_plan import RoutePlan, from_mask, route_plan, route_plan_ref
from .router import Routing, aux_loss, forced_balance, router, router_ref, update_expert_bias, z_loss
from .swiglu import swiglu, swiglu_ref
from .unpermute import unpermute, unpermute_ref

__all__ = ["RoutePlan", "Routing", "adamw", "adamw_ref", "add_layer_norm", "add_layer_norm_ref", "add_rms_norm", "add_rms_norm_ref",
           "attention", "attention_ref", "aux_loss", "clamped_swiglu", "clamped_swiglu_ref", "cross_entropy", "cross_entropy_ref",
           "dropout", "dropout_ref", "expert_mlp", "expert_mlp_ref", "forced_balance", "from_mask", "gated", "gated_ref", "gelu",
           "gelu_ref", "grad_norm", "grad_square_sum", "grad_square_sum_ref", "grouped_gemm", "grouped_gemm_ref", "grouped_wgrad",
           "grouped_wgrad_ref", "jitter", "jitter_ref", "layer_norm", "layer_norm_ref", "permute", "permute_ref", "rms_norm",
           "rms_norm_ref", "rope", "rope_ref", "rope_tables", "route_plan", "route_plan_ref", "router", "router_ref", "swiglu",
           "swiglu_ref", "unpermute", "unpermute_ref", "update_expert_bias", "z_loss"]
