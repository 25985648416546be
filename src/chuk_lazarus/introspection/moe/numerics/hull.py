"""The lower convex hull of points in the plane: the options that are worth their price."""

from collections.abc import Sequence


def lower_hull(prices: Sequence[float], losses: Sequence[float]) -> list[int]:
    """The points on the lower convex hull of prices and losses, as long as losses fall, by ascending price.

    For any budget, no mix of other points has a smaller loss than the mix of two neighbours of these.
    """
    hull: list[tuple[float, float, int]] = []
    for point in sorted(zip(prices, losses, range(len(prices)), strict=True)):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [place for _, _, place in hull]


def _slope(first: tuple[float, float, int], second: tuple[float, float, int]) -> float:
    """By how much the loss changes for a price, between two points."""
    return (second[1] - first[1]) / (second[0] - first[0])
