"""What the default run takes of many cases, so that each of their parts occurs; the others are marked `long`."""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest

Case = tuple[Any, ...]


THOROUGH = os.environ.get("LAZARUS_TESTS") == "thorough"
"""Whether `make test-all` runs, which also repeats the tests of properties, with all their examples."""


def examples(count: int) -> int:
    """How many examples of a property are tried, of the `count` that a thorough run tries."""
    return count if THOROUGH else max(5, count // 4)


def in_turn(*parts: Sequence[Any]) -> list[Case]:
    """As many cases as the longest has parts: each part occurs at least once, those of the shorter ones in turn."""
    return [tuple(part[number % len(part)] for part in parts) for number in range(max(map(len, parts)))]


def one_of_each_kind(cases: Iterable[Case], kind: Callable[..., Any]) -> list[Case]:
    """For each kind one of its cases, of which the first part was chosen least often so far."""
    by_kind: dict[Any, list[Case]] = {}
    for case in cases:
        by_kind.setdefault(kind(*case), []).append(case)
    times: dict[Any, int] = {}
    chosen = []
    for group in by_kind.values():
        case = min(group, key=lambda one: times.get(one[0], 0))
        times[case[0]] = times.get(case[0], 0) + 1
        chosen.append(case)
    return chosen


def keep(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Parameters, of which the kept run by default."""
    return [pytest.param(value, marks=() if value in kept else pytest.mark.long) for value in values]


def sampled(cases: Iterable[Case], chosen: Collection[Case], name: Callable[..., str] | None = None) -> list[Any]:
    """All cases as parameters, with their names; `long` those that are not chosen."""
    return [
        pytest.param(*case, id=name(*case) if name else None, marks=() if case in chosen else pytest.mark.long)
        for case in cases
    ]
