"""What `lazarus --version` prints: all that matters when something is wrong on somebody else's machine."""

import platform
from importlib.metadata import PackageNotFoundError, version

from chuk_lazarus import __version__

LIBRARIES = ("numpy", "scipy", "safetensors", "gguf", "huggingface_hub", "matplotlib")
EXTRAS = {"mlx": "mlx", "mlx-lm": "mlx", "numba": "trellis", "distributed": "dask"}


def describe_version() -> str:
    """Our version, and those of Python and of the libraries that are installed; of extras also which are not."""
    libc = " ".join(platform.libc_ver()).strip()
    system = ", ".join(filter(None, [f"{platform.system()} {platform.machine()}", libc]))
    found = {name: _version(name) for name in (*LIBRARIES, *EXTRAS)}
    lines = [f"{name} {number}" for name, number in found.items() if number]
    lines += [
        f'{name} is not installed: pip install "chuk-lazarus[{extra}]"'
        for name, extra in EXTRAS.items()
        if not found[name]
    ]
    return "\n".join([f"lazarus {__version__}", f"Python {platform.python_version()} on {system}", *lines])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
