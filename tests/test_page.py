"""The report: what stands in it, where it comes from, and what a manifest cannot do to it."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bittern import cli
from bittern.errors import BitternError
from bittern.page import svg as svg_module
from bittern.page.charts import step_of, steps
from bittern.page.layers import short_names
from bittern.page.page import make_sections, render, write_page
from bittern.page.parts import Section, place, share
from bittern.report import MANIFEST_FILE
from bittern.schema import problem
from bittern.story import change_in_words, duration, size_in_words, tell
from tests import manifests

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "link", "br", "img", "hr", "input"}
WITHIN_A_LINE = {"a", "strong", "span", "th", "td", "caption", "text", "tspan", "title", "desc"}


def page_of(manifest: dict[str, Any], *beside: dict[str, Any]) -> str:
    assert problem(manifest) is None
    return render(manifest, make_sections(manifest, beside))


@cache
def standard(name: str) -> tuple[list[Section], str]:
    """Sections and page of one of the manifests that are made by hand."""
    manifest = getattr(manifests, name)()
    assert problem(manifest) is None
    sections = make_sections(manifest)
    return sections, render(manifest, sections)


def drawn(sections: list[Section]) -> list[str]:
    return [chart.name for section in sections for chart in section.charts if chart.svg is not None]


def charts_of(manifest: dict[str, Any]) -> list[str]:
    return [chart.name for section in make_sections(manifest) for chart in section.charts if chart.svg is not None]


class Reader(HTMLParser):
    """Elements in the order in which they open, the text of the page, and whether everything is closed."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


QUANTIZED = ["size", "memory", "perplexity", "kl", "accuracy", "error", "bits", "prediction"]
UPTRAINED = [
    *("size", "memory", "perplexity", "kl", "accuracy"),
    *("stages-perplexity", "stages", "groups", "loss", "training-perplexity"),
]


def test_every_chart_that_the_manifest_has_figures_for() -> None:
    assert drawn(standard("quantized")[0]) == QUANTIZED
    assert drawn(standard("uptrained")[0]) == UPTRAINED
    assert drawn(standard("chain")[0]) == [
        *("size", "memory", "perplexity", "kl", "accuracy"),
        *("stages-perplexity", "stages", "groups", "loss", "training-perplexity", "error", "bits", "prediction"),
    ]


def test_the_page_is_well_formed_and_every_chart_has_a_name_and_a_table() -> None:
    for manifest, names in (("quantized", QUANTIZED), ("uptrained", UPTRAINED)):
        reader = Reader(standard(manifest)[1])
        assert reader.open == []
        ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
        assert [each for each, count in Counter(ids).items() if count > 1] == []
        pictures = [attributes for tag, attributes in reader.elements if tag == "svg"]
        assert [picture["aria-labelledby"] for picture in pictures] == [f"{n}-title {n}-summary" for n in names]
        assert {each for picture in pictures for each in picture["aria-labelledby"].split()} <= set(ids)
        assert all(picture["role"] == "img" for picture in pictures)
        tags = Counter(tag for tag, _ in reader.elements)
        assert tags["details"] >= len(names) and tags["table"] == tags["caption"]


def test_the_page_asks_for_nothing() -> None:
    page = standard("quantized")[1]
    reader = Reader(page)
    policy = next(a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and "script" not in policy
    for tag, attributes in reader.elements:
        assert tag not in ("script", "iframe", "object", "embed", "img", "image", "form", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action"):
                assert value.startswith("#") or value == "data:,"
            assert "url(" not in value or re.fullmatch(r"url\(#[\w-]+\)", value)
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_the_same_manifest_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifests.quantized()))
    write_page(path, tmp_path / "here.html")
    command = [sys.executable, "-m", "bittern", "report", str(path), "-o", str(tmp_path / "there.html")]
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nsvg.fonttype: path\n")
    environment = {**os.environ, "PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "here.html").read_bytes() == (tmp_path / "there.html").read_bytes()


def test_colours_are_variables_that_the_style_has() -> None:
    page = standard("quantized")[1] + standard("uptrained")[1]
    style = (ROOT / "bittern" / "page" / "page.css").read_text()
    light, dark = style.split("prefers-color-scheme: dark", 1)
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    assert set(svg_module.COLOURS) <= used | {f"on-heat-{n}" for n in range(7)} | {"four"}
    for name in used:
        assert f"--{name}:" in light and f"--{name}:" in dark
    inline = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert inline and not any(re.search(r"(fill|stroke): *#", picture) for picture in inline)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrasts_of_the_colours(scheme: int) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5
    style = (ROOT / "bittern" / "page" / "page.css").read_text().split("prefers-color-scheme: dark", 1)[scheme]
    colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", style.split("}")[0]))
    for paper in ("paper", "card"):
        assert all(contrast(colour[ink], colour[paper]) >= 4.5 for ink in ("ink", "muted", "link"))
        assert all(contrast(colour[line], colour[paper]) >= 3 for line in ("one", "two", "three", "four", "focus"))
    assert all(contrast(colour[ink], colour["alarm-paper"]) >= 4.5 for ink in ("ink", "alarm", "link"))
    heat = [colour[f"heat-{step}"] for step in range(svg_module.STEPS)]
    for step, shade in enumerate(heat):
        assert contrast(shade, colour[f"on-heat-{step}"]) >= 4.5, step
    values = [luminance(shade) for shade in heat]
    assert values == sorted(values, reverse=not scheme)  # one direction, so that it reads without colour


def test_figures_are_those_of_the_manifest() -> None:
    text = Reader(standard("quantized")[1]).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "source at 3 to 8 bits" in text
    assert "1.60 MB became 300 kB, 5.33 times smaller." in text
    assert "Perplexity on held-out.txt went from 6.39 to 8.07 (+26.3 %)." in text
    assert "models/source 66.0 %, this artifact 61.0 %" in text
    # 0.001 * (1 + block) * (1 + position): the largest is down_proj of block 2, the smallest q_proj of block 0
    assert "from 0.10 % in model.layers.0.self_attn.q_proj to 2.1 % in model.layers.2.mlp.down_proj" in text
    assert "on average largest in mlp.down_proj (1.4 %)" in text
    assert "18 layers have 3 bits, 3 layers have 8 bits, 1 stay floats" in text
    # weights of 1.6 and 0.3 MB, and 1152 bytes for each of 2048 tokens
    assert "3.96 MB before, 2.66 MB now" in text
    assert "Time: 10 s predicted, 12 s measured" in text
    assert "no calibration token came" in text and "shape 7 x 96 is no multiple of 32" in text
    assert "bittern quantize models/source -o OUT --sym --bits 3" in text
    assert "2.13.0" in text and "Linux x86_64, 2 processors" in text and manifests.HASH in text
    assert "Not in this manifest" not in text


def test_cells_of_the_heat_map_are_where_they_belong() -> None:
    """By the order of its texts in the picture: columns on top, then blocks, cells row by row."""
    sections = {section.name: section for section in standard("quantized")[0]}
    chart = sections["layers"].charts[0]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", chart.svg or "")
    expected = [
        share(layer["loss"]).removesuffix(" %")
        for block in range(3)
        for layer in manifests.layers()
        if f".{block}." in layer["layer"] and not (block == 0 and layer["layer"].endswith("gate_proj"))
    ]
    found = [text for text in texts if re.fullmatch(r"\d\.\d+", text)]
    assert found == expected
    assert texts[:10] == ["q", "k", "v", "o", "gate", "up", "down", "0", "1", "2"]


def test_what_the_stages_of_an_effort_brought() -> None:
    def rows(manifest: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
        section = next(section for section in make_sections(manifest) if section.name == "layers")
        return dict(section.tables)["What each stage brought"].rows

    manifest = manifests.quantized()
    assert [(row[2], row[3]) for row in rows(manifest)] == [("83 %", "20"), ("91 %", "21"), ("75 %", "all")]
    refused = {**manifest, "tuning": manifests.tuning(refused="KL rose")}
    assert rows(refused)[-1][2] == "not taken"
    unknown = {**manifest, "tuning": {**manifests.tuning(), "kl": {"solved": 0.4, "tuned": None}}}
    assert rows(unknown)[-1][2] == "-"
    plain = {name: value for name, value in manifest.items() if name not in ("stages", "tuning")}
    section = next(section for section in make_sections(plain) if section.name == "layers")
    assert [shown for shown, _ in section.tables] == ["All 21 layers"]


def test_several_artifacts_make_a_curve() -> None:
    others = []
    for bits, perplexity in ((2, 19.96), (4, 6.73)):
        other = {**manifests.quantized(), "layers": manifests.layers(bits=bits)}
        other["evaluations"] = [{**manifests.evaluations()[0], "perplexity": perplexity}]
        other["size"] = {**other["size"], "output": manifests.side(400_000, 100_000 * bits)}
        others.append(other)
    sections = make_sections(manifests.quantized(), others)
    chart = next(chart for section in sections for chart in section.charts if chart.name == "perplexity")
    assert [row[:4] for row in chart.table.rows] == [
        ("this artifact", "held-out.txt", "6.00", "8.0700"),
        ("models/source", "held-out.txt", "32.00", "6.3900"),
        ("2 to 8 bits", "held-out.txt", "4.00", "19.9600"),
        ("4 to 8 bits", "held-out.txt", "8.00", "6.7300"),
    ]


def test_a_base_that_the_manifest_does_not_know_is_a_line() -> None:
    manifest = {**manifests.quantized(), "evaluations": manifests.evaluations(base="elsewhere/base")}
    section = next(section for section in make_sections(manifest) if section.name == "quality")
    assert "Bits per weight are not known of: elsewhere/base." in section.text[0]
    assert "elsewhere/base: 6.39" in (section.charts[0].svg or "")
    assert [row[2] for row in section.charts[0].table.rows] == ["6.00", "-"]


def names_of(sections: list[Section]) -> list[str]:
    return [section.name for section in sections]


@pytest.mark.parametrize("make", ["schema_1", "schema_2"])
def test_older_manifests_are_told_and_what_they_lack_is_named(make: str) -> None:
    sections, page = standard(make)
    assert names_of(sections) == ["layers", "warnings", "history", "environment", "repeat", "missing"]
    missing = [what for what, _ in sections[-1].items]
    assert missing == ["Size", "Cache", "Quality", "Prediction"] + (["Files"] if make == "schema_1" else [])
    text = Reader(page).text
    assert "put together from its options" in text and "bittern quantize models/source -o OUT --sym --bits 3" in text
    assert "None" not in text and "nan" not in text.split()


def test_what_was_rounded_to_nearest_has_no_errors_to_show() -> None:
    manifest = manifests.quantized()
    manifest["layers"] = [{**each, "method": "rtn", "loss": None, "damp": None} for each in manifest["layers"]]
    assert "error" not in charts_of(manifest)
    assert "so no error of their outputs was measured" in Reader(page_of(manifest)).text


def test_experts_share_a_column_and_the_worst_is_shown() -> None:
    manifest = manifests.quantized()
    model = manifest["layers"][0]
    manifest["layers"] = [
        {**model, "layer": f"model.layers.{block}.mlp.experts.{expert}.down_proj", "loss": 0.01 * (1 + expert)}
        for block in range(2)
        for expert in range(64)
    ]
    chart = next(c for s in make_sections(manifest) for c in s.charts if c.name == "error")
    assert chart.svg is not None and "Of several experts in a cell the worst is shown." in chart.summary
    assert chart.table.rows == (
        ("mlp.experts.*.down_proj", "128", "32 %", "64 %", "model.layers.0.mlp.experts.63.down_proj"),
    )


def test_what_is_too_large_to_draw_is_said() -> None:
    manifest = manifests.quantized()
    model = manifest["layers"][0]
    manifest["layers"] = [{**model, "layer": f"model.layers.{block}.q_proj"} for block in range(3100)]
    assert {"error", "bits"} & set(charts_of(manifest)) == set()
    text = Reader(page_of(manifest)).text
    assert "too many blocks or kinds of layers to draw" in text and "The first 3000 layers" in text


HOSTILE = [
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "</style></svg></title><script src=//example.org/x.js></script>",
    "{{ 7 * 7 }}{% for x in y %}",
    "$\\frac{1}{$ \\begin{x}",
    "javascript:alert(1) &lt;b&gt; &amp;",
    "\x00\x1b[31m\u202eright to left\u2028\ufeff",
    "x" * 50_000,
    "]]> <!-- --> <![CDATA[",
    "",
]


POISONED_NAMES = ("kept", "files", "versions", "layer_seconds")
"""Objects whose keys are anybody's."""


def poison(value: Any, texts: Iterator[str], key: str = "") -> Any:
    """A value of a manifest whose every string is hostile, as far as the schema allows."""
    if isinstance(value, dict) and key in POISONED_NAMES:
        return {f"{next(texts)}{name}": poison(item, texts) for name, item in value.items()}
    if isinstance(value, dict):
        return {name: poison(item, texts, name) for name, item in value.items()}
    if isinstance(value, list):
        return [poison(item, texts, key) for item in value]
    if not isinstance(value, str) or key in ("kind", "what", "sha256"):
        return value
    return f"model.layers.1.{next(texts)}" if key == "layer" else next(texts)


@pytest.mark.parametrize(("make", "first"), [("quantized", 0), ("uptrained", 4), ("chain", 7)])
def test_hostile_strings_stay_text(make: str, first: int) -> None:
    whole = Counter(tag for tag, _ in Reader(standard(make)[1]).elements)
    manifest = poison(getattr(manifests, make)(), itertools.cycle(HOSTILE[first:] + HOSTILE[:first]))
    reader = Reader(page_of(manifest))
    assert reader.open == []
    found = Counter(tag for tag, _ in reader.elements)
    assert set(found) <= set(whole) and found["svg"] == whole["svg"] and found["section"] == whole["section"]
    assert not {"script", "img"} & set(found)
    assert all(not name.startswith("on") for _, attributes in reader.elements for name in attributes)
    page = "".join(reader.texts)
    assert not any(character in page for character in "\x00\x1b\u202e\u2028\ufeff")
    assert "{{ 7 * 7 }}" in page and "<script>window.hacked" in page  # shown as they are


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the texts and numbers of a manifest are; of a list those of its first item."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(min(len(value), 1)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


@pytest.mark.parametrize("make", ["quantized", "uptrained"])
def test_whatever_may_be_null_is_passed_over(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bittern.page.charts.draw", lambda *_: "<svg></svg>")
    whole = getattr(manifests, make)()
    passed = set()
    for *path, last in leaves(whole):
        manifest = copy.deepcopy(whole)
        holder = manifest
        for key in path:
            holder = holder[key]
        holder[last] = None
        if problem(manifest) is None:
            render(manifest, make_sections(manifest))
            passed.add(last)
    assert {"all", "without_embeddings", "perplexity", "revision"} <= passed
    assert make == "uptrained" or {"solved", "tuned", "loss"} <= passed


@pytest.mark.parametrize("value", [1e149, 5e-324])
def test_numbers_at_the_edge_are_drawn(value: float) -> None:
    def pushed(item: Any, key: str = "") -> Any:
        if isinstance(item, dict):
            return {name: pushed(each, name) for name, each in item.items()}
        if isinstance(item, list):
            return [pushed(each, key) for each in item]
        is_share = key == "top1_agreement" or "accuracy" in key or "exact_match" in key
        return value if isinstance(item, float) and not (is_share and value > 1) else item

    assert Reader(page_of(pushed(manifests.chain()))).open == []


def test_numbers_as_large_as_the_schema_lets_them_be() -> None:
    manifest = manifests.quantized()
    manifest["context_length"] = 2**62
    manifest["size"]["output"]["bytes"]["total"] = 2**62
    manifest["layers"][0] |= {"bits": 32, "tokens": 2**62, "shape": [2**40, 2**40]}
    assert Reader(page_of(manifest)).open == []
    manifest = manifests.uptrained()
    manifest["heads"]["num_attention_heads"] = 2**62
    manifest["blocks"][0]["groups"] = [[2**62], [0]]
    manifest["blocks"][1]["groups"] = []
    assert Reader(page_of(manifest)).open == []


@pytest.mark.parametrize(
    ("name", "where", "short"),
    [
        ("model.layers.12.self_attn.q_proj", ("12", "self_attn.q_proj"), "q"),
        ("transformer.h.0.mlp.c_fc", ("0", "mlp.c_fc"), "c_fc"),
        ("model.layers.3.mlp.experts.17.up_proj", ("3", "mlp.experts.*.up_proj"), "up"),
        ("lm_head", ("-", "lm_head"), "lm_head"),
    ],
)
def test_places_of_layers(name: str, where: tuple[str, str], short: str) -> None:
    assert place(name) == where and short_names([where[1]]) == [short]


def test_short_names_differ() -> None:
    assert short_names(["attn.c_proj", "mlp.c_proj"]) == ["attn.c_proj", "mlp.c_proj"]
    assert short_names(["a.q", "b.q_proj"]) == ["q", "q_proj"]
    assert all(len(name) <= 28 for name in short_names(["x" * 1000]))


def test_steps_of_the_scale_have_equal_ratios() -> None:
    bounds = steps([0.001, 0.0, 0.128])
    assert [later / earlier for earlier, later in itertools.pairwise(bounds)] == pytest.approx([2.0] * 5)
    assert [step_of(value, bounds) for value in (0.0, 0.001, 0.003, 0.128)] == [0, 0, 1, 6]
    assert steps([]) == steps([0.5]) == steps([0.0, 0.0]) == []


def test_words() -> None:
    assert [size_in_words(n) for n in (0, 999, 1000, 21_182_112, 999_600, 3 * 10**15)] == [
        *("0 bytes", "999 bytes", "1.00 kB", "21.2 MB", "1.00 MB", "3000 TB")
    ]
    assert [duration(s) for s in (0.04, 9.96, 59.7, 61, 3601, 400_000)] == [
        *("0.0 s", "10.0 s", "60 s", "1 min 1 s", "1 h 0 min", "111 h 6 min")
    ]
    assert change_in_words(4, 5) == "+25.0 %" and change_in_words(4, 3) == "-25.0 %"
    assert [share(v) for v in (None, 0.0, 0.1234, 0.0123, 0.00123, 0.000123, 1e-7)] == [
        *("-", "0.000 %", "12 %", "1.2 %", "0.12 %", "0.012 %", "1e-05 %")
    ]


def test_the_story_of_a_chain_is_told_from_the_first_run_on() -> None:
    told = tell(manifests.chain())
    assert told[0].startswith("uptrained models/source (llama): 6 key and value heads became 3")
    assert told[1].startswith("quantized models/source (llama): GPTQ and round to nearest, 18 layers at 3 bits")
    assert told[2] == (
        "held-out.txt: perplexity 8.07 (models/source: 6.39), KL 0.25, top-1 agreement 76.0 %, 7,650 tokens"
    )
    text = Reader(standard("chain")[1]).text
    assert "Degraded: perplexity is 3 % above the source's" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "1. uptrain" in text and "2. quantize" in text


# The command


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def test_the_command_writes_a_file_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "art").mkdir()
    (tmp_path / "art" / MANIFEST_FILE).write_text(json.dumps(manifests.quantized()))
    out = tmp_path / "report.html"
    assert run("report", tmp_path / "art", "-o", out) == 0
    assert re.fullmatch(rf"{re.escape(str(out))}: 8 charts, \d+ kB\n", capsys.readouterr().out)
    first = out.read_bytes()
    assert run("report", tmp_path / "art" / MANIFEST_FILE, "-o", out) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("exists already (--overwrite replaces a file)\n")
    assert run("report", tmp_path / "art", "-o", out, "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(out), "bytes": len(first), "charts": QUANTIZED}
    assert out.read_bytes() == first and [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "expected an artifact's folder"),
        (lambda path: path.mkdir(), f"no {MANIFEST_FILE}, so nothing to report"),
        (lambda path: (path.mkdir(), (path / MANIFEST_FILE).write_text("{")), "expected a JSON file"),
        (lambda path: (path.mkdir(), (path / MANIFEST_FILE).write_text('{"schema_version": 4}')), "upgrade bittern"),
        (lambda path: (path.mkdir(), (path / MANIFEST_FILE).write_text('{"schema_version": 3}')), "expected the key"),
        (lambda path: (path.mkdir(), (path / MANIFEST_FILE).symlink_to("/etc/hostname")), "leads out of the folder"),
    ],
)
def test_what_the_command_refuses(make: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "art")
    assert run("report", tmp_path / "art", "-o", tmp_path / "r.html") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and words in captured.err
    assert not (tmp_path / "r.html").exists()


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(manifests.schema_2()))
    for output, words in (("out.txt", "ends in .html"), ("none/out.html", "cannot be written"), ("d.html", "exists")):
        (tmp_path / "d.html").mkdir(exist_ok=True)
        with pytest.raises(BitternError, match=re.escape(words)):
            write_page(path, tmp_path / output, overwrite=True)
    with pytest.raises(BitternError, match="a GGUF file has no manifest"):
        write_page(tmp_path / "x.gguf", tmp_path / "out.html")


def test_without_what_draws_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(manifests.quantized()))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BitternError, match=r"needs matplotlib: pip install 'bittern\[report\]'"):
        write_page(path, tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()
