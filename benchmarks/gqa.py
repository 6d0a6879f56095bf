"""Fewer key-value heads: mean pooling, the first head and bittern's conversion, before and after the same training.

python benchmarks/gqa.py MODEL --dataset train.txt --text held-out.txt --kv-heads 3 2 1 --tokens 200k

Every cell is one `bittern uptrain`, a process of its own, on the same windows in the same order: only how the heads are
made differs. Mean pooling of neighbours is the recipe of Ainslie et al. 2023. The cut of the gap says how much of the
cross-entropy that mean pooling loses to the source, in nats, a conversion keeps. Cells that stand in --work already are
taken up again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any

from measure import measure
from quality import machine

METHODS = ("mean", "first", "aligned")
NAMES = {"mean": "mean pooling", "first": "first head", "aligned": "bittern"}


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("--dataset", required=True, help="text to convert and train with")
    parser.add_argument("--text", required=True, help="text to measure on")
    parser.add_argument("--kv-heads", type=int, nargs="+", required=True)
    parser.add_argument("--tokens", required=True, help="to train on, as 200k; 0 only converts")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="(all)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/gqa"), help="checkpoints and logs (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures")
    parser.add_argument("--picture", type=Path, help="also draw perplexity against tokens (needs matplotlib)")
    return parser.parse_known_args()  # what is left goes to bittern uptrain


def cell(options: argparse.Namespace, more: list[str], kv_heads: int, method: str) -> dict[str, Any]:
    """The figures of one uptraining, made now or found."""
    name = f"{Path(options.model).name}-{kv_heads}-{method}-{options.tokens}"
    kept = options.work / f"{name}.json"
    command = [sys.executable, "-m", "bittern", "uptrain", options.model, "-o", str(options.work / name)]
    command += ["--kv-heads", str(kv_heads), "--init", method, "--dataset", options.dataset, "--text", options.text]
    command += ["--tokens", options.tokens, "--overwrite", *more]
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        if found["command"] != command:
            sys.exit(f"error: {kept} was made by another command: remove it, or name another --work")
        return found
    load = os.getloadavg()[0]
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    cost = measure(command, options.work / f"{name}.log", threads)
    manifest = json.loads((options.work / name / "bittern_manifest.json").read_text())
    if method != "aligned":
        shutil.rmtree(options.work / name)  # nobody asks for it again
    found = {
        "kv_heads": kv_heads,
        "method": method,
        "command": command,
        "perplexity": manifest["perplexity"],
        "training": manifest["training"],
        "heads": manifest["heads"],
        "kv_bytes_per_token": manifest["kv_bytes_per_token"],
        "conversion_seconds": manifest["measured"]["conversion_seconds"],
        "seconds": cost.seconds,
        "peak_rss_bytes": cost.peak_rss_bytes,
        "load_average": load,
        "date": date.today().isoformat(),
    }
    kept.write_text(json.dumps(found, indent=2) + "\n")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; ratios are to the source."""
    source = rows[0]["perplexity"]["source"]
    trained = rows[0]["training"]
    tokens = trained["tokens"] if trained else 0
    lines = [
        f"| kv heads | method | perplexity at 0 tokens | gap cut | after {tokens:,} tokens"
        " | conversion, s | all, s | RSS, GB |",
        "|---|---|---|---|---|---|---|---|",
        f"| {rows[0]['heads']['source_kv_heads']} | source | {source:.3f} | | | | | |",
    ]
    pooled = {row["kv_heads"]: row["perplexity"]["converted"] for row in rows if row["method"] == "mean"}
    for row in rows:
        converted, after = row["perplexity"]["converted"], row["perplexity"]["trained"]
        mean = pooled.get(row["kv_heads"])
        cut = "" if mean is None else f"{1 - math.log(converted / source) / math.log(mean / source):.1%}"
        final = "" if after is None else f"{after:.3f} ({after / source:.3f} x)"
        cost = f"{row['conversion_seconds']:.0f} | {row['seconds']:.0f} | {row['peak_rss_bytes'] / 1e9:.2f}"
        start = f"{converted:.3f} ({converted / source:.3f} x)"
        lines.append(f"| {row['kv_heads']} | {NAMES[row['method']]} | {start} | {cut} | {final} | {cost} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against tokens, a panel for each number of heads."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bittern"
    from matplotlib import pyplot

    counts = sorted({row["kv_heads"] for row in rows}, reverse=True)
    figure, axes = pyplot.subplots(1, len(counts), figsize=(4 * len(counts), 3.2), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], counts, strict=True):
        for row in (row for row in rows if row["kv_heads"] == count):
            curve = row["training"]["curve"] if row["training"] else []
            points = [(0, row["perplexity"]["converted"]), *((p["tokens"], p["perplexity"]) for p in curve)]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=NAMES[row["method"]])
        axis.axhline(rows[0]["perplexity"]["source"], color="0.5", linestyle="--", label="source")
        axis.set(title=f"{count} key-value heads", xlabel="tokens", yscale="log")
    axes[0][0].set_ylabel("perplexity, held out")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    options, more = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    order = [(count, method) for count in options.kv_heads for method in options.methods]
    rows = [cell(options, more, count, method) for count, method in order]
    here = machine()
    print(table(rows))
    print(f"\n{here}")
    for row in rows:
        if row["load_average"] > 0.5:
            print(f"warning: {row['kv_heads']} {row['method']} began at load {row['load_average']:.1f}, not idle")
    if options.json:
        options.json.write_text(json.dumps({"machine": here, "rows": rows}, indent=2) + "\n")
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
