"""Words that have one meaning everywhere: the roles of an expert's matrices, and what a verdict can be."""

from typing import Literal

Origin = Literal["UPCYCLED", "NATIVE", "UNDETERMINED"]

ROLES = ("gate", "up", "down")

OVERLAY_CONFIG = "overlay_config"
"""The key of config.json that describes an overlay."""
