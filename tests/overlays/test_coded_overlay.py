"""Overlays in codes on disk: written, read, exported, interrupted; and what the reports say of them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from typer.testing import CliRunner

from chuk_lazarus.cli.app import app
from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.errors import InvalidRequest, ModelUnreadable, MoEError, UnknownFormat
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.numerics.alignment import Alignment, keep_order
from chuk_lazarus.introspection.moe.numerics.forward import ACTIVATIONS, run_expert
from chuk_lazarus.introspection.moe.numerics.low_rank import relative_error
from chuk_lazarus.introspection.moe.overlays import analysis, coded_layer
from chuk_lazarus.introspection.moe.overlays.checkpoint import writer
from chuk_lazarus.introspection.moe.overlays.checkpoint.export import export_overlay
from chuk_lazarus.introspection.moe.overlays.checkpoint.reader import OverlayCheckpoint, read_overlay
from chuk_lazarus.introspection.moe.overlays.codes import LayerCodes, MatrixCode, RoleCodes
from chuk_lazarus.introspection.moe.overlays.codes.bf16 import Bf16Code
from chuk_lazarus.introspection.moe.overlays.codes.bits import BitsCode
from chuk_lazarus.introspection.moe.overlays.codes.low_rank import FactorsCode, SumCode
from chuk_lazarus.introspection.moe.overlays.codes.trellis import TrellisCode
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.stored import BIAS
from places import FIXTURES
from sampling import sampled

ONE_OF_EACH = {  # a fixture of each layout in its first storage format
    Experts.open(str(path.parent)).family: path.parent.name
    for path in sorted(FIXTURES.glob("*/oracle.npz"), reverse=True)
    if path.parent.name != "published_grok2"
}
every_layout = pytest.mark.parametrize("name", sorted(ONE_OF_EACH.values()))
FINE = RoleCodes(BitsCode(256), BitsCode(256))


def quiet(what: str, done: int, total: int) -> None:
    pass


def write(model: Path | str, folder: Path, codes: RoleCodes = FINE, **options: Any) -> OverlayCheckpoint:
    experts = Experts.open(str(model))
    chosen: dict[int, LayerCodes] = {
        number: dict.fromkeys(experts.layer(number).roles, codes) for number in experts.layers
    }
    writer.write_coded_overlay(
        experts, chosen, folder, resources=Resources.current(), progress=quiet, **({"rule": "as given"} | options)
    )
    return read_overlay(folder)


def export(folder: Path, target: Path) -> Experts:
    export_overlay(folder, target, resources=Resources.current(), progress=quiet)
    return Experts.open(str(target))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shuffle(layer: Any, codes: LayerCodes, resources: Resources) -> Alignment:
    rng = np.random.default_rng(layer.number)
    order = keep_order(layer.count, layer.sizes["I"])
    return replace(order, permutations=rng.permuted(order.permutations, axis=1))


def keep(layer: Any, codes: LayerCodes, resources: Resources) -> Alignment:
    return keep_order(layer.count, layer.sizes["I"])


def outputs(experts: Experts, number: int, expert: int, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    layer = experts.layer(number)
    activation = experts.activation if experts.activation in ACTIVATIONS else "swiglu_oai"
    return run_expert(inputs, layer.matrices(expert), layer.biases(expert), activation)


# ---------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.sample
@every_layout
@pytest.mark.parametrize("order", ["kept", "shuffled"])
def test_an_export_computes_what_the_model_does(
    name: str, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order the neurons are coded, biases included."""
    monkeypatch.setattr(writer, "find_alignment", shuffle if order == "shuffled" else keep)
    overlay = write(FIXTURES / name, tmp_path / "overlay")
    original, rebuilt = Experts.open(str(FIXTURES / name)), export(tmp_path / "overlay", tmp_path / "export")
    assert rebuilt.layers == original.layers == overlay.layers
    for number in original.layers:
        layer = original.layer(number)
        inputs = np.random.default_rng(0).standard_normal((16, layer.sizes["H"])).astype(np.float32)
        for expert in range(layer.count):
            matrices = overlay.expert(number, expert)
            assert {role: matrix.shape for role, matrix in matrices.items()} == {r: layer.shape(r) for r in layer.roles}
            expected = outputs(original, number, expert, inputs)
            assert relative_error(outputs(rebuilt, number, expert, inputs), expected) < 0.05
            if order == "kept":
                assert all(relative_error(matrices[role], layer.matrices(expert)[role]) < 0.02 for role in matrices)


@every_layout
def test_all_else_is_copied(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "find_alignment", keep)
    overlay = write(FIXTURES / name, tmp_path / "overlay")
    original = Experts.open(str(FIXTURES / name))
    replaced = {
        tensor_name
        for number in original.layers
        for tensor in original.layer(number).tensors
        for parts in tensor.parts
        for part, tensor_name in parts.items()
        if part != BIAS
    }
    copied = set(original.checkpoint.names) - replaced
    assert set(overlay.checkpoint.names) == copied | overlay.names
    chunks = overlay.checkpoint.chunks
    assert all(b"".join(chunks(n, 2**20)) == b"".join(original.checkpoint.chunks(n, 2**20)) for n in copied)


CODES: list[tuple[MatrixCode | None, MatrixCode]] = [
    (BitsCode(16), BitsCode(3)),
    (BitsCode(32, 64), BitsCode(2)),
    (None, BitsCode(8)),
    (Bf16Code(), FactorsCode(3, BitsCode(8))),
    (BitsCode(16), SumCode(FactorsCode(2, BitsCode(8)), BitsCode(4))),
    (BitsCode(16), FactorsCode(0, BitsCode(8))),
    (None, Bf16Code()),
    (BitsCode(256), BitsCode(128)),
    (BitsCode(16), TrellisCode(2)),
    (BitsCode(16), SumCode(FactorsCode(2, BitsCode(8)), TrellisCode(1))),
    (None, TrellisCode(3)),
]


@pytest.mark.parametrize(("base", "delta"), CODES, ids=str)
def test_every_code_is_read_as_it_was_written(base: MatrixCode | None, delta: MatrixCode, tmp_path: Path) -> None:
    """Against the codes themselves, matrix by matrix."""
    layer = Experts.open("demo:upcycled").layer(1)
    overlay = write("demo:upcycled", tmp_path / "overlay", RoleCodes(base, delta))
    for role in layer.roles:
        matrices = [layer.matrices(expert)[role] for expert in range(layer.count)]
        shape = layer.shape(role)
        stored = np.zeros(shape, np.float32)
        if base is not None:
            mean = np.mean(np.stack(matrices), axis=0, dtype=np.float64).astype(np.float32)
            stored = base.decode(base.encode(mean), shape)
        np.testing.assert_allclose(overlay.base(1, role), stored, rtol=1e-6, atol=1e-7)
        for expert, matrix in enumerate(matrices):
            parts = delta.encode(matrix - overlay.base(1, role), unbiased=base is None)
            found = overlay.expert(1, expert)[role]
            np.testing.assert_allclose(found, delta.decode(parts, shape) + overlay.base(1, role), rtol=1e-5, atol=1e-6)


def test_the_config_tells_what_it_is(tmp_path: Path) -> None:
    overlay = write("demo:upcycled", tmp_path / "overlay", RoleCodes(BitsCode(16), BitsCode(3)), source="org/model")
    facts = overlay.config["overlay_config"]
    codes = {"base": "4bit:128", "delta": "1.6bit:128"}
    sizes = {"experts": 8, "hidden": 64, "intermediate": 128}
    assert facts["version"] == 2
    assert facts["rule"] == "as given"
    assert facts["layers"] == {n: {**sizes, "codes": dict.fromkeys(("gate", "up", "down"), codes)} for n in "01"}
    card = (tmp_path / "overlay/README.md").read_text()
    assert "org/model" in card
    assert "codes of layers 0-1: gate 1.6bit:128 on 4bit:128" in card


def test_copies_in_any_order_become_the_same_bytes(tmp_path: Path) -> None:
    for demo in ("upcycled", "permuted"):
        MoECompressionService.compress(f"demo:{demo}", tmp_path / demo, bits=2.25, format="overlay")
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / demo).glob("*.safetensors"))
        for demo in ("upcycled", "permuted")
    ]
    assert sizes[0] == sizes[1]
    errors = []
    for demo in ("upcycled", "permuted"):
        report = MoECompressionService.verify(f"demo:{demo}", layers="all", bits=2.25, tolerance=1)
        errors.append([layer.output_error.mean for layer in report.layers])
    np.testing.assert_allclose(errors[0], errors[1], rtol=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# The reports


@pytest.mark.sample
@pytest.mark.parametrize("bits", [2.0, 2.25, 3.1, 5.0])
@pytest.mark.parametrize("demo", ["upcycled", "native"])
def test_bits_are_those_of_the_files(demo: str, bits: float, tmp_path: Path) -> None:
    report = MoECompressionService.compress(f"demo:{demo}", tmp_path / "overlay", bits=bits, format="overlay")
    size = 0
    for file in (tmp_path / "overlay").glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            size += sum(opened.get_tensor(key).nbytes for key in opened.keys() if ".overlay." in key)  # noqa: SIM118
    experts = Experts.open(f"demo:{demo}")
    weights = sum(experts.layer(number).parameters for number in experts.layers)
    assert report.bits_per_weight == pytest.approx(8 * size / weights)
    assert 0.99 * bits <= report.bits_per_weight <= bits  # a rank of so small a layer is half a per cent
    parts = report.bytes_by_part
    assert parts.bases + parts.deltas + parts.scales == size
    assert (parts.bases > 0) == (demo == "upcycled")
    assert not report.ranks
    assert report.codes.keys() == {0, 1}


def test_all_commands_say_the_same(tmp_path: Path) -> None:
    computed = MoECompressionService.compute("demo:upcycled", layers="all", bits=2.5)
    verified = MoECompressionService.verify("demo:upcycled", layers="all", bits=2.5, tolerance=1)
    written = MoECompressionService.compress("demo:upcycled", tmp_path / "overlay", bits=2.5)
    assert written.verification == verified.layers
    assert written.bits_per_weight == computed.bits_per_weight
    assert written.bytes_by_part == computed.bytes_by_part
    assert [layer.codes for layer in verified.layers] == [layer.codes for layer in computed.layers]
    experts, overlay = Experts.open("demo:upcycled"), read_overlay(tmp_path / "overlay")
    for layer in computed.layers:
        exact = [experts.layer(layer.layer).matrices(expert) for expert in range(8)]
        found = [overlay.expert(layer.layer, expert) for expert in range(8)]
        lost = sum(((f[role] - e[role]) ** 2).sum() for e, f in zip(exact, found, strict=True) for role in e)
        energy = sum((e[role] ** 2).sum() for e in exact for role in e)
        assert layer.weight_error == pytest.approx(np.sqrt(lost / energy), rel=1e-4)


def test_a_ratio_of_coded_experts_is_of_sixteen_bits() -> None:
    by_ratio = MoECompressionService.compute("demo:upcycled", layers="all", target_ratio=6.4, coded=True)
    assert by_ratio.layers == MoECompressionService.compute("demo:upcycled", layers="all", bits=2.5).layers
    assert not MoECompressionService.compute("demo:upcycled", target_ratio=4).layers[0].codes


def test_coded_experts_err_less_than_factors_of_the_same_size() -> None:
    coded = MoECompressionService.compute("demo:upcycled", layers="all", bits=2.5)
    ranked = MoECompressionService.compute("demo:upcycled", layers="all", target_ratio=6.4)
    assert coded.overlay_bytes <= ranked.overlay_bytes * 1.01
    assert max(layer.weight_error for layer in coded.layers) < 0.5 * min(layer.weight_error for layer in ranked.layers)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 0.3}, r"0.3 bits per weight are out of reach \(the least is 0.58\)"),
        ({"bits": 9}, "no codes of 9 bits per weight"),
        ({"bits": 2, "target_ratio": 4}, "both bits and a ratio are given"),
        ({"bits": 2, "ranks": {"up": 3}}, "both codes and ranks"),
        ({"bits": 2, "max_error": 0.1}, "both bits and a maximum error are given"),
        ({"coded": True, "target_ratio": 1}, "can't have a ratio of 1"),
    ],
)
def test_bits_that_cannot_be(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=text):
        MoECompressionService.compress("demo:upcycled", tmp_path / "overlay", **options)
    assert not (tmp_path / "overlay").exists()


def test_the_command_line(tmp_path: Path) -> None:
    start = ["introspect", "moe-expert"]
    for command in ("compute", "verify", "compress"):
        more = ["-O", str(tmp_path / "overlay")] if command == "compress" else ["--layers", "all"]
        more += ["--tolerance", "0.5"] if command == "verify" else []
        run = CliRunner().invoke(
            app, [*start, f"moe-overlay-{command}", "-m", "demo:upcycled", "--bits", "2.25", *more]
        )
        assert run.exit_code == 0, run.output
        assert "1.6bit" in run.output
    run = CliRunner().invoke(app, [*start, "moe-overlay-compute", "-m", "demo:upcycled", "--bits", "0.1"])
    assert isinstance(run.exception, InvalidRequest | SystemExit)


def test_a_model_that_shares_nothing_is_read_once_and_stays_in_order(tmp_path: Path) -> None:
    native = Experts.open("demo:native")
    size = sum(native.layer(number).stored_bytes for number in native.layers)
    report = MoECompressionService.compress("demo:native", tmp_path / "overlay", bits=6, format="overlay")
    assert report.cost.bytes_read < 2.3 * size  # with the trial and with what is copied
    overlay = read_overlay(tmp_path / "overlay")
    for role, matrix in overlay.expert(0, 3).items():
        assert relative_error(matrix, native.layer(0).matrices(3)[role]) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted


@pytest.mark.parametrize(
    ("calls", "trellis"),
    sampled(
        [(0, False), (1, False), (20, False), (20, True), (30, False), (47, False)],
        [(0, False), (20, True), (47, False)],
    ),
)
def test_stopped_and_resumed_it_ends_with_the_same_bytes(
    calls: int, trellis: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compress(folder: str) -> Any:
        return MoECompressionService.compress("demo:permuted", tmp_path / folder, bits=2.25, trellis=trellis)

    compress("whole")
    code, left = coded_layer.CodedLayer.code, [calls]

    def stop(*arguments: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return code(*arguments)

    monkeypatch.setattr(coded_layer.CodedLayer, "code", stop)
    with pytest.raises(KeyboardInterrupt):
        compress("stopped")
    assert (tmp_path / "stopped.partial").exists()
    monkeypatch.setattr(coded_layer.CodedLayer, "code", code)
    monkeypatch.setattr(analysis, "try_layer", None)  # the codes are in the plan
    compress("stopped")
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    assert not (tmp_path / "stopped.partial").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Broken


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["overlay_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_layer(**facts: Any) -> Callable[[Path], None]:
    return edit_config(lambda overlay: overlay["layers"]["0"].update(facts))


def edit_codes(**codes: Any) -> Callable[[Path], None]:
    return edit_config(lambda overlay: overlay["layers"]["0"]["codes"]["up"].update(codes))


@pytest.mark.parametrize(
    ("damage", "kind", "text"),
    [
        (edit_config(lambda o: o.update(version=3)), UnknownFormat, "version 3, but we read only versions 1 and 2"),
        (edit_config(lambda o: o.update(version=True)), UnknownFormat, "version True"),
        (edit_config(lambda o: o.update(version=1)), ModelUnreadable, "rank"),
        (edit_config(lambda o: o.update(layers={})), ModelUnreadable, "lists no layers"),
        (edit_config(lambda o: o["layers"].pop("0")), ModelUnreadable, "layer 0 is only partly in"),
        (edit_config(lambda o: o["layers"]["0"]["codes"].pop("up")), ModelUnreadable, "layer 0"),
        (edit_layer(experts=7), ModelUnreadable, "delta"),
        (edit_layer(experts=10**6), UnknownFormat, "1000000 experts"),
        (edit_layer(hidden=0), ModelUnreadable, "sizes or codes"),
        (edit_layer(hidden="64"), ModelUnreadable, "sizes or codes"),
        (edit_layer(intermediate=127), ModelUnreadable, "not U8"),
        (edit_codes(delta="9bit:128"), ModelUnreadable, "sizes or codes"),
        (edit_codes(delta=3), ModelUnreadable, "sizes or codes"),
        (edit_codes(delta=None), ModelUnreadable, "sizes or codes"),
        (edit_codes(base="rank2:3bit:128"), ModelUnreadable, "sizes or codes"),
        (edit_codes(delta="2bit:128"), ModelUnreadable, "overlay.up.delta.levels is U8"),
        (edit_codes(delta="rank2:3bit:128"), ModelUnreadable, "left.levels is missing"),
    ],
)
def test_a_broken_overlay_is_one_line(
    damage: Callable[[Path], None], kind: type[MoEError], text: str, tmp_path: Path
) -> None:
    write("demo:upcycled", tmp_path / "overlay", RoleCodes(BitsCode(16), BitsCode(3)))
    damage(tmp_path / "overlay")
    with pytest.raises(kind, match=text) as caught:
        read_overlay(tmp_path / "overlay")
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write("demo:upcycled", tmp_path / "overlay", RoleCodes(BitsCode(16), BitsCode(3)))
    file = next(
        path for path in (tmp_path / "overlay").glob("*.safetensors") if b"overlay.up.delta.unit" in path.read_bytes()
    )
    data = bytearray(file.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little") + header["model.layers.0.overlay.up.delta.unit"]["data_offsets"][0]
    data[start : start + 4] = np.float32(np.inf).tobytes()
    file.write_bytes(data)
    with pytest.raises(ModelUnreadable, match="NaN, infinity"):
        read_overlay(tmp_path / "overlay").expert(0, 0)


def test_what_an_overlay_has_not_got(tmp_path: Path) -> None:
    overlay = write("demo:upcycled", tmp_path / "overlay", RoleCodes(BitsCode(16), BitsCode(3)))
    for ask in (
        lambda: overlay.expert(0, 8),
        lambda: overlay.expert(0, -1),
        lambda: overlay.expert(7, 0),
        lambda: overlay.factors(0, "up", 0),
    ):
        with pytest.raises(InvalidRequest):
            ask()


def test_experts_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / "mixtral", model)
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    size = 8 + int.from_bytes(data[:8], "little")
    start = size + json.loads(data[8:size])[name]["data_offsets"][0]
    data[start : start + 2] = b"\x80\x7f"  # infinity
    file.write_bytes(data)
    for codes in (FINE, RoleCodes(None, BitsCode(4))):
        with pytest.raises(ModelUnreadable, match="layer 1"):
            write(model, tmp_path / "overlay", codes)
        assert not (tmp_path / "overlay").exists()
        shutil.rmtree(tmp_path / "overlay.partial")


@pytest.mark.parametrize(
    ("codes", "text"),
    [
        ({0: {"gate": FINE}}, "needs codes for"),
        ({9: dict.fromkeys(("gate", "up", "down"), FINE)}, "layer 9"),
        ({0: dict.fromkeys(("gate", "up", "down"), RoleCodes(FINE.base, FactorsCode(99, BitsCode(4))))}, "rank 99"),
        ({}, "for any layer"),
    ],
)
def test_codes_that_do_not_fit(codes: dict[int, LayerCodes], text: str, tmp_path: Path) -> None:
    experts = Experts.open("demo:upcycled")
    with pytest.raises(InvalidRequest, match=text):
        writer.write_coded_overlay(experts, codes, tmp_path / "overlay", resources=Resources.current(), progress=quiet)


def test_bytes_on_disk_are_those_of_the_layout(tmp_path: Path) -> None:
    codes = RoleCodes(BitsCode(16), SumCode(FactorsCode(2, BitsCode(8)), BitsCode(4)))
    overlay = write("demo:upcycled", tmp_path / "overlay", codes)
    for role in ("gate", "up", "down"):
        layout = overlay.coded[0].layout(role)
        for part, expected in layout.items():
            info = overlay.checkpoint.info(f"model.layers.0.overlay.{role}.{part}")
            assert (info.dtype, info.shape, info.nbytes) == (expected.dtype, expected.shape, expected.nbytes)
        assert sum(part.nbytes for part in layout.values()) == codes.nbytes(overlay.shape(0, role), 8)
        assert prod(overlay.shape(0, role)) == 64 * 128
