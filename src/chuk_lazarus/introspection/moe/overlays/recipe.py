"""A recipe with which llama.cpp's own `llama-quantize` gives a model's experts the types with the smallest error at a
size.

The file for its option `--tensor-type-file` has a `regex=TYPE` on each line; the first that is found in a tensor's name
decides (tools/quantize/quantize.cpp and src/llama-quant.cpp of llama.cpp). Converters may join gates and ups, so both
get one type, under either name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from shlex import quote

from ..errors import InvalidRequest
from ..files import write_file
from ..weights.experts import Experts
from .analysis import OverlayJob
from .bit_budget import BitRule
from .checkpoint.dequantise import dequantise
from .checkpoint.folder import Tensor
from .checkpoint.writer import expert_names
from .ggml import GgmlType, expert_pattern, ggml_types
from .quantised import Place, try_all
from .width_budget import Widths, WidthTrial, choose_widths, count_bytes, join_trials, mean_error

KIND = "gguf-recipe"
PAIR = ("gate", "up")
REST_TYPES = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}  # by the bits of the rest
FILE_TYPES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}  # llama-quantize's names for files of one type
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # its own, by src
KEPT = "BF16"

Unit = tuple[int, tuple[str, ...]]
"""A layer's number, and the roles that get one type."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What was written: the type of each projection, None for bf16; the expected relative weight error and approximate
    bytes of all tensors; and the commands to run next."""

    widths: Widths[Place]
    weight_error: float
    nbytes: int
    commands: tuple[str, ...]


def write_recipe(
    job: OverlayJob, rule: BitRule, target: Path, rest_bits: int | None, is_overlay: bool, force: bool
) -> Recipe:
    """Choose types for the job's model, and write the file for `llama-quantize --tensor-type-file`.

    Raises InvalidRequest where no types meet the rule, or the file can't be written.
    """
    check_file(target, force)
    trials = _join_units(try_all(job, KIND, ggml_types), job)
    rest = _count_rest(job.opened.experts, rest_bits)
    chosen = choose_widths(rule, trials, lambda widths: rest + count_bytes(trials, widths))
    try:
        write_file(target, _format(chosen, rest_bits).encode())
    except OSError as error:
        raise InvalidRequest(f"can't write {target}: {error.strerror or error}", "choose another place") from None
    job.end()
    return Recipe(
        {(number, role): width for (number, roles), width in chosen.items() for role in roles},
        sqrt(mean_error(trials, chosen)),
        rest + count_bytes(trials, chosen),
        _list_commands(job.opened.experts, job.opened.name, target, rest_bits, is_overlay),
    )


def check_file(target: Path, force: bool) -> None:
    """Raise InvalidRequest if the file exists and must not be replaced, or its folder does not exist."""
    if target.is_dir():
        raise InvalidRequest(f"{target} is a folder", "name the file to write")
    if target.exists() and not force:
        raise InvalidRequest(f"{target} already exists", "choose another name, or force its replacement")
    if not target.parent.is_dir():
        raise InvalidRequest(f"{target.parent}: no such folder", "create it, or choose another")


def _join_units(trials: Mapping[Place, WidthTrial], job: OverlayJob) -> dict[Unit, WidthTrial]:
    units: dict[Unit, WidthTrial] = {}
    for layer in job.layers:
        pair = tuple(role for role in PAIR if role in layer.roles)
        for roles in (pair, *((role,) for role in layer.roles if role not in pair)):
            units[layer.number, roles] = join_trials([trials[layer.number, role] for role in roles])
    return units


def _count_rest(experts: Experts, bits: int | None) -> int:
    """The bytes of all other tensors, about: of matrices in the type for these bits, of all else in F32."""
    checkpoint = experts.checkpoint
    layers = [experts.layer(number) for number in experts.layers]
    names = sorted(set(checkpoint.names) - expert_names(layers))
    counts = {layer.count for layer in layers}
    return sum(_rest_bytes(writer.tensor, bits, counts) for writer in dequantise(checkpoint, names))


def _rest_bytes(tensor: Tensor, bits: int | None, expert_counts: set[int]) -> int:
    weights = prod(tensor.shape)
    is_router = tensor.shape[:1] in {(count,) for count in expert_counts}
    if len(tensor.shape) < 2 or is_router or not tensor.name.endswith("weight"):
        return 4 * weights
    shape = weights // tensor.shape[-1], tensor.shape[-1]
    for name in (REST_TYPES[bits], FALLBACKS.get(REST_TYPES[bits])) if bits else ():
        if name and shape[1] % (kind := GgmlType(name)).block[0] == 0:
            return kind.nbytes(shape)
    return 2 * weights


def _format(widths: Widths[Unit], rest_bits: int | None) -> str:
    """The lines of the file: those of experts, and where the rest is kept, one for all other tensors."""
    layers: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for (number, roles), width in widths.items():
        layers.setdefault((roles, width or KEPT), []).append(number)
    lines = [f"{expert_pattern(numbers, roles)}={width}" for (roles, width), numbers in sorted(layers.items())]
    if rest_bits is None:
        roles_of: dict[int, set[str]] = {}
        for number, roles in widths:
            roles_of.setdefault(number, set()).update(roles)
        experts = expert_pattern(sorted(roles_of), set().union(*roles_of.values()))
        lines.append(f"^(?!{experts.removeprefix('^')})={KEPT}")
    return "".join(f"{line}\n" for line in lines)


def _list_commands(
    experts: Experts, model: str, target: Path, rest_bits: int | None, is_overlay: bool
) -> tuple[str, ...]:
    """The commands that make the GGUF file, from the model on."""
    repository, stem = experts.checkpoint.repository, target.with_suffix("")
    commands = []
    if experts.checkpoint.is_gguf:
        source = str(repository.folder / experts.checkpoint.config_file) if repository.folder else model
    else:
        folder, source = model, f"{stem}-bf16.gguf"
        if is_overlay:
            folder = f"{stem}-standard"
            commands.append(f"lazarus introspect moe-expert moe-overlay-export {quote(model)} -O {quote(folder)}")
        elif repository.folder is None:
            folder = f"{stem}-original"
            revision = f" --revision {quote(repository.revision)}" if repository.revision else ""
            commands.append(f"hf download {quote(repository.name)}{revision} --local-dir {quote(folder)}")
        elif not Path(model).exists():  # an embedded model
            folder = str(repository.folder)
        commands.append(f"python convert_hf_to_gguf.py {quote(folder)} --outtype bf16 --outfile {quote(source)}")
    kind = REST_TYPES[rest_bits or 8]
    options = f"--pure --tensor-type-file {quote(str(target))}"
    out = f"{stem}.gguf"
    commands.append(f"llama-quantize {options} {quote(source)} {quote(out)} {FILE_TYPES.get(kind, kind)}")
    return tuple(commands)
