"""The kind of upcycling, in words: what was copied, in which groups, and how much of it is left."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..numerics.pairs import group_partners
from ..reports import QuickLayer
from ..text import format_groups, format_numbers, format_ranges
from .lineage import FEW, Group, PairEvidence

SHARED = 0.05  # the share of neurons found in the best partner below which experts form no groups
LEFT = 0.8  # the share of neurons found in other experts above which none were re-initialised


def name_kind(sharing: PairEvidence) -> str:
    """The kind of upcycling that leaves such matches, in words.

    Copies share neurons with all experts equally. Slices that were cut alike, or copies of several layers, fall into
    groups that share nothing with each other. Slices that were shuffled before they were cut overlap with some more
    than with others.
    """
    if len(sharing.experts) < 2:
        return "identical copies"
    if sum(map(len, sharing.twins)) >= 0.9 * sharing.count:
        return f"identical copies{_describe_groups(sharing.twins)}"
    shared = max(sharing.shared, sharing.without_down or 0.0)
    order = "" if sharing.in_place > 0.5 else "shuffled "
    groups = group_experts(sharing)
    what = f"copies{_describe_groups(groups)}" if len(groups) > 1 else "copies"
    size = len(sharing.experts) / max(1, len(groups))
    alone = sorted(set(sharing.experts) - {expert for group in groups for expert in group}) if groups else []
    if alone:
        what += f"; expert{'' if len(alone) == 1 else 's'} {format_numbers(alone)} apart"
    elif len(groups) < 2 and shared >= FEW and _overlap(sharing):
        what = f"slices that overlap{_count_copies(sharing.pairs)}"
    text = order + what
    if (kept := _share_kept(sharing, size)) < LEFT:
        text += f", {_name_loss(kept, sharing)}"
    return text if sharing.shared > 0.5 * shared else f"{text}; the down projections do not agree"


def note_identical(layers: Iterable[tuple[int, int, Sequence[Group]]], of: str = "") -> list[str]:
    """A sentence on the identical experts, for layers with the same finding; takes the numbers of layers, how many
    experts were read and the groups of identical ones. `of` names what was read, if not everything."""
    found: dict[str, list[int]] = {}
    for layer, experts, groups in layers:
        identical = sum(map(len, groups))
        match len(groups):
            case 0:
                continue
            case 1 if identical == experts:
                who = f"all {experts} experts are identical"
            case 1:
                who = f"experts {format_numbers(groups[0])} are identical"
            case _:
                who = f"{identical} experts are identical in {len(groups)} groups, experts {format_groups(groups)}"
        found.setdefault(f"{who}, to the last bit{of}", []).append(layer)
    return [
        f"layer{'s' if len(numbers) > 1 else ''} {format_ranges(numbers)}: {said}" for said, numbers in found.items()
    ]


def note_identical_parts(parts: Iterable[QuickLayer]) -> list[str]:
    """As `note_identical`, of parts of layers."""
    return note_identical([(part.layer, len(part.experts), part.identical) for part in parts], " of what was read")


def group_experts(sharing: PairEvidence) -> tuple[Group, ...]:
    """The experts that share neurons only among themselves, in groups of two or more; twins are with each other."""
    is_shared = max(sharing.shared, sharing.without_down or 0.0) >= SHARED
    places = group_partners(sharing.pairs) if is_shared else tuple((i,) for i in range(len(sharing.experts)))
    twins = {group[0]: group for group in sharing.twins}
    found = [[sharing.experts[place] for place in group] for group in places]
    groups = [sorted(twin for expert in group for twin in twins.get(expert, (expert,))) for group in found]
    return tuple(tuple(group) for group in sorted(groups) if len(group) > 1)


def _overlap(sharing: PairEvidence) -> bool:
    """Whether experts share more with some than with others, by enough neurons to tell."""
    count = len(sharing.experts)
    others = sharing.pairs[~np.eye(count, dtype=bool)]
    is_less = others < 0.25 * others.mean()
    return float(is_less.mean()) > 0.05 and others.mean() * sharing.queries / count >= 8


def _count_copies(pairs: NDArray[np.float64]) -> str:
    """The number of copies that overlapping slices come from: those of one copy share nothing. "" if that is not
    clear."""
    from scipy.sparse.csgraph import connected_components  # here, because it takes long to load

    others = ~np.eye(len(pairs), dtype=bool)
    is_apart = (np.maximum(pairs, pairs.T) < 0.25 * pairs[others].mean()) & others
    copies, labels = connected_components(is_apart, directed=False)
    slices = len(pairs) // copies
    same = np.equal.outer(labels, labels) & others
    if copies < 2 or slices < 2 or np.any(np.bincount(labels) != slices) or np.any(same != is_apart):
        return ""
    return f": {copies} copies of a layer, each in {slices} slices"


def _share_kept(sharing: PairEvidence, size: float) -> float:
    """The share of its neurons that an expert still has of what was copied, for groups of about `size` experts.

    If each expert lost different ones and a share k is left, k² is found in any one expert of the group, and k (1 - (1
    - k)^n) in at least one of the n others; if all lost the same ones, k is found in every one.
    """
    pair = max(sharing.shared, sharing.without_down or 0.0)
    shares = np.linspace(0, 1, 1001)
    found = shares * (1 - (1 - shares) ** max(1.0, size - 1))
    own = float(shares[np.abs(found - sharing.anywhere).argmin()])
    is_common = size > 2 and abs(pair - sharing.anywhere) < abs(pair - own * own)
    return sharing.anywhere if is_common else own


def _name_loss(kept: float, sharing: PairEvidence) -> str:
    """Says what happened to the others: what is left of re-initialised neurons is close, what was trained far apart is
    not."""
    if sharing.strong < 0.5 * sharing.shared:
        return "partly re-initialised, or trained far apart"
    return f"about {5 * round(20 * (1 - kept))} % of the neurons re-initialised"


def _describe_groups(groups: Sequence[Group]) -> str:
    """For instance " in 2 groups of 4, experts 0-3; 4-7: 4 copies of a layer in 2 slices, or of 2 layers"."""
    count, sizes = len(groups), sorted({len(group) for group in groups})
    named = f"experts {format_groups(groups)}"
    if sizes == [2]:
        return f" in {count} pairs, {named}: of a smaller mixture, or 2 copies of a layer in {count} slices"
    if len(sizes) == 1:
        size = sizes[0]
        return (
            f" in {count} groups of {size}, {named}: {size} copies of a layer in {count} slices, or of {count} layers"
        )
    return f" in {count} groups of {sizes[0]} to {sizes[-1]}, {named}: slices of a layer, or copies of several"
