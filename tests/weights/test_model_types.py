"""tools/model_types.py: which types of a library's source have neither a row nor a reason."""

from pathlib import Path

import gguf
import pytest

import model_types
from checkpoints_in_memory import TABLE, as_stored, open_made, random_experts

EXPERTS = "class {}Experts(nn.Module):\n    pass\n"


def add_model(source: Path, name: str, experts: bool = True) -> None:
    folder = source / "transformers/models" / name
    folder.mkdir(parents=True)
    (folder / f"configuration_{name}.py").write_text(f'class A:\n    model_type = "{name}"\n')
    (folder / f"modeling_{name}.py").write_text(EXPERTS.format("A") if experts else "class AMLP:\n    pass\n")


def test_only_types_with_experts_and_without_a_row_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("qwen3_moe", "doge", "brand_new_moe"):
        add_model(tmp_path, name)
    add_model(tmp_path, "brand_new_dense", experts=False)
    assert model_types.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == "brand_new_moe: transformers\n"


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        (
            "diffusers/models/transformers/transformer_new.py",
            "class NewMoE(nn.Module):\n    self.experts = 1\nclass NewModel(ModelMixin, ConfigMixin):\n",
            "NewModel",
        ),
        (
            "vllm/models/brand_new/nvidia/model.py",
            "from vllm.layers.fused_moe import FusedMoE",
            "brand_new",
        ),
        ("vllm_omni/diffusion/models/newer/newer.py", "self.experts = FusedMoE()", "newer"),
    ],
)
def test_types_are_found_where_libraries_have_them(file: str, text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    assert set(model_types.missing(tmp_path)) == {name}


def test_a_source_whose_types_are_all_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_model(tmp_path, "mixtral")
    assert model_types.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "every type has a row or a reason\n"


def test_the_installed_gguf_has_no_tensor_of_experts_without_a_row() -> None:
    assert model_types.gguf_names(Path(gguf.__file__).parents[1]) == set()


def test_mlx_lm_has_no_type_without_a_row() -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    assert model_types.missing(Path(next(iter(mlx_lm.__path__))).parent) == {}


def test_aliases_are_of_listed_types() -> None:
    assert set(model_types.ALIASES.values()) <= model_types.known_types()
    assert not (model_types.ALIASES.keys() | model_types.REASONS.keys()) & model_types.known_types()


@pytest.mark.parametrize("name", [name for name, why in model_types.REASONS.items() if model_types.BY_NAMES in why])
def test_what_is_read_by_its_names_is_read_with_a_note(name: str) -> None:
    row = TABLE["stacked_gate_up_down" if name.startswith("step") else "gate_up_down"]
    block = row.tensors[0].names.index("moe.gate_proj") if name.startswith("step") else 0
    matrices = random_experts(3, 6, 4)
    experts = open_made(as_stored(row, matrices, block=block), {"model_type": name})
    assert experts.family == row.name
    assert any("chosen by its tensors' names" in note for note in experts.notes)
    assert (experts.layer(0).matrices(1)["down"] == matrices["down"][1]).all()
