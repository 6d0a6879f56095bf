"""The manifest: what a run did to every layer, with which versions, and what it measured.

``bittern_manifest.json`` lies in the artifact. Two runs with the same seed on the same machine agree
in every file of the artifact and in all of the manifest but its ``measured`` object.
"""

from __future__ import annotations

import platform
import resource
import sys
from typing import Any

import bittern

MANIFEST_FILE = "bittern_manifest.json"
SCHEMA_VERSION = 1


def make_manifest(
    *,
    source: dict[str, Any],
    options: dict[str, Any],
    calibration: dict[str, Any] | None,
    layers: list[dict[str, Any]],
    kept: dict[str, str],
    notes: list[str],
    seconds: float,
) -> dict[str, Any]:
    """Put a manifest together.

    Args:
        source: name, revision and architecture of what was quantized.
        options: the options that the run was called with.
        calibration: dataset, tokens asked for and found, hash; None without calibration.
        layers: a record per quantized layer; its ``seconds`` move to ``measured``.
        kept: layers left in 16 bits -> why.
        notes: warnings and fallbacks that a user must know of.
        seconds: wall time of the run.
    """
    import torch
    import transformers

    return {
        "schema_version": SCHEMA_VERSION,
        "source": source,
        "options": options,
        "calibration": calibration,
        "layers": [{key: value for key, value in record.items() if key != "seconds"} for record in layers],
        "kept": kept,
        "notes": notes,
        "versions": {
            "bittern": bittern.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "measured": {
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory(),
            "layer_seconds": {record["layer"]: round(record["seconds"], 4) for record in layers},
            "threads": torch.get_num_threads(),
        },
    }


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
