"""Different layers of trained dense models, taken as the experts of one layer: nobody copied them from each other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from chuk_lazarus.introspection.moe import Experts, MoETypeService
from made_layers import SHORT, write

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("smollm2", range(4)),
        ("smollm2", range(10, 18)),
        ("smollm2", range(22, 30)),
        ("smollm2", range(0, 30, 3)),
        ("smollm2", range(30)),
        ("gemma3", range(4)),
        ("gemma3", range(10, 18)),
        ("gemma3", range(0, 18, 3)),
        ("gemma3", range(18)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.start}-{value[-1]}-by-{value.step}",
)
def test_layers_as_experts_are_not_upcycled(
    model: str, layers: Sequence[int], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    dense = Experts.open(str(request.getfixturevalue(model)), "dense")
    matrices = [dense.layer(number).matrices(0) for number in layers]
    made = {
        role: np.stack([layer[role].T if role == "down" else layer[role] for layer in matrices]).astype(np.float16)
        for role in SHORT
    }
    path = write(tmp_path / "m", made)
    report = MoETypeService.analyze(path)
    sharing = report.layers[0].lineage.sharing
    assert report.type != "UPCYCLED"
    assert MoETypeService.quick(path).type != "UPCYCLED"
    assert sharing.shared < 0.05
    assert sharing.strong < 0.005
    assert sharing.without_down is not None
    assert sharing.without_down < 0.10
