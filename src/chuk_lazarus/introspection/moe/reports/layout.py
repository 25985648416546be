"""What is in a checkpoint."""

from typing import Literal

from pydantic import Field

from .report import Cost, Identity, Report


class LayerLayout(Report):
    """How one layer's routed experts lie in the files; `formats` are the storage formats by role, shapes [out, in] by
    role, bytes what the files spend."""

    layer: int
    storage: str
    formats: dict[str, str]
    experts: int
    shapes: dict[str, tuple[int, int]]
    parameters: int
    stored_bytes: int


class SharedExperts(Report):
    """The experts that every token passes through, in `layers`; shapes and bytes are those of one layer.

    Several shared experts often lie in one matrix, and are one here.
    """

    family: str
    storage: str
    layers: tuple[int, ...]
    shapes: dict[str, tuple[int, int]]
    stored_bytes: int


class FitPlan(Report):
    """Whether a model fits into a folder of `size` bytes, quantised for mlx-lm, and what that costs.

    `bits_per_weight` are those that are left for each weight of the routed experts, everything counted, null where
    these are fewer than any width has; `least_bytes` is the least folder. The relative `weight_error` is what to expect
    of such widths, were the weights Gaussian, or, where `measured` is true, what was measured on the model; `bound` is
    the least of any code of Gaussian weights. All else, `rest_bytes`, has `rest_bits` (null: as stored). `memory_bytes`
    are weights and cache of `context` tokens, `machine_bytes` the memory of the smallest Mac that runs it. Null is what
    headers and config do not tell.
    """

    size: int
    fits: bool
    bits_per_weight: float | None
    weight_error: float | None
    bound: float | None
    measured: bool = False
    least_bytes: int
    rest_bits: int | None
    rest_bytes: int | None
    context: int
    cache_bytes: int | None
    memory_bytes: int | None
    machine_bytes: int | None
    download_bytes: int


class MoELayout(Identity):
    """What is in a checkpoint, from its headers alone.

    `family` is the row of the layout table, `stack` what the tensors' names begin with, `stacks` all such
    beginnings with experts; `tensors` names the stored tensors of the first described layer by what they hold.
    `layers` are the layers whose headers were read; `order` is how gates and ups lie in a tensor that holds both,
    and `order_by` what tells it: the model type, the tensors' names, or the norms of the weights. `exact` says
    whether these are all, else `parameters` and `stored_bytes`, those of all routed experts of `moe_layers`, take
    the others to be like them. `dense_layers` have a dense feed-forward, in the place of experts or beside them.
    `analysis_bytes` is what an analysis with default options would read of the experts, of which `further_bytes`
    are parts of `further_layers`, and `quick_bytes` what a quick one would at most.
    `other_bytes` are those of all else than routed experts, and `cache_bytes_per_token` what keys and values of a token
    take at most; null where headers and config do not tell. `fit` is there where a size was asked for.
    """

    schema_: Literal["moe-layout/1"] = Field(default="moe-layout/1", alias="schema")
    stack: str
    stacks: tuple[str, ...]
    top_k: int
    activation: str
    moe_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    tensors: dict[str, tuple[str, ...]]
    order: Literal["halves", "turns"] | None = None
    order_by: Literal["model_type", "names", "norms"] | None = None
    layers: tuple[LayerLayout, ...]
    shared: SharedExperts | None
    exact: bool
    parameters: int
    stored_bytes: int
    other_bytes: int | None = None
    cache_bytes_per_token: int | None = None
    fit: FitPlan | None = None
    analysis_bytes: int
    further_layers: tuple[int, ...] = ()
    further_bytes: int = 0
    quick_bytes: int
    notes: tuple[str, ...]
    cost: Cost
