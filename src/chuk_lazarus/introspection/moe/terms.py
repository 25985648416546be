"""Terms that are used everywhere: the roles of an expert's matrices, and the possible verdicts."""

from typing import Literal

Origin = Literal["UPCYCLED", "NATIVE", "UNDETERMINED"]

ROLES = ("gate", "up", "down")

OVERLAY_CONFIG = "overlay_config"
"""The key of config.json that describes an overlay."""
