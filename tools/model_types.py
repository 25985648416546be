"""List the model types of Mixtures of Experts that libraries load and that no row of layouts.toml lists.

    python tools/model_types.py SOURCE ...

SOURCE is a folder that holds the source of transformers, diffusers, mlx-lm, mlx-vlm, vLLM, vLLM-Omni, SGLang, OLMo-core
or gguf, such as an unpacked wheel (`pip download --no-deps NAME`, then unzip). Nothing of it is run or imported. A type
counts as a Mixture of Experts where the code of its model names a class or a module of experts. The exit code is 1
where a type is listed that has neither a row nor a reason below.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from chuk_lazarus.introspection.moe.weights.layouts import load_table

# How each library's code shows that a model has experts.
EXPERTS = {
    "transformers": r"class \w*(?:Experts|SparseMoeBlock|SparseMLP|MoE|Moe|MoeLayer|MOE)\b",
    "olmo_core": r"class \w*Experts\b",
    "diffusers": r"\bself\.experts\b",
    "mlx_lm": r"\bSwitch(?:GLU|MLP|Linear)\b",
    "mlx_vlm": r"\bSwitch(?:GLU|MLP|Linear)\b",
    "vllm": r"\bfused_moe\b",
    "vllm_omni": r"\b(?:FusedMoE|MultiHeadMoE|self\.experts)\b",
    "sglang": r"\b(?:FusedMoE|get_moe_impl_class|EPMoE|DeepEPMoE)\b",
}
PLACES = {
    "transformers/models": "transformers",
    "olmo_core/nn/moe/v2": "olmo_core",
    "diffusers/models/transformers": "diffusers",
    "mlx_lm/models": "mlx_lm",
    "mlx_vlm/models": "mlx_vlm",
    "vllm/model_executor/models": "vllm",
    "vllm/models": "vllm",
    "vllm_omni/diffusion/models": "vllm_omni",
    "sglang/srt/models": "sglang",
}

# What a library calls a model whose config.json has another model_type, of which a row knows.
ALIASES = {
    "AXK1": "axk1",
    "bailing_moe_v2": "bailing_moe",
    "bailing_moe_v3": "bailing_hybrid",
    "dots3_note": "dots3_note_text",
    "ernie45_moe": "ernie4_5_moe",
    "ernie45_moe_vl": "ernie4_5_moe_vl",
    "ernie45_vl": "ernie4_5_moe_vl",
    "ernie45_vl_moe": "ernie4_5_moe_vl",
    "ernie4": "ernie4_5_moe",
    "ernie": "ernie4_5_moe",
    "gemma4_causal": "gemma4_text",
    "gemma4_mm": "gemma4",
    "glm5next": "glm5_next",
    "grok": "grok-1",
    "hidream_image": "HiDreamImageTransformer2DModel",
    "hunyuan_image3": "hunyuan_image_3_moe",
    "hunyuan_v3": "hy_v3",
    "hunyuan_v4": "hy_v4",
    "inkling": "inkling_mm_model",
    "klear": "Klear",
    "lfm2": "lfm2_moe",
    "lingbot_video": "LingBotVideoTransformer3DModel",
    "llada2": "llada2_moe",
    "mimo_v2": "mimo_v2_flash",
    "minimax_m3": "minimax_m3_vl",
    "mllama4": "llama4",
    "nemo_speechlm": "nemotron_h",
    "qwen3_5": "qwen3_5_moe",
    "qwen3_omni_moe": "qwen3_omni_moe_text",
    "qwen3_omni_moe_talker": "qwen3_omni_moe_talker_text",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe_text",
}

BY_NAMES = "read by its tensors' names, with a note"

# Types without a row, and why.
REASONS = {
    "alice_ai": BY_NAMES,
    "bagel": "its two experts are one for text and one for images, not a mixture",
    "doge": "its experts are one vector each, rows of an embedding, not matrices",
    "interns1": BY_NAMES,
    "interns1_pro": BY_NAMES,
    "k2_horizon": BY_NAMES,
    "longcat_flash_sparse": BY_NAMES,
    "magi2": "refused, because each head of the hidden state has its own experts",
    "ming_image": "a diffusion model; its text encoder is read by its tensors' names, as `bailing_moe`",
    "openpangu": BY_NAMES,
    "param2moe": BY_NAMES,
    "sarvam": BY_NAMES,
    "sarvam_moe": BY_NAMES,
    "sdar_moe": BY_NAMES,
    "step3_text": BY_NAMES,
    "step3_vl": BY_NAMES,
    "step5": BY_NAMES,
    "vitpose_backbone": "its experts are heads for data sets, chosen by the caller, not a mixture",
    "xllm": BY_NAMES + "; experts of the attention's values are not feed-forwards, and not read",
    "youtu_vl": BY_NAMES,
    "ffn_norm_exps": "a norm",
}

_TYPE = re.compile(r"""^\s+model_type(?:\s*:\s*[\w\[\], |]+)?\s*=\s*["']([\w.-]+)["']""", re.MULTILINE)
_CLASS = re.compile(r"^class (\w+)\(\s*ModelMixin", re.MULTILINE)
_HEAD = re.compile(r"_(?:mtp|nextn|eagle\d*|dspark|mtp_\w+)$|^(?:mtp|dflash|eagle)\w*$")
# parts of a model that have no experts of their own, and files that describe no model
_OTHER = re.compile(
    r"_(?:vision|audio|encoder|vision_model|vision_encoder|audio_encoder|text_encoder|code_predictor|common)$"
    r"|^(?:transformers|interfaces|expert_substitution|bert_with_rope|clip_vision_model|pixtral|moonvit\w*|qwen2"
    r"|perception_encoder|DFNRope_vision_transformer|siglip2_vision_model|minicpm)$"
)


def known_types() -> set[str]:
    """The types that a row of routed experts lists."""
    return {name for row in load_table() if row.kind == "routed" for name in row.model_types}


def find_types(source: Path) -> Iterator[tuple[str, str]]:
    """The library's name and a model type, for each type of a Mixture of Experts in its source."""
    for place, library in PLACES.items():
        for folder in sorted(source.glob(f"**/{place}")):
            for model in sorted(folder.iterdir()):
                yield from ((library, name) for name in _types_of(model, library) if not _OTHER.search(name))


def _types_of(model: Path, library: str) -> set[str]:
    """The model types of one model's file or folder, {} where it has no experts."""
    files = [model] if model.suffix == ".py" else sorted(model.rglob("*.py"))
    files = [file for file in files if not file.name.startswith(("switch_layers", "utils", "__init__", "base"))]
    texts = {file: file.read_text(encoding="utf-8", errors="replace") for file in files}
    if not any(re.search(EXPERTS[library], text) for text in texts.values()):
        return set()
    if library in ("vllm", "vllm_omni", "sglang"):
        return set() if _HEAD.search(model.stem) else {model.stem}
    if library == "diffusers":  # the name of a class is the type
        return {name for text in texts.values() for name in _CLASS.findall(text)}
    if library in ("transformers", "olmo_core"):
        return {name for file, text in texts.items() if "configuration" in file.name for name in _TYPE.findall(text)}
    stated = {name for text in texts.values() for name in _TYPE.findall(text)}
    return {model.stem} if model.suffix == ".py" else stated or {model.stem}


def missing(source: Path) -> dict[str, set[str]]:
    """The types without a row or a reason, each with the libraries that load it."""
    known, found = known_types(), {}
    for library, name in find_types(source):
        if name not in known and name not in REASONS and ALIASES.get(name) not in known:
            found.setdefault(name, set()).add(library)
    return found


def gguf_names(source: Path) -> set[str]:
    """The names of experts' tensors in gguf's table that no row has."""
    known = {name for row in load_table() for tensor in row.tensors for name in tensor.names}
    texts = [file.read_text(encoding="utf-8") for file in source.glob("**/gguf/constants.py")]
    found = {name for text in texts for name in re.findall(r'"blk\.\{bid\}\.(ffn_\w+_exps)"', text)}
    return found - known - set(REASONS)


def main(sources: list[str]) -> int:
    if not sources:
        print(__doc__)
        return 2
    lines = [
        f"{name}: {', '.join(sorted(libraries))}"
        for source in sources
        for name, libraries in sorted(missing(Path(source)).items())
    ]
    lines += [f"{name}: gguf" for source in sources for name in sorted(gguf_names(Path(source)))]
    print("\n".join(lines) or "every type has a row or a reason")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
