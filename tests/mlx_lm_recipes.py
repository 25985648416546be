"""How MLX LM loads our fixtures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How MLX LM can load a fixture: what its config lacks for this library, and names that its models spell
    differently."""

    config: Mapping[str, Any] = field(default_factory=dict)
    rename: tuple[str, str] | None = None
    shift: int = 0  # our layer number less MLX LM's


ROPE = {"rope_theta": 10000.0}
HALF_ROPE = {**ROPE, "rope_scaling": None, "partial_rotary_factor": 0.5}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
MINIMAX = {**ROPE, "rotary_dim": 4, "shared_intermediate_size": 0}
BOTH_ATTENTIONS = {"layer_types": ["sliding_attention", "full_attention"]}
HUNYUAN = {
    **ROPE,
    "model_type": "hunyuan",
    "num_shared_expert": 1,
    "use_mixed_mlp_moe": True,
    "use_qk_norm": True,
    "use_cla": False,
    "cla_share_factor": 2,
    "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
}
# the one model class of MLX LM that reads these stacked names
FUSED = {
    "model_type": "qwen3_5_moe",
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 8,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
RECIPES = {
    "deepseek_v2": Recipe({"rope_scaling": YARN}),
    "deepseek_v3_fp8": Recipe({"n_shared_experts": None}),
    "ernie4_5_moe": Recipe(ROPE),
    "glm4_moe": Recipe(HALF_ROPE),
    "gpt_oss_mxfp4": Recipe(BOTH_ATTENTIONS),
    "gpt_oss_mxfp4_square": Recipe(BOTH_ATTENTIONS),
    "granitemoe": Recipe(ROPE),
    "granitemoe_square": Recipe(ROPE),
    "granitemoehybrid": Recipe({"layer_types": ["mamba", "attention"]}),
    "hunyuan_v1_moe": Recipe(HUNYUAN),
    "llama4_square": Recipe({"model_type": "llama4"}, ("^", "language_model.")),
    "llama4_text": Recipe({"model_type": "llama4"}, ("^", "language_model.")),
    "minimax": Recipe(MINIMAX),
    "minimax_m2": Recipe(MINIMAX),
    "mixtral_fused": Recipe(FUSED),
    # its sanitize looks at layer 0 only, and that is dense here
    "qwen2_moe": Recipe({**ROPE, "num_hidden_layers": 1}, (r"layers\.1\.", "layers.0."), shift=1),
    "qwen3_5_moe_text": Recipe({"model_type": "qwen3_5_moe"}),
    "qwen3_moe": Recipe({**ROPE, "num_experts": 4}),
    "qwen3_moe_fused": Recipe(FUSED),
    "qwen3_moe_fused_square": Recipe({**FUSED, "moe_intermediate_size": 16}),
}
