"""Whether a conversion is still the same model."""

from typing import Literal

from pydantic import Field

from .report import Cost, Identity, Report

FaultKind = Literal[
    "unquantised",
    "missing",
    "empty",
    "identical",
    "reordered",
    "exchanged",
    "transposed",
    "interleaved",
    "scale",
    "rotated",
    "router",
    "error",
]


class WeightFault(Report):
    """What is wrong; `role` and `expert` are null if it concerns all of them."""

    layer: int
    role: str | None
    expert: int | None
    fault: FaultKind
    detail: str


class ProjectionConversion(Report):
    """One projection of a layer's compared experts, in the conversion and in the original.

    `error` is the relative Frobenius error of each expert, in the order of the layer's `experts`, null if it is not
    finite or could not be read; `mean` and `max` are over those that are numbers. `expected_error` is the mean error of
    plain rounding of the same weights to this format. `ratio` is the largest ratio of an expert's error to its expected
    error, which always allows for arithmetic in bfloat16.
    """

    format: str
    original_format: str
    bits_per_weight: float
    expected_error: float
    mean: float | None
    max: float | None
    ratio: float | None
    error: tuple[float | None, ...]


class LayerConversion(Report):
    """A layer's `experts` that were compared, by role; `router_error` is the relative error of the router's weights,
    null if either model has no router that we find."""

    layer: int
    experts: tuple[int, ...]
    projections: dict[str, ProjectionConversion]
    router_error: float | None


class MoEWeightsVerification(Identity):
    """Whether the experts of a converted model are those of the original, and what is wrong with those that are not.

    `family`, `storage` and the like describe the conversion. It passes if there are no faults; an expert is a fault if
    its error is more than `tolerance` times what its format should cost. `notes` list harmless differences.
    """

    schema_: Literal["moe-weights-verification/1"] = Field(default="moe-weights-verification/1", alias="schema")
    passed: bool
    against: str
    against_revision: str | None
    against_storage: str
    tolerance: float
    moe_layers: tuple[int, ...]
    faults: tuple[WeightFault, ...]
    layers: tuple[LayerConversion, ...]
    notes: tuple[str, ...]
    cost: Cost
