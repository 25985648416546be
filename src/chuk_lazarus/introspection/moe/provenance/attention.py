"""Whether attention and token embeddings come from a dense parent, whatever happened to its feed-forwards."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from ..errors import ModelUnreadable, MoEError, NotMoE, UnknownFormat
from ..jobs.resources import Resources
from ..numerics.neurons import Array
from ..numerics.search import searching_order
from ..numerics.similarity import (
    Assignment,
    even_columns,
    find_assignment,
    kernel,
    row_cosine,
    unbiased_cka,
)
from ..progress import Counter, Progress
from ..reports import AttentionMatch, EmbeddingMatch, ProjectionMatch
from ..weights.attention import Attention, Embeddings
from ..weights.experts import Experts

TOKENS, RUN = 4096, 256  # tokens whose embeddings are compared, and neighbours among them
CONVINCING = 0.75  # the mean CKA above which no other layer of the parent is compared


@dataclass(frozen=True, slots=True)
class AttentionPair:
    """The attention of a model and of its parent, of one hidden size."""

    model: Attention
    parent: Attention
    hidden: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What can't be read, and why."""
        return (
            *(f"attention: {note}" for note in self.model.notes),
            *(f"attention of the parent: {note}" for note in self.parent.notes),
        )


def pair_attention(model: Experts, parent: Experts, hidden: int) -> AttentionPair:
    """The attention of two models with hidden sides of `hidden`."""
    return AttentionPair(Attention(model.checkpoint, model.stack), Attention(parent.checkpoint, parent.stack), hidden)


def is_mixture(model: Experts) -> bool:
    """Whether a model has routed experts, beside those that were opened."""
    try:
        Experts(model.checkpoint)
    except NotMoE:
        return False
    except MoEError:
        return True  # what looks like experts and can't be read
    return True


def compare_embeddings(
    model: Experts, parent: Experts, progress: Progress
) -> tuple[EmbeddingMatch, Assignment | None] | None:
    """How similar the embeddings of tokens with equal ids are, and the assignment of the model's hidden side, if its
    columns are those of the parent in another order or with other signs.

    None if there are none that can be read, or none of the same width.
    """
    try:
        ours, theirs = Embeddings(model.checkpoint, model.stack), Embeddings(parent.checkpoint, parent.stack)
        if ours.shape[1] != theirs.shape[1]:
            return None
        runs = draw_runs(min(ours.shape[0], theirs.shape[0]))
        rows = []
        for embeddings in (ours, theirs):
            embeddings.prefetch(runs, progress)
            rows.append(np.concatenate([embeddings.rows(*run) for run in runs]))
    except (UnknownFormat, ModelUnreadable):
        return None
    left, right = rows
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return None
    assignment = find_assignment(left, right)
    is_assigned = not assignment.is_identity
    left = even_columns(assignment.apply(left) if is_assigned else left)
    right = even_columns(right)
    match = EmbeddingMatch(
        tokens=len(left),
        cosine=row_cosine(left, right) or 0.0,
        cka=unbiased_cka(kernel(left), kernel(right)),
        correlation=assignment.correlation,
        assigned=is_assigned,
    )
    return match, assignment if is_assigned else None


def draw_runs(count: int) -> list[tuple[int, int]]:
    """Evenly spaced runs of tokens, TOKENS together, out of range(count); all if there are no more."""
    if count <= TOKENS:
        return [(0, count)]
    starts = np.linspace(0, count - RUN, TOKENS // RUN).round().astype(int).tolist()
    return [(start, start + RUN) for start in starts]


def match_attention(
    number: int, pair: AttentionPair, assignment: Assignment | None, resources: Resources, progress: Progress
) -> AttentionMatch | None:
    """How similar the attention of layer `number` is to that of the parent's most similar layer; None if there is none
    to compare.

    The parent's layer of the same number is compared first, then its neighbours, until one is nearly identical.
    """
    if number not in pair.model.layers or not pair.parent.layers:
        return None
    candidates = searching_order(number, pair.parent.layers)
    pair.model.prefetch([number], progress)
    ours = read_projections(pair.model, number, pair.hidden, assignment)
    if not ours:
        return None
    sizes = {candidate: pair.parent.nbytes(candidate) for candidate in candidates}
    counter = Counter(progress, f"layer {number}, attention", sum(sizes.values()))
    compared: dict[int, dict[str, ProjectionMatch]] = {}
    with resources.worker_threads() as pool:
        kernels = dict(zip(ours, pool.map(kernel, ours.values()), strict=True))

        def compare(role: str, ours: Array, theirs: Array) -> ProjectionMatch:
            return ProjectionMatch(cosine=row_cosine(ours, theirs), cka=unbiased_cka(kernels[role], kernel(theirs)))

        for candidate in candidates:
            pair.parent.prefetch([candidate], progress)
            theirs = read_projections(pair.parent, candidate, pair.hidden, None)
            roles = [role for role in ours if role in theirs]
            matches = pool.map(compare, roles, [ours[r] for r in roles], [theirs[r] for r in roles])
            if roles:
                compared[candidate] = dict(zip(roles, matches, strict=True))
            counter.add(sizes.pop(candidate))
            if roles and mean_cka(compared[candidate]) >= CONVINCING:
                counter.add(sum(sizes.values()))
                break
    if not compared:
        return None
    best = max(compared, key=lambda candidate: mean_cka(compared[candidate]))
    cosines = [match.cosine for match in compared[best].values() if match.cosine is not None]
    return AttentionMatch(
        layer=best,
        layers={candidate: mean_cka(roles) for candidate, roles in sorted(compared.items())},
        cka=mean_cka(compared[best]),
        cosine=fmean(cosines) if cosines else None,
        projections=compared[best],
    )


def mean_cka(roles: Mapping[str, ProjectionMatch]) -> float:
    """The mean over the projections."""
    return fmean(match.cka for match in roles.values())


def read_projections(attention: Attention, number: int, hidden: int, assignment: Assignment | None) -> dict[str, Array]:
    """The projections of a layer with the hidden side as columns of equal length, [rows, hidden]; those that have no
    hidden side are left out."""
    found = {}
    for role, matrix in attention.matrices(number).items():
        columns = matrix.T if role == "o" else matrix
        if columns.shape[1] == hidden:
            found[role] = even_columns(assignment.apply(columns) if assignment else columns)
    return found
