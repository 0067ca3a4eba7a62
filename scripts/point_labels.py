"""Write names beside the points of a chart so that no name covers another name or a point.

The places are found by coordinate descent: each name in turn takes the free place that is nearest to its point, and
this is repeated until no name moves. A name that has to stand further away gets a short line to its point.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import BboxBase

_DISTANCES = (4.0, 10.0, 17.0, 25.0, 35.0, 47.0)
"""How far a name may stand from its point's marker, in pixels at 100 dots per inch."""
_DIRECTIONS = tuple(range(0, 360, 30))
"""Where a name may stand, in degrees against the clock; 0 is right of the point."""
_FREE_DISTANCE = 11.0
"""Up to here a name needs no line to its point."""
_NUM_STARTS = 4
"""The descent depends on the order of the names, so it is tried with several."""


@dataclass(frozen=True)
class Label:
    """A point and its name.

    Args:
        text: name of the point.
        x, y: position of the point in data coordinates.
        colour: colour of the name, as matplotlib takes it.
        radius: radius of the point's marker in points; above 0.
    """

    text: str
    x: float
    y: float
    colour: Any
    radius: float = 2.5


@dataclass(frozen=True)
class _Place:
    """A rectangle for a name, in pixels; ``cost`` is lower near the point."""

    left: float
    bottom: float
    width: float
    height: float
    distance: float
    cost: float

    @classmethod
    def of(cls, box: "BboxBase") -> "_Place":
        return cls(box.x0, box.y0, box.width, box.height, 0.0, 0.0)

    def is_in(self, box: "BboxBase") -> bool:
        right, top = self.left + self.width, self.bottom + self.height
        return self.left > box.x0 and right < box.x1 and self.bottom > box.y0 and top < box.y1

    def overlaps(self, other: "_Place", margin: float) -> bool:
        return (
            self.left < other.left + other.width + margin
            and other.left < self.left + self.width + margin
            and self.bottom < other.bottom + other.height + margin
            and other.bottom < self.bottom + self.height + margin
        )

    def holds(self, point: tuple[float, float], margin: float) -> bool:
        return (
            -margin < point[0] - self.left < self.width + margin
            and -margin < point[1] - self.bottom < self.height + margin
        )

    def nearest(self, point: tuple[float, float]) -> tuple[float, float]:
        """The point of the rectangle that is nearest to the given one."""
        x = min(max(point[0], self.left), self.left + self.width)
        return x, min(max(point[1], self.bottom), self.bottom + self.height)


def label_points(
    axes: "Axes", labels: Sequence[Label], *, avoid: Sequence[tuple[float, float]] = (), fontsize: float = 9
) -> None:
    """Write each name beside its point. Call it last: the limits and the scales of the axes must be final.

    Args:
        axes: axes in which the points are drawn.
        labels: the points with their names.
        avoid: further points that no name may cover, such as the ends of error bars, in data coordinates.
        fontsize: size of the names in points; above 0.
    """
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    texts = [
        axes.annotate(
            *(label.text, (label.x, label.y), (0, 0)),
            textcoords="offset points",
            va="bottom",
            fontsize=fontsize,
            color=label.colour,
        )
        for label in labels
    ]
    for text in texts:
        text.set_in_layout(False)  # a name is put where the layout leaves room, and does not change the layout
    figure.draw_without_rendering()
    scale = figure.dpi / 100
    pixels = [_pixel(axes, label.x, label.y) for label in labels]
    radii = [label.radius * figure.dpi / 72 for label in labels]
    # Of markers on one spot the largest counts.
    radii = [
        max(radius for other, radius in zip(pixels, radii, strict=True) if math.dist(pixel, other) < 3 * scale)
        for pixel in pixels
    ]
    obstacles = [(pixel, radius + scale) for pixel, radius in zip(pixels, radii, strict=True)]
    obstacles += [(_pixel(axes, *point), 4 * scale) for point in avoid]
    bounds = axes.bbox.padded(-3 * scale)
    choices = []
    for pixel, radius, text in zip(pixels, radii, texts, strict=True):
        box = text.get_window_extent()
        places = _places(pixel, radius, box.width, box.height, scale)
        choices.append([place for place in places if place.is_in(bounds)] or places)
    legend = axes.get_legend()
    taken = [] if legend is None else [_Place.of(legend.get_window_extent())]
    chosen = _choose(choices, pixels, obstacles, taken, scale)
    for label, (x, y), text, place in zip(labels, pixels, texts, chosen, strict=True):
        text.set_position(((place.left - x) * 72 / figure.dpi, (place.bottom - y) * 72 / figure.dpi))
        if place.distance > _FREE_DISTANCE * scale:
            end = axes.transData.inverted().transform(place.nearest((x, y)))
            ends = (label.x, end[0]), (label.y, end[1])
            axes.plot(*ends, color=label.colour, linewidth=0.7, zorder=1, scalex=False, scaley=False)


def _pixel(axes: "Axes", x: float, y: float) -> tuple[float, float]:
    place = axes.transData.transform((x, y))
    return float(place[0]), float(place[1])


def _places(point: tuple[float, float], radius: float, width: float, height: float, scale: float) -> list[_Place]:
    """The rectangles round a point, each with its own cost: nearer is better, and right of the point is best."""
    places = []
    for distance in _DISTANCES:
        for degrees in _DIRECTIONS:
            cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            sideways, upwards = (0 if abs(part) < 0.3 else math.copysign(1, part) for part in (cos, sin))
            x = point[0] + (radius + distance * scale) * cos + (sideways - 1) / 2 * width
            y = point[1] + (radius + distance * scale) * sin + (upwards - 1) / 2 * height
            cost = distance + (0 if degrees == 0 else 2 if degrees in (90, 180, 270) else 4)
            places.append(_Place(x, y, width, height, distance * scale, cost))
    return places


def _choose(
    choices: Sequence[Sequence[_Place]],
    pixels: Sequence[tuple[float, float]],
    obstacles: Sequence[tuple[tuple[float, float], float]],
    taken: Sequence[_Place],
    scale: float,
) -> list[_Place]:
    """For each name the place that costs least beside the others: the best of several coordinate descents.

    Args:
        choices: possible places of each name.
        pixels: point of each name.
        obstacles: points that no name may cover, each with its radius.
        taken: rectangles that no name may cover.
        scale: pixels of 1/100 inch; above 0.
    """

    def own_cost(name: int, place: _Place) -> float:
        covered = sum(place.holds(point, radius) for point, radius in obstacles)
        covered += sum(place.overlaps(other, 2 * scale) for other in taken)
        distances = [math.dist(place.nearest(point), point) for point in pixels if point != pixels[name]]
        doubt = max(0.0, place.distance - min(distances, default=math.inf)) / scale  # another point is nearer
        return place.cost + 1000 * covered + 3 * doubt

    def cost(name: int, number: int) -> float:
        place, total = choices[name][number], own_costs[name][number]
        for other, found in chosen.items():
            if other != name:
                there = choices[other][found]
                total += 1000 * place.overlaps(there, 2 * scale)
                total += 100 * sum(place.holds(point, scale) for point in lines[other][found])
                total += 100 * sum(there.holds(point, scale) for point in lines[name][number])
        return total

    own_costs = [[own_cost(name, place) for place in places] for name, places in enumerate(choices)]
    lines = [[_line(pixels[name], place, scale) for place in places] for name, places in enumerate(choices)]
    random, order = Random(0), list(range(len(choices)))
    best: tuple[float, list[_Place]] = (math.inf, [])
    chosen: dict[int, int] = {}
    for _ in range(_NUM_STARTS):
        chosen.clear()
        for _ in range(10):
            before = dict(chosen)
            for name in order:
                chosen[name] = min(range(len(choices[name])), key=partial(cost, name))
            if chosen == before:
                break
        total = sum(cost(name, number) for name, number in chosen.items())
        found = [choices[name][number] for name, number in sorted(chosen.items())]
        best = min(best, (total, found), key=lambda one: one[0])
        random.shuffle(order)
    return best[1]


def _line(point: tuple[float, float], place: _Place, scale: float) -> list[tuple[float, float]]:
    """Points along the line from a point to its name; none where the name needs no line."""
    if place.distance <= _FREE_DISTANCE * scale:
        return []
    x, y = place.nearest(point)
    return [(point[0] + (x - point[0]) * part / 6, point[1] + (y - point[1]) * part / 6) for part in range(1, 6)]
