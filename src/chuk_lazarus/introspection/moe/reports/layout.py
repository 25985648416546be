"""What is in a checkpoint."""

from typing import Literal

from pydantic import Field

from .report import Cost, Identity, Report


class LayerLayout(Report):
    """How the routed experts of one layer are stored; `formats` are the storage formats by role, `shapes` are [out, in]
    by role, and bytes are those in the files."""

    layer: int
    storage: str
    formats: dict[str, str]
    experts: int
    shapes: dict[str, tuple[int, int]]
    parameters: int
    stored_bytes: int


class SharedExperts(Report):
    """The experts that every token passes through, in `layers`; shapes and bytes are those of one layer.

    Several shared experts are often stored as one matrix, and count as one here.
    """

    family: str
    storage: str
    layers: tuple[int, ...]
    shapes: dict[str, tuple[int, int]]
    stored_bytes: int


class FitPlan(Report):
    """Whether a model fits into a folder of `size` bytes, quantised for mlx-lm, and what that costs.

    `bits_per_weight` is what is left for each weight of the routed experts, everything counted, null if that is less
    than any width needs; `least_bytes` is the size of the smallest possible folder. `weight_error` (relative) is what
    to expect of such widths if the weights are Gaussian or, if `measured` is true, what was measured on the model;
    `bound` is the smallest error of any code of Gaussian weights. Everything else takes `rest_bytes` at `rest_bits`
    (null: as stored). `memory_bytes` counts the weights and the cache of `context` tokens, and `machine_bytes` is the
    memory of the smallest Mac that runs it. What headers and config do not tell is null.
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

    `family` is the row of the layout table, `stack` the prefix of the tensors' names, and `stacks` all such prefixes
    with experts. `tensors` names the stored tensors of the first described layer by what they hold. `layers` are the
    layers whose headers were read. `order` is how gate and up rows are arranged in a tensor that holds both, and
    `order_by` how that is known: from the model type, the tensors' names, or the norms of the weights.

    `exact` says whether `layers` are all layers; if not, `parameters` and `stored_bytes`, those of all routed experts
    of `moe_layers`, assume that the others are like them. `dense_layers` have a dense feed-forward, instead of experts
    or beside them. `analysis_bytes` is what an analysis with default options would read of the experts, of which
    `further_bytes` are parts of `further_layers`, and `quick_bytes` the most that a quick one would read. `other_bytes`
    counts everything but routed experts, and `cache_bytes_per_token` is the most that keys and values of a token take;
    null if headers and config do not tell. `fit` is there if a size was asked for.
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
