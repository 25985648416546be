"""Banks of neurons: found where they were planted, coded, read, exported and run."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import chuk_lazarus
from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.errors import InvalidRequest, ModelUnreadable
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.numerics.alignment import Alignment, Bank, align, keep_order, permute
from chuk_lazarus.introspection.moe.numerics.bank import bank_delta_energy, may_share, rate_sharing, share_neurons
from chuk_lazarus.introspection.moe.numerics.forward import ACTIVATIONS, run_expert
from chuk_lazarus.introspection.moe.numerics.low_rank import relative_error
from chuk_lazarus.introspection.moe.overlays import coded_layer
from chuk_lazarus.introspection.moe.overlays.alignment import find_places
from chuk_lazarus.introspection.moe.overlays.bank_budget import bank_delta_share, bank_ladder, sharing_experts
from chuk_lazarus.introspection.moe.overlays.checkpoint import writer
from chuk_lazarus.introspection.moe.overlays.checkpoint.export import export_overlay
from chuk_lazarus.introspection.moe.overlays.checkpoint.reader import OverlayCheckpoint, read_overlay
from chuk_lazarus.introspection.moe.overlays.codes import BankShape, LayerCodes, MatrixCode, RoleCodes
from chuk_lazarus.introspection.moe.overlays.codes.bits import LEVELS, BitsCode
from chuk_lazarus.introspection.moe.overlays.codes.low_rank import FactorsCode, SumCode
from chuk_lazarus.introspection.moe.overlays.layer import bank_notes
from chuk_lazarus.introspection.moe.overlays.trials import RoleTrial
from chuk_lazarus.introspection.moe.weights.experts import Experts
from places import FIXTURES
from sampling import examples, keep

Vectors = dict[str, NDArray[np.float32]]

HIDDEN, NEURONS, EXPERTS = 64, 32, 8
ROLES = ("gate", "up", "down")
FINE = BitsCode(256)


def quiet(what: str, done: int, total: int) -> None:
    pass


# ---------------------------------------------------------------------------------------------------------------------
# Found where they were planted


def plant(
    draw: np.random.Generator, experts: int, matched: int, users: int, noise: float
) -> tuple[Vectors, NDArray[np.intp]]:
    """Vectors by role, and the planted neuron that each neuron is like, -1 for strangers: [experts, NEURONS]."""
    size = matched * experts // users
    labels = np.full((experts, NEURONS), -1)
    names = draw.permutation(size).reshape(experts // users, matched)
    for expert in range(experts):
        labels[expert, draw.permutation(NEURONS)[:matched]] = draw.permutation(names[expert // users])
    vectors = {}
    for role in ROLES:
        planted = draw.standard_normal((size, HIDDEN))
        own = draw.standard_normal((experts, NEURONS, HIDDEN))
        near = planted[labels] + noise * own
        vectors[role] = np.where((labels >= 0)[:, :, None], near, own).astype(np.float32)
    return vectors, labels


@settings(max_examples=examples(20), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    users=st.sampled_from([2, 4]),
    matched=st.sampled_from([NEURONS // 2, 3 * NEURONS // 4, NEURONS]),
    noise=st.sampled_from([0.0, 0.05, 0.2]),
)
def test_planted_neurons_are_found(seed: int, users: int, matched: int, noise: float) -> None:
    vectors, labels = plant(np.random.default_rng(seed), EXPERTS, matched, users, noise)
    assert may_share(vectors)
    found = share_neurons(vectors, align(vectors))
    assert found.bank is not None
    assert found.bank.index.shape == (EXPERTS, matched)
    assert found.bank.size == matched * EXPERTS // users
    places = find_places(found)
    np.testing.assert_array_equal(places >= 0, labels >= 0)
    assert len(set(zip(places[labels >= 0], labels[labels >= 0], strict=True))) == found.bank.size
    np.testing.assert_array_equal(np.sort(found.permutations, axis=1), np.tile(np.arange(NEURONS), (EXPERTS, 1)))
    assert (np.diff(found.bank.index, axis=1) > 0).all()
    energy = bank_delta_energy(np.concatenate(list(vectors.values()), axis=2), found)
    assert energy == pytest.approx((1 - 1 / users) * noise**2 / (1 + noise**2), rel=0.1, abs=1e-6)


def test_strangers_and_copies_get_no_bank() -> None:
    draw = np.random.default_rng(0)
    strangers = {role: draw.standard_normal((EXPERTS, NEURONS, HIDDEN)).astype(np.float32) for role in ROLES}
    assert not may_share(strangers)
    assert share_neurons(strangers, align(strangers)).bank is None
    copies, _ = plant(draw, EXPERTS, NEURONS, EXPERTS, 0.1)
    assert may_share(copies)
    assert share_neurons(copies, align(copies)).bank is None  # one base holds them


@pytest.mark.parametrize("matched", [NEURONS // 2, NEURONS])
def test_the_law_counts_what_a_bank_saves(matched: int) -> None:
    """Against the law by hand: two of eight experts share each neuron."""
    vectors, _ = plant(np.random.default_rng(3), EXPERTS, matched, 2, 0.1)
    grams = {role: np.einsum("eni,fni->ef", each, each) for role, each in vectors.items()}
    share, own = matched / NEURONS, 0.5 * 0.01 / 1.01
    alignment = align(vectors)
    for rate in rate_sharing(grams, vectors, alignment, share_neurons(vectors, alignment)).values():
        assert rate.bits_saved == pytest.approx(share * (0.5 * np.log2(1 / (own + 4.0**-4)) - 4 / 2), abs=0.05)
        assert rate.delta_energy == pytest.approx(1 - share * (1 - own), abs=0.05)
        assert rate.bits_saved <= rate.bound


def test_natives_and_copies_are_coded_as_before() -> None:
    for name in ("native", "upcycled", "permuted"):
        written = MoECompressionService.compute(f"demo:{name}", layers="all", bits=2.5)
        assert not any(codes.bank for layer in written.layers for codes in layer.codes.values())


@pytest.mark.parametrize("users", [2, 4])
def test_d_is_told_by_a_few_experts(users: int) -> None:
    """Those that share the most of the bank; on average, what all of a neuron's users say."""
    shares, energies = [], []
    for seed in range(8):
        vectors, _ = plant(np.random.default_rng(seed), EXPERTS, NEURONS, users, 0.2)
        found = share_neurons(vectors, align(vectors))
        assert found.bank is not None
        chosen = sharing_experts(found.bank.index, 2)
        for own in vectors.values():
            matched = [permute("up", own[expert], found.permutations[expert]) for expert in chosen]
            shares.append(bank_delta_share(matched, found.bank, chosen))
            energies.append(bank_delta_energy(own, found))
    assert np.mean(shares) == pytest.approx(np.mean(energies), rel=0.03)


@given(matched=st.integers(1, 96), more=st.integers(0, 96), d=st.floats(1e-4, 0.5), axis=st.sampled_from([0, 1]))
@settings(max_examples=examples(20), deadline=None)
def test_codes_of_a_bank_err_less_from_step_to_step(matched: int, more: int, d: float, axis: int) -> None:
    """Against all that could be: none takes fewer bytes and does less harm."""
    bank, shape = BankShape(matched + more, matched, axis), ((96, 64), (64, 96))[axis]
    errors = {2: 0.57, 3: 0.23, 4: 0.13, 8: 0.035, 16: 0.009, 64: 0.0007, 256: 5e-5}
    trial = RoleTrial(shape, 8, d, {}, errors, bank=bank)
    rungs = [BitsCode(each, 64) for each in LEVELS]
    ladder = bank_ladder(bank, shape, 8, 64, rungs, trial.harm)
    sizes, harms = zip(*((codes.nbytes(shape, 8), trial.harm(codes)) for codes in ladder), strict=True)
    assert all(np.diff(sizes) > 0)
    assert all(np.diff(harms) < 0)
    assert all((codes.rest is None) == (matched == 96) for codes in ladder)
    for base, levels in product((4, 16), (2, 8)):
        other = RoleCodes(BitsCode(base, 64), BitsCode(levels, 64), ladder[0].rest, bank)
        size, harm = other.nbytes(shape, 8), trial.harm(other)
        on_hull = float(np.interp(size, sizes, harms))
        assert harm >= on_hull * (1 - 1e-9) or size > sizes[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Written, read and exported: any bank will do, as fine codes lose nothing


def random_bank(layer: Any, codes: LayerCodes, resources: Resources) -> Alignment:
    """A bank that neurons refer to at random, in the sizes that the codes say."""
    order = keep_order(layer.count, layer.sizes["I"])
    bank = next((each.bank for each in codes.values() if each.bank), None)
    if bank is None:
        return order
    draw = np.random.default_rng(layer.number)
    index = np.stack([np.sort(draw.permutation(bank.size)[: bank.matched]) for _ in range(layer.count)])
    index[0, : bank.matched] = np.arange(bank.matched)  # with the next line, all neurons of the bank are used
    index[1, : bank.matched] = np.arange(bank.size - bank.matched, bank.size)
    return replace(order, permutations=draw.permuted(order.permutations, axis=1), bank=Bank(bank.size, index))


def bank_codes(role: str, size: int, matched: int, rest: MatrixCode | None, delta: MatrixCode = FINE) -> RoleCodes:
    return RoleCodes(FINE, delta, rest, BankShape(size, matched, int(role == "down")))


def write(
    model: Path | str, folder: Path, monkeypatch: pytest.MonkeyPatch, matched: float = 0.75, delta: MatrixCode = FINE
) -> OverlayCheckpoint:
    """An overlay with a bank of nearly twice as many neurons as refer to it."""
    monkeypatch.setattr(writer, "find_alignment", random_bank)
    experts = Experts.open(str(model))
    codes: dict[int, LayerCodes] = {}
    for number in experts.layers:
        layer = experts.layer(number)
        count = int(matched * layer.sizes["I"])
        rest = FINE if count < layer.sizes["I"] else None
        codes[number] = {role: bank_codes(role, 2 * count - 1, count, rest, delta) for role in layer.roles}
    writer.write_coded_overlay(experts, codes, folder, resources=Resources.current(), progress=quiet, rule="as given")
    return read_overlay(folder)


def outputs(experts: Experts, number: int, expert: int, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    layer = experts.layer(number)
    activation = experts.activation if experts.activation in ACTIVATIONS else "swiglu_oai"
    return run_expert(inputs, layer.matrices(expert), layer.biases(expert), activation)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "dbrx"])
@pytest.mark.parametrize("matched", [0.5, 1])
def test_an_export_computes_what_the_model_does(
    name: str, matched: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up in one tensor or in two, with and without biases and strangers."""
    overlay = write(FIXTURES / name, tmp_path / "overlay", monkeypatch, matched)
    original = Experts.open(str(FIXTURES / name))
    export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
    rebuilt = Experts.open(str(tmp_path / "export"))
    assert rebuilt.layers == original.layers == overlay.layers
    for number in original.layers:
        layer = original.layer(number)
        inputs = np.random.default_rng(0).standard_normal((16, layer.sizes["H"])).astype(np.float32)
        for expert in range(layer.count):
            expected = outputs(original, number, expert, inputs)
            assert relative_error(outputs(rebuilt, number, expert, inputs), expected) < 0.05


def test_a_note_tells_of_strangers_where_there_are_some() -> None:
    some, none = ({role: bank_codes(role, 191, 96, rest) for role in ROLES} for rest in (FINE, None))
    assert bank_notes({0: some, 1: some, 2: none}) == [
        "in layers 0-1 96 neurons of each expert are deltas from a bank of 191 shared neurons, "
        "the others are coded by themselves",
        "in layer 2 all 96 neurons of each expert are deltas from a bank of 191 shared neurons",
    ]


@pytest.mark.parametrize("matched", [96, 128])
@pytest.mark.parametrize("role", ROLES)
def test_a_matrix_stays_as_it_is_while_it_is_coded(role: str, matched: int) -> None:
    """Also where neurons are in the bank's order already, so that the deltas could be a view of it."""
    layer = Experts.open("demo:upcycled").layer(0)
    index = np.tile(np.arange(matched), (layer.count, 1))
    order = replace(keep_order(layer.count, layer.sizes["I"]), bank=Bank(matched, index))
    rest = FINE if matched < layer.sizes["I"] else None
    codes = {each: bank_codes(each, matched, matched, rest) for each in ROLES}
    coder = coded_layer.CodedLayer(layer, codes, order)
    with Resources.current().worker_threads(layer) as pool:
        coder.code_bases(pool)
    matrix = layer.matrices(3)[role]
    before = matrix.copy()
    rebuilt = coder.decode(3, role, coder.code(3, role, matrix))
    np.testing.assert_array_equal(matrix, before)
    assert relative_error(rebuilt, matrix) < 0.01


def test_neurons_are_the_bank_s_plus_deltas_then_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the documented order of the tensors, each decoded by itself."""
    overlay = write("demo:upcycled", tmp_path / "overlay", monkeypatch)
    index = np.asarray(overlay.checkpoint.whole(overlay.checkpoint.info("model.layers.1.overlay.index")))
    assert index.dtype == np.uint8
    neurons = {"gate": lambda m: m, "up": lambda m: m, "down": lambda m: m.T}
    for role, codes in overlay.coded[1].codes.items():
        base = neurons[role](overlay.base(1, role))
        assert base.shape == (191, 64)
        for expert in (0, 5):
            found, own = neurons[role](overlay.expert(1, expert)[role]), neurons[role](overlay.delta(1, role, expert))
            np.testing.assert_allclose(found[:96], own[:96] + base[index[expert]], atol=1e-6)
            np.testing.assert_array_equal(found[96:], own[96:])
        assert codes.bank == BankShape(191, 96, int(role == "down"))


def test_the_config_and_the_bytes_tell_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = write("demo:upcycled", tmp_path / "overlay", monkeypatch)
    facts = overlay.config["overlay_config"]["layers"]["0"]
    texts = {"base": "8bit:128", "delta": "8bit:128", "rest": "8bit:128"}
    sizes = {"experts": 8, "hidden": 64, "intermediate": 128, "bank": 191, "matched": 96}
    assert facts == sizes | {"codes": dict.fromkeys(ROLES, texts)}
    sizes_on_disk = {
        name: overlay.checkpoint.info(name).nbytes for name in overlay.names if name.startswith("model.layers.0.")
    }
    expected = sum(codes.nbytes(overlay.shape(0, role), 8) for role, codes in overlay.coded[0].codes.items())
    assert sum(sizes_on_disk.values()) == expected + 8 * 96
    assert sizes_on_disk["model.layers.0.overlay.index"] == 8 * 96


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["overlay_config"]["layers"]["0"])
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def edit_index(change: Callable[[NDArray[np.uint8]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "numpy") as opened:
                if "model.layers.0.overlay.index" not in opened.keys():  # noqa: SIM118
                    continue
                start = json.loads(file.read_bytes()[8:][: int.from_bytes(file.read_bytes()[:8], "little")])
            at = 8 + int.from_bytes(file.read_bytes()[:8], "little")
            first, last = (at + offset for offset in start["model.layers.0.overlay.index"]["data_offsets"])
            data = bytearray(file.read_bytes())
            index = np.frombuffer(bytes(data[first:last]), np.uint8).reshape(8, 96).copy()
            change(index)
            data[first:last] = index.tobytes()
            file.write_bytes(data)

    return damage


def set_far(index: NDArray[np.uint8]) -> None:
    index[3, 5] = 191


def set_twice(index: NDArray[np.uint8]) -> None:
    index[3, 5] = index[3, 90]


IN_CONFIG = "the sizes or codes of layer"
BROKEN = [
    (edit(lambda layer: layer.update(bank=190)), "overlay.gate.base.levels is U8"),
    (edit(lambda layer: layer.update(bank=2**40)), IN_CONFIG),
    (edit(lambda layer: layer.update(bank=95)), IN_CONFIG),
    (edit(lambda layer: layer.update(bank="191")), IN_CONFIG),
    (edit(lambda layer: layer.update(matched=0)), IN_CONFIG),
    (edit(lambda layer: layer.update(matched=129)), IN_CONFIG),
    (edit(lambda layer: layer.update(matched=True)), IN_CONFIG),
    (edit(lambda layer: layer.pop("matched")), IN_CONFIG),
    (edit(lambda layer: layer["codes"]["up"].pop("rest")), IN_CONFIG),
    (edit(lambda layer: layer["codes"]["up"].update(rest=3)), IN_CONFIG),
    (edit(lambda layer: layer["codes"]["up"].update(rest="rank2:3bit:128")), IN_CONFIG),
    (edit(lambda layer: layer["codes"]["up"].update(base=None)), IN_CONFIG),
]


@pytest.mark.parametrize(("damage", "text"), BROKEN)
def test_a_broken_bank_is_one_line(
    damage: Callable[[Path], None], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("demo:upcycled", tmp_path / "overlay", monkeypatch)
    damage(tmp_path / "overlay")
    with pytest.raises(ModelUnreadable, match=text) as caught:
        read_overlay(tmp_path / "overlay")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "text"), [(set_far, "neuron 191 of a bank of 191"), (set_twice, "a neuron twice")])
def test_an_index_of_what_is_not_there_is_one_line(
    change: Callable[[NDArray[np.uint8]], Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("demo:upcycled", tmp_path / "overlay", monkeypatch)
    edit_index(change)(tmp_path / "overlay")
    overlay = read_overlay(tmp_path / "overlay")
    overlay.expert(1, 0)
    with pytest.raises(ModelUnreadable, match=text):
        overlay.expert(0, 3)
    with pytest.raises(ModelUnreadable, match=text):
        export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
    assert not (tmp_path / "export").exists()
    if find_spec("mlx_lm"):
        from chuk_lazarus.introspection.moe import load_overlay

        with pytest.raises(ModelUnreadable, match=text):
            load_overlay(tmp_path / "overlay")


# ---------------------------------------------------------------------------------------------------------------------
# In MLX

DELTAS = [FINE, BitsCode(3), FactorsCode(0, FINE), FactorsCode(3, FINE), SumCode(FactorsCode(2, FINE), BitsCode(4))]


@pytest.mark.skipif(not find_spec("mlx_lm"), reason="MLX is not installed")
@pytest.mark.parametrize(
    ("name", "matched", "delta"),
    [
        *(("demo:upcycled", 0.5, delta) for delta in DELTAS),
        ("demo:upcycled", 1, BitsCode(3)),
        ("qwen3_moe", 0.5, BitsCode(3)),
        ("qwen3_moe", 1, FactorsCode(0, FINE)),
        ("gpt_oss", 0.5, BitsCode(3)),
    ],
    ids=str,
)
def test_mlx_computes_what_the_decoded_experts_do(
    name: str, matched: float, delta: MatrixCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer's experts, for a few rows and for so many that they are sorted."""
    import mlx.core as mx

    from chuk_lazarus.introspection.moe import load_overlay
    from chuk_lazarus.introspection.moe.overlays.runtime.modules import CodedGLU

    source = name if name.startswith("demo") else FIXTURES / name
    overlay = write(source, tmp_path / "overlay", monkeypatch, matched, delta)
    experts = Experts.open(str(source))
    config = json.loads((tmp_path / "overlay/config.json").read_text())
    config |= {"rope_theta": 10000.0, "num_experts": overlay.count(overlay.layers[0])} if "qwen" in name else {}
    (tmp_path / "overlay/config.json").write_text(json.dumps(config))
    model: Any = load_overlay(tmp_path / "overlay")[0]
    model.set_dtype(mx.float32)
    blocks = [module for _, module in model.named_modules() if isinstance(module, CodedGLU)]
    assert len(blocks) == len(overlay.layers)
    draw = np.random.default_rng(0)
    biases = read_biases(overlay, experts)
    for number, block in zip(overlay.layers, sorted(blocks, key=lambda block: order_of(model, block)), strict=True):
        count = overlay.count(number)
        activation = experts.activation if experts.activation in ACTIVATIONS else "swiglu_oai"
        for rows in (3, 70):
            x = draw.standard_normal((rows, overlay.shape(number, "gate")[1])).astype(np.float32)
            chosen = np.stack([draw.permutation(count)[:2] for _ in range(rows)])
            found = np.array(block(mx.array(x), mx.array(chosen)))
            for expert in range(count):
                at = np.argwhere(chosen == expert)
                expected = run_expert(x, overlay.expert(number, expert), biases(number, expert), activation)
                for row, place in at:
                    np.testing.assert_allclose(found[row, place], expected[row], rtol=2e-3, atol=2e-4)


def order_of(model: Any, block: Any) -> str:
    return next(str(path) for path, module in model.named_modules() if module is block)


def read_biases(overlay: OverlayCheckpoint, experts: Experts) -> Callable[[int, int], dict[str, NDArray[np.float32]]]:
    """The biases as the overlay has them: those of gate and up in the order of the bank."""

    def read(number: int, expert: int) -> dict[str, NDArray[np.float32]]:
        layer = experts.layer(number)
        permutation = random_bank(layer, overlay.coded[number].codes, Resources.current()).permutations[expert]
        return {role: permute(role, bias, permutation) for role, bias in layer.biases(expert).items()}

    return read


# ---------------------------------------------------------------------------------------------------------------------
# Chosen, from the model to the folder


def make_slices(folder: Path, noise: float = 0.05) -> Path:
    """`demo:native` with experts of which each neuron but every fourth is near to one of another expert, in any
    order."""
    folder.mkdir()
    source = Path(chuk_lazarus.__file__).parent / "demo/native"
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    experts = Experts.open("demo:native")
    for number in experts.layers:
        layer, draw = experts.layer(number), np.random.default_rng(number)
        orders = [draw.permutation(128) for _ in range(8)]
        for tensor in layer.tensors:
            (role,) = tensor.spec.roles
            slices = draw.standard_normal((4, 96, 64))
            for expert, parts in enumerate(tensor.parts):
                rows = draw.standard_normal((128, 64))
                rows[:96] = slices[expert // 2] + noise * rows[:96]
                rows = rows[orders[expert]] / 8
                name = parts["weight"]
                tensors[name] = np.ascontiguousarray(rows.T if role == "down" else rows).astype(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("bits", keep([2.5, 4.0], 2.5))
def test_shared_neurons_save_bits(bits: float, tmp_path: Path) -> None:
    """The errors are less than those of plain codes of a bit more; reports and files say the same."""
    model = make_slices(tmp_path / "model")
    report = MoECompressionService.compress(str(model), tmp_path / "overlay", bits=bits)
    overlay = read_overlay(tmp_path / "overlay")
    size = sum(overlay.checkpoint.info(name).nbytes for name in overlay.names)
    assert report.bits_per_weight == pytest.approx(8 * size / (2 * 8 * 3 * 64 * 128))
    assert 0.99 * bits <= report.bits_per_weight <= bits
    assert (
        "in layers 0-1 96 neurons of each expert are deltas from a bank of 384 shared neurons, the others are coded"
        in (" ".join(report.notes))
    )
    parts = report.bytes_by_part
    assert parts.bases + parts.deltas + parts.scales == size
    computed = MoECompressionService.compute(str(model), layers="all", bits=bits)
    for layer in computed.layers:
        assert {(codes.bank, codes.matched) for codes in layer.codes.values()} == {(4 * 96, 96)}
        plain = BitsCode(2 ** int(bits))
        matrix = Experts.open(str(model)).layer(layer.layer).matrices(0)["up"]
        lost = relative_error(plain.decode(plain.encode(matrix), (128, 64)), matrix)
        assert layer.weight_error < lost
        exact = [Experts.open(str(model)).layer(layer.layer).matrices(expert) for expert in range(8)]
        x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
        errors = [
            relative_error(run_expert(x, overlay.expert(layer.layer, e), {}, "silu"), run_expert(x, own, {}, "silu"))
            for e, own in enumerate(exact)
        ]
        assert max(errors) < 4 * layer.weight_error  # their functions: neurons are in one order in all roles
    again = MoECompressionService.verify(str(model), layers="all", bits=bits, tolerance=1)
    assert again.layers == report.verification


def test_stopped_and_resumed_it_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_slices(tmp_path / "model")
    MoECompressionService.compress(str(model), tmp_path / "whole", bits=3)
    code, left = coded_layer.CodedLayer.code, [30]

    def stop(*arguments: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return code(*arguments)

    monkeypatch.setattr(coded_layer.CodedLayer, "code", stop)
    with pytest.raises(KeyboardInterrupt):
        MoECompressionService.compress(str(model), tmp_path / "stopped", bits=3)
    monkeypatch.setattr(coded_layer.CodedLayer, "code", code)
    MoECompressionService.compress(str(model), tmp_path / "stopped", bits=3)
    folders = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "stopped")]
    assert folders[0] == folders[1]


def test_codes_for_another_bank_are_refused(tmp_path: Path) -> None:
    experts = Experts.open("demo:upcycled")
    codes = {number: {role: bank_codes(role, 191, 96, FINE) for role in ROLES} for number in experts.layers}
    with pytest.raises(InvalidRequest, match="do not fit the bank"):
        writer.write_coded_overlay(experts, codes, tmp_path / "overlay", resources=Resources.current(), progress=quiet)
    assert not (tmp_path / "overlay").exists()
