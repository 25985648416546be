"""Overlays in MLX: experts that stay base and factors, in mlx-lm's models or in a block to train.

An overlaid projection computes `W x = base x + left (right x)` or, in codes, `base x + delta x` with quantised
matrices. No expert's matrix is rebuilt, except that a delta in a trellis is decoded for its product. The base product
is computed once per token, for all experts that the token is routed to.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx_lm.models.switch_layers import SwiGLU

from ...terms import ROLES
from ..codes import LayerCodes, RoleCodes, StoredMatrix, list_matrices, parse_code
from ..codes.bits import BitsCode
from ..codes.code import Parts, Shape
from ..codes.trellis import TrellisCode
from .trellis import TrellisMatrix

SORT_FROM = 64  # rows from which sorting them by expert is faster; mlx-lm's own number


class OverlayLinear(Module):
    """A linear layer per expert, as base and low-rank factors; it replaces mlx-lm's SwitchLinear.

    Parameters, named as the parts of a role on disk: `base` [out, in], `left` [experts, out, rank], `right` [experts,
    rank, in] and, if asked for, `bias` [experts, out]. A new layer's `right` is zero, so that all its experts equal the
    base; the columns of `left` are random, of about unit length. The rank may be 0. The base may be an AffineMatrix.
    """

    base: "mx.array | AffineMatrix"
    has_base = True

    def __init__(self, input_dims: int, output_dims: int, num_experts: int, rank: int, bias: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        scale = math.sqrt(1 / input_dims)
        self.base = mx.random.uniform(-scale, scale, (output_dims, input_dims))
        self.left = mx.random.normal((num_experts, output_dims, rank), scale=math.sqrt(1 / output_dims))
        self.right = mx.zeros((num_experts, rank, input_dims))
        if bias:
            self.bias = mx.zeros((num_experts, output_dims))

    @property
    def input_dims(self) -> int:
        return self.right.shape[2]

    @property
    def output_dims(self) -> int:
        return self.left.shape[1]

    @property
    def num_experts(self) -> int:
        return self.left.shape[0]

    @property
    def rank(self) -> int:
        return self.left.shape[2]

    def base_product(self, x: mx.array) -> mx.array:
        """The base product, which all experts share: [..., in] -> [..., out]."""
        base = self.base
        product: mx.array = base(x) if isinstance(base, AffineMatrix) else x @ base.T
        return product.astype(x.dtype)

    def code_base(self, code: str) -> None:
        """Keep the base in bits ("4bit:128"), as it is on disk; it is frozen then, and gradients pass through it.

        Raises ValueError for another code, and for a base that is in a code already.
        """
        bits, base = parse_code(code), self.base
        if not isinstance(bits, BitsCode):
            raise ValueError(f"a base to train on must be kept in bits, such as 4bit:128, not as {code}")
        if isinstance(base, AffineMatrix):
            raise ValueError("the base is already coded")
        shape = self.output_dims, self.input_dims
        matrix = AffineMatrix(StoredMatrix("base", bits, shape, None))
        parts = bits.encode(np.array(base.astype(mx.float32)))
        matrix.update(affine_arrays(bits, parts, shape))
        self.base = matrix

    def select(self, product: mx.array, indices: mx.array) -> mx.array:
        """Each expert's outputs from the base product: these themselves."""
        return product

    def delta_product(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """What each expert adds to the base product, its bias included; shapes as in a call."""
        y = x
        if self.rank:
            needs_float32 = mx.default_device() == mx.cpu  # the only type that gather_mm takes there
            for factor in (self.right, self.left):
                y, factor = (y.astype(mx.float32), factor.astype(mx.float32)) if needs_float32 else (y, factor)
                y = mx.gather_mm(y, factor.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)
        else:  # the gradient of a product over an axis of length 0 crashes MLX 0.32
            leading = mx.broadcast_shapes(x.shape[:-2], indices.shape)
            y = mx.zeros((*leading, x.shape[-2], self.output_dims), x.dtype)
        if "bias" in self:
            y = y + mx.expand_dims(self.bias[indices], -2)
        return y.astype(x.dtype)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Apply expert `indices[...]` to `x[...]`, as SwitchLinear does.

        `x` is [..., rows, in], `indices` [...], and the axes before the last two broadcast: [batch, length, 1, 1, in]
        with [batch, length, top_k] gives [batch, length, top_k, 1, out]. `sorted_indices` promises that the indices,
        on one axis, ascend. The result has the dtype of `x`.
        """
        return self.base_product(x) + self.delta_product(x, indices, sorted_indices)


class DenseMatrix(Module):
    """A matrix [out, in], or one for each expert, in `matrix`."""

    def __init__(self, matrix: StoredMatrix) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.matrix = mx.zeros(_stacked(matrix, matrix.shape))

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes [..., in] -> [..., out], for a single matrix."""
        product: mx.array = mx.matmul(x, self.matrix.T)
        return product

    def gather(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        """Shapes as in OverlayLinear, for a matrix for each expert."""
        matrix = self.matrix
        if mx.default_device() == mx.cpu:  # where gather_mm takes float32 only
            x, matrix = x.astype(mx.float32), matrix.astype(mx.float32)
        return mx.gather_mm(x, matrix.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)


class AffineMatrix(Module):
    """A matrix in MLX's affine form, or one for each expert: `weight`, `scales` and `biases`, as `BitsCode.as_affine`
    gives them.

    `transposed` are left factors, which are stored so that they are multiplied from the other side. It is
    frozen, as a QuantizedLinear is: gradients pass through it to its input.
    """

    def __init__(self, matrix: StoredMatrix, transposed: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert isinstance(matrix.code, BitsCode)
        rows, self._columns = matrix.shape
        self._group, self._bits = matrix.code.affine_settings(self._columns)
        groups = -(-self._columns // self._group)
        self._transposed = transposed
        self._padding = groups * self._group - self._columns
        self.weight = mx.zeros(_stacked(matrix, (rows, groups * self._group * self._bits // 32)), mx.uint32)
        self.scales = mx.zeros(_stacked(matrix, (rows, groups)))
        self.biases = mx.zeros(_stacked(matrix, (rows, groups)))
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes [..., in] -> [..., out], for a single matrix."""
        y = mx.quantized_matmul(
            self._pad(x), self.weight, self.scales, self.biases, not self._transposed, self._group, self._bits
        )
        return self._cut(y)

    def gather(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        """Shapes as in OverlayLinear, for a matrix for each expert."""
        y = mx.gather_qmm(
            self._pad(x),
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=indices,
            transpose=not self._transposed,
            group_size=self._group,
            bits=self._bits,
            sorted_indices=sorted_indices,
        )
        return self._cut(y)

    def _pad(self, x: mx.array) -> mx.array:
        """Zeros for the columns that pad the matrix."""
        if self._transposed or not self._padding:
            return x
        return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self._padding)])

    def _cut(self, y: mx.array) -> mx.array:
        return y[..., : self._columns] if self._transposed else y


def affine_arrays(code: BitsCode, parts: Parts, shape: Shape) -> dict[str, mx.array]:
    """The parameters of an AffineMatrix, from the parts of a matrix of that shape, or of a stack of them.

    Scales and biases are float32 on a CPU, bfloat16 elsewhere.
    """
    affine = code.as_affine(parts, shape)
    scale_type = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    scales, biases = (mx.array(array).astype(scale_type) for array in (affine.scales, affine.biases))
    return {"weight": mx.array(affine.weight), "scales": scales, "biases": biases}


def _stacked(matrix: StoredMatrix, shape: tuple[int, int]) -> tuple[int, ...]:
    return shape if matrix.experts is None else (matrix.experts, *shape)


def _make_matrix(name: str, matrix: StoredMatrix) -> Module:
    """The module that keeps a matrix, which is empty yet."""
    match matrix.code:
        case BitsCode():
            return AffineMatrix(matrix, transposed=name == "left")
        case TrellisCode():
            return TrellisMatrix(matrix)
        case _:
            return DenseMatrix(matrix)


class CodedLinear(Module):
    """A linear layer per expert in codes; it replaces mlx-lm's SwitchLinear.

    `base` is a single matrix, `delta`, `left` and `right` are one for each expert; any of them may be missing. Their
    outputs are summed; calls are like those of OverlayLinear.

    If the base is a bank, these matrices are of the neurons that refer to it, `rest` is that of an expert's other
    neurons, and `places` maps neurons. For gate and up, [experts, out]: for each output the neuron of the bank that it
    adds, or the bank's size for an unshared neuron. For down, [experts, bank]: for each input of the bank the neuron of
    the expert that it takes, or their number for none.
    """

    def __init__(
        self, input_dims: int, output_dims: int, num_experts: int, codes: RoleCodes, bias: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._output_dims = output_dims
        for name, matrix in list_matrices(codes, (output_dims, input_dims), num_experts).items():
            self[name] = _make_matrix(name, matrix)
        self._bank = codes.bank
        if codes.bank:
            self.places = mx.zeros((num_experts, codes.bank.size if codes.bank.axis else output_dims), mx.uint32)
        if bias:
            self.bias = mx.zeros((num_experts, output_dims))

    @property
    def has_base(self) -> bool:
        """Whether there is a base whose product is the same for all experts."""
        return "base" in self and not (self._bank and self._bank.axis)

    def base_product(self, x: mx.array) -> mx.array | None:
        """The base product, which all experts share: [..., in] -> [..., out]; of a bank with neurons as outputs, these,
        and of one with neurons as inputs None, as these are not shared. None where there is no base."""
        if "base" not in self or (self._bank and self._bank.axis):
            return None
        product: mx.array = self["base"](x)
        return product.astype(x.dtype)

    def select(self, product: mx.array, indices: mx.array) -> mx.array:
        """Each expert's outputs from the base product, which is [..., rows, out]; `indices` are as in a call."""
        if not self._bank:
            return product
        return _take(product, self.places[indices])

    def delta_product(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """What each expert adds to the base product, its bias included; shapes as in OverlayLinear."""
        referring, others = x, x
        if self._bank and self._bank.axis:
            referring, others = mx.split(x, [self._bank.matched], axis=-1)
        products: list[mx.array] = []
        if "delta" in self:
            products.append(self["delta"].gather(referring, indices, sorted_indices))
        if "left" in self:
            inner = self["right"].gather(referring, indices, sorted_indices).astype(x.dtype)
            products.append(self["left"].gather(inner, indices, sorted_indices))
        if "rest" in self:
            rest = self["rest"].gather(others, indices, sorted_indices)
            if self._bank and not self._bank.axis:  # unshared neurons are further outputs
                zeros = mx.zeros((*rest.shape[:-1], self._bank.matched), rest.dtype)
                products = [mx.concatenate([_sum(products) if products else zeros, rest], axis=-1)]
            else:
                products.append(rest)
        if self._bank and self._bank.axis:
            products.append(self["base"](_take(x, self.places[indices])))
        if "bias" in self:
            products.append(mx.expand_dims(self.bias[indices], -2))
        if not products:
            leading = mx.broadcast_shapes(x.shape[:-2], indices.shape)
            return mx.zeros((*leading, x.shape[-2], self._output_dims), x.dtype)
        return _sum(products).astype(x.dtype)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """As OverlayLinear."""
        delta, base = self.delta_product(x, indices, sorted_indices), self.base_product(x)
        return delta if base is None else self.select(base, indices) + delta


def _sum(products: Sequence[mx.array]) -> mx.array:
    total = products[0]
    for product in products[1:]:
        total = total + product
    return total


def _take(x: mx.array, places: mx.array) -> mx.array:
    """The numbers of `x` [..., rows, n] at `places` [..., m] of the last axis, 0 at place n; leading axes broadcast."""
    padded = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    leading = mx.broadcast_shapes(x.shape[:-2], places.shape[:-1])
    padded = mx.broadcast_to(padded, (*leading, *padded.shape[-2:]))
    wanted = mx.broadcast_to(mx.expand_dims(places, -2), (*leading, x.shape[-2], places.shape[-1]))
    return mx.take_along_axis(padded, wanted, axis=-1)


class ExpertOutputs:
    """The outputs of each token's experts for a block that weighs and adds them up: `(y * weights).sum(axis=-2)`.

    All experts share the base, so its product is computed once for a token, with the weighted sum of their inputs:
    sum of w (base h + delta) = base (sum of w h) + sum of w delta. `hidden` is h, [..., top_k, in], `delta` is [...,
    top_k, out], and `weights` [..., top_k, 1].
    """

    def __init__(self, base_product: Callable[[mx.array], mx.array], hidden: mx.array, delta: mx.array) -> None:
        self.base_product = base_product
        self.hidden = hidden
        self.delta = delta

    @property
    def dtype(self) -> mx.Dtype:
        return self.delta.dtype

    def __mul__(self, weights: mx.array) -> "ExpertOutputs":
        return ExpertOutputs(self.base_product, self.hidden * weights, self.delta * weights)

    def sum(self, axis: int) -> mx.array:
        """Over the experts, the only axis that they can be summed over: [..., out]."""
        if axis != -2:
            raise ValueError(f"the outputs of experts are summed over axis -2, not {axis}")
        return self.base_product(self.hidden.sum(axis)) + self.delta.sum(axis)


class _SharedBaseGLU(Module):
    """Gated experts whose projections have a `base_product`, which `select` gives to experts, and a `delta_product`.

    From SORT_FROM rows on they are sorted by expert, as in SwitchGLU; the base products of gate and up are computed
    before that, once for a token. That of down is, too, where `are_added_up` says that the block which calls does no
    more with the outputs than to weigh and add them up: these are ExpertOutputs then.
    """

    are_added_up = False

    gate_proj: Module
    up_proj: Module
    down_proj: Module
    activation: Callable[[mx.array, mx.array], mx.array]

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array | ExpertOutputs:
        """Apply each token's experts: [..., hidden] and [..., top_k] -> [..., top_k, hidden]."""
        indices = mx.stop_gradient(indices)
        if indices.size < SORT_FROM:
            x = mx.expand_dims(x, (-2, -3))
            hidden = self.activation(self.up_proj(x, indices), self.gate_proj(x, indices))
            delta: mx.array = self.down_proj.delta_product(hidden, indices)
            return self._add_base(hidden.squeeze(-2), delta.squeeze(-2))
        experts = indices.flatten()
        order = mx.argsort(experts)
        experts, tokens = experts[order], order // indices.shape[-1]
        x = x.reshape(-1, 1, x.shape[-1])
        rows = x[tokens]

        def project(linear: Module) -> mx.array:
            base: mx.array | None = linear.base_product(x)
            delta: mx.array = linear.delta_product(rows, experts, True)
            return delta if base is None else linear.select(base[tokens], experts) + delta

        hidden = self.activation(project(self.up_proj), project(self.gate_proj))
        delta = self.down_proj.delta_product(hidden, experts, sorted_indices=True)
        places = mx.argsort(order)
        hidden, delta = (mx.unflatten(y[places], 0, indices.shape).squeeze(-2) for y in (hidden, delta))
        return self._add_base(hidden, delta)

    def _add_base(self, hidden: mx.array, delta: mx.array) -> mx.array | ExpertOutputs:
        """The outputs, from the inputs of down and what its deltas make of them."""
        if self.are_added_up and self.down_proj.has_base:
            return ExpertOutputs(self.down_proj.base_product, hidden, delta)
        base: mx.array | None = self.down_proj.base_product(hidden)
        return delta if base is None else base + delta


class OverlayGLU(_SharedBaseGLU):
    """The gated experts of one layer, overlaid; it replaces mlx-lm's SwitchGLU. `ranks` are by role, or one for all
    three."""

    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        num_experts: int,
        ranks: Mapping[str, int] | int,
        activation: Callable[[mx.array, mx.array], mx.array] | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        by_role = dict.fromkeys(ROLES, ranks) if isinstance(ranks, int) else ranks
        self.gate_proj = OverlayLinear(input_dims, hidden_dims, num_experts, by_role["gate"], bias)
        self.up_proj = OverlayLinear(input_dims, hidden_dims, num_experts, by_role["up"], bias)
        self.down_proj = OverlayLinear(hidden_dims, input_dims, num_experts, by_role["down"], bias)
        # not `activation or SwiGLU()`, as a module without parameters is falsy
        self.activation = SwiGLU() if activation is None else activation  # type: ignore[no-untyped-call]


class CodedGLU(_SharedBaseGLU):
    """The gated experts of one layer in codes, which are by role; it replaces mlx-lm's SwitchGLU."""

    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        num_experts: int,
        codes: LayerCodes,
        activation: Callable[[mx.array, mx.array], mx.array],
        bias: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gate_proj = CodedLinear(input_dims, hidden_dims, num_experts, codes["gate"], bias)
        self.up_proj = CodedLinear(input_dims, hidden_dims, num_experts, codes["up"], bias)
        self.down_proj = CodedLinear(hidden_dims, input_dims, num_experts, codes["down"], bias)
        self.activation = activation


class OverlayMoE(Module):
    """A mixture-of-experts block that is an overlay from the start, to be trained.

    It has a router, whose routing weights are the softmax over the logits of each token's `top_k` experts, and SwiGLU
    experts that share a base; each expert has its own factors in gate, up and down. With `freeze_base` only router and
    factors train, and so they do once the base is kept in few bits (`code_base`).
    """

    def __init__(
        self, hidden: int, intermediate: int, experts: int, top_k: int, rank: int, *, freeze_base: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if not 1 <= top_k <= experts:
            raise ValueError(f"can't choose the top {top_k} of {experts} experts")
        self.top_k = top_k
        self.router = Linear(hidden, experts, bias=False)
        self.experts = OverlayGLU(hidden, intermediate, experts, rank)
        self.experts.are_added_up = True
        if freeze_base:
            self.freeze(keys="base")

    @classmethod
    def from_dense(
        cls,
        gate: mx.array,
        up: mx.array,
        down: mx.array,
        experts: int,
        top_k: int,
        rank: int,
        *,
        freeze_base: bool = False,
    ) -> "OverlayMoE":
        """A block that computes what a dense feed-forward does, to be trained further.

        `gate` and `up` are [intermediate, hidden], `down` is [hidden, intermediate]. The base is a copy of these
        matrices; every `right` is zero, so every expert equals the base. Raises ValueError where the shapes do not fit.
        """
        block = cls(gate.shape[1], gate.shape[0], experts, top_k, rank, freeze_base=freeze_base)
        block.set_dtype(gate.dtype)
        for role, matrix in zip(ROLES, (gate, up, down), strict=True):
            linear = block.experts[f"{role}_proj"]
            if matrix.shape != linear.base.shape:
                raise ValueError(
                    f"{role} has shape {list(matrix.shape)}, but gate and up need {list(linear.base.shape)}"
                )
            linear.base = mx.array(matrix)
        return block

    def code_base(self, code: str = "4bit:128") -> None:
        """Quantise and freeze the bases of gate, up and down; raises ValueError for an invalid code."""
        for role in ROLES:
            self.experts[f"{role}_proj"].code_base(code)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of each token and their routing weights: [..., hidden] -> twice [..., top_k]."""
        logits = self.router(x)
        indices = mx.stop_gradient(mx.argpartition(-logits, kth=self.top_k - 1, axis=-1)[..., : self.top_k])
        return indices, mx.softmax(mx.take_along_axis(logits, indices, axis=-1), axis=-1, precise=True)

    def __call__(self, x: mx.array) -> mx.array:
        """Shape in and out: [..., hidden]."""
        indices, weights = self.route(x)
        return (self.experts(x, indices) * weights[..., None]).sum(axis=-2)
