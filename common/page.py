"""
The page that compare.py writes: one HTML file that needs no network.

Everything comes in as plain data. Text from a file, a person or a model goes through safe(). The
models in the page run in JavaScript, from the files in browser/. Without JavaScript, the rest of
the page is still there.
"""

import json
import math
from base64 import b64encode
from hashlib import sha256
from html import escape
from pathlib import Path

from common.messages import readable
from data.tokenizer import CAPS_LOCK, SHIFT

FOLDER = Path(__file__).parent / "browser"
SCRIPTS = ("gpt.js", "tokenizer.js", "weights.js", "page.js", "watch.js", "inside.js")


def part(name):
    """The text of a file that becomes part of the page."""
    return (FOLDER / name).read_text(encoding="utf-8")


def head(scripts):
    """The beginning of the page. Its policy lets it fetch nothing and run only these scripts."""
    hashes = [sha256(script.encode("utf-8")).digest() for script in scripts]
    allowed = " ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in hashes) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; "
    policy += "base-uri 'none'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>From parrot to assistant</title><style>{part("page.css")}</style></head>
<body>
"""


def safe(text):
    """Any text as HTML that shows the text and does nothing else."""
    return escape(readable(str(text), "\ufffd"))


def page(paths, logs, talk, examples, table, models=None, why_not=""):
    """The whole page, a str.

    paths: {name: path}, the checkpoints "base", "tuned" and perhaps "dpo". logs: for each figure,
    what curve() takes. talk: {"source", "tokens"}, see conversation(). examples: [{"prompt",
    "base", "tuned", ...}]. table: a heading and its rows, see score_table(), or None. models: what
    pack() in weights.py returns, to put them into the page, or None. why_not: then, the reason.
    """
    files = ", ".join(f"<code>{safe(path)}</code>" for path in paths.values())
    curves = "".join(curve(*log) for log in logs)
    third = " Preferences then made it <b>dpo</b>, which favors the better answer."
    parts = [
        "<h1>From parrot to assistant</h1>",
        "<p>A small language model, at each stage of its education. First, it only read text: "
        "<b>base</b> continues whatever you begin, like a parrot. Fine-tuning on conversations "
        f"made it <b>tuned</b>, which answers.{third if 'dpo' in paths else ''}</p>",
    ]
    if why_not:
        parts.append(f"<p>The models themselves are not in this page. {safe(why_not)}</p>")
    if models:
        parts.append(part("live.html"))
    parts += [
        '<section id="conversation"><h2>What fine-tuning looks at</h2>',
        f"{conversation(**talk)}</section>",
        f'<h2>The loss, step by step</h2><div class="two">{curves}</div>',
    ]
    if table:
        parts.append(f"<h2>What each model can answer</h2>{score_rows(*table)}")
    parts.append("<h2>The models, side by side</h2>")
    parts += [all_completions(**example) for example in examples]
    parts.append(f'<p class="note">Made from {files}.</p>')
    scripts = [part(name) for name in SCRIPTS] if models else []
    if models:
        about, numbers = models
        first = examples[0]
        about["prompts"] = [example["prompt"] for example in examples]
        said = {"user": first["prompt"], "assistant": first["tuned"].strip() or "..."}
        about["talk"] = [{"role": role, "content": text} for role, text in said.items()]
        parts += [data("about", json.dumps(about)), data("weights", numbers)]
        parts += [f"<script>{script}</script>" for script in scripts]
    return head(scripts) + "\n".join(parts) + "\n</body></html>\n"


def data(name, text):
    """Data for the page's scripts: an element that the browser doesn't run."""
    text = text.replace("<", r"\u003c")  # in JSON, the same character
    return f'<script type="text/plain" id="{name}">{text}</script>'


def score_rows(heading, rows):
    """The scores as a table. rows: lists of str; the first one is the header."""
    html = ""
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        html += "<tr>" + "".join(f"<{tag}>{safe(cell)}</{tag}>" for cell in row) + "</tr>"
    return f"<p>{safe(heading)}</p><table>{html}</table>"


def all_completions(prompt, **completions):
    """One prompt and each model's completion."""
    html = f'<h3 dir="auto">{safe(prompt)}</h3><div class="columns">'
    for name, text in completions.items():
        said = f'<div dir="auto">{safe(text.strip(" "))}</div>'
        html += f'<div class="said {name}"><b>{name}</b>{said}</div>'
    return html + "</div>"


# -------------------------------------------------------------------------------------------------
# The curves. A drawing is 400 wide and 250 high. The steps run from LEFT to RIGHT, the losses from
# BOTTOM up to TOP. In SVG, y grows downward.

LEFT, RIGHT, TOP, BOTTOM = 44, 384, 24, 210


def is_number(x):
    return isinstance(x, (int, float)) and abs(x) < 1e9  # False for NaN


def points(rows, key):
    """[(step, value)] of the rows of a log that hold this value. Skips malformed rows."""
    found = []
    for row in rows:
        if isinstance(row, dict) and is_number(row.get("step")) and is_number(row.get(key)):
            found.append((row["step"], max(abs(row[key]), 1e-6)))  # a logarithmic axis has no 0
    return found


def marks_around(values):
    """Marks for a logarithmic axis that holds the values: 1, 2, 5, 10, ..., or powers of ten."""
    for digits in ((1, 2, 5), (1,)):
        marks = [float(f"{digit}e{power}") for power in range(-6, 11) for digit in digits]
        first = max(i for i, mark in enumerate(marks) if mark <= min(values))
        last = min(i for i, mark in enumerate(marks) if mark > max(values))
        marks = marks[first : last + 1]
        if len(marks) <= 8:
            break
    return marks


def distance_between_marks(last):
    """For an axis of steps from 0 to last: 1, 2, 5, 10, ..., whatever gives at most six marks."""
    for power in range(10):
        for digit in (1, 2, 5):
            if last <= 5 * digit * 10**power:
                return digit * 10**power


LOSSES = {"training": "loss", "validation": "val_loss"}
ANSWERS = {"chosen": "chosen", "rejected": "rejected"}  # log-probabilities: we draw their size


def curve(title, path, rows, keys=LOSSES):
    """Two lines over the steps of one stage, as a figure. Only the first one must have points.

    path, rows: of the stage's log. keys: {what we call a line: its key in a row}, in nats.
    """
    (first, line), (second, other) = ((name, points(rows, key)) for name, key in keys.items())
    if not line:
        why = f"we found no log of a finished run in <code>{safe(path)}</code>"
        return f"<figure><figcaption><b>{title}</b> is left out: {why}.</figcaption></figure>"
    last = max(1, *(step for step, _ in line + other))
    marks = marks_around([value for _, value in line + other])
    height = math.log(marks[-1] / marks[0])

    def x(step):
        return f"{LEFT + (RIGHT - LEFT) * step / last:.1f}"

    def y(value, offset=0):
        return f"{offset + BOTTOM - (BOTTOM - TOP) * math.log(value / marks[0]) / height:.1f}"

    drawn = [
        '<text x="0" y="11">nats (logarithmic)</text>',
        f'<text x="{RIGHT}" y="248" text-anchor="end">optimizer steps</text>',
    ]
    for mark in marks:
        drawn.append(f'<path d="M{LEFT} {y(mark)}H{RIGHT}"/>')
        drawn.append(f'<text x="38" y="{y(mark, 4)}" text-anchor="end">{mark:g}</text>')
    for step in range(0, int(last) + 1, distance_between_marks(last)):
        drawn.append(f'<path d="M{x(step)} {BOTTOM}v4"/>')
        drawn.append(f'<text x="{x(step)}" y="229" text-anchor="middle">{step:,}</text>')
    for name, values in ((first, line), (second, other)):
        places = " ".join(f"{x(step)},{y(value)}" for step, value in values)
        drawn.append(f'<polyline class="{name}" points="{places}"/>')
    for step, value in other:
        tip = f"<title>{second}, step {step:,}: {value:.3f}</title>"
        place = f'cx="{x(step)}" cy="{y(value)}" r="3"'
        drawn.append(f'<circle class="{second}" {place}>{tip}</circle>')
    ends = f'<b class="{first}">{first}</b> {line[-1][1]:.3f}'
    if other:
        ends += f', <b class="{second}">{second}</b> {other[-1][1]:.3f}'
    label = f'role="img" aria-label="{title}: {first} and {second} over steps"'
    return (
        f'<figure><svg viewBox="0 0 400 250" {label}>{"".join(drawn)}</svg>'
        f"<figcaption><b>{title}</b>, {last:,} steps. At the end: {ends}.</figcaption></figure>"
    )


# -------------------------------------------------------------------------------------------------
# A conversation, token by token


def legend(names):
    """Two boxes that say what the colors and the numbers are."""
    lines = "".join(f"<span>{name}</span>" for name in names) + "</li>"
    return (
        f'<ul class="tokens"><li class="supervised"><span class="token">supervised</span>{lines}'
        f'<li><span class="token">not supervised</span>{lines}</ul>'
    )


def box(text, supervised, *losses):
    """One token as a box above its losses, in nats, or None where there is no loss."""
    signs = {"\n": "↵", "\t": "⇥", SHIFT: "⇧", CAPS_LOCK: "⇪"}
    shown = ""
    for c in text:
        shown += c if c.isprintable() else signs.get(c, c.encode("unicode_escape").decode())
    shown = safe(shown).replace(" ", "<i>·</i>")
    html = f'<li{" class=supervised" if supervised else ""}><span class="token">{shown}</span>'
    for loss in losses:
        if loss is None:
            html += "<span>–</span>"
        else:
            heat = min(45, 8 * loss)  # percent of color
            html += f'<span style="--heat: {heat:.0f}">{max(0.0, loss):.2f}</span>'
    return html + "</li>"


def conversation(source, tokens):
    """A conversation, each token with its losses.

    source: where it comes from. tokens: [{"text", "supervised", name: loss, ...}], one loss for
    each model.
    """
    if not tokens:
        return "<p>Left out: every prompt fills the model's context. Try shorter prompts.</p>"
    turns, names = [], [key for key in tokens[0] if key not in ("text", "supervised")]
    for token in tokens:
        if token["text"] in ("<|user|>", "<|assistant|>") or not turns:
            turns.append("")
        turns[-1] += box(token["text"], token["supervised"], *(token[name] for name in names))
    supervised = [token for token in tokens if token["supervised"]]
    means = [sum(token[name] for token in supervised) / len(supervised) for name in names]
    listed = ", ".join(f"{mean:.2f} ({name})" for name, mean in zip(names, means, strict=True))
    end = f"Over the {len(supervised)} supervised tokens, the mean loss in nats is {listed}."
    if tokens[-1]["text"] != "<|end|>":
        end += " We show only the part that fits in the model's block."
    return (
        f"<p>{safe(source)} Each box is a token. Below it is its loss with each model. "
        "The loss is −ln of the probability that the model gave to the "
        "token: 0.01 means 99%, 0.69 means 50%, 4.6 means 1%. Only the green boxes count in "
        "fine-tuning: the assistant's own words, and the <code>&lt;|end|&gt;</code> that closes "
        "them. The model reads the gray boxes too, but their labels are −100.</p>"
        + legend(names)
        + "".join(f'<ul class="tokens">{turn}</ul>' for turn in turns)
        + f"<p>{end}</p>"
    )
