"""The page: what is in it, whether text stays text, and what a real browser makes of it."""

import json
import math
import re
import shutil
from html import unescape

import pytest
import torch

import compare
import sft
from common.checkpoint import Checkpoint
from common.conversation import token_by_token
from common.files import read_log
from common.page import SCRIPTS, box, curve, marks_around, page
from common.stages import load_stages
from data import Tokenizer
from data.tokenizer import CAPS_LOCK, SHIFT, unmark_capitals
from model import GPT, GPTConfig

EVIL = (
    "</code></title></svg></style><script>alert(1)</script>"
    "<img src=\"http://evil.example/x.png\" onerror='alert(2)'>&amp;"
)
CONTROL = "[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # characters that a page never shows
LOG = [
    {"step": 10, "loss": 7.25, "val_loss": 7.5},
    {"step": 20, "loss": 3.5},
    {"step": 30, "loss": 1.125, "val_loss": 1.375},
]
LOGS = [("Pretraining", "a.jsonl", LOG), ("Fine-tuning", "b.jsonl", LOG)]
TOKENS = [
    {"text": "<|user|>", "supervised": False, "base": None, "tuned": None},
    {"text": " 고", "supervised": False, "base": 4.25, "tuned": 4.125},
    {"text": "\\xec\\x96", "supervised": False, "base": 2.0, "tuned": 2.0},
    {"text": "<|assistant|>", "supervised": False, "base": 3.0, "tuned": 3.0},
    {"text": "🦜\n", "supervised": True, "base": 9.5, "tuned": 0.75},
    {"text": "<|end|>", "supervised": True, "base": 12.5, "tuned": 0.25},
]
SCORES = (
    "3 test questions",
    [["", "base", "tuned", "control"], ["  a part", "12.3%", "98.7%", "-"]],
)


PATHS = {"base": "out/base.pt", "tuned": "out/sft.pt"}


def a_page(text="text", paths=PATHS, logs=LOGS, scores=SCORES):
    """A page with this text in every place that can show text."""
    token = {"text": text, "supervised": True, "base": 1.5, "tuned": 0.5}
    talk = {"source": "A conversation." + text, "tokens": [*TOKENS[:-1], token, TOKENS[-1]]}
    example = {"prompt": f"What is {text}?", "base": f"A) {text}\nB) no", "tuned": f"It is {text}."}
    if scores:
        heading, rows = scores
        scores = heading + text, [*rows, [text] * 4]
    return page(paths, logs, talk, [example] * 2, scores)


def words_of(html):
    return unescape(re.sub(r"<[^>]*>", " ", html.split("</style>")[1]))


@pytest.mark.parametrize(
    "part",
    [
        "Pretraining , 30 steps. At the end: training 1.125, validation 1.375",
        "step 10: 7.500",
        "· 고 4.25 4.12",
        r"\xec\x96 2.00",
        "🦜↵ 9.50 0.75",
        "<|end|> 12.50 0.25",
        "12.3% 98.7%",
        "3 supervised tokens, the mean loss in nats is 7.83 (base), 0.50 (tuned)",
    ],
)
def test_the_figures_are_those_that_were_given(part):
    assert part in " ".join(words_of(a_page()).split())


def test_every_token_and_every_row_of_a_log_is_drawn():
    html = a_page()
    assert html.count("<li class=supervised>") == 3
    assert html.count("<li><span") == 4 + 1  # and one in the legend
    assert html.count("<svg") == 2 and html.count("<polyline") == html.count("<circle") == 4


def test_the_curve_is_where_the_axes_say():
    html = curve("Pretraining", "log", LOG)
    found = re.findall(r'<path d="M44 ([\d.]+)H384"/><text [^>]*>([\d.e+-]+)<', html)
    marks = {float(mark): float(y) for y, mark in found}
    line = re.search(r'class="training" points="([^"]*)"', html)[1]
    a, b = 1, 5  # two marks, from which a reader works out the axis
    for row, point in zip(LOG, line.split(), strict=True):
        y = float(point.split(",")[1])
        loss = math.exp((y - marks[a]) / (marks[b] - marks[a]) * math.log(b / a))
        assert loss == pytest.approx(row["loss"], rel=0.01)
    assert min(marks) <= 1.125 and max(marks) >= 7.5


@pytest.mark.parametrize(
    "values", [[1.0], [0.5, 0.5], [1e-6, 1e9], [0.004, 0.35], [0.65, 7.3], [1.0, 1.1]]
)
def test_an_axis_holds_its_values(values):
    marks = marks_around(values)
    assert 2 <= len(marks) <= 17 and marks == sorted(set(marks))
    assert marks[0] <= min(values) and marks[-1] >= max(values)


def test_text_stays_text():
    logs = [("Pretraining", EVIL, []), ("Fine-tuning", EVIL, LOG)]
    html = a_page(EVIL, paths={"base": f"/tmp/{EVIL}/base.pt", "tuned": EVIL}, logs=logs)
    assert EVIL in words_of(html)
    logs = [("Pretraining", "a", []), ("Fine-tuning", "b", LOG)]
    harmless = a_page(re.sub("[^ ]", "x", EVIL), logs=logs)
    tags = "<[a-z!/]+"
    assert re.findall(tags, html) == re.findall(tags, harmless)  # not one tag more
    assert not re.search(CONTROL, a_page("\x00\x1b[31m\x7f\x9b" + SHIFT + CAPS_LOCK))
    assert "&lt;" in box("<", True, 0.0)
    assert r"\x00\u202e" in box("\x00\u202e", False, None, 1.0)
    assert "⇧a" in box(SHIFT + "a", True, 0.0) and "⇪" in box(CAPS_LOCK, False, None)
    assert "-0.00" not in box("a", True, -1e-9)


def test_what_is_missing_is_left_out(tmp_path):
    log = tmp_path / "no.jsonl"
    logs = [("Pretraining", log, []), ("Fine-tuning", "b", LOG)]
    words = words_of(a_page(logs=logs, scores=None))
    assert f"no log of a finished run in  {log}" in words and "Fine-tuning , 30 steps" in words
    assert "questions" not in words
    assert "Left out" in page(PATHS, [], {"source": "", "tokens": []}, [], None)
    cut = page(PATHS, [], {"source": "", "tokens": TOKENS[:-1]}, [], None)
    assert "only the part that fits" in cut and "only the part that fits" not in a_page()
    odd = [
        5,
        {"step": "<b>", "loss": 1.0},
        {"step": 1, "loss": float("nan")},
        {"step": 2, "loss": "<i>"},
        {"step": 3},
    ]
    assert "left out" in curve("Pretraining", "log", odd)
    assert "left out" not in curve("Pretraining", "log", [*odd, {"step": 4, "loss": 0.0}])


def test_a_log_of_an_unfinished_run(tmp_path):
    log = tmp_path / "sft.jsonl"
    assert read_log(log) == []
    log.write_text('{"step": 1}\n{"step"', encoding="utf-8")
    assert read_log(log) == []
    log.write_text('{"step": 1}\n', encoding="utf-8")
    assert read_log(log) == [{"step": 1}]
    (tmp_path / "sft.resume.pt").touch()  # the log isn't that of the checkpoint
    assert read_log(log) == []


def test_losses_of_a_conversation():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["고양이가 고개를 끄덕인다. the cat nods"], 270)
    sizes = dict(block_size=24, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=32)
    base, tuned = (
        Checkpoint(None, GPT(GPTConfig(**sizes, dropout=0.0)).eval(), tokenizer, {})
        for _ in range(2)
    )
    torch.nn.init.normal_(tuned.model.embed.weight)
    talk = {"prompt": "the cat?", "response": "고 🦜"}
    talks = [
        ("the cat", " "),
        ("the cat nods" * 9, "fills the block"),
        (talk["prompt"], talk["response"]),
        ("the cat?", "nods " * 30),
    ]
    models = {"base": base, "tuned": tuned}
    tokens = token_by_token(models, talks)
    row = sft.sft_data_collator([talk], tokenizer)
    assert [token["supervised"] for token in tokens] == (row["labels"][0] != -100).tolist()
    assert "\\xf0" in "".join(token["text"] for token in tokens)
    assert tokens[-1]["text"] == "<|end|>" and tokens[0]["base"] is None
    for name, checkpoint in (("base", base), ("tuned", tuned)):
        losses = [token[name] for token in tokens if token["supervised"]]
        mean = checkpoint.model(row["input_ids"], row["labels"])[1].item()
        assert sum(losses) / len(losses) == pytest.approx(mean, rel=1e-5)
    assert token_by_token(models, talks[:2]) == []
    assert len(token_by_token(models, talks[3:])) == 24


def text_of(tokens):
    """What the tokens of a conversation say, with capital letters in place of their marks."""
    return unmark_capitals("".join(token["text"] for token in tokens).encode()).decode()


def test_the_page_of_a_run(small_world, monkeypatch):
    html = (small_world / "report.html").read_text(encoding="utf-8")
    assert not re.search(CONTROL, html)
    scores = json.loads((small_world / "comparison.json").read_text(encoding="utf-8"))
    words = words_of(html)
    for stage in ("pretrain", "sft"):
        last = read_log(small_world / f"{stage}.jsonl")[-1]
        ends = rf"training  {last['loss']:.3f},\s+validation  {last['val_loss']:.3f}"
        assert re.search(rf"{last['step']} steps. At the end:\s+{ends}", words)
    assert f"{100 * scores['tuned']['answered']:.1f}%" in words
    for example in scores["examples"]:
        assert example["tuned"].strip(" ") in words and example["base"] in words
    lines = (small_world / "world" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    tokens = scores["conversation"]["tokens"]
    shown = text_of(tokens[1:-1]).split("<|end|><|assistant|>")
    assert shown in [[item["prompt"], item["response"]] for item in items]
    assert "⇧" in words and "⇧" not in text_of(tokens)  # capitals are marks, and only in the boxes
    supervised = [token for token in tokens if token["supervised"]]
    before, after = (sum(token[name] for token in supervised) for name in ("base", "tuned"))
    assert after < 0.5 * before

    # The example shown first is also the one we look at token by token.
    monkeypatch.setattr(compare, "EXAMPLES", [items[-1]["prompt"]])
    monkeypatch.setattr(compare, "score_all", lambda *arguments: {})  # it would take long
    conversation = compare.compare(load_stages(small_world))["conversation"]
    assert items[-1]["prompt"] in text_of(conversation["tokens"])
    assert "A held-out question" in conversation["source"]


def test_the_page_of_ones_own_conversations(small_world, tmp_path, capsys):
    """The base model is elsewhere, without a log or world. OUT holds another model's log."""
    elsewhere, out = tmp_path / "else<b>where", tmp_path / "out"
    elsewhere.mkdir()
    out.mkdir()
    shutil.copy(small_world / "pretrain.jsonl", out)
    shutil.copy(small_world / "base.pt", elsewhere)
    data = tmp_path / "talks.json"
    talks = [
        {"prompt": f"<script>alert({i})</script> 고양이 🦜", "response": f"{i}!"} for i in range(30)
    ]
    data.write_text(json.dumps(talks), encoding="utf-8")
    options = ["--data", str(data), "--max_steps", "3", "--device", "cpu"]
    sft.main(["--out", str(out), "--base", str(elsewhere / "base.pt"), *options])
    assert f"Wrote {out / 'report.html'}" in capsys.readouterr().out
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html and "<table" not in html
    assert "Pretraining</b> is left out" in html and "Fine-tuning</b>, 3 steps" in html
    assert "what the tuned model answered" in html and "else&lt;b&gt;where" in html


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("which", ["evil", "run"])
def test_in_a_browser(which, width, browser, tmp_path, request):
    if which == "evil":
        path = tmp_path / "evil # page.html"
        logs = [("Pretraining", "/a" * 90, []), ("Fine-tuning", "b", LOG)]
        path.write_text(
            a_page(EVIL + "w" * 300, {"base": "/long" * 50, "tuned": "b"}, logs), encoding="utf-8"
        )
    else:
        path = request.getfixturevalue("small_world") / "report.html"
    events = browser.open(path, width)
    names = {method for method, _ in events}
    bad = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
    assert not (bad | {"Page.javascriptDialogOpening"}) & names, events
    requests = [params for method, params in events if method == "Network.requestWillBeSent"]
    assert [request["request"]["url"] for request in requests] == [path.as_uri()]
    active = "script:not(#about, #weights), img, link, iframe, object, [onerror]"
    scripts = 0 if which == "evil" else len(SCRIPTS)
    assert browser.value(f"document.querySelectorAll('{active}').length") == scripts
    kinds = ["h1", "figure", "svg", "polyline", "table", ".tokens .supervised", ".said"]
    parts = browser.value(f"{kinds}.map(kind => document.querySelectorAll(kind).length)")
    assert parts[:5] == ([1, 2, 1, 2, 1] if which == "evil" else [1, 2, 2, 4, 1])
    assert parts[5] >= 4 and parts[6] >= 4
    assert browser.value("document.title") == "From parrot to assistant"
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("innerWidth") == width
    places = "[...document.querySelectorAll('.said')].map(said => said.getBoundingClientRect())"
    below, beside = browser.value(f"(([a, b]) => [b.top >= a.bottom, b.left >= a.right])({places})")
    assert below == (width == 400) and beside == (width == 1200)


def test_dark_and_light(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(a_page(), encoding="utf-8")
    shades = {}
    for scheme in ("light", "dark"):
        browser.open(path, 800, scheme)
        for place in ("body", ".supervised", "figcaption"):
            style = f"getComputedStyle(document.querySelector('{place}'))"
            colors = browser.value(f"(s => [s.backgroundColor, s.color])({style})")
            rgb = [re.findall(r"\d+", color)[:3] for color in colors]
            shades[scheme, place] = [sum(map(int, parts)) for parts in rgb]
    for place in ("body", ".supervised"):
        assert shades["light", place][0] > 600 > 300 > shades["light", place][1]
        assert shades["dark", place][0] < 200 < 500 < shades["dark", place][1]
    assert shades["light", "figcaption"][1] < 350 and shades["dark", "figcaption"][1] > 400
