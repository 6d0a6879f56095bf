"""Tokens/s of bittern, llama.cpp, GPTQModel and transformers on the same token ids, interleaved in one run.

python benchmarks/decode.py MODEL                               # decode and prefill, at 4, 8, 3 and 2 bits
python benchmarks/decode.py MODEL --neighbour                   # decode beside a process that spins on one core
python benchmarks/decode.py MODEL --long 1024 2048 4096 8192    # time and memory of bittern's prefill
python benchmarks/decode.py MODEL --startup                     # from nothing to the first token

MODEL is an unquantized folder of the Llama family; the artifacts and GGUF files that are made of it stay in --work.
Every engine is a process of its own that times itself. Those that share a ratio are held in memory together and take
turns, a round each, from another one on in every round, so that what the machine does meanwhile hits all of them alike;
figures are medians over the rounds. Decode is of the tokens after the first, greedy and past any end of sequence,
choosing them included; prefill is from a prompt to its first new token, logits of the last position only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import peers
from quality import machine
from to_gguf import write_gguf

LLAMACPP = {8: "Q8_0", 4: "Q4_0", 3: "Q3_K_M", 2: "Q2_K"}
CHECKED = 20  # greedy tokens that the F16 GGUF file and transformers must agree on
REST = 0.3  # seconds between turns, for the threads of the one before to fall asleep


@dataclass(frozen=True)
class Engine:
    """One engine with one set of weights.

    Attributes:
        tool: "bittern", "llama.cpp", "GPTQModel" or "transformers".
        bits: nominal ones of the blocks' weights; 32 for the unquantized model.
        weights: how the blocks' weights are stored.
        head: how the output matrix is held.
        bits_per_weight: stored, without embeddings and head, scales included.
        megabytes: of the weights' files.
        script: the worker, a file of ``peers``.
        load: what its load command is given.
    """

    tool: str
    bits: int
    weights: str
    head: str
    bits_per_weight: float
    megabytes: float
    script: str
    load: Mapping[str, Any] = field(repr=False)

    @property
    def label(self) -> str:
        return f"{self.tool} {self.weights}, head {self.head}"


class Worker(peers.Worker):
    """A process that holds one engine, whose failure ends the run."""

    def __init__(self, script: str, label: str, options: argparse.Namespace) -> None:
        self.label = label
        log = options.work / f"{Path(script).stem}.log"
        super().__init__(script, interpreter(script, options.envs), log, {"OMP_NUM_THREADS": str(options.threads)})

    def _answer(self) -> dict[str, Any]:
        try:
            return super()._answer()
        except RuntimeError as error:
            sys.exit(f"error: {self.label}: {error}; its log is {self.log}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", type=Path, help="folder of an unquantized checkpoint")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--neighbour", action="store_true", help="4-bit decode beside a process spinning on one core")
    mode.add_argument("--long", type=int, nargs="+", metavar="TOKENS", help="prefills of so many tokens in bittern")
    mode.add_argument("--startup", action="store_true", help="fresh processes, to the first token")
    parser.add_argument("--bits", type=int, nargs="+", choices=sorted(LLAMACPP), default=[4, 8, 3, 2])
    parser.add_argument("--group-size", default="64", help="of bittern's artifacts (%(default)s)")
    parser.add_argument(
        "--calibration", help="text to quantize on with GPTQ; without it round to nearest, as fast to run"
    )
    parser.add_argument("--activations", choices=["a16", "a8"], nargs="+", default=["a16"], help="bittern's (a16)")
    parser.add_argument("--text", type=Path, help="text for the prompts; without it random ids")
    parser.add_argument("--seed", type=int, default=0, help="of the random ids (%(default)s)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens before the decoded ones (%(default)s)")
    parser.add_argument("--new", type=int, default=128, help="tokens to decode (%(default)s)")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefill (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--skip-peers", nargs="*", choices=["llama.cpp", "GPTQModel", "transformers"], default=[])
    parser.add_argument("--envs", type=Path, default=peers.DEFAULT_ENVS, help="the peers' environments (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/decode"), help="artifacts and logs (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--picture", type=Path, help="file (.svg, .png) for a chart of the table; needs matplotlib")
    options = parser.parse_args()
    if options.picture and (options.neighbour or options.long or options.startup):
        parser.error("--picture: only the table of decode and prefill is drawn")
    if options.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture: matplotlib is not installed here; pip install matplotlib, or leave the option out")
    return options


def interpreter(script: str, envs: Path) -> Path:
    """The Python that runs a worker."""
    owners = {"llamacpp_worker.py": "llamacpp", "gptqmodel_worker.py": "gptqmodel"}
    return peers.interpreter(owners[script], envs) if script in owners else Path(sys.executable)


@contextmanager
def loaded(engine: Engine, options: argparse.Namespace) -> Iterator[tuple[Worker, dict[str, Any]]]:
    """A worker that has loaded its engine, and what it said of that."""
    worker = Worker(engine.script, engine.label, options)
    try:
        yield worker, worker.ask("load", threads=options.threads, **engine.load)
    finally:
        worker.close()


# What is measured


def artifact(model: Path, bits: int, options: argparse.Namespace) -> Path:
    """bittern's artifact, made unless it is there: such a folder is always whole."""
    out: Path = options.work / model.name / f"bittern-{bits}bit-g{options.group_size}"
    if not out.exists():
        print(f"making {out}", flush=True)
        command = [sys.executable, "-m", "bittern", "quantize", model, "-o", out]
        command += ["--bits", str(bits), "--group-size", options.group_size]
        calibration = ["--dataset", options.calibration, "--nsamples", "16", "--seqlen", "256"]
        command += calibration if options.calibration else ["--method", "rtn"]
        with out.with_suffix(".log").open("w") as log:
            subprocess.run(list(map(str, command)), check=True, stderr=log)
    return out


def gguf_file(model: Path, kind: str, options: argparse.Namespace) -> Path:
    """llama.cpp's file of that type, made unless it is there; it gets its name when it is whole."""
    out: Path = options.work / model.name / f"{kind}.gguf"
    if out.exists():
        return out
    print(f"making {out}", flush=True)
    if kind == "F16":
        write_gguf(model, out)
        return out
    partial = out.with_suffix(".partial")
    source = str(gguf_file(model, "F16", options))
    worker = Worker("llamacpp_worker.py", f"llama.cpp {kind}", options)
    worker.ask("quantize", source=source, target=str(partial), kind=kind, threads=options.threads)
    worker.close()
    partial.rename(out)
    return out


def head_dtype(path: Path) -> str:
    """How a checkpoint folder stores its output matrix."""
    from bittern.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        tied = "lm_head.weight" not in checkpoint.tensors
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        dtype = str(checkpoint.tensors[name].dtype).removeprefix("torch.")
    return f"{dtype} (tied)" if tied else dtype


def weight_files(folder: Path) -> float:
    """Megabytes of a checkpoint folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def bittern_engine(
    model: Path, bits: int, head_bits: int | None, activations: str, options: argparse.Namespace
) -> Engine:
    from bittern.inspect import inspect

    path = artifact(model, bits, options)
    return Engine(
        tool="bittern",
        bits=bits,
        weights=f"{bits}-bit g{options.group_size} {activations}",
        head=head_dtype(path) if head_bits is None else f"{head_bits} bits",
        bits_per_weight=inspect(path)["bits_per_weight"]["without_embeddings"],
        megabytes=weight_files(path),
        script="bittern_worker.py",
        load={"path": str(path), "lm_head_bits": head_bits, "activations": activations},
    )


def llamacpp_engine(model: Path, kind: str, bits: int, options: argparse.Namespace) -> Engine:
    import gguf

    path = gguf_file(model, kind, options)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    inside = [tensor for name, tensor in tensors.items() if name not in ("token_embd.weight", "output.weight")]
    tied = "output.weight" not in tensors
    head = tensors["token_embd.weight" if tied else "output.weight"].tensor_type.name
    return Engine(
        tool="llama.cpp",
        bits=bits,
        weights=kind,
        head=f"{head} (tied)" if tied else head,
        bits_per_weight=8 * sum(int(t.n_bytes) for t in inside) / sum(int(t.n_elements) for t in inside),
        megabytes=path.stat().st_size / 1e6,
        script="llamacpp_worker.py",
        load={"path": str(path), "context": max(options.prompt + options.new, options.prefill) + 64},
    )


def transformers_engine(model: Path) -> Engine:
    return Engine(
        tool="transformers",
        bits=32,
        weights="float32",
        head="float32",
        bits_per_weight=32,
        megabytes=weight_files(model),
        script="transformers_worker.py",
        load={"path": str(model)},
    )


def engines(model: Path, bits: int, first: bool, options: argparse.Namespace) -> list[Engine]:
    """Those that are compared at these bits; GPTQModel at 4 bits, transformers in the first group alone."""
    wanted = [
        bittern_engine(model, bits, head_bits, activations, options)
        for activations in options.activations
        for head_bits in (None, 8)
    ]
    if "llama.cpp" not in options.skip_peers:
        wanted.append(llamacpp_engine(model, LLAMACPP[bits], bits, options))
    if bits == 4 and "GPTQModel" not in options.skip_peers:
        ours, path = wanted[0], artifact(model, bits, options)
        wanted.append(
            Engine(
                tool="GPTQModel",
                bits=bits,
                weights=f"{bits}-bit g{options.group_size}",
                head=head_dtype(path),
                bits_per_weight=ours.bits_per_weight,
                megabytes=ours.megabytes,
                script="gptqmodel_worker.py",
                load={"path": str(path)},
            )
        )
    if first and "transformers" not in options.skip_peers:
        wanted.append(transformers_engine(model))
    return wanted


def token_ids(model: Path, count: int, options: argparse.Namespace) -> list[int]:
    """The same prompt for every engine: the text's first tokens, or random ones."""
    if options.text is None:
        size = json.loads((model / "config.json").read_text())["vocab_size"]
        draw = random.Random(options.seed)
        return [draw.randrange(size) for _ in range(count)]
    from bittern.checkpoint import open_checkpoint
    from bittern.tokenizer import encode

    with open_checkpoint(model) as checkpoint:
        ids = encode(checkpoint.tokenizer(), options.text.read_text(encoding="utf-8"))
    if len(ids) < count:
        sys.exit(f"error: --text {options.text}: has {len(ids)} tokens, {count} are needed")
    return ids[:count]


def check_context(model: Path, needed: int) -> None:
    limit = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    if needed > limit:
        sys.exit(f"error: {model} has a context of {limit} tokens: --prompt + --new and --prefill + 1 have to fit")


# The modes: each returns what JSON will hold, and prints a table


def turns(round_number: int, items: Sequence[Any]) -> list[int]:
    """The order of a round: every item once, from another one on in each round."""
    return [(round_number + step) % len(items) for step in range(len(items))]


def speeds(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Decode and prefill of every engine, a group of engines for each number of bits."""
    check_context(model, max(options.prompt + options.new, options.prefill + 1))
    ids = token_ids(model, max(options.prompt, options.prefill), options)
    groups = []
    for bits in options.bits:
        group = engines(model, bits, bits == options.bits[0], options)
        groups.append(measure_group(group, ids, options))
        print("\n" + speed_table(groups[-1]) + "\n", flush=True)
    return {"model": str(model), "agreement": agreement(model, ids, options), "groups": groups}


def measure_group(group: list[Engine], ids: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Hold these engines and measure them in turns."""
    rows: list[dict[str, Any]] = []
    probes: list[float | None] = []
    with ExitStack() as stack:
        workers = []
        for engine in group:
            print(f"loading {engine.label}", flush=True)
            worker, said = stack.enter_context(loaded(engine, options))
            workers.append(worker)
            rows.append({**asdict(engine), "load": said, "decode": [], "prefill": []})
            worker.ask("decode", ids=ids[: options.prompt], new=8)  # the first run of anything is slow
            worker.ask("prefill", ids=ids[: options.prefill])
        reader, probed = workers[0], round(group[0].megabytes)  # bittern's, and as much as its weights are
        for number in range(options.rounds):
            print(f"\rround {number + 1} of {options.rounds}", end="", flush=True)
            probes.append(reader.ask("probe", megabytes=probed, threads=options.threads)["gb_per_s"])
            for index in turns(number, workers):
                time.sleep(REST)
                said = workers[index].ask("decode", ids=ids[: options.prompt], new=options.new)
                rows[index]["decode"].append(said["decode_tokens_per_s"])
                time.sleep(REST)
                said = workers[index].ask("prefill", ids=ids[: options.prefill])
                rows[index]["prefill"].append(said["tokens_per_s"])
                rows[index]["rss_mb"] = said["rss_mb"]
        print()
    for row in rows:
        row.update(decode_median=median(row["decode"]), prefill_median=median(row["prefill"]))
    return {
        "bits": group[0].bits,
        "rows": rows,
        "probe_megabytes": probed,
        "probe_gb_per_s": probes,
    }


def agreement(model: Path, ids: list[int], options: argparse.Namespace) -> int | None:
    """Of CHECKED greedy tokens, how many llama.cpp on the F16 file gives before it leaves transformers in fp32."""
    if {"llama.cpp", "transformers"} & set(options.skip_peers):
        return None
    pair = [
        llamacpp_engine(model, "F16", 16, options),
        transformers_engine(model),
    ]
    said = []
    for engine in pair:
        with loaded(engine, options) as (worker, _):
            said.append(worker.ask("decode", ids=ids[: options.prompt], new=CHECKED)["tokens"])
    same = [ours == theirs for ours, theirs in zip(*said, strict=True)]
    equal = same.index(False) if False in same else CHECKED
    print(f"llama.cpp on the F16 file gives the first {equal} of {CHECKED} greedy tokens of transformers in float32")
    return equal


def neighbour(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Decode of bittern and llama.cpp at 4 bits, alone and beside a process that spins on the last core."""
    check_context(model, options.prompt + options.new)
    ids = token_ids(model, options.prompt, options)
    core = max(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    group = [engine for engine in engines(model, 4, False, options) if engine.tool in ("bittern", "llama.cpp")]
    rows: list[dict[str, Any]] = [{**asdict(engine), "alone": [], "beside": []} for engine in group]
    with ExitStack() as stack:
        workers = [stack.enter_context(loaded(engine, options))[0] for engine in group]
        for worker in workers:
            worker.ask("decode", ids=ids, new=8)
        for number in range(options.rounds):
            print(f"\rround {number + 1} of {options.rounds}", end="", flush=True)
            for kind in ("alone", "beside"):
                spinner = subprocess.Popen([sys.executable, "-S", "-c", spin]) if kind == "beside" else None
                try:
                    for index in turns(number, workers):
                        time.sleep(REST)
                        said = workers[index].ask("decode", ids=ids, new=options.new)
                        rows[index][kind].append(said["decode_tokens_per_s"])
                finally:
                    if spinner is not None:
                        spinner.kill()
                        spinner.wait()
        print()
    for row in rows:
        row.update(alone_median=median(row["alone"]), beside_median=median(row["beside"]))
        row["kept"] = row["beside_median"] / row["alone_median"]
    table = [["engine", "weights", "lm_head", "tokens/s alone", "beside a spinning process", "kept"]]
    for row in rows:
        table.append([row["tool"], row["weights"], row["head"], f"{row['alone_median']:.1f}"])
        table[-1] += [f"{row['beside_median']:.1f}", f"{row['kept']:.2f}"]
    print("\n" + markdown(table) + "\n")
    return {"model": str(model), "core": core, "rows": rows}


def long_prefills(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time and peak memory of bittern's prefill at 4 bits, each length in a process of its own in every round."""
    lengths: list[int] = sorted(options.long)
    ids = token_ids(model, max(lengths), options)
    engine = bittern_engine(model, 4, None, options.activations[0], options)
    rows: list[dict[str, Any]] = [
        {"tokens": tokens, "seconds": [], "loaded_mb": [], "peak_mb": []} for tokens in lengths
    ]
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        lengthen(Path(engine.load["path"]), Path(folder), max(lengths) + 1)
        longer = replace(engine, load={**engine.load, "path": folder})
        for number in range(options.rounds):
            for index in turns(number, lengths):
                print(f"\rround {number + 1} of {options.rounds}, {lengths[index]} tokens   ", end="", flush=True)
                with loaded(longer, options) as (worker, said):
                    rows[index]["loaded_mb"].append(said["rss_mb"])
                    said = worker.ask("prefill", ids=ids[: lengths[index]])
                    rows[index]["seconds"].append(lengths[index] / said["tokens_per_s"])
                    rows[index]["peak_mb"].append(said["peak_mb"])
        print()
    table = [["tokens", "seconds", "tokens/s", "peak RSS, MB", "over the loaded model, MB", "KB a token"]]
    for row in rows:
        row.update(seconds_median=median(row["seconds"]), peak_median_mb=median(row["peak_mb"]))
        row["over_mb"] = row["peak_median_mb"] - median(row["loaded_mb"])
        rate = row["tokens"] / row["seconds_median"]
        table.append(
            [str(row["tokens"]), f"{row['seconds_median']:.2f}", f"{rate:.0f}", f"{row['peak_median_mb']:.0f}"]
        )
        table[-1] += [f"{row['over_mb']:.0f}", f"{row['over_mb'] * 1000 / row['tokens']:.0f}"]
    print(f"\n{engine.label}\n\n{markdown(table)}\n")
    return {"model": str(model), "engine": asdict(engine), "rows": rows}


def lengthen(source: Path, target: Path, context: int) -> None:
    """A checkpoint folder whose config allows that many tokens; its other files are the same ones by another name."""
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            (target / file.name).hardlink_to(file)  # a symbolic link out of the folder is refused
    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = max(context, config["max_position_embeddings"])
    (target / "config.json").write_text(json.dumps(config))


def startup(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """From nothing to the first token at 4 bits, files in the page cache: a fresh process in every round."""
    check_context(model, options.prompt + options.new)
    ids = token_ids(model, options.prompt, options)
    group = [engine for engine in engines(model, 4, False, options) if engine.tool in ("bittern", "llama.cpp")]
    names = ("imports_s", "load_s", "first_token_s", "whole_s", "imports_mb", "peak_mb")
    rows: list[dict[str, Any]] = [{**asdict(engine), **{name: [] for name in names}} for engine in group]
    for number in range(options.rounds):
        print(f"\rround {number + 1} of {options.rounds}", end="", flush=True)
        for index in turns(number, group):
            time.sleep(REST)
            began = time.perf_counter()
            with loaded(group[index], options) as (worker, said):
                done = worker.ask("decode", ids=ids, new=1)
                whole = time.perf_counter() - began
                figures = (worker.started["imports_s"], said["load_s"], done["prefill_s"], whole)
            for name, value in zip(names, (*figures, worker.started["rss_mb"], done["peak_mb"]), strict=True):
                rows[index][name].append(value)
    print()
    titles = ("imports, s", "load, s", "first token, s", "together, s", "RSS after imports, MB", "peak RSS, MB")
    table = [["engine", "weights", "lm_head", *titles]]
    for row in rows:
        row.update({f"{name}_median": median(row[name]) for name in names})
        values = [f"{row[f'{name}_median']:.{0 if name.endswith('mb') else 2}f}" for name in names]
        table.append([row["tool"], row["weights"], row["head"], *values])
    print("\n" + markdown(table) + "\n")
    return {"model": str(model), "rows": rows}


# How it is shown


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def speed_table(group: Mapping[str, Any]) -> str:
    """The figures of a group, with bittern's speed over each peer's; below, what says how far to trust them."""
    rivals = [row for row in group["rows"] if row["tool"] != "bittern"]
    titles = [
        "engine",
        "weights",
        "lm_head",
        "bits/weight",
        "files, MB",
        "load, s",
        "RSS, MB",
        "decode, t/s",
        "prefill, t/s",
    ]
    titles += [f"{what} / {row['tool']}" for row in rivals for what in ("decode", "prefill")]
    table = [titles]
    for row in group["rows"]:
        cells = [row["tool"], row["weights"], row["head"], f"{row['bits_per_weight']:.2f}", f"{row['megabytes']:.0f}"]
        cells += [f"{row['load']['load_s']:.2f}", f"{row['rss_mb']:.0f}"]
        cells += [f"{row['decode_median']:.1f}", f"{row['prefill_median']:.0f}"]
        for rival in rivals:
            for name in ("decode_median", "prefill_median"):
                cells.append(f"{row[name] / rival[name]:.2f}" if row["tool"] == "bittern" else "")
        table.append(cells)
    lines = [markdown(table), ""]
    for row in rivals:
        if row["tool"] == "GPTQModel":
            lines.append(f"GPTQModel's kernel: {row['load']['kernel']}, the fastest of those that run here")
        if row["tool"] == "llama.cpp":
            lines.append(f"llama.cpp's weights: {'; '.join(row['load']['buffers'])}")
    probes = [probe for probe in group["probe_gb_per_s"] if probe is not None]
    if probes:
        what = f"reading {group['probe_megabytes']} MB"
        lines.append(f"probe: {what} at {median(probes):.1f} GB/s ({min(probes):.1f} to {max(probes):.1f})")
    return "\n".join(lines)


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of decode and prefill for every engine, a row of panels for each model."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    colours = {"bittern": "#1f6f8b", "llama.cpp": "#e07a3f", "GPTQModel": "#8a8a8a", "transformers": "#c9c9c9"}
    bars = [[row for group in result["groups"] for row in group["rows"]] for result in results]
    heights = [1 + 0.42 * len(rows) for rows in bars]
    figure, panels = pyplot.subplots(
        len(bars), 2, figsize=(11, sum(heights)), sharey="row", squeeze=False, height_ratios=heights
    )
    for result, rows, pair in zip(results, bars, panels, strict=True):
        for panel, what in zip(pair, ("decode", "prefill"), strict=True):
            drawn = panel.barh(
                range(len(rows)), [row[f"{what}_median"] for row in rows], color=[colours[row["tool"]] for row in rows]
            )
            panel.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
            panel.set_title(f"{Path(result['model']).name}: {what}, tokens/s", fontsize=10)
            panel.margins(x=0.12)
            panel.spines[["top", "right"]].set_visible(False)
        labels = [f"{row['tool']} {row['weights']}\nhead {row['head']}" for row in rows]
        pair[0].set_yticks(range(len(rows)), labels, fontsize=7)
        pair[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    options = arguments()
    load_average = os.getloadavg()[0]
    options.work.mkdir(parents=True, exist_ok=True)
    options.work = options.work.resolve()
    for log in options.work.glob("*_worker.log"):
        log.unlink()
    results = []
    for model in options.models:
        (options.work / model.name).mkdir(exist_ok=True)
        print(f"{model}, {options.threads} threads, {options.rounds} rounds", flush=True)
        if options.neighbour:
            results.append(neighbour(model, options))
        elif options.long:
            results.append(long_prefills(model, options))
        elif options.startup:
            results.append(startup(model, options))
        else:
            results.append(speeds(model, options))
    here = {
        **machine(),
        "threads": options.threads,
        "load_average": load_average,
        "llama.cpp": peers.PACKAGES["llamacpp"][-1],
    }
    print(", ".join(f"{name} {value}" for name, value in here.items()))
    if load_average > 1:
        print(f"warning: began at load {load_average:.1f}, not idle")
    if options.picture:
        draw(results, options.picture)
    if options.json:
        shape = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        shape["models"] = [str(model) for model in options.models]
        options.json.write_text(json.dumps({"machine": here, "options": shape, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
