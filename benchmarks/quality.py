"""bittern beside other quantizers: perplexity and KL on several texts, bits, time and memory, on the same tokens.

python benchmarks/quality.py MODEL --calibration FILE --text wikitext=FILE --text c4=FILE --bits 4 3 2 --group-size 64

The calibration tokens are chosen once, by bittern's own code, and the peers are given those very ids. The tools run one
after the other, each in a process of its own that is measured from outside, imports included. Everything that the label
of a row does not name stays at the tool's default. One evaluator, bittern's, reads every artifact, with fp32 arithmetic
on the dequantized weights; --control lets GPTQModel evaluate its own artifacts too.

Every finished artifact stays in --work with the record of how it was made, and every score: a table can be made in
several sittings. Names in --work hold a hash of model, tokens, options and the tool's version, so that nothing is taken
up that another protocol made.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peers
from measure import measure
from quality_recipes import KINDS, STANDARD, TOOLS, Recipe, command, key, protocol, recipes
from quality_scores import Text, read_scores, read_text, score, score_base, task_key
from quality_table import cost_table, draw, idle, quality_table
from to_gguf import write_gguf

PEER = "gptqmodel"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the unquantized checkpoint")
    parser.add_argument(
        "--calibration", nargs="+", required=True, metavar="FILE", help="calibration texts, a share of each"
    )
    parser.add_argument(
        "--text", type=named, action="append", required=True, metavar="NAME=FILE", help="evaluation text"
    )
    parser.add_argument("--task", type=Path, action="append", default=[], help="file of multiple choice or last words")
    parser.add_argument("--limit", type=int, help="questions of each task (all)")
    parser.add_argument("--bits", type=int, nargs="+", choices=sorted(KINDS), default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--nsamples", type=int, default=128, help="calibration windows (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration windows (%(default)s)")
    parser.add_argument("--windows", type=int, default=64, help="evaluation windows of each text (%(default)s)")
    parser.add_argument("--eval-seqlen", type=int, default=1024, help="tokens in each (%(default)s)")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where tools calibrate (llama.cpp: always the CPU) and artifacts are scored (%(default)s)",
    )
    parser.add_argument(
        "--tools", nargs="+", choices=list(TOOLS), default=list(STANDARD), help=f"({' '.join(STANDARD)})"
    )
    parser.add_argument(
        "--efforts",
        nargs="+",
        default=[],
        metavar="EFFORT",
        help="bittern's, a row each (its default); best:512k is best with --tune-tokens 512k",
    )
    parser.add_argument("--autoround-iters", metavar="N", help="AutoRound's steps for each block (its default, 200)")
    parser.add_argument("--autoround-lr", metavar="RATE", help="their size (its default, 1 over the steps)")
    parser.add_argument("--autoround-batch-size", metavar="N", help="windows in a step (its default, 8)")
    parser.add_argument(
        "--gap", action="store_true", help="add the share of GPTQModel's loss that each row does not have"
    )
    parser.add_argument("--control", action="store_true", help="GPTQModel evaluates its own artifacts too")
    parser.add_argument("--finished", action="store_true", help="show what is in --work already, and make nothing")
    parser.add_argument("--envs", type=Path, default=peers.DEFAULT_ENVS, help="the peers' environments (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="artifacts, records (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--picture", type=Path, help="file (.svg, .png) for a chart of the table; needs matplotlib")
    options = parser.parse_args()
    if len({name for name, _ in options.text}) < len(options.text):
        parser.error("--text: expected names that differ")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU here; --device cpu")
    if options.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture: matplotlib is not installed here; pip install matplotlib, or leave the option out")
    return options


def named(value: str) -> tuple[str, str]:
    """NAME=FILE."""
    name, found, path = value.partition("=")
    if not (name and found and path):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, found {value}")
    return name, path


def checkpoint_hash(folder: Path) -> str:
    """A hash of a checkpoint's weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    kept = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json", ".model")]
    for path in sorted(kept):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:12]


def calibration_ids(options: argparse.Namespace) -> tuple[Path, str]:
    """Write the calibration tokens for the peers; returns the file and the hash of the tokens."""
    from bittern.calibration import load_tokens
    from bittern.checkpoint import open_checkpoint

    with open_checkpoint(options.model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    tokens = load_tokens(
        options.calibration, tokenizer, nsamples=options.nsamples, seqlen=options.seqlen, seed=options.seed
    )
    for warning in tokens.warnings:
        print(f"warning: {warning}")
    path: Path = options.work / f"calibration-{tokens.sha256[:12]}.json"
    partial = path.with_suffix(f".{os.getpid()}")  # another table may be made from the same tokens meanwhile
    partial.write_text(json.dumps(tokens.ids.tolist()))
    partial.replace(path)
    return path, tokens.sha256


def dataset_words(options: argparse.Namespace) -> list[str]:
    """The options by which bittern finds the same tokens."""
    words = [word for path in options.calibration for word in ("--dataset", path)]
    for name in ("nsamples", "seqlen", "seed"):
        words += [f"--{name}", str(getattr(options, name))]
    return words


def place(recipe: Recipe, found: Mapping[str, Any], work: Path) -> Path:
    """Where an artifact lies; its record, scores and log are beside it."""
    name = re.sub(r"[^a-z0-9]+", "-", recipe.label.lower()).strip("-")
    return work / f"{name}-{recipe.bits}bit-{key(found)}{'.gguf' if recipe.tool == 'llamacpp' else ''}"


def beside(artifact: Path, ending: str) -> Path:
    return artifact.with_name(artifact.name + ending)


def finished(artifact: Path) -> dict[str, Any] | None:
    """The record of an artifact that is there."""
    record = beside(artifact, ".json")
    if not (record.exists() and artifact.exists()):
        return None
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def make(recipe: Recipe, found: Mapping[str, Any], artifact: Path, words: Sequence[str | Path]) -> dict[str, Any]:
    """Run a quantizer that writes ``artifact``; returns the record of it.

    Raises:
        RuntimeError: when it fails, with the end of its log.
    """
    for old in (artifact, beside(artifact, ".json"), beside(artifact, ".scores.json")):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    cost = asdict(measure(words, beside(artifact, ".log"), peers.ENVIRONMENT if recipe.home else None))
    del cost["output"]
    record = {
        "label": recipe.label,
        "bits": recipe.bits,
        "artifact": artifact.name,
        "date": now,
        "threads": os.environ.get("OMP_NUM_THREADS") or os.cpu_count(),
        **cost,
        "protocol": found,
    }
    beside(artifact, ".json").write_text(json.dumps(record, indent=1))
    return record


def warm_up(options: argparse.Namespace, recipe: Recipe, ids: Path) -> None:
    """Let GPTQModel quantize on one window: at its first use it compiles an extension, which no run shall pay for."""
    done = options.work / "gptqmodel-is-warm"
    if done.exists():
        return
    few, output = options.work / "warm-up.json", options.work / "warm-up"
    few.write_text(json.dumps(json.loads(ids.read_text())[:1]))
    words = command(
        recipe, options.model, output, ids=few, dataset=[], gguf=few, envs=options.envs, device=options.device
    )
    measure(words, beside(output, ".log"), peers.ENVIRONMENT)
    shutil.rmtree(output)
    done.touch()


def plan(options: argparse.Namespace) -> list[Recipe]:
    names = ("iters", "lr", "batch_size")
    given = {name.replace("_", "-"): getattr(options, f"autoround_{name}") for name in names}
    autoround = {name: value for name, value in given.items() if value is not None}
    return recipes(options.tools, options.bits, options.group_size, options.efforts, autoround)


def check_tokens(artifact: Path, sha256: str) -> None:
    """bittern chose its calibration tokens by itself: were they the peers'?"""
    manifest = json.loads((artifact / "bittern_manifest.json").read_text())
    if manifest["calibration"]["sha256"] != sha256:
        sys.exit(f"error: {artifact} was calibrated on other tokens than the peers' were")


def rows(options: argparse.Namespace, texts: Sequence[Text], base: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every artifact made and scored, one after the other; and what failed."""
    ids, sha256 = calibration_ids(options)
    checkpoint = base.name.partition("-")[2]
    found, failed = [], []
    for recipe in plan(options):
        told = protocol(recipe, checkpoint, sha256, options.device)
        artifact = place(recipe, told, options.work)
        record = finished(artifact)
        title = f"{recipe.label}, {recipe.bits} bits"
        if record is None and options.finished:
            continue
        try:
            if record is None:
                print(f"{title} ...", end=" ", flush=True)
                gguf: Path = options.work / f"model-{checkpoint}.gguf"
                if recipe.tool == "llamacpp" and not gguf.exists():
                    write_gguf(options.model, gguf, dtype=None)
                if recipe.home == PEER:
                    warm_up(options, recipe, ids)
                words = command(
                    recipe,
                    options.model,
                    artifact,
                    ids=ids,
                    dataset=dataset_words(options),
                    gguf=gguf,
                    envs=options.envs,
                    device=options.device,
                )
                record = make(recipe, told, artifact, words)
                print(f"{record['seconds']:.0f} s, {record['peak_rss_bytes'] / 1e9:.2f} GB", flush=True)
            if recipe.home is None and recipe.calibrated:
                check_tokens(artifact, sha256)
            found.append({**record, **scored(options, artifact, base, texts, recipe)})
        except Exception as error:  # a table over several sittings goes on without a tool that fails
            print(f"failed: {error}", flush=True)
            failed.append(title)
    return found, failed


def scored(
    options: argparse.Namespace, artifact: Path, base: Path, texts: Sequence[Text], recipe: Recipe
) -> dict[str, Any]:
    """Bits and figures of an artifact, by the names of the texts and tasks."""
    from bittern.inspect import inspect

    record = beside(artifact, ".scores.json")
    scores = score(artifact, options.model, base, record, texts, options.task, options.limit, options.device)
    row = {"bits_per_weight": inspect(artifact)["bits_per_weight"], **by_name(scores, texts, options)}
    if options.control and recipe.home == PEER:
        row["control_perplexity"] = control(options, artifact, texts[0], record)
    return row


def by_name(scores: Mapping[str, Any], texts: Sequence[Text], options: argparse.Namespace) -> dict[str, Any]:
    tasks = [scores["tasks"][task_key(path, options.limit)] for path in options.task]
    return {
        "texts": {text.name: scores["texts"][text.key] for text in texts},
        "tasks": {task["name"]: task for task in tasks},
    }


def control(options: argparse.Namespace, artifact: Path, text: Text, record: Path) -> float:
    """Perplexity of GPTQModel's artifact by GPTQModel itself."""
    scores = read_scores(record)
    if text.key not in scores.setdefault("controls", {}):
        ids = options.work / f"windows-{text.key}.json"
        ids.write_text(json.dumps(text.windows.tolist()))
        script = peers.SCRIPTS / "gptqmodel_perplexity.py"
        words = [peers.interpreter(PEER, options.envs), script, artifact, "--windows", ids]
        output = measure(words, beside(artifact, ".control.log"), peers.ENVIRONMENT).output
        scores["controls"][text.key] = json.loads(output.splitlines()[-1])["perplexity"]
        record.write_text(json.dumps(scores, indent=1))
    perplexity: float = scores["controls"][text.key]
    return perplexity


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    import transformers

    import bittern

    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bittern": bittern.__version__,
        "peer": peers.PACKAGES[PEER][-1],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def show(options: argparse.Namespace, found: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> None:
    """Print the tables, and write what was asked for."""
    print("\n" + quality_table(found, base, options.gap) + "\n\n" + cost_table(found) + "\n")
    print(
        f"{options.model}, group {options.group_size}, calibration {options.nsamples} x {options.seqlen} tokens of "
        f"{', '.join(options.calibration)}, evaluation "
        + ", ".join(
            f"{base['texts'][name]['windows']} x {options.eval_seqlen} of {file}" for name, file in options.text
        )
    )
    here = machine()
    print(", ".join(f"{name} {value}" for name, value in here.items()))
    print("versions: " + ", ".join(sorted({f"{row['label']} {row['protocol']['version']}" for row in found})))
    for row in found:
        if row.get("control_perplexity") is not None:
            name = options.text[0][0]
            print(f"{row['label']}, {row['bits']} bits, {name} by {PEER} itself: {row['control_perplexity']:.2f}")
        if not idle(row):
            others = "nobody counted how many" if row["others"] is None else f"{row['others']:.1f}"
            print(f"not idle: beside {row['label']}, {row['bits']} bits: cores busy with something else: {others}")
    if options.picture:
        draw(found, base, options.picture)
    if options.json:
        shape = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        shape["task"] = [str(path) for path in options.task]
        figures = {"machine": here, "options": shape, "base": base, "rows": found}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    options.work = options.work.resolve()
    base = options.work / f"base-{checkpoint_hash(Path(options.model))}"
    base.mkdir(exist_ok=True)
    texts = [read_text(name, path, options.model, options.eval_seqlen, options.windows) for name, path in options.text]
    own = score_base(options.model, base, texts, options.task, options.limit, options.device)
    from bittern.inspect import inspect

    size = {"label": "unquantized", "bits_per_weight": inspect(options.model)["bits_per_weight"]}
    found, failed = rows(options, texts, base)
    show(options, found, {**size, **by_name(own, texts, options)})
    if failed:
        sys.exit("error: these failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
