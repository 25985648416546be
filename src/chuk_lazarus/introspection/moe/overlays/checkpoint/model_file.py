"""The file in an overlay's folder by which mlx-lm's own programs run it.

config.json names it as `model_file`, and mlx-lm executes it with `--trust-remote-code`. We never do.
"""

from collections.abc import Mapping
from typing import Any

KEY = "model_file"
MODEL_FILE = "overlay_model.py"

CONTENT = b'''\
"""How mlx-lm loads this overlay, where chuk-lazarus is installed:

    mlx_lm.generate --model FOLDER --trust-remote-code
"""

from pathlib import Path

from chuk_lazarus.introspection.moe import overlay_classes

Model, ModelArgs = overlay_classes(Path(__file__).parent)
'''


def name_model_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the file named in it; that of a model with code of its own stays as it is."""
    return {KEY: MODEL_FILE, **config}


def forget_model_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `name_model_file`."""
    return {key: value for key, value in config.items() if (key, value) != (KEY, MODEL_FILE)}
