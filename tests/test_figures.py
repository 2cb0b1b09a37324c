"""The pictures of the documentation: what is in them, and whether text stays text."""

import io
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch

import model as network
from common.files import read_log
from common.messages import InputError
from conftest import ROOT
from data.tokenizer import CAPS_LOCK, SHIFT
from docs import figures
from docs.figures import PICTURES, main, read_run, svg
from sft import encode

EVIL = "<script>alert(1)</script>&amp;\"'\x00\x1b[31m\x9b\ufffe\ud800]]>"
SVG = "{http://www.w3.org/2000/svg}"
ENDINGS = ("", "-dark")
PAIRS = [  # a log of dpo.py
    {"step": step, "told_apart": share, "margin": margin, "chosen": -1.0, "rejected": rejected}
    for step, share, margin, rejected in ((10, 0.5, -0.5, -6.0), (20, 0.75, 1.5, -9.0))
]


@pytest.fixture(scope="module")
def drawn(small_world, tmp_path_factory):
    """All pictures of a run without preferences: where they are, and what the program said."""
    to, said = tmp_path_factory.mktemp("figures"), io.StringIO()
    with redirect_stdout(said):
        main([str(small_world), "--to", str(to)])
    return to, said.getvalue()


def preferences():
    draw = PICTURES["margins"]
    return svg(draw, draw(SimpleNamespace(logs={"Preferences": PAIRS})), "light")


def texts_of(picture, look=None):
    """The text of each text element, with this class if given."""
    found = ET.fromstring(picture).iter(f"{SVG}text")
    return ["".join(text.itertext()) for text in found if look in (None, text.get("class"))]


def check(picture):
    """It is small, it is only shapes and text, it tells what it shows, and it is not cut off."""
    assert len(picture.encode()) < 100_000
    root = ET.fromstring(picture)
    width, height = map(float, root.get("viewBox").split()[2:])
    assert root.tag == f"{SVG}svg" and width == 800
    assert [child.tag for child in root[:2]] == [f"{SVG}title", f"{SVG}desc"]
    assert len(root[0].text) > 15 and len(root[1].text) > 50 and len(root.findall(".//*")) > 20
    shapes = {"title", "desc", "style", "rect", "text", "tspan", "path", "polyline", "circle"}
    for element in root.iter():
        assert element is root or element.tag.removeprefix(SVG) in shapes
        assert not any(name.startswith("on") or "href" in name for name in element.attrib)
        if element.tag == f"{SVG}text":
            assert 0 <= float(element.get("x")) <= 800 and 0 < float(element.get("y")) < height
    assert picture.count("http") == 1 and not re.search(r"url\(|@import|nan|var\(", picture)


def test_every_picture(drawn):
    to, said = drawn
    names = {f"{name}{ending}.svg" for name in PICTURES if name != "margins" for ending in ENDINGS}
    assert {path.name for path in to.iterdir()} == names
    assert said.count("We leave out") == 1 and "We leave out margins" in said
    for path in to.iterdir():
        check(path.read_text(encoding="utf-8"))
    check(preferences())


def test_the_committed_ones():
    """All that the program makes, and nothing else. Two of them need no run: are they current?"""
    folder = ROOT / "docs" / "figures"
    names = {f"{name}{ending}.svg" for name in PICTURES for ending in ENDINGS}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.iterdir():
        check(path.read_text(encoding="utf-8"))
    for name in ("pipeline", "curve"):
        for scheme, ending in zip(("light", "dark"), ENDINGS, strict=True):
            made = svg(PICTURES[name], PICTURES[name](None), scheme)
            assert (folder / f"{name}{ending}.svg").read_text(encoding="utf-8") == made


def test_text_stays_text(small_world):
    run = read_run(small_world)
    shown = "<script>alert(1)</script>&amp;\"'" + "\ufffd\ufffd[31m" + 3 * "\ufffd" + "]]>"
    picture = svg(PICTURES["curve"], (EVIL, 100, [figures.words(0, 9, EVIL)] * 30), "dark")
    assert ET.fromstring(picture)[0].text == shown and texts_of(picture) == [shown] * 31
    run.answer = [(EVIL[i : i + 9], 1.0, 0.5) for i in range(30)] + [("<|end|>", 20.0, 0.1)]
    picture = svg(PICTURES["surprise"], PICTURES["surprise"](run), "light")
    check(picture)
    assert "<script>a" in texts_of(picture) and "<|end|>" in texts_of(picture)
    assert figures.token_text(f"{SHIFT}a{CAPS_LOCK}\n\t b") == "⇧a⇪↵⇥ b"
    assert figures.token_text(" a") == "a" and figures.token_text(" ") == "·"
    assert figures.token_text("a" * 30) == "a" * 13 + "…"


def test_the_losses_are_where_the_axis_says(drawn, small_world):
    picture = (drawn[0] / "losses.svg").read_text(encoding="utf-8")
    found = re.findall(r'<path class="line" d="M80 ([\d.]+)H272"/>\n<text [^>]*>([^<]+)<', picture)
    marks = {float(mark): float(y) for y, mark in found}
    low, high = min(marks), max(marks)
    rows = read_log(small_world / "pretrain.jsonl")
    line = re.search(r'<polyline class="blue" points="([^"]*)"', picture)[1].split()
    assert len(line) == len(rows) > 10
    for row, point in zip(rows, line, strict=True):
        x, y = map(float, point.split(","))
        part = (y - marks[low]) / (marks[high] - marks[low])
        assert math.exp(part * math.log(high / low)) * low == pytest.approx(row["loss"], rel=0.01)
        assert x == pytest.approx(80 + 192 * row["step"] / rows[-1]["step"], abs=0.1)
    ends = f"ends at {rows[-1]['loss']:.2f}, {rows[-1]['val_loss']:.2f}"
    assert texts_of(picture).count(ends) == 1 and "Preferences" not in picture


def test_the_bars_are_as_high_as_the_losses(drawn, small_world):
    picture = (drawn[0] / "surprise.svg").read_text(encoding="utf-8")
    found = json.loads((small_world / "comparison.json").read_text(encoding="utf-8"))
    tokens = [token for token in found["conversation"]["tokens"] if token["supervised"]]
    bars = {
        name: [float(height) for height in re.findall(rf'height="([\d.]+)"[^>]*{look}', picture)]
        for name, look in (("base", "solid hot"), ("tuned", "solid green"))
    }
    most = max(token[name] for token in tokens for name in bars)
    for name, heights in bars.items():
        expected = [max(1.5, 250 * token[name] / most) for token in tokens]
        assert heights == pytest.approx(expected, abs=0.06)
    assert texts_of(picture, "mono")[-1] == "<|end|>"


def test_the_mask_is_that_of_the_collator(drawn, small_world):
    picture = (drawn[0] / "mask.svg").read_text(encoding="utf-8")
    run = read_run(small_world)
    masked, shown = texts_of(picture, "mono soft"), texts_of(picture, "mono green bold")
    assert shown == [str(label) for label in run.row["labels"] if label != -100]
    assert masked.count("-100") == run.row["labels"].count(-100) == picture.count(">-100<")
    assert picture.count('class="leaf"') == len(shown)


def test_a_mask_of_many_lines(small_world):
    run = read_run(small_world)
    run.row = encode({"prompt": "a b c " * 9, "response": "d e f " * 9}, run.tuned.tokenizer)
    picture = svg(PICTURES["mask"], PICTURES["mask"](run), "light")
    check(picture)
    boxes = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="56', picture)
    assert len(boxes) == len(run.row["labels"]) > 50
    assert all(134 <= float(x) and float(x) + float(width) <= 776 for x, width in boxes)


def test_attention(drawn, small_world):
    """One of the heads, as the network computes it, and the one that looks most at both words."""
    tuned, attend = read_run(small_world).tuned, network.attend
    example = {"prompt": "What is the capital of Kenya?"}
    example["response"] = "The capital of Kenya is Nairobi."
    ids = encode(example, tuned.tokenizer)["input_ids"]
    looks = figures.attention_of(tuned.model, ids)
    config = tuned.model.config
    assert network.attend is attend
    assert looks.shape == (config.n_layer, config.n_head, len(ids), len(ids))
    assert torch.allclose(looks.sum(dim=-1), torch.ones(()), atol=1e-5)
    assert looks.triu(1).abs().max() == 0
    picture = (drawn[0] / "attention.svg").read_text(encoding="utf-8")
    layer, head = map(int, re.search(r"Layer (\d+), head (\d+)", picture).groups())
    text = [tuned.tokenizer.decode([i]) for i in ids]
    half, weights = text.index("<|assistant|>"), []
    for mark in (0, 1):  # " capital" has none, and " Kenya" has one
        i = tuned.tokenizer.encode((" capital", " Kenya")[mark])[mark]
        weights.append(looks[:, :, ids.index(i, half) - 1, ids.index(i)])
    assert torch.minimum(*weights).argmax() == (layer - 1) * config.n_head + head - 1
    percents = [f"{100 * weight[layer - 1, head - 1]:.0f}%" for weight in weights]
    assert [text for text in texts_of(picture) if text.endswith("%")] == percents
    widths = map(float, re.findall(r"stroke-width:([\d.]+)", picture.split("</style>")[1]))
    assert max(widths) >= 29.9 * max(weight[layer - 1, head - 1] for weight in weights)


def test_the_curve_is_the_table():
    """The numbers of the text: its table has a row for each run."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    keys = ("base knows", "tuned answers", "in unseen wordings", "explains as asked")
    for i, millions in enumerate(figures.TOKENS):
        scores = [figures.CURVE[key][1][i] for key in (*keys, "strangers, in all")]
        assert f"| {millions} million | " + " | ".join(map(str, scores)) + " |" in text
    ends = [scores[-1] for _, scores in figures.CURVE.values()]
    assert list(figures.CURVE)[0] == "tuned answers" and ends[0] == max(ends)


def test_margins():
    picture = preferences()
    said = texts_of(picture)
    assert {"ends at 75%", "ends at 1.50", "ends at −1.00, −9.00", "20 steps"} <= set(said)
    lines = re.findall(r'<polyline class="(\w+)" points="([^"]*)"', picture)
    assert [look for look, _ in lines] == ["green", "green", "blue", "hot"]
    assert [len(points.split()) for _, points in lines] == [2, 3, 2, 2]
    y = [float(point.split(",")[1]) for point in lines[1][1].split()]
    assert y[1] > y[0] > y[2]  # a margin below zero, the start, and one above
    marks = [float(text.replace("−", "-")) for text in texts_of(picture, "axis") if "s" not in text]
    assert min(marks) <= -9.0 and max(marks) == 100
    for log in ([], [5, {"margin": 1.0}], [{"step": 10, "loss": 0.5}]):
        assert PICTURES["margins"](SimpleNamespace(logs={"Preferences": log})) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"examples": []}',
        '{"examples": [{"prompt": "a", "tuned": ""}], "conversation": {"tokens": []}}',
        '{"examples": [{"prompt": "a", "tuned": "b"}], "conversation": {"tokens": []}}',
        '{"examples": [{"prompt": "a", "tuned": "b"}], "conversation": {"tokens": '
        '[{"text": "a", "supervised": true, "base": NaN, "tuned": 1}]}}',
    ],
)
def test_a_comparison_that_is_none(text, small_world, tmp_path):
    out = shutil.copytree(small_world, tmp_path / "out", dirs_exist_ok=True)
    (out / "comparison.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="comparison.json.*python compare.py"):
        read_run(out)


def test_bad_input_gets_one_line(small_world, tmp_path, capsys):
    out = shutil.copytree(small_world, tmp_path / "out")
    (out / "sft.jsonl").unlink()
    for folder, what in ((tmp_path / "no", "no such checkpoint"), (out, "no finished run")):
        with pytest.raises(SystemExit) as stopped:
            main([str(folder), "--to", str(tmp_path / "to")])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and what in error
