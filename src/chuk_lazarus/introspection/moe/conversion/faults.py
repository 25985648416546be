"""What may be wrong with a conversion."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..reports import FaultKind


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault in a layer, of one role or all, and of one expert or all; `detail` is a sentence without its full
    stop."""

    layer: int
    kind: FaultKind
    detail: str
    role: str | None = None
    expert: int | None = None


def gather(faults: Iterable[Fault], roles: Sequence[str], experts: Sequence[int]) -> list[Fault]:
    """The faults of a layer; equal faults of all `experts`, or of all `roles`, become one.

    Their details may differ: the first is kept, with its place.
    """
    result = list(dict.fromkeys(faults))
    ways: tuple[tuple[Callable[[Fault], Fault], Callable[[Fault], object], Sequence[object]], ...] = (
        (lambda fault: replace(fault, expert=None), lambda fault: fault.expert, experts),
        (lambda fault: replace(fault, role=None), lambda fault: fault.role, roles),
    )
    for of_all, of, everything in ways:
        alike: dict[Fault, list[Fault]] = {}
        for fault in result:
            alike.setdefault(replace(of_all(fault), detail=""), []).append(fault)
        result = [
            other
            for same in alike.values()
            for other in ([_join(of_all(same[0]), same)] if {*map(of, same)} >= {*everything} and everything else same)
        ]
    return result


def _join(joined: Fault, parts: Sequence[Fault]) -> Fault:
    """The fault that stands for its parts, whose first has its detail."""
    if len({part.detail for part in parts}) == 1 or joined.detail.endswith(")"):
        return joined
    where = f"expert {parts[0].expert}" if parts[0].expert != joined.expert else str(parts[0].role)
    return replace(joined, detail=f"{joined.detail} ({where})")
