"""The picture of a choice of bits: how much the model is harmed by each group of layers that has too few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bittern.page.charts import cells, ranges, step_of, steps
from bittern.page.parts import Chart, Place, Table, figure, place, too_many

MOST_ROWS = 3000  # of the table
_NAMED = 3  # members that the name of a group lists


def sensitivity_chart(mixed: Mapping[str, Any]) -> Chart | None:
    """Expected harm of every group at the fewest bits that it could have had; None where none is known.

    Args:
        mixed: what the manifest says of the choice.
    """
    groups: Sequence[Mapping[str, Any]] = mixed["groups"]
    options = sorted({bits for group in groups for bits in group["harm"] if _is_number(bits)}, key=int)
    known = [group for group in groups if options and options[0] in group["harm"]]
    if not known:
        return None
    fewest = options[0]
    harms = [float(group["harm"][fewest]) for group in known]
    bounds = steps(harms)
    grid: dict[Place, float] = {}
    for group, harm in zip(known, harms, strict=True):
        where = _place(group)
        grid[where] = max(harm, grid.get(where, 0.0))
    rows, columns = (list(dict.fromkeys(key[side] for key in grid)) for side in (0, 1))
    keys = [[(row, column) for column in columns] for row in rows]
    told = {key: (step_of(harm, bounds), f"{harm:.2g}") for key, harm in grid.items()}
    values = [[told.get(key) for key in row] for row in keys]
    worst, best = (known[harms.index(end(harms))] for end in (max, min))
    title = f"Harm that is expected of each group at {fewest} bits"
    summary = (
        f"KL divergence of the whole model, in nats per token, that was expected when a group alone has {fewest} bits:"
        f" from {min(harms):.2g} in {best['layers'][0]} to {max(harms):.2g} in {worst['layers'][0]}. Asked for were"
        f" {mixed['average']:g} bits a weight on average, scales and zeros not counted; the choice has"
        f" {mixed['found']:.4g}."
    )
    legend = ranges(bounds, min(harms), max(harms), "{:.2g}".format) if bounds else []
    svg = cells("sensitivity", title, summary, rows, columns, values, "block", legend)
    table = Table(
        "Every group, its bits, and the harm that was expected at each",
        ("First layer", "Layers", "Weights", "Bits", *(f"at {bits}" for bits in options)),
        tuple(
            (
                str(group["layers"][0]),
                str(len(group["layers"])),
                figure(group["weights"]),
                str(group["bits"]),
                *(figure(group["harm"].get(bits), "{:.2g}") for bits in options),
            )
            for group in groups[:MOST_ROWS]
        ),
        (0,),
    )
    return Chart("sensitivity", title, summary + too_many(svg), svg, table)


def _place(group: Mapping[str, Any]) -> Place:
    """The block that a group is in, and what it is in there."""
    places = [place(str(name)) for name in group["layers"]]
    leaves = list(dict.fromkeys(kind.rpartition(".")[2].removesuffix("_proj") for _, kind in places))
    more = ", …" if len(leaves) > _NAMED else ""
    return places[0][0], ", ".join(leaves[:_NAMED]) + more


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 2
