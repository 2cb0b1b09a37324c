"""The page: what stands in it, what it does with text that would like to be more than text, and how a real browser takes it."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
from html import unescape

import pytest
import torch

import compare
import sft
from data import Tokenizer
from data.report import box, curve, marks_around, page
from data.text import read_log
from model import GPT, GPTConfig

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</code></title></svg></style><script>alert(1)</script><img src=\"http://evil.example/x.png\" onerror='alert(2)'>&amp;"
LOG = [{"step": 10, "loss": 7.25, "val_loss": 7.5}, {"step": 20, "loss": 3.5}, {"step": 30, "loss": 1.125, "val_loss": 1.375}]
TOKENS = [
    {"text": "<|user|>", "supervised": False, "base": None, "tuned": None},
    {"text": " 고", "supervised": False, "base": 4.25, "tuned": 4.125},
    {"text": "\\xec\\x96", "supervised": False, "base": 2.0, "tuned": 2.0},
    {"text": "<|assistant|>", "supervised": False, "base": 3.0, "tuned": 3.0},
    {"text": "🦜\n", "supervised": True, "base": 9.5, "tuned": 0.75},
    {"text": "<|end|>", "supervised": True, "base": 12.5, "tuned": 0.25},
]
SCORES = "test questions: 3", [("", "base", "tuned", "tuned from random"), ("  a part", "12.3%", "98.7%", "-")]


def a_page(text="text", paths=("out/base.pt", "out/sft.pt"), logs=(("Pretraining", "a.jsonl", LOG), ("Fine-tuning", "b.jsonl", LOG)), scores=SCORES):
    """A page in which a text stands wherever one can."""
    tokens = [*TOKENS[:-1], {"text": text, "supervised": True, "base": 1.5, "tuned": 0.5}, TOKENS[-1]]
    examples = [{"prompt": f"What is {text}?", "base": f"A) {text}\nB) no", "tuned": f"It is {text}."}] * 2
    if scores:
        scores = scores[0] + text, [*scores[1], (text, text, text, text)]
    return page(paths, logs, {"source": "A conversation." + text, "tokens": tokens}, examples, scores)


def words_of(html):
    return unescape(re.sub(r"<[^>]*>", " ", html.split("</style>")[1]))


def test_the_figures_are_those_that_were_given():
    html = a_page()
    words = " ".join(words_of(html).split())
    for part in ("Pretraining , 30 steps. At the end: training 1.125, validation 1.375", "step 10: 7.500", "· 고 4.25 4.12", r"\xec\x96 2.00"):
        assert part in words
    for part in ("🦜↵ 9.50 0.75", "<|end|> 12.50 0.25", "12.3% 98.7%", "3 supervised tokens the mean loss was 7.83 nats before, and is 0.50"):
        assert part in words
    assert html.count("<li class=supervised>") == 3 and html.count("<li><span") == 4 + 1  # (and one in the legend)
    assert html.count("<svg") == 2 and html.count("<polyline") == 4 and html.count("<circle") == 4


def test_the_curve_is_where_the_axes_say():
    html = curve("Pretraining", "log", LOG)
    marks = {float(mark): float(y) for y, mark in re.findall(r'<path d="M44 ([\d.]+)H384"/><text [^>]*>([\d.e+-]+)<', html)}
    line = re.search(r'class="training" points="([^"]*)"', html)[1]
    a, b = 1, 5  # two marks, from which a reader works out the axis
    for row, point in zip(LOG, line.split(), strict=True):
        y = float(point.split(",")[1])
        assert math.exp((y - marks[a]) / (marks[b] - marks[a]) * math.log(b / a)) == pytest.approx(row["loss"], rel=0.01)
    assert min(marks) <= 1.125 and max(marks) >= 7.5


@pytest.mark.parametrize("values", [[1.0], [0.5, 0.5], [1e-6, 1e9], [0.004, 0.35], [0.65, 7.3], [1.0, 1.1]])
def test_an_axis_holds_its_values(values):
    marks = marks_around(values)
    assert 2 <= len(marks) <= 17 and marks[0] <= min(values) and marks[-1] >= max(values) and marks == sorted(set(marks))


def test_text_stays_text():
    html = a_page(EVIL, paths=(f"/tmp/{EVIL}/base.pt", EVIL), logs=[("Pretraining", EVIL, []), ("Fine-tuning", EVIL, LOG)])
    assert EVIL in words_of(html)
    harmless = a_page(re.sub("[^ ]", "x", EVIL), logs=[("Pretraining", "a", []), ("Fine-tuning", "b", LOG)])
    assert re.findall("<[a-z!/]+", html) == re.findall("<[a-z!/]+", harmless)  # not one tag more
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", a_page("\x00\x1b[31m\x7f\x9b"))
    assert "&lt;" in box("<", True, 0.0) and r"\x00\u202e" in box("\x00\u202e", False, None, 1.0) and "-0.00" not in box("a", True, -1e-9)


def test_what_is_missing_is_left_out(tmp_path):
    words = words_of(a_page(logs=[("Pretraining", tmp_path / "no.jsonl", []), ("Fine-tuning", "b", LOG)], scores=None))
    assert f"Pretraining  is left out:  {tmp_path / 'no.jsonl'}" in words and "Fine-tuning , 30 steps" in words and "questions" not in words
    assert "Left out" in page(("a", "b"), [], {"source": "", "tokens": []}, [], None)
    cut = page(("a", "b"), [], {"source": "", "tokens": TOKENS[:-1]}, [], None)
    assert "it is cut where" in cut and "it is cut where" not in a_page()
    odd = [5, {"step": "<b>", "loss": 1.0}, {"step": 1, "loss": float("nan")}, {"step": 2, "loss": "<i>"}, {"step": 3}]
    assert "left out" in curve("Pretraining", "log", odd) and "left out" not in curve("Pretraining", "log", [*odd, {"step": 4, "loss": 0.0}])


def test_a_log_that_is_no_finished_one(tmp_path):
    log = tmp_path / "sft.jsonl"
    assert read_log(log) == []
    log.write_text('{"step": 1}\n{"step"', encoding="utf-8")
    assert read_log(log) == []
    log.write_text('{"step": 1}\n', encoding="utf-8")
    assert read_log(log) == [{"step": 1}]
    (tmp_path / "sft.resume.pt").touch()  # what is logged is another run's than the checkpoint's
    assert read_log(log) == []


def test_losses_of_a_conversation():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["고양이가 고개를 끄덕인다. the cat nods"], 270)
    config = GPTConfig(block_size=24, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=32)
    models = {name: (GPT(config).eval(), tokenizer) for name in ("base", "tuned")}
    torch.nn.init.normal_(models["tuned"][0].embed.weight)
    talks = [("the cat", " "), ("the cat nods" * 9, "fills the block"), ("the cat?", "고 🦜"), ("the cat?", "nods " * 30)]
    tokens = compare.token_by_token(models, talks)
    (input_ids,), (labels,) = (rows.tolist() for rows in sft.sft_data_collator([{"prompt": "the cat?", "response": "고 🦜"}], tokenizer).values())
    assert [token["supervised"] for token in tokens] == [label != -100 for label in labels]
    assert "\\xf0" in "".join(token["text"] for token in tokens) and tokens[-1]["text"] == "<|end|>" and tokens[0]["base"] is None
    for name, (model, _) in models.items():
        losses = [token[name] for token in tokens if token["supervised"]]
        assert sum(losses) / len(losses) == pytest.approx(model(torch.tensor([input_ids]), torch.tensor([labels]))[1].item(), rel=1e-5)
    assert compare.token_by_token(models, talks[:2]) == []
    assert len(compare.token_by_token(models, talks[3:])) == 24


def test_the_page_of_a_run(small_world, monkeypatch):
    html = (small_world / "report.html").read_text(encoding="utf-8")
    scores = json.loads((small_world / "comparison.json").read_text(encoding="utf-8"))
    words = words_of(html)
    for stage in ("pretrain", "sft"):
        last = read_log(small_world / f"{stage}.jsonl")[-1]
        assert re.search(rf"{last['step']} steps. At the end:\s+training  {last['loss']:.3f},\s+validation  {last['val_loss']:.3f}", words)
    assert f"{100 * scores['tuned']['answered']:.1f}%" in words and all(e["tuned"] in words and e["base"] in words for e in scores["examples"])
    items = [json.loads(line) for line in (small_world / "world" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = scores["conversation"]["tokens"]
    assert "".join(token["text"] for token in tokens[1:-1]).split("<|end|><|assistant|>") in [[i["prompt"], i["response"]] for i in items]
    counted = [token for token in tokens if token["supervised"]]
    assert sum(token["tuned"] for token in counted) < 0.5 * sum(token["base"] for token in counted)
    monkeypatch.setattr(compare, "EXAMPLES", [items[-1]["prompt"]])  # what is shown first is also looked at token by token
    conversation = compare.compare(small_world / "base.pt", small_world / "sft.pt")["conversation"]
    assert items[-1]["prompt"] in "".join(token["text"] for token in conversation["tokens"]) and "what fine-tuning never" in conversation["source"]


def test_the_page_of_ones_own_conversations(small_world, tmp_path, capsys):
    """With a base model that lies elsewhere, without its log, and no world beside it; and another's log where ours will be."""
    elsewhere, out = tmp_path / "else<b>where", tmp_path / "out"
    elsewhere.mkdir(), out.mkdir()
    shutil.copy(small_world / "pretrain.jsonl", out)
    shutil.copy(small_world / "base.pt", elsewhere)
    data = tmp_path / "talks.json"
    data.write_text(json.dumps([{"prompt": f"<script>alert({i})</script> 고양이 🦜", "response": f"{i}!"} for i in range(30)]), encoding="utf-8")
    sft.main(["--out", str(out), "--base", str(elsewhere / "base.pt"), "--data", str(data), "--max_steps", "3", "--device", "cpu"])
    assert f"wrote {out / 'report.html'}" in capsys.readouterr().out
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html and "Pretraining</b> is left out" in html and "Fine-tuning</b>, 3 steps" in html and "<table" not in html
    assert "what the tuned model answered" in html and "else&lt;b&gt;where" in html


class Browser:
    """A headless Chromium with one page, told what to do through two pipes (chromedevtools.github.io/devtools-protocol)."""

    def __init__(self, profile):
        import fcntl  # (not on Windows)

        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (*os.pipe(), *os.pipe())]
        commands, self.write, self.read, answers = ends
        options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe".split()
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", CHROMIUM, *options, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, answers), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands), os.close(answers)
        self.buffer, self.number, self.events, self.session = b"", 0, [], {}
        target = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            piece = os.read(self.read, 2**16)
            assert piece, "the browser has gone"
            self.buffer += piece
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def send(self, number, method, **params):
        os.write(self.write, json.dumps({"id": number, "method": method, "params": params, **self.session}).encode() + b"\0")

    def ask(self, method, **params):
        self.number += 1
        self.send(self.number, method, **params)
        while (message := self.message()).get("id") != self.number:
            self.note(message)
        assert "error" not in message, message
        return message["result"]

    def note(self, event):
        self.events.append(event)
        if event["method"] == "Page.javascriptDialogOpening":  # an alert: nobody would ever close it
            self.send(0, "Page.handleJavaScriptDialog", accept=True)

    def open(self, path, width, scheme="light"):
        """Show a file. Returns what happened meanwhile, [(method, params)]."""
        self.events = []
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.note(self.message())
        self.value("new Promise(done => setTimeout(done, 200))")  # what is late
        return [(event["method"], event["params"]) for event in self.events]

    def value(self, expression):
        return self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)["result"].get("value")

    def close(self):
        with contextlib.suppress(OSError, AssertionError):
            self.ask("Browser.close")
        self.process.kill()
        self.process.wait()
        os.close(self.read), os.close(self.write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("there is no chromium, chromium-browser or google-chrome here (on Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("which", ["evil", "run"])
def test_in_a_browser(which, width, browser, tmp_path, request):
    if which == "evil":
        path = tmp_path / "evil # page.html"
        logs = [("Pretraining", "/a" * 90, []), ("Fine-tuning", "b", LOG)]
        path.write_text(a_page(EVIL + "w" * 300, ("/long" * 50, "b"), logs), encoding="utf-8")
    else:
        path = request.getfixturevalue("small_world") / "report.html"
    events = browser.open(path, width)
    names = [method for method, _ in events]
    assert not {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening"} & set(names), events
    assert [params["request"]["url"] for method, params in events if method == "Network.requestWillBeSent"] == [path.as_uri()]
    assert browser.value("document.querySelectorAll('script, img, link, iframe, object, [onerror]').length") == 0
    kinds = ["h1", "figure", "svg", "polyline", "table", ".tokens .supervised", ".said"]
    parts = browser.value(f"{kinds}.map(kind => document.querySelectorAll(kind).length)")
    assert parts[:5] == ([1, 2, 1, 2, 1] if which == "evil" else [1, 2, 2, 4, 1]) and parts[5] >= 4 and parts[6] >= 4
    assert browser.value("document.title") == "From parrot to assistant"
    assert browser.value("document.documentElement.scrollWidth") <= width == browser.value("innerWidth")
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
            colors = browser.value(f"(s => [s.backgroundColor, s.color])(getComputedStyle(document.querySelector('{place}')))")
            shades[scheme, place] = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors]
    for place in ("body", ".supervised"):
        assert shades["light", place][0] > 600 > 300 > shades["light", place][1]
        assert shades["dark", place][0] < 200 < 500 < shades["dark", place][1]
    assert shades["light", "figcaption"][1] < 350 and shades["dark", "figcaption"][1] > 400
