"""Draw the tables of docs/measured.md: perplexity and KL over bits per weight, a line for each tool.

``python benchmarks/picture.py docs/measured.md stories15m docs/quality.svg`` draws the first table under that heading.
Its rows may be of several runs, which the picture that quality.py draws of its own rows cannot show.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality_table import draw

BASE = "full precision"
"""The row of the unquantized model."""


def first_table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under ``## heading``, its head first, without the line of dashes."""
    sections = [part for part in text.split("\n## ") if part.split("\n", 1)[0].strip() == heading]
    if len(sections) != 1:
        raise SystemExit(f"expected one heading '## {heading}', found {len(sections)}")
    table: list[list[str]] = []
    for line in sections[0].splitlines():
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif table:
            break
    if not table:
        raise SystemExit(f"expected a table under '## {heading}', found none")
    return [table[0], *table[2:]]


def read(table: Sequence[Sequence[str]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and the unquantized model, as ``quality_table.draw`` takes them.

    Columns are ``tool``, ``bits``, ``bits per weight``, and ``NAME: perplexity`` with ``KL`` behind it for each text;
    others are passed over, and so are rows without figures for one of the texts.
    """
    head, *body = table
    places = {title.removesuffix(": perplexity"): at for at, title in enumerate(head) if title.endswith(": perplexity")}
    rows: list[dict[str, Any]] = []
    base: dict[str, Any] = {}
    for cells in body:
        row = dict(zip(head[:3], cells[:3], strict=True))
        if not all(cells[at] for at in places.values()):
            continue
        texts = {name: {"perplexity": float(cells[at])} for name, at in places.items()}
        if row["tool"] == BASE:
            base = {"texts": texts}
            continue
        for name, at in places.items():
            texts[name]["kl"] = float(cells[at + 1])
        size = {"without_embeddings": float(row["bits per weight"])}
        rows.append({"label": row["tool"], "bits": int(row["bits"]), "bits_per_weight": size, "texts": texts})
    if not base or not rows:
        raise SystemExit(f"expected a row '{BASE}' and others, with columns 'NAME: perplexity', found {list(head)}")
    return rows, base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="Markdown file")
    parser.add_argument("heading", help="under which the table stands")
    parser.add_argument("picture", type=Path, help="file (.svg, .png) to write; needs matplotlib")
    options = parser.parse_args()
    rows, base = read(first_table(options.document.read_text(), options.heading))
    draw(rows, base, options.picture)


if __name__ == "__main__":
    main()
