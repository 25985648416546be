"""What config.json says of a model: its experts, its activation, its quantisation."""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any

CONFIG = "config.json"
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
ACTIVATION_KEYS = ("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function", "dense_act_fn")
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "moe_top_k",
    "moe_num_active_primary_experts",
    "experts_per_token",
    "router_topk",
)
EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "moe_num_primary_experts")
QUANTIZATION_KEYS = ("quantization_config", "quantization")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a multimodal config that describes the language model."""
    while inner := next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None):
        config = inner
    return config


def stack_config(config: dict[str, Any], root: str) -> tuple[dict[str, Any], bool]:
    """The part of a multimodal config that describes a stack of layers ("talker.model" has a `talker_config`), and
    whether it is this stack's own."""
    first = root.partition(".")[0].removesuffix("_encoder")
    inner = config.get(f"{first}_config")
    return (text_config(inner), True) if isinstance(inner, dict) else (text_config(config), False)


def layer_config(config: dict[str, Any], number: int) -> Mapping[str, Any]:
    """The config with what it says about one layer."""
    by_layer = config.get("per_layer_config")
    own = by_layer.get(str(number)) if isinstance(by_layer, dict) else None
    return ChainMap(own, config) if isinstance(own, dict) else config


def count_experts(config: Mapping[str, Any]) -> int | None:
    """How many experts the config says there are."""
    for part in (config, config.get("ffn_config")):
        if isinstance(part, Mapping):
            for key in EXPERT_COUNTS:
                if type(count := part.get(key)) is int:
                    return count
    return None


def nested_objects(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and every object in it."""
    found = [config]
    for one in found:
        yield one
        found += [value for value in one.values() if isinstance(value, dict)]


def read_quantization(file: str, found: dict[str, Any]) -> dict[str, Any]:
    """What one of QUANTIZATION_FILES says, as a config's quantization_config would; {} for nothing."""
    method, renamed = {
        "hf_quant_config.json": ("modelopt", {}),
        "quantize_config.json": ("gptq", {}),
        "quant_config.json": ("awq", {"w_bit": "bits", "q_group_size": "group_size"}),
    }[file]
    if method == "modelopt":
        inner = found.get("quantization")
        found = inner if isinstance(inner, dict) and inner.get("quant_algo") else {}
    found = {renamed.get(key, key): value for key, value in found.items()}
    return {**found, "quant_method": found.get("quant_method") or method} if found else {}


def find_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config or its text part says first about quantisation."""
    for key in QUANTIZATION_KEYS:
        if isinstance(found := config.get(key), dict) and found:
            return found
    inner = (find_quantization(config[key]) for key in TEXT_CONFIGS if isinstance(config.get(key), dict))
    return next((one for one in inner if one), {})


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what it says about quantisation, neither its own nor that of its text part."""
    return {
        key: without_quantization(value) if key in TEXT_CONFIGS and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION_KEYS
    }
