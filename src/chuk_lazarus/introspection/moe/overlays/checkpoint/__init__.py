"""Overlays on disk."""
