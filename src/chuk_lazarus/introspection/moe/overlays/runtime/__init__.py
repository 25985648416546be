"""Running overlays in MLX; importing this without MLX raises LibraryMissing, which says how to install it."""

from ...errors import LibraryMissing

try:
    import mlx.core  # noqa: F401
    import mlx_lm  # noqa: F401
except ModuleNotFoundError:
    raise LibraryMissing.of("mlx", "MLX and mlx-lm are not installed") from None
except ImportError as error:  # a package without its shared libraries, or for a newer glibc
    raise LibraryMissing.of("mlx", f"MLX can't be loaded: {error}") from None
