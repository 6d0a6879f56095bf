"""bittern beside GPTQModel: perplexity, KL, time and memory on the same tokens in the same run.

python benchmarks/quality.py MODEL --calibration FILE --text FILE --bits 4 3 2 --group-size 64

The calibration tokens are chosen once, by bittern's own code, and the peer is given those very ids. The tools run one
after the other, each in a process of its own that is measured from outside, imports included. Everything that is not an
option here stays at the tool's default. One evaluator, bittern's, reads every artifact with fp32 arithmetic on the
dequantized weights; --control lets GPTQModel evaluate its own artifacts too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import peers
from measure import measure

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PEER = "gptqmodel"


@dataclass(frozen=True)
class Run:
    """One artifact and what making it cost.

    Attributes:
        tool: "bittern", "bittern rtn" or "gptqmodel".
        bits: 8, 4, 3 or 2.
        artifact: its folder.
        seconds: wall time of the process.
        peak_rss_bytes: its largest resident set.
        load_average: of the machine, over the minute before; near 0 when it was idle.
        date: when it was made.
    """

    tool: str
    bits: int
    artifact: str
    seconds: float
    peak_rss_bytes: int
    load_average: float
    date: str


class RememberingBase:
    """The unquantized model, which keeps its last logits: every artifact is compared with it on a window in turn."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = model.device
        self.last: tuple[Tensor, Any] | None = None

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        if self.last is None or not self.last[0].equal(input_ids):
            self.last = (input_ids, self.model(input_ids=input_ids, **options))
        return self.last[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the unquantized checkpoint")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--nsamples", type=int, default=128, help="calibration windows (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration windows (%(default)s)")
    parser.add_argument("--windows", type=int, default=64, help="evaluation windows (%(default)s)")
    parser.add_argument("--eval-seqlen", type=int, default=1024, help="tokens in each (%(default)s)")
    parser.add_argument("--rtn", action="store_true", help="also round to nearest")
    parser.add_argument("--skip-peers", action="store_true", help="bittern alone")
    parser.add_argument("--control", action="store_true", help="GPTQModel evaluates its own artifacts too")
    parser.add_argument("--reuse", action="store_true", help="take the artifacts that an earlier run left in --work")
    parser.add_argument("--envs", type=Path, default=peers.DEFAULT_ENVS, help="the peers' environments (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="artifacts and logs (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def calibration_ids(options: argparse.Namespace) -> tuple[Path, str]:
    """Write the calibration tokens for the peers; returns the file and the hash of the tokens."""
    from bittern.checkpoint import open_checkpoint
    from bittern.calibration import load_tokens

    with open_checkpoint(options.model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    tokens = load_tokens(
        options.calibration, tokenizer, nsamples=options.nsamples, seqlen=options.seqlen, seed=options.seed
    )
    for warning in tokens.warnings:
        print(f"warning: {warning}")
    path: Path = options.work / "calibration.json"
    path.write_text(json.dumps(tokens.ids.tolist()))
    return path, tokens.sha256


def bittern_command(options: argparse.Namespace, bits: int, output: Path, method: str) -> list[str | Path]:
    command = [sys.executable, "-m", "bittern", "quantize", options.model, "-o", output, "--method", method]
    for name in ("group-size", "nsamples", "seqlen", "seed"):
        command += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
    return [*command, "--bits", str(bits), "--dataset", options.calibration]


def peer_command(options: argparse.Namespace, bits: int, output: Path, ids: Path) -> list[str | Path]:
    python = peers.interpreter(PEER, options.envs)
    script = peers.SCRIPTS / "gptqmodel_quantize.py"
    shape = ["--bits", str(bits), "--group-size", str(options.group_size)]
    return [python, script, options.model, output, "--calibration", ids, *shape]


def make(tool: str, bits: int, command: Sequence[str | Path], output: Path, reuse: bool) -> Run:
    """Run a quantizer that writes ``output``, or remember the run that did."""
    record = output.with_suffix(".json")
    if reuse and record.exists() and output.is_dir():
        return Run(**json.loads(record.read_text()))
    shutil.rmtree(output, ignore_errors=True)
    load_average = os.getloadavg()[0]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    cost = measure(command, output.with_suffix(".log"), peers.ENVIRONMENT if tool == PEER else None)
    run = Run(tool, bits, str(output), cost.seconds, cost.peak_rss_bytes, load_average, now)
    record.write_text(json.dumps(asdict(run)))
    return run


def warm_up(options: argparse.Namespace, ids: Path) -> None:
    """Let the peer quantize on one window: at its first use it compiles an extension, which no run shall pay for."""
    few = options.work / "warm-up.json"
    few.write_text(json.dumps(json.loads(ids.read_text())[:1]))
    output = options.work / "warm-up"
    measure(peer_command(options, options.bits[0], output, few), output.with_suffix(".log"), peers.ENVIRONMENT)
    shutil.rmtree(output)


def make_all(options: argparse.Namespace) -> list[Run]:
    """Every artifact, one after the other."""
    ids, sha256 = calibration_ids(options)
    plan: list[tuple[str, int, list[str | Path], Path]] = []
    for bits in options.bits:
        output = {
            tool: options.work / f"{tool.replace(' ', '-')}-{bits}bit" for tool in ("bittern", "bittern rtn", PEER)
        }
        plan.append(("bittern", bits, bittern_command(options, bits, output["bittern"], "gptq"), output["bittern"]))
        if options.rtn:
            rtn = output["bittern rtn"]
            plan.append(("bittern rtn", bits, bittern_command(options, bits, rtn, "rtn"), rtn))
        if not options.skip_peers:
            plan.append((PEER, bits, peer_command(options, bits, output[PEER], ids), output[PEER]))
    if not options.skip_peers and not options.reuse:
        warm_up(options, ids)
    runs = []
    for tool, bits, command, output_folder in plan:
        print(f"{tool} {bits} bits ...", end=" ", flush=True)
        run = make(tool, bits, command, output_folder, options.reuse)
        print(f"{run.seconds:.0f} s, {run.peak_rss_bytes / 1e9:.2f} GB")
        if tool == "bittern":
            manifest = json.loads((output_folder / "bittern_manifest.json").read_text())
            if manifest["calibration"]["sha256"] != sha256:
                sys.exit(f"error: {output_folder} was calibrated on other tokens than {ids}")
        runs.append(run)
    return runs


def evaluate_all(
    options: argparse.Namespace, runs: Iterable[Run]
) -> tuple[float, list[dict[str, float]], list[list[int]]]:
    """The base's perplexity; perplexity, KL and top-1 agreement of every run; the windows.

    All models are in memory and each window visits them all, so that the base runs once a window.
    """
    import torch

    import bittern
    from bittern.checkpoint import open_checkpoint
    from bittern.evaluate import evaluate, text_windows

    with open_checkpoint(options.model) as checkpoint:
        windows = text_windows(
            options.text, checkpoint.tokenizer(), seqlen=options.eval_seqlen, windows=options.windows
        )
    if len(windows) < options.windows:
        print(f"warning: {options.text} has {len(windows)} windows of {options.eval_seqlen} tokens")
    base = bittern.load(options.model, device="cpu", dtype=torch.float32)
    models = [bittern.load(run.artifact, device="cpu", dtype=torch.float32) for run in runs]
    against = cast("PreTrainedModel", RememberingBase(base))
    base_nll = 0.0
    sums = [torch.zeros(3, dtype=torch.float64) for _ in models]
    for index, window in enumerate(windows.unsqueeze(1)):
        print(f"\revaluating window {index + 1} of {len(windows)}", end="", flush=True)
        base_nll += evaluate(against, window).nll
        for total, model in zip(sums, models, strict=True):
            result = evaluate(model, window, against=against)
            total += torch.tensor([result.nll, result.kl, result.top1_agreement], dtype=torch.float64)
    print()
    means = [total / len(windows) for total in sums]
    scores = [{"perplexity": m[0].exp().item(), "kl": m[1].item(), "top1_agreement": m[2].item()} for m in means]
    return float(torch.tensor(base_nll / len(windows)).exp()), scores, windows.tolist()


def controls(options: argparse.Namespace, runs: Sequence[Run], windows: list[list[int]]) -> list[float | None]:
    """Perplexity of GPTQModel's artifacts by GPTQModel itself; None for the others."""
    ids = options.work / "windows.json"
    ids.write_text(json.dumps(windows))
    script = peers.SCRIPTS / "gptqmodel_perplexity.py"
    results: list[float | None] = []
    for run in runs:
        if run.tool != PEER:
            results.append(None)
            continue
        command = [peers.interpreter(PEER, options.envs), script, run.artifact, "--windows", ids]
        log = options.work / f"control-{run.bits}bit.log"
        output = measure(command, log, peers.ENVIRONMENT).output
        results.append(json.loads(output.splitlines()[-1])["perplexity"])
    return results


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
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bittern": bittern.__version__,
        "peer": peers.PACKAGES[PEER][-1],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def table(base_perplexity: float, rows: Sequence[dict[str, Any]]) -> str:
    """The figures as a Markdown table; ratios are to the peer at the same bits."""
    titles = ("tool", "bits", "bits/weight", "perplexity", "KL", "top-1", "seconds", "peak RSS", "ppl", "time", "RSS")
    lines = ["| " + " | ".join([*titles[:8], *(f"{title} / peer's" for title in titles[8:])]) + " |", "|---" * 11 + "|"]
    lines.append(f"| unquantized | | | {base_perplexity:.2f} | | | | | | | |")
    peer = {row["bits"]: row for row in rows if row["tool"] == PEER}
    for row in rows:
        cells = [row["tool"], str(row["bits"]), f"{row['bits_per_weight']['without_embeddings']:.2f}"]
        cells += [f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['top1_agreement']:.3f}"]
        cells += [f"{row['seconds']:.0f}", f"{row['peak_rss_bytes'] / 1e9:.2f} GB"]
        other = peer.get(row["bits"])
        for key in ("perplexity", "seconds", "peak_rss_bytes"):
            cells.append("" if other is None or row["tool"] == PEER else f"{row[key] / other[key]:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    options.work = options.work.resolve()
    runs = make_all(options)
    base_perplexity, scores, windows = evaluate_all(options, runs)
    own = controls(options, runs, windows) if options.control else [None] * len(runs)

    from bittern.inspect import inspect

    rows = [
        {
            **asdict(run),
            **score,
            "control_perplexity": control,
            "bits_per_weight": inspect(run.artifact)["bits_per_weight"],
        }
        for run, score, control in zip(runs, scores, own, strict=True)
    ]
    here = machine()
    shape = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    print("\n" + table(base_perplexity, rows) + "\n")
    print(
        f"{options.model}, group {options.group_size}, calibration {options.nsamples} x {options.seqlen} tokens of "
        f"{options.calibration}, evaluation {len(windows)} x {options.eval_seqlen} tokens of {options.text}"
    )
    print(", ".join(f"{name} {value}" for name, value in here.items()))
    for row in rows:
        if row["control_perplexity"] is not None:
            print(f"{PEER} {row['bits']} bits, evaluated by {PEER} itself: {row['control_perplexity']:.2f}")
        if row["load_average"] > 1:
            print(f"warning: {row['tool']} {row['bits']} bits began at load {row['load_average']:.1f}, not idle")
    if options.json:
        figures = {"machine": here, "options": shape, "unquantized_perplexity": base_perplexity, "rows": rows}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
