"""Every row of the layout table in every storage format that it can have: what is encoded is what `Experts` reads.

A row's names and axes come from the table's text, the storage from the reference encoders, which are written from the
formats' specifications, or from the gguf package; matrices, sizes and everything that a checkpoint leaves open are
drawn. A matrix is encoded as it lies in the file: gate and up fused, or turned, first.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from math import lcm
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import encoders_float
import encoders_packed
from checkpoints_in_memory import TABLE, Memory, roles_of, row_axes, store
from chuk_lazarus.introspection.moe.errors import MoEError
from chuk_lazarus.introspection.moe.weights.checkpoint import Checkpoint
from chuk_lazarus.introspection.moe.weights.expert_layer import ExpertLayer
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.layouts import Layout
from encoded import Encoded
from sampling import THOROUGH, in_turn, one_of_each_kind, sampled

Array = NDArray[Any]
Matrix = NDArray[np.float32]
Matrices = dict[str, Matrix]  # role -> [experts, out, in]
Tensors = dict[str, tuple[str, Array]]  # name -> safetensors dtype, array
Encoder = Callable[[Matrix, np.random.Generator], Encoded]

# ---------------------------------------------------------------------------------------------------------------------
# Formats: those of the reference encoders, and what only turned stacks have


def fp8_column(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    """A stored matrix [in, out] with a scale for each output, as compressed-tensors and ModelOpt have Llama 4."""
    encoded = encoders_float.fp8_channel(matrix.T, rng)
    parts = {name: (dtype, np.ascontiguousarray(array.T)) for name, (dtype, array) in encoded.parts.items()}
    return Encoded(parts, encoded.values.T, encoded.quantization)


def nvfp4_turned(matrix: Matrix, rng: np.random.Generator) -> Encoded:
    """A stored matrix [in, out] in groups of inputs, as ModelOpt has Llama 4 and GPT-OSS."""
    encoded = encoders_float.nvfp4_modelopt(matrix.T, rng)
    parts = {name: (dtype, np.ascontiguousarray(array.T)) for name, (dtype, array) in encoded.parts.items()}
    return Encoded(parts | {"weight": ("U8", parts["weight"][1])}, encoded.values.T, encoded.quantization)


ENCODERS: dict[str, tuple[Encoder, tuple[int, int]]] = {
    **encoders_float.ENCODERS,
    **encoders_packed.ENCODERS,
    "fp8_column": (fp8_column, (1, 1)),
    "nvfp4_turned": (nvfp4_turned, (16, 1)),
}

PER_MATRIX = {
    "fp8_tensor": "weight_scale",
    "fp8_e5m2_tensor": "weight_scale_inv",
    "int8_tensor": "weight_scale",
    "nvfp4_modelopt": "weight_scale_2",
    "nvfp4_compressed": "weight_global_scale",
    "nvfp4_turned": "weight_scale_2",
    "nvfp4_scale2": "scale2",
    "mlx_nvfp4_global": "global_scale",
    "mlx_nvfp4_scale_2": "weight_scale_2",
    "mlx_nvfp4_global_scale": "weight_global_scale",
    "modelopt_w4a8": "weight_scale_2",
}
"""The part that is one number for a whole matrix: one for each expert of a stack, or one for all."""

TALL: dict[str, int | Fraction] = {
    "fp8_block": 16,
    "fp8_block_ue8m0": 16,
    "fp8_block_compressed": 16,
    "fp8_block_modelopt": 128,
    "pack_int4_asym": 8,
    "pack_int4_channel_asym": 8,
    "pack_int4_asym_actorder": 8,
    "pack_int4_ragged": 8,
    "pack_int8_asym": 4,
    "pack_int2": 16,
    "pack_int1": 32,
    "pack_int3_asym": Fraction(32, 3),
    "pack_int6_asym": Fraction(32, 6),
    "int8_block": 16,
    "quark_int4_channel": 8,
    "modelopt_int4": 2,
    "modelopt_w4a8": 2,
}
"""How many rows share a scale, or a word: a flattened tensor is refused where these are rows of two experts."""

ELEMENTS = {
    "bnb_nf4": 64,
    "bnb_fp4": 64,
    "bnb_nf4_nested": 4 * 64,
    "bnb_fp4_nested": 4 * 64,
    "bnb_nf4_bf16_storage": 32,
}
"""The same for formats whose blocks run on over the rows, in elements."""

BARE = {
    "weight": ("",),
    "blocks": ("_blocks",),
    "scales": ("_scales",),
    "scale": ("_scale",),
    "weight_scale": ("_scale", "_weight_scale"),
    "weight_scale_inv": ("_scale_inv", "_weight_scale_inv"),
    "weight_scale_2": ("_scale_2", "_weight_scale_2"),
    "weight_packed": ("_packed", "_weight_packed"),
    "weight_shape": ("_shape", "_weight_shape"),
    "weight_zero_point": ("_zero_point", "_weight_zero_point"),
    "weight_g_idx": ("_g_idx",),
    "weight_global_scale": ("_global_scale", "_weight_global_scale"),
    "weight_amax": ("_amax",),
    "weight_outer_scale_denominator": ("_outer_scale_denominator",),
    "pre_quant_scale": ("_pre_quant_scale",),
}
"""What a part is called behind the name of a bare parameter, which no module holds."""


# ---------------------------------------------------------------------------------------------------------------------
# Rows, and what is left out


@cache
def traits(row: Layout) -> frozenset[str]:
    """What decides which formats a row can have: how its tensors lie, and whether a gate and its up lie in halves."""
    axes = row_axes(row)
    form = {"E": "stacks", "(E": "flattened"}.get(axes["down"].split()[0], "modules")
    return frozenset({form, "halves" if any(is_halves(each) for each in axes.values()) else "no halves"})


def turns_inputs(axes: str, role: str) -> bool:
    """Whether a tensor with these axes has its inputs on the last axis but one."""
    return not axes.endswith(" I" if role == "down" else " H")


def is_halves(axes: str) -> bool:
    """Whether the first half of a stored matrix's rows are the gate's, the second the up's, or the other way round."""
    return axes.endswith("(2 I) H")


@dataclass(frozen=True)
class Exclusion:
    """Formats that rows with a trait can't have; `refused` says that they are refused where they are found anyway."""

    trait: str
    formats: tuple[str, ...]
    reason: str
    refused: bool = True


BNB_4BIT = tuple(name for name in ENCODERS if name.startswith("bnb_") and name != "bnb_int8")
QUARK_INTEGERS = tuple(name for name in ENCODERS if name.startswith(("quark_int", "quark_uint")))
INPUTS_FIRST = (
    *(name for name in ENCODERS if name.startswith(("gptq", "awq", "auto_round"))),
    *(name for name in QUARK_INTEGERS if name.endswith("group")),
)
EXCLUDED = (
    Exclusion("stacks", BNB_4BIT, "a quant_state describes one matrix"),
    Exclusion("stacks", QUARK_INTEGERS, "Quark packs matrices alone"),
    Exclusion("flattened", INPUTS_FIRST, "stored [in, out], where the experts' rows are columns"),
    Exclusion("modules", ("nvfp4_turned",), "only stacks are stored turned"),
    Exclusion("flattened", ("nvfp4_turned",), "only stacks are stored turned"),
    Exclusion("no halves", ("nvfp4_halves",), "the two second scales are a gate's and its up's", refused=False),
)

ROWS = {name: row for name, row in TABLE.items() if "gguf" not in name}
GGUF_ROWS = {name: row for name, row in TABLE.items() if "gguf" in name}


def exclusion(row: Layout, name: str) -> Exclusion | None:
    return next((one for one in EXCLUDED if one.trait in traits(row) and name in one.formats), None)


COVERED = [(row.name, name) for row in ROWS.values() for name in ENCODERS if not exclusion(row, name)]
REFUSED = [
    (row.name, name) for row in ROWS.values() for name in ENCODERS if (one := exclusion(row, name)) and one.refused
]


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint of one layer


@dataclass(frozen=True)
class Case:
    """What is drawn for a checkpoint; all else comes from the seed."""

    experts: int
    intermediate: int
    hidden: int
    seed: int
    dotted: bool  # the names of stacks' parts: a module's, or a bare parameter's
    one_scale: bool  # what is one number for a matrix is one for the whole stack
    biases: bool
    beside: bool  # a router and a shared expert
    scaled: bool = False  # factors of the inputs beside each tensor

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


def is_slow(name: str) -> bool:
    """Whether the encoder goes from element to element."""
    return name in encoders_packed.ENCODERS


def multiples(unit: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(1, max(1, most // unit)).map(lambda count: count * unit)


def make_cases(row: Layout, name: str, scaled: bool = False) -> st.SearchStrategy[Case]:
    unit = lcm(*ENCODERS[name][1])
    size = multiples(unit, 40 if is_slow(name) else 70)
    intermediate = size
    if "flattened" in traits(row) and (shared := TALL.get(name) or ELEMENTS.get(name)):
        intermediate |= st.just(lcm(Fraction(shared).numerator, unit))  # so that no two experts share it
    elif is_slow(name) and unit == 32:
        intermediate = st.sampled_from([32, 64])
    return st.builds(
        Case,
        experts=st.integers(2, 3 if is_slow(name) else 9 if unit == 1 else 4),
        intermediate=intermediate,
        hidden=size,
        seed=st.integers(0, 2**32 - 1),
        scaled=st.just(scaled),
    )


def random_matrices(row: Layout, case: Case) -> Matrices:
    """By role; the sizes of numbers differ from row to row and from column to column."""
    rng = case.rng
    experts = 1 if is_single(row) else case.experts
    shapes = dict.fromkeys(("gate", "up"), (case.intermediate, case.hidden))
    shapes["down"] = (case.hidden, case.intermediate)
    return {
        role: (
            rng.standard_normal((experts, *shapes[role]))
            * np.exp2(rng.integers(-6, 3, (experts, shapes[role][0], 1)))
            * np.exp2(rng.integers(-2, 2, (experts, 1, shapes[role][1])))
        ).astype(np.float32)
        for role in sorted(roles_of(row))
    }


def is_single(row: Layout) -> bool:
    """Whether a layer has one such expert: a dense layer, and most shared experts."""
    return row.kind != "routed" and not row_axes(row)["down"].startswith("E")


def cut(axes: str, role: str, stored: Array, matrices: Matrices) -> Matrices:
    """The roles' matrices in a tensor stored with these axes: `store` of their places tells where each weight went."""
    roles = role.split("_")
    size = matrices[roles[0]].size
    places = {each: np.arange(size).reshape(matrices[each].shape) + number * size for number, each in enumerate(roles)}
    values = np.empty(size * len(roles), np.float32)
    values[store(axes, role, places).reshape(-1)] = stored.reshape(-1)
    return {each: values[places[each]] for each in roles}


@dataclass
class Written:
    """The tensors of a checkpoint as they are encoded, and what they mean."""

    tensors: Tensors = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    values: Matrices = field(default_factory=dict)
    router: Matrix | None = None
    shared: dict[str, Matrix] = field(default_factory=dict)  # role -> a shared expert's matrix

    @property
    def repository(self) -> Memory:
        entries, data = {}, b""
        for name, (dtype, array) in self.tensors.items():
            # a shape counts elements, of which F4 has two a byte
            shape = (*array.shape[:-1], array.shape[-1] * 2) if dtype == "F4" else array.shape
            start, data = len(data), data + array.tobytes()
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, len(data)]}
        header = json.dumps(entries).encode()
        contents = {
            "model.safetensors": struct.pack("<Q", len(header)) + header + data,
            "config.json": json.dumps(self.config).encode(),
        }
        return Memory(contents)

    def __str__(self) -> str:
        listing = [f"  {name} {dtype} {list(array.shape)}" for name, (dtype, array) in self.tensors.items()]
        return "\n".join(["stored as", *listing, f"config {json.dumps(self.config)}"])


class Writer:
    """Encodes the tensors of a row in a format."""

    def __init__(self, row: Layout, name: str, case: Case) -> None:
        self.row, self.name, self.case = row, name, case
        self.rng = case.rng
        self.written = Written()
        self.quantization: dict[str, Any] | None = None
        self.prefix = str(self.rng.choice(["model.layers.0.", "transformer.blocks.3.", "language_model.h.11."]))

    def write(self) -> Written:
        matrices, written = random_matrices(self.row, self.case), self.written
        block = int(self.rng.integers(100))
        for tensor in self.row.tensors:
            axes = row_axes(self.row)[tensor.role]
            stored = store(axes, tensor.role, matrices)
            template = self.prefix + tensor.names[block % len(tensor.names)]
            values = self._write_tensor(template, axes, stored, tensor.role)
            if self.case.scaled:
                values = self._scale_inputs(template, axes, tensor.role, values)
            written.values |= cut(axes, tensor.role, values, matrices)
        types = sorted(self.row.model_types) or ["mystery"]
        written.config["model_type"] = types[int(self.rng.integers(len(types)))]
        if self.quantization:
            key = "quantization" if self.name.startswith("mlx") else "quantization_config"
            written.config[key] = self.quantization
        if self.row.kind == "routed":
            self._write_beside()
        return written

    def _write_tensor(self, template: str, axes: str, stored: Matrix, role: str) -> Array:
        flattened, stacked = axes.startswith("(E"), axes.startswith("E ")
        if stacked and self.case.one_scale and self.name in PER_MATRIX:
            # by encoding all experts as one matrix
            whole = self._encode(stored.reshape(-1, stored.shape[-1]), template, role, 0)
            parts = {
                part: (dtype, self._spread(array, stored, part == PER_MATRIX[self.name]))
                for part, (dtype, array) in whole.parts.items()
            }
            self._add(template, parts, stored.shape[:2], stack=True)
            return whole.values.reshape(stored.shape)
        if flattened or (stacked and self.name in BNB_4BIT):
            whole = self._encode(stored, template, role, 0)
            self._add(template, whole.parts, stored.shape[:-1], stack=True)
            return whole.values
        names = [template.replace("{expert}", str(expert)) for expert in range(len(stored))]
        alike = stacked and not is_slow(self.name)  # a stack's parts have one dtype; the slow choose only an order
        experts = [
            self._encode(matrix, names[number], role, 0 if alike else number) for number, matrix in enumerate(stored)
        ]
        if stacked:
            self._add(template, self._stack(experts), stored.shape[:2], stack=True)
        else:
            for own, encoded in zip(names, experts, strict=True):
                self._add(own, encoded.parts, stored.shape[1:2], stack=False)
        return np.stack([encoded.values for encoded in experts])

    def _scale_inputs(self, template: str, axes: str, role: str, values: Array) -> Array:
        """Put factors of the inputs beside a stored tensor; returns its values with these multiplied."""
        stacked = axes.startswith("E ")
        count, inputs = len(values), values.shape[-2 if turns_inputs(axes, role) else -1]
        one = axes.startswith("(E") or (stacked and self.case.one_scale)
        factors = np.exp2(self.rng.integers(-5, 6, (1 if one else count, inputs))).astype(ml_dtypes.bfloat16)
        if stacked or axes.startswith("(E"):
            shared = ((1, inputs), (inputs,)) if inputs != count else ((1, inputs),)
            shape = shared[-1] if one else ((count, inputs), (count, 1, inputs))[int(self.rng.integers(2))]
            self._add(template, {"pre_quant_scale": ("BF16", factors.reshape(shape))}, (), stack=stacked, bias=False)
        else:
            for expert, own in enumerate(factors):
                part = {"pre_quant_scale": ("BF16", own)}
                self._add(template.replace("{expert}", str(expert)), part, (), stack=False, bias=False)
        each = factors.astype(np.float32)
        if axes.startswith("(E"):
            return values if turns_inputs(axes, role) else values * each  # those are refused
        return values * (each[:, :, None] if turns_inputs(axes, role) else each[:, None])

    def _encode(self, matrix: Matrix, module: str, role: str, expert: int) -> Encoded:
        """Encode a matrix, choosing what the config has said already."""
        name = self.name
        if name == "nvfp4_halves" and not is_halves(row_axes(self.row)[role]):
            name = "nvfp4_modelopt"
        encoder = ENCODERS[name][0]
        is_mlx = name.startswith("mlx")
        for seed in ([self.case.seed, expert, len(role)], [self.case.seed]):
            encoded = encoder(matrix, np.random.default_rng(seed))
            if is_mlx or self.quantization in (None, encoded.quantization):
                break
        if self.quantization is None:
            self.quantization = dict(encoded.quantization)
        elif is_mlx and any(self.quantization.get(key) != value for key, value in encoded.quantization.items()):
            self.quantization[module] = encoded.quantization  # MLX says so by module
        return encoded

    def _stack(self, experts: list[Encoded]) -> Tensors:
        parts: Tensors = {}
        for part, (dtype, first) in experts[0].parts.items():
            stack = np.stack([encoded.parts[part][1] for encoded in experts])
            if part == "weight_format":
                stack = first
            elif part == "weight_shape":
                stack = (first, stack, np.array([len(experts), *first], np.int64))[int(self.rng.integers(3))]
            elif part == PER_MATRIX.get(self.name):
                stack = stack.reshape(len(experts), *[1] * int(self.rng.integers(3)))
            parts[part] = (dtype, stack)
        return parts

    def _spread(self, array: Array, stored: Matrix, per_matrix: bool) -> Array:
        """A part of a matrix that is all experts' rows, cut by expert."""
        if per_matrix:
            # [1, 1] beside integers of a single row is taken for a scale of that row, and refused in a stack
            ways = ((), (1,)) if stored.shape[1] == 1 else ((), (1,), (1, 1))
            return array.reshape(ways[int(self.rng.integers(len(ways)))])
        return array.reshape(len(stored), -1, *array.shape[1:])

    def _add(self, name: str, parts: Tensors, outputs: Sequence[int], *, stack: bool, bias: bool = True) -> None:
        """Name the parts of a stored tensor, and perhaps put a bias beside it."""
        bare = stack and not self.case.dotted and parts.keys() <= BARE.keys()
        way = int(self.rng.integers(2))
        for part, stored in parts.items():
            behind = BARE[part][way % len(BARE[part])] if bare else f".{part}"
            self.written.tensors[name + behind] = stored
        if self.case.biases and bias:
            vector = self.rng.standard_normal(outputs).astype(ml_dtypes.bfloat16)
            vector[...] = np.where(self.rng.random(outputs) < 0.2, np.nan, vector)
            self.written.tensors[f"{name}{'_' if bare else '.'}bias"] = ("BF16", vector)

    def _write_beside(self) -> None:
        """A router and a shared expert in plain numbers; who says how many experts a flattened tensor holds."""
        experts, hidden = self.case.experts, self.case.hidden
        flattened = "flattened" in traits(self.row)
        says = int(self.rng.integers(1, 4))  # the router, the config or both
        if self.case.beside or self.row.routed_only or (flattened and says != 2):
            routers = ("mlp.gate", "mlp.router.layer", "ffn.router.layer", "block_sparse_moe.gate")
            name = self.prefix + str(self.rng.choice(routers))
            router = self.rng.standard_normal((experts, hidden)).astype(np.float32)
            self.written.router = router
            self.written.tensors[f"{name}.weight"] = ("F32", router)
        if says != 1:
            self.written.config["num_experts"] = experts
        if self.case.beside:
            for role, shape in (("gate", (5, hidden)), ("up", (5, hidden)), ("down", (hidden, 5))):
                matrix = self.rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
                self.written.shared[role] = matrix.astype(np.float32)
                self.written.tensors[f"{self.prefix}mlp.shared_experts.{role}_proj.weight"] = ("BF16", matrix)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def assert_equal(found: Array, expected: Array, name: str, what: str) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape, what
    if name == "bnb_int8":  # weight * SCB / 127, rounded at another place
        np.testing.assert_allclose(found, expected, rtol=2e-7, err_msg=what)
    else:
        np.testing.assert_array_equal(found, expected, err_msg=what)


def assert_read(layer: ExpertLayer, expected: Mapping[str, Matrix], rng: np.random.Generator, name: str) -> None:
    """All matrices, and some windows of rows of some experts."""
    count = len(expected["down"])
    assert (layer.count, sorted(layer.roles)) == (count, sorted(expected))
    for expert in range(count):
        for role, matrix in layer.matrices(expert).items():
            assert_equal(matrix, expected[role][expert], name, f"{role} of expert {expert}")
    for tensor in layer.tensors:
        windows = tensor.windows(int(rng.integers(1, 1 + count * tensor.rows * tensor.columns)))
        assert [low for low, _ in windows] == [0, *(high for _, high in windows[:-1])]
        assert windows[-1][1] == tensor.rows
        low, high = sorted(int(row) for row in rng.choice(tensor.rows + 1, 2, replace=False))
        experts = [int(each) for each in rng.permutation(count)[: rng.integers(1, 4)]]
        for start, stop in ((low, high), *(windows[int(rng.integers(len(windows)))] for _ in range(2))):
            for piece in tensor.read(experts, start, stop):
                what = f"{piece.role} of experts {experts} in stored rows {start} to {stop}"
                assert_equal(piece.values, expected[piece.role][experts][:, *piece.index], name, what)


def assert_beside(experts: Experts, layer: ExpertLayer, written: Written) -> None:
    """The router and the shared expert, where there are such."""
    router = layer.router()
    assert (router is None) == (written.router is None)
    if router is not None:
        np.testing.assert_array_equal(router.weight, written.router)
    if written.shared:
        found = Experts(experts.checkpoint, "shared").layer(layer.number).matrices(0)
        assert found.keys() == written.shared.keys()
        for role, matrix in found.items():
            np.testing.assert_array_equal(matrix, written.shared[role])


def is_cut(row: Layout, name: str, case: Case) -> bool:
    """Whether rows of two experts, or of gate and up, share something or might, so that the tensor is refused."""
    if any(tensor.axes.groups[0] == ("2", "I") for tensor in row.tensors):
        size, span = case.intermediate, min(TALL.get(name, 1), 2 * case.intermediate)
        return size % span != 0 and 2 * -(-size // span) == -(-2 * size // span)
    if "flattened" not in traits(row):
        return False
    if name in ELEMENTS:
        return case.intermediate * case.hidden % ELEMENTS[name] != 0
    return case.intermediate % min(TALL.get(name, 1), case.experts * case.intermediate) != 0


def assert_opened(experts: Experts, row: Layout, written: Written, case: Case, name: str) -> None:
    assert experts.family == row.name
    layer = experts.layer(experts.layers[0])
    assert_read(layer, written.values, case.rng, name)
    assert_beside(experts, layer, written)


@contextmanager
def describe(written: Written) -> Iterator[None]:
    """Say beside an error what was stored."""
    try:
        yield
    except BaseException as error:
        error.add_note(str(written))
        raise


def check(row: Layout, name: str, case: Case) -> None:
    written = Writer(row, name, case).write()
    refused = pytest.raises(MoEError) if is_cut(row, name, case) else nullcontext()
    with describe(written), refused:
        assert_opened(Experts(Checkpoint(written.repository), row.kind), row, written, case, name)


def kind_of(row: str, name: str) -> tuple[frozenset[str], str]:
    """What a row and a format have in common with others: the format, and how the row's tensors lie."""
    return traits(TABLE[row]), name


def named(row: str, name: str) -> str:
    return f"{row}-{name}"


SAMPLE = one_of_each_kind(COVERED, kind_of)
SAMPLE_REFUSED = one_of_each_kind(REFUSED, kind_of)


def fuzz(examples: int, cases: st.SearchStrategy[Case], run: Callable[[Case], None]) -> None:
    """Run with some cases; a case that fails is printed."""
    # the same cases in every run: so many combinations, drawn anew each time, would find a rare one now and then
    how = settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    how(given(case=cases)(lambda case: run(case)))()


@pytest.mark.hypothesis  # whose cases it tries, more of them in the thorough run
@pytest.mark.parametrize(("row", "name"), sampled(COVERED, SAMPLE, named))
def test_what_is_encoded_is_what_is_read(row: str, name: str) -> None:
    if name.startswith("mlx"):
        pytest.importorskip("mlx.core")
    count = 3 if THOROUGH and not is_slow(name) else 2
    fuzz(count, make_cases(TABLE[row], name), lambda case: check(TABLE[row], name, case))


@pytest.mark.parametrize(("row", "name"), sampled(REFUSED, SAMPLE_REFUSED, named))
def test_a_format_that_a_row_can_not_have_is_refused(row: str, name: str) -> None:
    def run(case: Case) -> None:
        written = Writer(TABLE[row], name, case).write()
        with describe(written), pytest.raises(MoEError):
            read_whole(Experts(Checkpoint(written.repository), TABLE[row].kind))

    fuzz(1, make_cases(TABLE[row], name), run)


# what ModelOpt writes beside factors of the inputs, and formats that are stored turned
BESIDE_FACTORS = ("nvfp4_modelopt", "nvfp4_turned", "fp8_tensor", "fp8_block_modelopt", "fp8_column", "int8_channel",
                  "modelopt_int4", "modelopt_w4a8", "bf16", "awq_4")  # fmt: skip
SCALED = [(row, name) for row, name in COVERED if name in BESIDE_FACTORS]


def kind_of_scaled(row: str, name: str) -> tuple[Any, ...]:
    axes = row_axes(TABLE[row])
    return (*kind_of(row, name), *sorted({turns_inputs(axis, role) for role, axis in axes.items()}))


@pytest.mark.parametrize(("row", "name"), sampled(SCALED, one_of_each_kind(SCALED, kind_of_scaled), named))
def test_what_is_divided_by_factors_of_its_inputs_is_multiplied_by_them(row: str, name: str) -> None:
    axes = row_axes(TABLE[row])
    is_refused = "flattened" in traits(TABLE[row]) and any(turns_inputs(axis, role) for role, axis in axes.items())

    def run(case: Case) -> None:
        written = Writer(TABLE[row], name, case).write()
        refused = pytest.raises(MoEError) if is_refused or is_cut(TABLE[row], name, case) else nullcontext()
        with describe(written), refused:
            assert_opened(Experts(Checkpoint(written.repository), TABLE[row].kind), TABLE[row], written, case, name)

    fuzz(2 if is_slow(name) else 4, make_cases(TABLE[row], name, scaled=True), run)


def read_whole(experts: Experts) -> None:
    layer = experts.layer(experts.layers[0])
    for expert in range(layer.count):
        layer.matrices(expert)


def test_every_row_and_every_format_is_covered() -> None:
    assert {row for row, _ in COVERED} | GGUF_ROWS.keys() == TABLE.keys()
    assert {name for _, name in COVERED} == ENCODERS.keys()
    assert all(any(exclusion(row, name) is one for row in ROWS.values() for name in one.formats) for one in EXCLUDED)


def test_the_sample_has_every_row_every_format_and_both_in_all_ways() -> None:
    """What runs by default, of which the rest is marked long."""
    assert {row for row, _ in SAMPLE} == ROWS.keys()
    assert {name for _, name in SAMPLE} == ENCODERS.keys()
    for sample, pairs in ((SAMPLE, COVERED), (SAMPLE_REFUSED, REFUSED)):
        assert set(sample) <= set(pairs)
        assert {kind_of(*pair) for pair in sample} == {kind_of(*pair) for pair in pairs}
    assert {row for row, _ in SAMPLE_BY_TYPE} == GGUF_ROWS.keys()
    assert {name for _, name in SAMPLE_BY_TYPE} == TYPES.keys()


# ---------------------------------------------------------------------------------------------------------------------
# GGUF


def can_quantise(kind: GGMLQuantizationType) -> bool:
    try:
        gguf.quants.quantize(np.zeros((1, GGML_QUANT_SIZES[kind][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return True


TYPES = {kind.name: kind for kind in GGMLQuantizationType if can_quantise(kind)}
BY_TYPE = [(row, name) for row in GGUF_ROWS for name in TYPES]
SAMPLE_BY_TYPE = in_turn(list(GGUF_ROWS), list(TYPES))


def make_gguf_cases(name: str) -> st.SearchStrategy[Case]:
    block = GGML_QUANT_SIZES[TYPES[name]][0]
    size = multiples(block, 96)
    return st.builds(Case, st.integers(2, 9 if block == 1 else 4), size, size, st.integers(0, 2**32 - 1))


def write_gguf(row: Layout, name: str, case: Case, path: Path) -> Written:
    """A file of one layer by the package's own writer; what its types mean is what the package makes of them."""
    rng, matrices, written = case.rng, random_matrices(row, case), Written()
    writer = gguf.GGUFWriter(path, str(rng.choice(["llama", "mixtral", "qwen3moe"])))
    prefix = f"blk.{rng.integers(3)}."

    def add(tensor: str, values: Matrix, kind: GGMLQuantizationType) -> Matrix:
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(prefix + tensor, data, raw_dtype=kind)
        written.tensors[prefix + tensor] = (kind.name, values)
        return gguf.quants.dequantize(data, kind)

    for tensor in row.tensors:
        axes = row_axes(row)[tensor.role]
        stored = store(axes, tensor.role, matrices)
        # one tensor may be of another type than the rest
        fitting = [kind for kind in TYPES.values() if stored.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0]
        kind = fitting[int(rng.integers(len(fitting)))] if rng.integers(3) == 0 else TYPES[name]
        stack = axes.startswith("E")
        found = []
        for expert, matrix in enumerate([stored] if stack else stored):
            module = tensor.names[0].replace("{expert}", str(expert))
            found.append(add(f"{module}.weight", matrix, kind))
            if case.biases:
                add(f"{module}.bias", rng.standard_normal(matrix.shape[:-1]).astype(np.float32), TYPES["F32"])
        written.values |= cut(axes, tensor.role, found[0] if stack else np.stack(found), matrices)
    if case.beside and row.kind == "routed":
        written.router = add(
            "ffn_gate_inp.weight", rng.standard_normal((case.experts, case.hidden), np.float32), TYPES["F32"]
        )
        for role, shape in (("gate", (5, case.hidden)), ("up", (5, case.hidden)), ("down", (case.hidden, 5))):
            written.shared[role] = add(f"ffn_{role}_shexp.weight", rng.standard_normal(shape, np.float32), TYPES["F16"])
        writer.add_expert_count(case.experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.mark.parametrize(("row", "name"), sampled(BY_TYPE, SAMPLE_BY_TYPE, named))
def test_what_is_quantised_is_what_is_read(row: str, name: str, tmp_path: Path) -> None:
    def run(case: Case) -> None:
        written = write_gguf(TABLE[row], name, case, tmp_path / "model.gguf")
        with describe(written):
            assert_opened(Experts.open(str(tmp_path), TABLE[row].kind), TABLE[row], written, case, name)

    fuzz(3, make_gguf_cases(name), run)
