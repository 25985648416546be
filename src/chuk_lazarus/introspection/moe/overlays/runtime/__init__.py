"""Overlays at work, in MLX."""
