"""What config.json says about a model: its experts, their activation and routing, the quantisation of its weights."""

import re
from collections import ChainMap
from collections.abc import Callable, Collection, Container, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from fnmatch import fnmatch, fnmatchcase
from itertools import chain
from typing import Any

from ..errors import printable
from .repositories.source import CONFIG, MODELSLIM, QUANTIZATION_FILES

LANGUAGE_MODELS = ("text_config", "llm_config", "language_config", "thinker_config")
MOONDREAM = ("config", "text")  # the objects in one another that describe Moondream's language model
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
    "num_selects",
    "num_activated_experts",
)
EXPERT_COUNT_KEYS = (
    "n_routed_experts",
    "num_local_experts",
    "num_experts",
    "moe_num_experts",
    "moe_num_primary_experts",
    "num_routed_experts",
)
HEAD_COUNT_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads")
QUANTIZATION_KEYS = ("quantization_config", "quantization")
DTYPE_KEYS = ("dtype", "torch_dtype")
ROTATION_KEYS = ("transform_config", "rotation_config", "spinquant_config", "quarot")
ALGORITHMS = "algo_config"  # Quark's list of what was done to the weights
ROTATIONS = ("rotation", "quarot", "spinquant")  # the names of those algorithms that rotate them
BY_MODULE = ("quantized_layers", "extra_config")
"""Objects with settings by module: those of ModelOpt's mixed precision, and those of AutoRound."""

_ATTENTION = re.compile(r"attn|attention|[qkvo]_proj|qkv|out_proj", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|expert|ffn|feed_forward|gate|up_proj|down_proj|w[123]\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The settings of a model, or of a part of it: its language model, one stack of layers, one layer.

    `values` is the JSON object that describes the part, `whole` the object that describes the model, None where
    `values` does. `is_stack` tells whether `values` describes one stack of layers and no other.
    """

    values: MutableMapping[str, Any]
    whole: Mapping[str, Any] | None = None
    is_stack: bool = False

    @classmethod
    def read(cls, files: Container[str], load: Callable[[str], dict[str, Any]]) -> "ModelConfig":
        """The config of the model that has these `files`, of which `load` parses one; empty without a config.json.

        Its `quantization_config` is the one that holds for the weights: that of MLX before others, and that of a file
        beside config.json where config.json has none. What ModelSlim's file says of rotations holds in any case.
        """
        values = load(CONFIG) if CONFIG in files else {}
        mlx = values.get("quantization")
        if isinstance(mlx, dict) and {"bits", "group_size"} <= mlx.keys() and "quantization_config" in values:
            # quantization_config may describe the model that MLX converted, which was stored in another format
            return cls({**values, "quantization_config": mlx})
        # settings of any part count here, an image encoder's included: they show that config.json itself has settings
        if any(_stated_quantization(part) for part in _nested_objects(values)):
            return cls({**values, **(_rotations_of_modelslim(load(MODELSLIM)) if MODELSLIM in files else {})})
        for file in QUANTIZATION_FILES:
            if file in files and (settings := _parse_quantization_file(file, load(file))):
                return cls({**values, "quantization_config": settings})
        return cls(values)

    def language_model(self) -> "ModelConfig":
        """The part of a multimodal model's config that describes its language model."""
        return ModelConfig(_find_language_model(self.values), self.values)

    def stack(self, root: str) -> "ModelConfig":
        """The part that describes a stack of layers, by the root of its tensors' names.

        For "talker.model" it is `talker_config`. Without this object, it is the language model's part.
        """
        name = root.partition(".")[0].removesuffix("_encoder")
        part = self.values.get(f"{name}_config")
        if not isinstance(part, dict):
            return self.language_model()
        return ModelConfig(_find_language_model(part), self.values, is_stack=True)

    def layer(self, number: int) -> "ModelConfig":
        """The settings of one layer: its own, then those of all layers."""
        by_layer, listed = self.values.get("per_layer_config"), self.values.get("block_configs")
        settings = by_layer.get(str(number)) if isinstance(by_layer, dict) else None
        if isinstance(listed, list) and 0 <= number < len(listed):
            settings = listed[number]
        if not isinstance(settings, dict):
            return self
        # a copy for each of many layers would take time that grows with the square of their number
        return ModelConfig(ChainMap(settings, self.values), self.whole, self.is_stack)

    @property
    def model_type(self) -> str | None:
        """The part's model_type or else the model's, in diffusers the name of its class; safe to print."""
        whole = self.whole or {}
        name = self.values.get("model_type") or whole.get("model_type") or self.values.get("_class_name")
        return printable(name) if isinstance(name, str) else None

    @property
    def num_hidden_layers(self) -> int | None:
        depth = self.values.get("num_hidden_layers")
        return depth if type(depth) is int else None

    @property
    def expert_count(self) -> int | None:
        """The number of routed experts in a layer."""
        for part in (self.values, self._ffn):
            for key in EXPERT_COUNT_KEYS:
                count = part.get(key)
                if isinstance(count, list) and count:  # of several modalities, the text's is the first
                    count = count[0]
                if type(count) is int:
                    return count
        return None

    @property
    def other_expert_count(self) -> int:
        """The number of experts of other modalities that follow the text's in the same list; usually 0."""
        counts = [part.get(key) for part in (self.values, self._ffn) for key in EXPERT_COUNT_KEYS]
        listed = next((count for count in counts if isinstance(count, list)), [])
        return sum(count for count in listed[1:] if type(count) is int and count > 0)

    def head_count(self, layer: int) -> int | None:
        """The number of attention heads, those of queries, in a layer; None where the config does not give it."""
        for key in HEAD_COUNT_KEYS:
            count = self.values.get(key)
            if isinstance(count, list) and 0 <= layer < len(count):  # some configs list the number for each layer
                count = count[layer]
            if type(count) is int and count > 0:
                return count
        return None

    @property
    def head_size(self) -> int | None:
        """The number of rows of q and k for each head; None where the config does not give it."""
        size = self.values.get("head_dim")
        return size if type(size) is int and size > 0 else None

    @property
    def cache_bytes_per_token(self) -> int | None:
        """Bytes that keys and values of a token take at most, in 16 bits; None where the config does not tell.

        Layers with a window or without attention take less. Of latent attention it is the latent vector.
        """
        depth, heads = self.num_hidden_layers, self.head_count(0)
        if depth is None:
            return None
        latent, rotary = (self.values.get(key) for key in ("kv_lora_rank", "qk_rope_head_dim"))
        if type(latent) is int and type(rotary) is int:
            return 2 * depth * (latent + rotary)
        hidden, key_heads = self.values.get("hidden_size"), self.values.get("num_key_value_heads", heads)
        size = self.head_size or (hidden // heads if heads and type(hidden) is int else None)
        if size is None or type(key_heads) is not int or key_heads < 1:
            return None
        return 2 * 2 * depth * key_heads * size

    @property
    def activations(self) -> list[str]:
        """The names under all keys that name the experts' activation; the first one decides."""
        function = self._ffn.get("ffn_act_fn")
        names = [self.values.get(key) for key in ACTIVATION_KEYS]
        names += [function.get("name")] if isinstance(function, dict) else []
        return [name for name in names if isinstance(name, str)]

    @property
    def top_k(self) -> int:
        """The number of experts that a token is routed to; 1 where the config does not give it."""
        counts = [part.get(key) for part in (self.values, self._ffn) for key in TOP_K_KEYS]
        # some configs list the number for each layer: the first layer's stands for all
        counts = [count[0] if isinstance(count, list) and count else count for count in counts]
        return next((count for count in counts if type(count) is int and count > 0), 1)

    @property
    def scoring(self) -> str | None:
        """The function that turns router logits into scores, "softmax" or "sigmoid", where the config names it."""
        function = self.values.get("scoring_func")
        return function if function in ("sigmoid", "softmax") else None

    @property
    def normalises_routing_weights(self) -> bool:
        """Whether the routing weights of a token's experts are scaled to a sum of 1."""
        return self.values.get("norm_topk_prob") is not False

    def quantization(self, module: str | None = None) -> Mapping[str, Any]:
        """The quantisation settings, {} where there are none: those that hold for `module`, or else the general ones.

        `module` is the name of a weight without its last part, such as "model.layers.0.mlp.gate".
        """
        # The experts of a stack have the model's settings, or else the stack's own. For a whole model, whose tensors
        # belong to all stacks, every object that describes a language model may have the settings.
        parts = _language_models(self.values) if self.whole is None else (self.whole, self.values)
        settings = next(filter(None, map(_stated_quantization, parts)), {})
        of_module = settings.get(module) if module else None
        if module and isinstance(by_layer := settings.get("layer_quant_config"), dict):  # Quark's
            own = next((by_layer[pattern] for pattern in by_layer if fnmatch(module, pattern)), None)
            if isinstance(own, dict):
                return {**settings, "global_quant_config": own}
        if module and isinstance(by_type := settings.get("layer_type_quant_config"), dict):
            own = next((by_type[kind] for kind in by_type if kind.rpartition(".")[2] == "Linear"), None)
            return {**settings, "global_quant_config": own} if isinstance(own, dict) else settings
        if module and (own := _find_module_settings(settings, module)):
            return {**settings, **own}
        if not isinstance(of_module, dict):
            return settings
        # MLX's settings of a module leave out the mode where it is affine, even if the general mode is another
        return {**settings, "mode": "affine", **of_module}

    def rotation(self, *, of_experts: bool = False) -> str | None:
        """The key under which the config says that weights are stored rotated, as QuaRot and SpinQuant do; or None.

        With `of_experts`, a rotation that is within attention alone does not count.
        """
        whole = self.values if self.whole is None else self.whole
        for part in _nested_objects(dict(whole)):
            for key, settings in _stated_rotations(part):
                if _rotates(settings) and not (of_experts and _rotates_attention_only(settings)):
                    return key
        return None

    def without_quantization(self) -> dict[str, Any]:
        """The values without the quantisation settings of the model and of its language model."""
        return _change_language_models(self.values, lambda part: _without(part, QUANTIZATION_KEYS))

    def without_modules(self, kept: Collection[str]) -> dict[str, Any]:
        """The values without the quantisation settings of modules that have none of the tensors `kept`."""
        modules = {name[: match.start()] for name in kept for match in re.finditer(r"[.]", name)}

        def is_gone(key: str, value: Any) -> bool:
            return isinstance(value, dict) and "." in key and key not in modules

        def drop(part: Mapping[str, Any]) -> dict[str, Any]:
            return {
                key: {name: setting for name, setting in value.items() if not is_gone(name, setting)}
                if key in QUANTIZATION_KEYS and isinstance(value, dict)
                else value
                for key, value in part.items()
            }

        return _change_language_models(self.values, drop)

    @property
    def _ffn(self) -> Mapping[str, Any]:
        """The object in which DBRX, or Moondream, describes its experts."""
        part = self.values.get("ffn_config", self.values.get("moe"))
        return part if isinstance(part, Mapping) else {}


def _find_language_model(values: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The innermost object that describes a language model."""
    while part := next((values[key] for key in LANGUAGE_MODELS if isinstance(values.get(key), dict)), None):
        values = part
    outer = values.get(MOONDREAM[0])
    if isinstance(outer, dict) and isinstance(inner := outer.get(MOONDREAM[1]), dict):
        return inner
    return values


def _language_models(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The object itself, then all objects in it that describe a language model, on every level."""
    yield values
    for key in LANGUAGE_MODELS:
        if isinstance(part := values.get(key), dict):
            yield from _language_models(part)


def _nested_objects(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The object itself, then every object that can be reached from it through objects."""
    parts = [values]
    for part in parts:
        yield part
        parts += [value for value in part.values() if isinstance(value, dict)]


def _stated_quantization(values: Mapping[str, Any]) -> dict[str, Any]:
    """The quantisation settings that stand in the object itself, {} where none do."""
    candidates = (values.get(key) for key in QUANTIZATION_KEYS)
    return next((settings for settings in candidates if isinstance(settings, dict) and settings), {})


def _find_module_settings(settings: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The settings under a module's name, or that of a module around it, or a pattern with * for both; or else {}."""
    for key in BY_MODULE:
        by_module = settings.get(key)
        if not isinstance(by_module, dict):
            continue
        ends = [*(match.start() for match in re.finditer(r"[.]", module)), len(module)]
        names = [module[:end] for end in reversed(ends)]
        patterns = (pattern for pattern in by_module if "*" in pattern and fnmatchcase(module, pattern))
        for name in chain(names, patterns):  # patterns are tried only where there is no name, since there may be many
            if isinstance(own := by_module.get(name), dict):
                return own
    return {}


def _stated_rotations(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of rotations that stand in the object itself, each with its key."""
    yield from ((key, values[key]) for key in ROTATION_KEYS if key in values)
    algorithms = values.get(ALGORITHMS)
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        if isinstance(algorithm, dict) and str(algorithm.get("name")).lower() in ROTATIONS:
            yield ALGORITHMS, algorithm


def _rotates(settings: Any) -> bool:
    """Whether the settings of a rotation are not empty; SpinQuant's are if it has switched each of R1 to R4 off."""
    if not isinstance(settings, dict):
        return bool(settings)
    switches = _spinquant_switches(settings)
    return bool(settings) and (not switches or any(switches.values()))


def _rotates_attention_only(settings: Any) -> bool:
    """Whether a rotation leaves feed-forwards as they are, by SpinQuant's switches or the modules that it names.

    R2 and R3 are within attention; R1 turns the hidden states, R4 the inputs of down (SpinQuant, arXiv 2405.16406).
    """
    if not isinstance(settings, dict):
        return False
    if switches := _spinquant_switches(settings):
        return not switches.get("r1", True) and not switches.get("r4", True)
    targets = [target for part in _nested_objects(settings) for target in _targets(part)]
    return bool(targets) and all(_ATTENTION.search(name) and not _FEED_FORWARD.search(name) for name in targets)


def _spinquant_switches(settings: Mapping[str, Any]) -> dict[str, bool]:
    return {key.lower(): bool(settings[key]) for key in settings if key.lower() in ("r1", "r2", "r3", "r4")}


def _targets(settings: Mapping[str, Any]) -> Iterator[str]:
    """The names of modules, or patterns of names, that the entries under "apply" are for."""
    entries = settings.get("apply")
    for entry in entries if isinstance(entries, list) else ():
        targets = entry.get("targets") if isinstance(entry, dict) else None
        yield from (target for target in targets if isinstance(target, str)) if isinstance(targets, list) else ("",)


def _change_language_models(
    values: Mapping[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """The object and those in it that describe a language model, on every level, each changed."""
    return {
        key: _change_language_models(value, change) if key in LANGUAGE_MODELS and isinstance(value, dict) else value
        for key, value in change(values).items()
    }


def name_dtype(values: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The values with this dtype wherever the model, or a part that describes a language model, names one."""
    return _change_language_models(
        values, lambda part: {key: dtype if key in DTYPE_KEYS else value for key, value in part.items()}
    )


def _without(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _parse_quantization_file(file: str, values: dict[str, Any]) -> dict[str, Any]:
    """The settings in one of QUANTIZATION_FILES, under the keys of a `quantization_config`; {} where it has none."""
    if file == MODELSLIM:  # nearly all of it is the format of each tensor, which its parts tell as well
        return {"quant_method": "modelslim", **_rotations_of_modelslim(values)}
    method, usual_keys = {
        "hf_quant_config.json": ("modelopt", {}),
        "quantize_config.json": ("gptq", {}),
        "quant_config.json": ("awq", {"w_bit": "bits", "q_group_size": "group_size"}),
    }[file]
    if method == "modelopt":
        settings = values.get("quantization")
        values = settings if isinstance(settings, dict) and settings.get("quant_algo") else {}
    values = {usual_keys.get(key, key): value for key, value in values.items()}
    return {**values, "quant_method": values.get("quant_method") or method} if values else {}


def _rotations_of_modelslim(values: Mapping[str, Any]) -> dict[str, Any]:
    """What ModelSlim's description of a model says of QuaRot's rotations, under one key; {} where it has none."""
    parts = (values.get("optional"), values.get("metadata"))
    stated = next((part["quarot"] for part in parts if isinstance(part, dict) and part.get("quarot")), None)
    stated = stated or values.get("is_rot_used")
    return {"quarot": stated} if stated else {}
