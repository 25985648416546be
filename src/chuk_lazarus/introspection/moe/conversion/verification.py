"""A conversion verified against its original: layer by layer, a few experts at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite, prod
from typing import Literal

from ..errors import InvalidRequest, MoEError, name_model, printable
from ..jobs.model import OpenedModel, evenly_spaced
from ..jobs.parts import LAYERS
from ..jobs.resources import Resources
from ..numerics.deviation import deviation
from ..progress import Counter, Progress, no_progress
from ..reports import Cost, LayerConversion, MoEWeightsVerification, ProjectionConversion, WeightFault
from ..weights.expert_layer import LacksRole, ShapesDoNotFit
from ..weights.experts import Experts
from .diagnosis import diagnose
from .faults import Fault, gather
from .format_error import ARITHMETIC
from .order import common_corner, find_order, find_sources, find_strays, keeps_groups, name_order
from .pair import LayerPair, RoleError, bits_per_weight, tensor_of
from .router import check_router, norm_factors, rows_agree
from .structure import compare_shapes, explain_misfit, explain_unreadable, find_missing, find_unquantised

EXPERTS, LEAST_EXPERTS = 8, 2  # of a layer that are compared, and the fewest where they are large
BUDGET = 2_000_000_000  # bytes of the original's experts beyond which fewer are compared
TOLERANCE = 2.5  # times the expected error; GPTQ, which puts errors where inputs are small, had up to 1.8
MATRICES = 8  # that a thread holds while it compares an expert
GROUP_KEYS = ("n_group", "num_expert_group", "n_groups")  # of experts, in configs whose routing is limited to groups

Count = int | Literal["all"] | None


def verify(
    model: str,
    against: str,
    *,
    layers: Sequence[int] | str | None = None,
    experts: Count = None,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> MoEWeightsVerification:
    """Compare the experts of `model` with those of `against`; `MoEWeightsService.verify` says what the options mean."""
    if not (isfinite(tolerance) and tolerance >= 1):
        raise InvalidRequest(f"the tolerance is {tolerance}", "give a factor of 1 or more")
    if isinstance(experts, int) and experts < 1:
        raise InvalidRequest(f"{experts} experts are too few", "compare at least one")
    with name_model(against):
        original = OpenedModel(against, None, layers, samples=LAYERS, purpose="verify")
    if experts is None and layers == "all":
        experts = "all"
    with name_model(model):
        return _Verification(model, original, tolerance, progress or no_progress).run(experts)


class _Verification:
    """A conversion that is compared with an opened original: gathers faults, notes and what was measured."""

    def __init__(self, model: str, original: OpenedModel, tolerance: float, progress: Progress) -> None:
        self.model, self.original, self.tolerance, self.progress = model, original, tolerance, progress
        self.resources = Resources.current()
        self.converted: Experts | None = None
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self.layers: list[LayerConversion] = []

    def run(self, experts: Count) -> MoEWeightsVerification:
        """The report; raises a child of MoEError where the conversion is in no layout or format that we know."""
        try:
            self.converted = Experts.open(self.model, damaged=True)
        except ShapesDoNotFit as error:
            self.faults += explain_misfit(error, self.original.experts.layer(error.layer))
        except LacksRole as error:
            numbers = [layer.number for layer in self.original.layers]
            self.faults += [
                Fault(n, "missing", "it is missing in every layer", role) for n in numbers for role in error.roles
            ]
        if self.converted:
            self._compare(self.converted, experts)
        return self._report()

    def _compare(self, converted: Experts, experts: Count) -> None:
        missing = list(find_missing(self.original.experts, converted))
        unquantised, notes = find_unquantised(converted)
        for number in dict.fromkeys(fault.layer for fault in (*missing, *unquantised)):
            here = [fault for fault in (*missing, *unquantised) if fault.layer == number]
            count = self.original.experts.layer(number).count if number in self.original.experts.layers else 0
            roles = self.original.layers[0].roles
            self.faults += gather(here, roles, range(count))
        self.notes += [*converted.notes, *notes]
        for layer in self.original.layers:
            if layer.number in {*converted.layers, *converted.mtp_layers}:
                pair = LayerPair(layer, converted.layer(layer.number), self.tolerance)
                absent = {(fault.role, fault.expert) for fault in missing if fault.layer == layer.number}
                chosen = self._choose(pair, experts)
                self._compare_layer(pair, chosen, {expert for _, expert in absent})

    def _choose(self, pair: LayerPair, experts: Count) -> tuple[int, ...]:
        """Which experts of a layer are compared."""
        layer = pair.original
        if experts is not None:
            return evenly_spaced(layer.count, None if experts == "all" else experts)
        fitting = BUDGET * layer.count // (layer.stored_bytes * len(self.original.layers))
        return evenly_spaced(layer.count, max(LEAST_EXPERTS, min(EXPERTS, fitting)))

    def _compare_layer(self, pair: LayerPair, chosen: Sequence[int], absent: set[int | None]) -> None:
        faults: list[Fault] = []
        readable = []
        for expert in chosen if None not in absent else ():
            if expert not in absent:
                wrong = _check_readable(pair, expert)
                faults += wrong
                readable += [] if wrong else [expert]
        everything = range(pair.original.count)
        sources = dict(zip(everything, everything, strict=True))
        errors: dict[int, dict[str, RoleError]] = {}
        if readable:
            self._fetch(pair, readable)
            errors = self._measure(pair, readable, sources)
            if bad := _find_bad(pair, errors):
                order = self._find_harmless_order(pair, bad)
                if order:
                    sources = dict(enumerate(order))
                    self.notes.append(
                        f"layer {pair.number}: experts and router are in a different order, which is harmless: "
                        f"{name_order(order)}"
                    )
                    self._fetch_original(pair, [sources[expert] for expert in readable])
                    errors = self._measure(pair, readable, sources)
                    bad = _find_bad(pair, errors)
                faults += self._explain(pair, bad, sources, errors)
            faults += _compare_biases(pair, [e for e in readable if e not in {f.expert for f in faults}], sources)
        router = check_router(pair, list(sources.values()))
        faults = [*gather(faults, pair.roles, chosen), *router.faults]
        self.faults += faults
        if readable:
            self.layers.append(_report_layer(pair, chosen, errors, router.error))

    def _fetch(self, pair: LayerPair, experts: Sequence[int]) -> None:
        """Fetch all of some experts of both models."""
        self._fetch_original(pair, experts)
        pair.converted.prefetch(
            self.progress,
            (
                found
                for expert in experts
                for tensor in pair.alone(expert).tensors
                for found in tensor.byte_ranges(pair.place(expert), 0, tensor.rows)
            ),
        )

    def _fetch_original(self, pair: LayerPair, experts: Sequence[int]) -> None:
        pair.original.prefetch(
            self.progress,
            (
                found
                for expert in experts
                for tensor in pair.original.tensors
                for found in tensor.byte_ranges(expert, 0, tensor.rows)
            ),
        )

    def _measure(
        self, pair: LayerPair, experts: Sequence[int], sources: Mapping[int, int]
    ) -> dict[int, dict[str, RoleError]]:
        """The errors of some experts by role, each against its source."""
        layer = pair.original
        total = layer.stored_bytes * len(experts) // layer.count
        counter = Counter(self.progress, f"layer {pair.number}", total, layer.stored_bytes / layer.parameters)

        def measure(expert: int) -> dict[str, RoleError]:
            errors = pair.compare(expert, sources[expert])
            counter.add(sum(prod(layer.shape(role)) for role in layer.roles))
            return errors

        with self.resources.worker_threads(layer, MATRICES) as pool:
            return dict(zip(experts, pool.map(measure, experts), strict=True))

    def _explain(
        self,
        pair: LayerPair,
        bad: Mapping[int, Mapping[str, float]],
        sources: Mapping[int, int],
        errors: Mapping[int, dict[str, RoleError]],
    ) -> list[Fault]:
        """What is wrong with experts whose errors are too large; the allowed errors are given by role."""
        faults: list[Fault] = []
        left = {expert: dict(allowed) for expert, allowed in bad.items()}
        if not bad:
            return faults
        original = [pair.corners(pair.original, sources[expert]) for expert in sources]
        converted = {expert: pair.corners(pair.alone(expert), pair.place(expert)) for expert in errors}
        for role in pair.roles:
            experts = [expert for expert in bad if role in bad[expert]]
            if not experts:
                continue
            here, there = common_corner(
                [
                    {expert: corner[role] for expert, corner in enumerate(original)},
                    {expert: corner[role] for expert, corner in converted.items()},
                ]
            )
            found = find_sources(here, there, experts, max(bad[expert][role] for expert in experts))
            if len(errors) > 1 and found.same.keys() | {*found.same.values()} == {*errors}:
                faults.append(Fault(pair.number, "identical", "all experts are identical", role))
                for expert in experts:
                    del left[expert][role]
                continue
            for expert in experts:
                if expert in found.same:
                    detail = f"it is identical to expert {found.same[expert]}"
                    faults.append(Fault(pair.number, "identical", detail, role, expert))
                elif expert in found.of:
                    detail = f"it is expert {found.of[expert]} of the original"
                    faults.append(Fault(pair.number, "reordered", detail, role, expert))
                elif not errors[expert][role].error <= bad[expert][role]:
                    continue
                del left[expert][role]
        for expert, allowed in left.items():
            if allowed:
                faults += self._diagnose(pair, expert, sources[expert], list(allowed), errors[expert])
        return faults

    def _diagnose(
        self, pair: LayerPair, expert: int, source: int, bad: Sequence[str], errors: dict[str, RoleError]
    ) -> list[Fault]:
        """What is wrong with one expert whose errors are too large in the roles in `bad`; sets `errors` to what remains
        if it is harmless."""
        original, converted = pair.original.matrices(source), pair.read_converted(expert)
        allowed = {role: pair.allowed(one.expected) for role, one in errors.items()}
        faults = []
        for finding in diagnose(original, converted, bad, allowed, norm_factors(pair)):
            if not finding.harmless:
                faults += [Fault(pair.number, finding.kind, finding.detail, role, expert) for role in finding.roles]
                continue
            what = finding.detail.removeprefix("its ")
            self.notes.append(f"layer {pair.number}: {what}, which is harmless")
            for role, left in finding.error.items():
                errors[role] = replace(errors[role], error=left)
        return faults

    def _find_harmless_order(self, pair: LayerPair, bad: Mapping[int, Mapping[str, float]]) -> tuple[int, ...] | None:
        """Which expert of the original each converted one is, if experts and router were reordered together; else
        None."""
        count = pair.original.count
        if any(_check_readable(pair, expert) for expert in range(count)):
            return None
        originals = [pair.corners(pair.original, expert) for expert in range(count)]
        converted = [pair.corners(pair.alone(expert), pair.place(expert)) for expert in range(count)]
        orders = set()
        for role in pair.roles:
            here, there = common_corner(
                [{e: corner[role] for e, corner in enumerate(some)} for some in (originals, converted)]
            )
            orders.add(find_order(here, there))
        if len(orders) > 1:
            return None
        order = orders.pop()
        groups = next((n for key in GROUP_KEYS if type(n := self.original.experts.config.get(key)) is int), 1)
        is_permuted = sorted(order) == list(range(count)) and order != tuple(range(count))
        return order if is_permuted and keeps_groups(order, groups) and rows_agree(pair, order) else None

    def _report(self) -> MoEWeightsVerification:
        original, converted = self.original, self.converted
        own, ours = original.cost(), converted.checkpoint if converted else None
        formats = [p.format for layer in self.layers for p in layer.projections.values()]
        return MoEWeightsVerification(
            model=printable(self.model),
            revision=ours.repository.revision if ours else None,
            family=converted.family if converted else "unknown",
            model_type=converted.model_type if converted else None,
            storage=", ".join(dict.fromkeys(formats)) or "unknown",
            experts=original.layers[0].count,
            passed=not self.faults,
            against=printable(original.name),
            against_revision=original.experts.checkpoint.repository.revision,
            against_storage=original.identity()["storage"],
            tolerance=self.tolerance,
            moe_layers=original.experts.layers,
            faults=tuple(
                WeightFault(layer=f.layer, role=f.role, expert=f.expert, fault=f.kind, detail=f.detail)
                for f in sorted(self.faults, key=lambda fault: fault.layer)
            ),
            layers=tuple(self.layers),
            notes=tuple(dict.fromkeys(self.notes)),
            cost=Cost(
                bytes_read=own.bytes_read + (ours.bytes_read if ours else 0),
                bytes_fetched=own.bytes_fetched + (ours.repository.bytes_fetched if ours else 0),
                seconds=own.seconds,
            ),
        )


def _check_readable(pair: LayerPair, expert: int) -> list[Fault]:
    """What keeps a converted expert from being compared with the original's."""
    if pair.converted.layout.is_single and expert and not _check_readable(pair, 0):
        count = pair.converted.count
        return [] if expert < count else [Fault(pair.number, "missing", "it is missing", None, expert)]
    number = None if pair.converted.layout.is_single else expert
    layer = pair.alone(expert)
    try:
        for tensor in layer.tensors:
            tensor.stored  # noqa: B018  which raises where it can't be decoded
        layer.sizes  # noqa: B018
    except ShapesDoNotFit as error:
        return explain_misfit(error, pair.original, number)
    except MoEError as error:
        return explain_unreadable(error, pair.converted, number)
    return compare_shapes(layer, pair.original, number)


def _find_bad(pair: LayerPair, errors: Mapping[int, Mapping[str, RoleError]]) -> dict[int, dict[str, float]]:
    """The experts and roles whose errors are too large, or that are nearer to another expert; with the allowed
    errors."""
    bad: dict[int, dict[str, float]] = {}
    for role in pair.roles:
        strays = find_strays(
            {expert: roles[role].original for expert, roles in errors.items()},
            {expert: roles[role].converted for expert, roles in errors.items()},
        )
        for expert, roles in errors.items():
            allowed = pair.allowed(roles[role].expected)
            if expert in strays or not roles[role].error <= allowed:
                bad.setdefault(expert, {})[role] = allowed
    return bad


def _compare_biases(pair: LayerPair, experts: Sequence[int], sources: Mapping[int, int]) -> list[Fault]:
    """What is wrong with the biases of experts."""
    faults = []
    for expert in experts:
        try:
            biases = pair.alone(expert).biases(pair.place(expert))
        except MoEError as error:
            faults.append(Fault(pair.number, "error", error.message, None, expert))
            continue
        for role, exact in pair.original.biases(sources[expert]).items():
            if role not in biases:
                faults.append(Fault(pair.number, "missing", "its bias is missing", role, expert))
            elif not (error_of := deviation(biases[role][None], exact[None])) <= pair.tolerance * ARITHMETIC:
                faults.append(
                    Fault(pair.number, "error", f"the error of its bias is {100 * error_of:.3g} %", role, expert)
                )
    return faults


def _report_layer(
    pair: LayerPair, chosen: Sequence[int], errors: Mapping[int, Mapping[str, RoleError]], router: float | None
) -> LayerConversion:
    first = pair.alone(next(iter(errors)))
    projections = {}
    for role in pair.roles:
        measured = [errors[expert][role] for expert in errors]
        finite = [one.error for one in measured if isfinite(one.error)]
        is_all = len(finite) == len(measured)
        tensor = tensor_of(first, role)
        projections[role] = ProjectionConversion(
            format=tensor.stored.codec,
            original_format=tensor_of(pair.original, role).stored.codec,
            bits_per_weight=bits_per_weight(tensor),
            expected_error=sum(one.expected for one in measured) / len(measured),
            mean=sum(finite) / len(finite) if finite else None,
            max=max(finite) if finite else None,
            ratio=max(one.error / max(one.expected, ARITHMETIC / 2) for one in measured) if is_all else None,
            error=tuple(
                errors[expert][role].error if expert in errors and isfinite(errors[expert][role].error) else None
                for expert in chosen
            ),
        )
    return LayerConversion(layer=pair.number, experts=tuple(chosen), projections=projections, router_error=router)
