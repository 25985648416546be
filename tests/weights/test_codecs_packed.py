"""Formats of packed integers against independent encoders, and against the libraries that write them."""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.errors import ModelUnreadable, MoEError, UnknownFormat
from chuk_lazarus.introspection.moe.weights.checkpoint import Checkpoint
from chuk_lazarus.introspection.moe.weights.codecs import NOT_DECODED, Part, Stored, recognise
from chuk_lazarus.introspection.moe.weights.codecs.bits import unpack, unpack_rows
from chuk_lazarus.introspection.moe.weights.model_config import ModelConfig
from chuk_lazarus.introspection.moe.weights.repositories.find import find_repository
from encoded import Encoded
from encoders_packed import ENCODERS
from places import FIXTURES
from sampling import examples

Array = NDArray[Any]
Parts = dict[str, tuple[str, Array]]

LIBRARIES = sorted(path.parent.name for path in (FIXTURES / "formats").glob("packed_*/oracle.npz"))


def matrix(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def describe(parts: Parts) -> dict[str, Part]:
    return {name: Part(dtype, array.shape, lambda array=array: array) for name, (dtype, array) in parts.items()}


def open_parts(parts: Parts, quantization: Mapping[str, Any]) -> Stored:
    return recognise(describe(parts), quantization)


def decode(stored: Stored, parts: Parts, start: int = 0, stop: int | None = None) -> Array:
    """Decoded rows [start, stop), in the stored orientation, from the rows of each part that cover them."""
    stop = stored.shape[-2] if stop is None else stop
    cut = {}
    for part, span in stored.rows_per_row.items():
        array = parts[part][1]
        cut[part] = array if span is None else array[int(start // span) : int(-(-stop // span))]
        assert span is None or stop == start or len(cut[part]) == -(-stop // span) - start // span
    decoded = stored.decode(cut, start, stop)
    assert decoded.dtype == np.float32
    return decoded


def make(name: str, rows: int, columns: int, seed: int = 0) -> Encoded:
    encoder, (outputs, inputs) = ENCODERS[name]
    rows, columns = -(-rows // outputs) * outputs, -(-columns // inputs) * inputs
    return encoder(matrix(rows, columns, seed), np.random.default_rng(seed))


def expected_of(encoded: Encoded, stored: Stored) -> Array:
    return encoded.values.T if stored.transposed else encoded.values


def assert_same(found: Array, expected: Array, name: str) -> None:
    if name == "bnb_int8":  # weight * SCB / 127, rounded at another place
        np.testing.assert_allclose(found, expected, rtol=2e-7)
    else:
        np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Streams of bits


@given(st.integers(1, 8), st.integers(0, 100), st.integers(0, 2**32 - 1))
def test_unpacking_reads_a_row_as_one_long_integer(bits: int, count: int, seed: int) -> None:
    words = -(-count * bits // 32)
    packed = np.random.default_rng(seed).integers(0, 1 << 32, (3, words), np.uint32)
    unpacked = unpack(packed, bits, count)
    assert unpacked.dtype == np.uint8
    for row, values in zip(packed, unpacked, strict=True):
        stream = sum(int(word) << (32 * place) for place, word in enumerate(row))
        assert values.tolist() == [(stream >> (place * bits)) & ((1 << bits) - 1) for place in range(count)]


@given(st.integers(1, 8), st.integers(0, 100), st.integers(0, 31), st.integers(0, 2**32 - 1))
def test_unpacking_down_the_rows_reads_a_column_as_one_long_integer(
    bits: int, count: int, first: int, seed: int
) -> None:
    words = -(-(first + count * bits) // 32)
    packed = np.random.default_rng(seed).integers(0, 1 << 32, (words, 3), np.uint32)
    unpacked = unpack_rows(packed, bits, first, count)
    assert unpacked.dtype == np.uint8
    for column in range(3):
        stream = sum(int(word) << (32 * place) for place, word in enumerate(packed[:, column])) >> first
        assert unpacked[:, column].tolist() == [(stream >> (at * bits)) & ((1 << bits) - 1) for at in range(count)]


def test_unpacking_keeps_leading_axes() -> None:
    packed = np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
    for bits in range(1, 9):
        np.testing.assert_array_equal(unpack(packed, bits, 13)[1, 2], unpack(packed[1, 2], bits, 13))


# ---------------------------------------------------------------------------------------------------------------------
# Against the encoders


@pytest.mark.parametrize("name", ENCODERS)
@given(st.data())
@settings(max_examples=examples(15), deadline=None)
def test_decoding_undoes_encoding_in_any_window(name: str, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 80))
    encoded = make(name, rows, columns, data.draw(st.integers(0, 1000)))
    stored = open_parts(encoded.parts, encoded.quantization)
    assert stored.plain_shape == encoded.values.shape
    whole = decode(stored, encoded.parts)
    assert_same(whole, expected_of(encoded, stored), name)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    np.testing.assert_array_equal(decode(stored, encoded.parts, start, stop), whole[start:stop])


@pytest.mark.parametrize("name", ENCODERS)
def test_every_window_equals_the_whole(name: str) -> None:
    encoded = make(name, 5, 21)
    stored = open_parts(encoded.parts, encoded.quantization)
    whole = decode(stored, encoded.parts)
    for start in range(len(whole)):
        for stop in {start + 1, (start + 1 + len(whole)) // 2, len(whole)}:
            np.testing.assert_array_equal(decode(stored, encoded.parts, start, stop), whole[start:stop])


@pytest.mark.parametrize("name", ENCODERS)
def test_parts_that_can_not_be_written_to_are_decoded(name: str) -> None:
    """What comes from a file is read-only."""
    encoded = make(name, 8, 40)
    for _, array in encoded.parts.values():
        array.flags.writeable = False
    before = {part: array.tobytes() for part, (_, array) in encoded.parts.items()}
    stored = open_parts(encoded.parts, encoded.quantization)
    assert_same(decode(stored, encoded.parts), expected_of(encoded, stored), name)
    assert before == {part: array.tobytes() for part, (_, array) in encoded.parts.items()}


@pytest.mark.parametrize(
    "name", [name for name in ENCODERS if not name.startswith(("bnb_nf4", "quark")) and "fp4" not in name]
)
def test_stacked_experts_are_decoded_one_by_one(name: str) -> None:
    experts = [make(name, 6, 33, seed) for seed in range(3)]
    parts: Parts = {
        part: (dtype, array if part == "weight_shape" else np.stack([each.parts[part][1] for each in experts]))
        for part, (dtype, array) in experts[0].parts.items()
        if part != "weight_format"
    }
    stored = open_parts(parts, experts[0].quantization)
    assert stored.plain_shape == (3, *experts[0].values.shape)
    for expert, encoded in enumerate(experts):
        own: Parts = {part: (dtype, array[expert]) for part, (dtype, array) in parts.items() if part != "weight_shape"}
        assert_same(decode(stored, own), expected_of(encoded, stored), name)


def with_part(encoded: Encoded, part: str, dtype: str, array: Array) -> Parts:
    return encoded.parts | {part: (dtype, array)}


# ---------------------------------------------------------------------------------------------------------------------
# Against the libraries


def load(name: str) -> tuple[Parts, dict[str, Any], NDArray[np.float32]]:
    folder = FIXTURES / "formats" / name
    checkpoint = Checkpoint(find_repository(str(folder)))
    parts = {
        tensor.removeprefix("x."): (checkpoint.info(tensor).dtype, checkpoint.whole(checkpoint.info(tensor)))
        for tensor in checkpoint.names
        if tensor.removeprefix("x.") not in NOT_DECODED
    }
    with np.load(folder / "oracle.npz") as oracle:
        return parts, checkpoint.config.get("quantization_config", {}), oracle["x"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_a_library_wrote_is_what_it_reads(name: str) -> None:
    parts, quantization, oracle = load(name)
    stored = open_parts(parts, quantization)
    assert stored.plain_shape == oracle.shape
    if oracle.ndim == 2:
        assert_library_agrees(name, stored, parts, oracle)
        return
    for expert, own_oracle in enumerate(oracle):
        own: Parts = {part: (dtype, array[expert]) for part, (dtype, array) in parts.items() if part != "weight_shape"}
        assert_library_agrees(name, stored, own, own_oracle)


def assert_library_agrees(name: str, stored: Stored, parts: Parts, oracle: NDArray[np.float32]) -> None:
    whole = decode(stored, parts)
    expected = oracle.T if stored.transposed else oracle
    if name.endswith("_int8_rows") or "_modelopt_" in name:  # the library multiplies by 1/127 last
        np.testing.assert_allclose(whole, expected, rtol=3e-7)
    else:
        np.testing.assert_array_equal(rounded(whole, name), expected)
    for start in range(0, len(whole), max(1, len(whole) // 9)):
        for stop in {start + 1, min(start + 7, len(whole)), len(whole)}:
            np.testing.assert_array_equal(decode(stored, parts, start, stop), whole[start:stop])


def rounded(values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """Values as a library gives them that decodes to a narrower type."""
    for ending, dtype in {"_f16": np.dtype(np.float16), "_bf16": np.dtype(ml_dtypes.bfloat16)}.items():
        if name.endswith(ending):
            with np.errstate(over="ignore"):
                return values.astype(dtype).astype(np.float32)
    return values


def test_there_is_a_fixture_for_every_library() -> None:
    assert {name.split("_")[1] for name in LIBRARIES} >= {
        "ct", "bnb", "gptq", "awq", "autoround", "quark", "modelopt",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What the config and the shapes must agree on


def assert_refused(kind: type[MoEError], parts: Parts, quantization: Mapping[str, Any], *words: str) -> None:
    with pytest.raises(kind) as caught:
        open_parts(parts, quantization)
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_integers_of_odd_widths_that_old_versions_packed_are_refused_by_name(bits: int) -> None:
    """These put as many into a word as fit. Where a row has as many words in both ways, it is refused, too."""
    encoded = ENCODERS["pack_int8"][0].func(matrix(4, 64), np.random.default_rng(), bits=bits)  # type: ignore[attr-defined]
    old = np.zeros((4, -(-64 // (32 // bits))), np.int32)
    parts = with_part(encoded, "weight_packed", "I32", old)
    assert_refused(UnknownFormat, parts, encoded.quantization, f"of {bits} bits in the padded words of old versions")
    encoded = ENCODERS["pack_int8"][0].func(  # type: ignore[attr-defined]
        matrix(4, 4), np.random.default_rng(), bits=bits, group=None
    )
    assert_refused(UnknownFormat, encoded.parts, encoded.quantization, "packed in two ways")


def test_packed_integers_need_no_config_where_the_shapes_tell() -> None:
    encoded = make("pack_int4_sym", 4, 64)
    stored = open_parts(encoded.parts, {})
    assert stored.codec == "int4"
    np.testing.assert_array_equal(decode(stored, encoded.parts), encoded.values)


def test_packed_integers_whose_width_the_shapes_leave_open() -> None:
    encoded = make("pack_int4_channel", 4, 4)  # one word a row: 4 to 8 bits
    assert_refused(UnknownFormat, encoded.parts, {}, "do not show which")
    assert open_parts(encoded.parts, encoded.quantization).codec == "int4"


def test_packed_integers_whose_width_the_config_contradicts() -> None:
    encoded = make("pack_int4_sym", 4, 64)
    assert_refused(UnknownFormat, encoded.parts, make("pack_int8", 4, 64).quantization, "8 bits")


def test_one_config_may_describe_packed_integers_of_several_widths() -> None:
    four, eight = make("pack_int4_sym", 4, 64), make("pack_int8", 4, 64)
    schemes = {
        "group_0": four.quantization["config_groups"]["group_0"],
        "group_1": eight.quantization["config_groups"]["group_0"],
    }
    both = four.quantization | {"config_groups": schemes}
    for encoded in (four, eight):
        np.testing.assert_array_equal(decode(open_parts(encoded.parts, both), encoded.parts), encoded.values)


def test_groups_of_a_size_that_does_not_divide_the_columns_need_the_config() -> None:
    encoded = make("pack_int4_ragged", 4, 41)
    schemes = make("pack_int4_asym", 4, 64).quantization
    assert_refused(UnknownFormat, encoded.parts, schemes, "4 scales for 41 columns")


def test_an_asymmetric_format_without_zero_points_is_incomplete() -> None:
    encoded = make("pack_int4_asym", 8, 64)
    del encoded.parts["weight_zero_point"]
    assert_refused(ModelUnreadable, encoded.parts, encoded.quantization, "no weight_zero_point")


def test_zero_points_of_older_versions_are_not_packed() -> None:
    encoded = make("pack_int4_asym", 8, 64)
    packed = encoded.parts["weight_zero_point"][1].view(np.uint32)
    zeros = np.array([[int(word) >> 4 * row & 15 for word in packed[0]] for row in range(8)]) - 8
    parts = with_part(encoded, "weight_zero_point", "I8", zeros.astype(np.int8))
    np.testing.assert_array_equal(decode(open_parts(parts, encoded.quantization), parts), encoded.values)


def test_scales_may_be_a_vector_or_one_number_per_expert() -> None:
    codes = np.arange(-12, 12, dtype=np.int8).reshape(2, 3, 4)
    for scale in (np.array([2, 3], np.float32), np.array([2, 3], np.float32).reshape(2, 1, 1)):
        stored = open_parts({"weight": ("I8", codes), "weight_scale": ("F32", scale)}, {})
        assert stored.rows_per_row == {"weight": 1, "weight_scale": None}
        for expert in range(2):
            own: Parts = {"weight": ("I8", codes[expert]), "weight_scale": ("F32", scale[expert])}
            np.testing.assert_array_equal(decode(stored, own), codes[expert] * (2.0 + expert))
    vector: Parts = {"weight": ("I8", codes[0]), "weight_scale": ("F32", np.array([1, 2, 4], np.float32))}
    np.testing.assert_array_equal(decode(open_parts(vector, {}), vector), codes[0] * np.array([[1.0], [2], [4]]))


def test_bytes_with_scales_of_another_kind_are_not_taken_for_integers() -> None:
    parts: Parts = {"weight": ("I8", np.zeros((4, 8), np.int8)), "weight_scale": ("F32", np.ones((4, 1), np.float32))}
    with pytest.raises(MoEError):
        open_parts(parts, {"quant_method": "something"})
    with pytest.raises(MoEError):
        open_parts(parts | {"weight_scale": ("I32", np.ones((4, 1), np.int32))}, {})


def test_integers_in_blocks_that_do_not_fit_the_config_are_refused() -> None:
    parts: Parts = {
        "weight": ("I8", np.zeros((64, 64), np.int8)),
        "weight_scale": ("F32", np.ones((2, 2), np.float32)),
    }
    scheme = {"weights": {"num_bits": 8, "type": "int", "strategy": "block", "block_structure": [16, 32]}}
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": scheme}}
    assert_refused(UnknownFormat, parts, said, "block of rows and columns")
    assert_refused(ModelUnreadable, parts, {}, "weight_scale is [2, 2]")


def test_gptq_zero_points_borrow_as_the_library_s_do() -> None:
    """v1 takes 1 from each zero point in the words as a whole, so that a 0 borrows from the next one."""
    encoded = make("gptq_4_v2", 16, 64)
    words = encoded.parts["qzeros"][1].view(np.uint32)
    parts = with_part(encoded, "qzeros", "I32", (words - np.uint32(0x11111111)).view(np.int32))
    said = encoded.quantization | {"checkpoint_format": "gptq"}
    np.testing.assert_array_equal(decode(open_parts(parts, said), parts), encoded.values.T)


def test_gptq_obeys_g_idx_whatever_the_config_says() -> None:
    encoded = make("gptq_4_act_order", 16, 96)
    for said in ({"desc_act": False}, {"desc_act": True}, {"group_size": -1}, {"group_size": 7}):
        stored = open_parts(encoded.parts, encoded.quantization | said)
        np.testing.assert_array_equal(decode(stored, encoded.parts), encoded.values.T)
        assert stored.rows_per_row["scales"] is None
    in_turn = make("gptq_4", 16, 96)
    for said in ({"desc_act": True}, {"desc_act": False}, {"static_groups": True}):
        stored = open_parts(in_turn.parts, in_turn.quantization | said)
        np.testing.assert_array_equal(decode(stored, in_turn.parts), in_turn.values.T)


def test_gptq_without_act_order_reads_only_the_groups_of_a_window() -> None:
    encoded = make("gptq_4", 16, 96)
    assert open_parts(encoded.parts, encoded.quantization).rows_per_row == {
        "qweight": 8,
        "qzeros": 32,
        "scales": 32,
        "g_idx": 1,
    }


def test_gptq_whose_later_expert_has_another_order_than_the_first() -> None:
    first = make("gptq_4", 16, 96)
    other = first.parts["g_idx"][1][::-1].copy()
    stored = open_parts(first.parts, first.quantization)
    with pytest.raises(UnknownFormat, match="a different order from the first"):
        decode(stored, with_part(first, "g_idx", "I32", other), 0, 40)


@pytest.mark.parametrize("group", [-1, 3, 1000])
def test_gptq_groups_that_no_row_has(group: int) -> None:
    for name in ("gptq_4", "gptq_4_act_order"):
        encoded = make(name, 16, 96)
        broken = encoded.parts["g_idx"][1].copy()
        stored = open_parts(encoded.parts, encoded.quantization)
        broken[50] = group
        with pytest.raises(ModelUnreadable, match="g_idx names groups"):
            decode(stored, with_part(encoded, "g_idx", "I32", broken))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"checkpoint_format": "gptq_p"}, "gptq_p"),
        ({"is_marlin_format": True}, "marlin"),
        ({"bits": 8}, "4 bits by its shapes, but config.json says 8"),
        ({"quant_method": "auto-round"}, "packing_format None"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:exllamav2"}, "auto_round:exllamav2"),
    ],
)
def test_gptq_of_other_kinds_is_refused_by_name(changed: dict[str, Any], words: str) -> None:
    encoded = make("gptq_4", 16, 96)
    assert_refused(UnknownFormat, encoded.parts, encoded.quantization | changed, words)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_gptq_of_odd_widths_is_refused_by_name(bits: int) -> None:
    encoder = ENCODERS["gptq_4"][0].func  # type: ignore[attr-defined]
    encoded = encoder(matrix(32, 64), np.random.default_rng(), bits=bits)
    assert_refused(UnknownFormat, encoded.parts, encoded.quantization, f"GPTQ in {bits} bits")


def test_gptq_without_a_config_may_be_of_either_kind() -> None:
    encoded = make("gptq_4", 16, 96)
    assert_refused(UnknownFormat, encoded.parts, {}, "config.json")


def test_gptq_modules_may_have_another_width_where_the_config_says_so() -> None:
    encoded = make("gptq_8", 16, 96)
    said = encoded.quantization | {"bits": 4, "group_size": 128}
    assert_refused(UnknownFormat, encoded.parts, said, "8 bits by its shapes")
    stored = open_parts(encoded.parts, said | {"dynamic": {r"+:.*experts.*": {"bits": 8, "group_size": 32}}})
    np.testing.assert_array_equal(decode(stored, encoded.parts), encoded.values.T)


def test_awq_needs_no_config() -> None:
    encoded = make("awq_4", 16, 96)
    stored = open_parts(encoded.parts, {})
    np.testing.assert_array_equal(decode(stored, encoded.parts), encoded.values.T)


def test_awq_of_auto_round() -> None:
    encoded = make("awq_4", 16, 96)
    said = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32}
    np.testing.assert_array_equal(decode(open_parts(encoded.parts, said), encoded.parts), encoded.values.T)


def test_awq_s_last_group_may_be_short() -> None:
    encoded = make("awq_4", 16, 75)
    np.testing.assert_array_equal(
        decode(open_parts(encoded.parts, encoded.quantization), encoded.parts), encoded.values.T
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"version": "gemv"}, "gemv"),
        ({"version": "marlin"}, "marlin"),
        ({"version": "gemv_fast"}, "gemv_fast"),
        ({"bits": 8}, "8 bits"),
        ({"group_size": 64}, "group_size 64"),
        ({"group_size": "all"}, "group_size all"),
    ],
)
def test_awq_of_other_kinds_is_refused_by_name(changed: dict[str, Any], words: str) -> None:
    encoded = make("awq_4", 16, 96)
    assert_refused(UnknownFormat, encoded.parts, encoded.quantization | changed, words)


def test_awq_s_shapes_are_not_gptq_s() -> None:
    gptq, awq = make("gptq_4_no_g_idx", 16, 96), make("awq_4", 16, 96)
    assert_refused(ModelUnreadable, gptq.parts, awq.quantization, "not the shapes of AWQ")
    assert_refused(ModelUnreadable, awq.parts, gptq.quantization, "not the shapes of GPTQ")


# ---------------------------------------------------------------------------------------------------------------------
# bitsandbytes' own state


STATE = "weight.quant_state.bitsandbytes__nf4"


def with_state(encoded: Encoded, text: bytes) -> Parts:
    return with_part(encoded, STATE, "U8", np.frombuffer(text, np.uint8))


def state_of(encoded: Encoded) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(encoded.parts[STATE][1].tobytes())
    return found


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"shape"',
        b"\xff\xfe",
        b"[" * 50_000,
        b"{}",
        b'{"shape": 3, "blocksize": 64}',
        b'{"shape": null, "blocksize": 64}',
    ],
)
def test_a_quant_state_that_is_none(text: bytes) -> None:
    assert_refused(ModelUnreadable, with_state(make("bnb_nf4", 8, 16), text), {}, "quant_state")


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": []},
        {"shape": [8]},
        {"shape": [8, -16]},
        {"shape": [8, 0]},
        {"shape": [8, 16.0]},
        {"shape": [True, 128]},
        {"shape": ["8", "16"]},
        {"shape": [8, 17]},
        {"shape": [2**62, 2**62]},
        {"blocksize": 0},
        {"blocksize": -64},
        {"blocksize": 64.0},
        {"blocksize": "64"},
        {"blocksize": 32},
        {"blocksize": None},
        {"blocksize": 10**30},
        {"nested_blocksize": 0},
        {"nested_blocksize": 1},
        {"nested_offset": None},
        {"nested_offset": "nan"},
        {"nested_offset": float("nan")},
        {"nested_offset": float("inf")},
    ],
)
def test_a_quant_state_whose_values_do_not_fit(changed: dict[str, Any]) -> None:
    encoded = make("bnb_nf4_nested", 8, 32)
    text = json.dumps(state_of(encoded) | changed).encode()
    assert_refused(ModelUnreadable, with_state(encoded, text), {})


def test_every_expert_s_own_offset_is_used() -> None:
    encoded = make("bnb_nf4_nested", 8, 32)
    stored = open_parts(encoded.parts, encoded.quantization)
    state = state_of(encoded)
    parts = with_state(encoded, json.dumps(state | {"nested_offset": state["nested_offset"] + 1.0}).encode())
    assert np.abs(decode(stored, parts) - encoded.values).max() == pytest.approx(1, abs=1e-5)


def test_an_expert_whose_quant_state_tells_of_another_shape() -> None:
    encoded = make("bnb_nf4", 8, 32)
    stored = open_parts(encoded.parts, encoded.quantization)
    parts = with_state(encoded, json.dumps(state_of(encoded) | {"shape": [32, 8]}).encode())
    with pytest.raises(ModelUnreadable, match="unlike that of other experts"):
        decode(stored, parts)


def test_bitsandbytes_of_an_unknown_kind() -> None:
    encoded = make("bnb_nf4", 8, 32)
    parts = {name.replace("nf4", "nf3"): part for name, part in encoded.parts.items()}
    assert_refused(UnknownFormat, parts, encoded.quantization, "nf3")


def test_int8_whose_weight_format_is_not_rows() -> None:
    encoded = make("bnb_int8", 8, 32)
    parts = with_part(encoded, "weight_format", "U8", np.array(2, np.uint8))
    assert_refused(UnknownFormat, parts, encoded.quantization, "weight_format")
    del parts["weight_format"]
    assert open_parts(parts, encoded.quantization).codec == "bnb-int8"


# ---------------------------------------------------------------------------------------------------------------------
# Parts that do not fit together


@pytest.mark.parametrize("name", ENCODERS)
def test_a_part_of_a_wrong_shape_never_gives_the_same_matrix(name: str) -> None:
    encoded = make(name, 40, 96)
    right = open_parts(encoded.parts, encoded.quantization).shape
    for part, (dtype, array) in encoded.parts.items():
        for axis in range(array.ndim):
            for kept in {0, array.shape[axis] - 1}:
                cut = array[(slice(None),) * axis + (slice(0, kept),)]
                try:  # fewer inputs are in themselves right: that they are too few, the other matrices tell
                    stored = open_parts(with_part(encoded, part, dtype, cut), encoded.quantization)
                except (ModelUnreadable, UnknownFormat) as error:
                    given = error.message
                else:
                    given = ""
                    assert stored.shape != right, part
                assert "\n" not in given


@pytest.mark.parametrize("name", ENCODERS)
def test_a_part_of_a_wrong_type_is_never_decoded(name: str) -> None:
    encoded = make(name, 40, 96)
    for part, (_, array) in encoded.parts.items():
        if part == "weight_format":
            continue
        for other in ("I16", "U64", "BOOL"):
            with pytest.raises((ModelUnreadable, UnknownFormat)):
                open_parts(with_part(encoded, part, other, array), encoded.quantization)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_missing_part_is_noticed(name: str) -> None:
    encoded = make(name, 40, 96)
    for part in encoded.parts:
        rest = {other: value for other, value in encoded.parts.items() if other != part}
        if part in ("g_idx", "weight_g_idx", "weight_format") or (name.startswith("int8") and part == "weight_scale"):
            continue
        # without an offset ModelSlim's parts are those of compressed-tensors; symmetric integers need no zero points
        if part == "weight_offset" or (name == "quark_int8_group" and part == "weight_zero_point"):
            continue
        if name == "modelopt_w4a8" and part == "weight_scale_2":  # the scale of a runtime's FP8 is no factor
            continue
        with pytest.raises((ModelUnreadable, UnknownFormat)):
            open_parts(rest, encoded.quantization)


@pytest.mark.parametrize(
    "sizes", [[8], [8, 65], [8, 0], [8, -64], [9, 64], [64, 8], [8, 2**62], [0, 0], [8, 64, 1], [1, 8, 64]]
)
def test_a_weight_shape_that_does_not_fit(sizes: list[int]) -> None:
    encoded = make("pack_int4_sym", 8, 64)
    parts = with_part(encoded, "weight_shape", "I64", np.array(sizes, np.int64))
    with pytest.raises((ModelUnreadable, UnknownFormat)):
        open_parts(parts, encoded.quantization)


@pytest.mark.parametrize("name", ENCODERS)
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=examples(10), deadline=None)
def test_any_bytes_decode_without_a_warning(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    encoded = make(name, 32, 64)
    keep = ("weight_shape", "weight_format", "g_idx", "weight_g_idx")
    parts = {
        part: (dtype, array)
        if part in keep or "quant_state" in part
        else (dtype, np.frombuffer(rng.bytes(array.nbytes), array.dtype).reshape(array.shape))
        for part, (dtype, array) in encoded.parts.items()
    }
    stored = open_parts(parts, encoded.quantization)
    whole = decode(stored, parts)
    assert whole.shape == stored.shape
    np.testing.assert_array_equal(decode(stored, parts, 3, 9), whole[3:9])


# ---------------------------------------------------------------------------------------------------------------------
# Quark's settings by layer


@pytest.mark.parametrize(
    "own",
    [
        {"layer_quant_config": {"*.experts.*": {"weight": {"dtype": "int8", "qscheme": "per_channel"}}}},
        {"layer_type_quant_config": {"nn.Linear": {"weight": {"dtype": "int8", "qscheme": "per_channel"}}}},
    ],
)
def test_quark_s_settings_of_a_layer_go_before_the_general_ones(own: dict[str, Any]) -> None:
    general = {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}}
    settings = {"quant_method": "quark", "global_quant_config": general} | own
    config = ModelConfig({"quantization_config": settings})
    encoded = make("quark_int8_channel", 6, 33)
    found = config.quantization("model.layers.0.mlp.experts.3.up_proj")
    np.testing.assert_array_equal(decode(open_parts(encoded.parts, found), encoded.parts), encoded.values)
    assert config.quantization()["global_quant_config"] == general


# ---------------------------------------------------------------------------------------------------------------------
# Settings by module


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.3.up_proj", "model.layers.0.mlp.experts", "*.experts.*"])
@pytest.mark.parametrize("key", ["quantized_layers", "extra_config"])
def test_settings_of_a_module_go_before_the_general_ones(name: str, key: str) -> None:
    settings = {"quant_method": "x", "group_size": 128, "bits": 4, key: {name: {"group_size": -1}, "model.layers": 3}}
    config = ModelConfig({"quantization_config": settings})
    assert config.quantization("model.layers.0.mlp.experts.3.up_proj") == {**settings, "group_size": -1}
    assert config.quantization("model.layers.0.self_attn.q_proj") == settings
    assert config.quantization() == settings


def test_modelopt_s_mixed_precision_tells_of_each_module() -> None:
    """A flat scale of a square matrix is one for each row by its module's own algorithm."""
    module = "model.layers.0.mlp.experts.3.up_proj"
    layers = {module: {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "model.layers.0.self_attn.q_proj": {}}
    said = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    config = ModelConfig.read({"hf_quant_config.json"}, lambda file: said)
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((32, 32)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, 32).astype(np.float32)
    parts: Parts = {"weight": ("F8_E4M3", weight), "weight_scale": ("F32", scale)}
    found = decode(open_parts(parts, config.quantization(module)), parts)
    np.testing.assert_array_equal(found, weight.astype(np.float32) * scale[:, None])


def test_awq_of_auto_round_may_have_other_groups_in_some_modules() -> None:
    encoded = make("awq_4", 16, 96)
    said = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 128}
    with pytest.raises(UnknownFormat, match="group_size 128"):
        open_parts(encoded.parts, said)
    stored = open_parts(encoded.parts, said | {"extra_config": {".*up_proj": {"group_size": 32}}})
    np.testing.assert_array_equal(decode(stored, encoded.parts), encoded.values.T)
