"""Perplexity of an artifact by GPTQModel itself in float32; runs inside GPTQModel's environment.

The control of ../quality.py, which reads GPTQModel's artifacts with bittern's loader. Standard output ends with one
JSON line {"perplexity": p}.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from gptqmodel_client import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--windows", type=Path, required=True, help="JSON file: a list of windows of token ids")
    arguments = parser.parse_args()
    model = load(arguments.artifact)
    total = count = 0.0
    with torch.inference_mode():
        for window in json.loads(arguments.windows.read_text()):
            ids = torch.tensor([window])
            logits = model(ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += len(window) - 1
    print(json.dumps({"perplexity": math.exp(total / count)}), flush=True)


if __name__ == "__main__":
    main()
