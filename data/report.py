"""
What compare.py shows: in the terminal, and as a page, one file of HTML and SVG that needs neither a network nor JavaScript.

Everything is given as plain data. Whatever comes from a file, a person or a model goes through readable() or safe().
"""

import math
import textwrap
from bisect import bisect_right
from html import escape
from itertools import zip_longest

from data.terminal import readable

# ---------------------------------------------------------------------------------------------------------------------
# In the terminal


def side_by_side(left, right, width=80):
    """Two texts in two columns, as lines of at most width characters."""
    column = (width - 3) // 2
    wrap = lambda text: [piece for line in text.split("\n") for piece in textwrap.wrap(line, column) or [""]]
    return [f"{a:<{column}} | {b}".rstrip() for a, b in zip_longest(wrap(left), wrap(right), fillvalue="")]


def percent(x):
    return "-" if x is None else f"{100 * x:.1f}%"


def table_of(scores):
    """The table of the experiment: its heading, and its rows, each three str, or four with a control; first the names of the columns.

    scores: what compare() returns.
    """
    base, tuned, control = (scores.get(key, {}) for key in ("base", "tuned", "random"))
    rows = [
        ("answers the plain question", base.get("plain"), None, None),
        ('answers it as "Q: ... A:"', base.get("faq"), None, None),
        ("answers it in the chat template", base.get("chat"), tuned.get("answered"), control.get("answered")),
        ("  in wordings never trained on", None, tuned.get("unseen"), control.get("unseen")),
        ("  about the half it was trained on", None, tuned.get("train"), control.get("train")),
        ("  small talk (trained on)", None, tuned.get("smalltalk"), control.get("smalltalk")),
        ("stops by itself", None, tuned.get("stops"), control.get("stops")),
        ("goes on with options or a question", base.get("goes_on"), None, None),
        ('knows ("The capital of Kenya is ...")', base.get("knows"), None, None),
    ]
    rows = [("", "base", "tuned", "tuned from random"), *((label, *map(percent, cells)) for label, *cells in rows)]
    rows.append(("bits per byte of plain text", *(f"{m['val_bpb']:.3f}" if "val_bpb" in m else "-" for m in (base, tuned, control))))
    rows = rows if control else [row[:3] for row in rows]
    return f"{scores['side']} questions: {scores['questions']}, about entities that fine-tuning never mentioned", rows


def show_scores(scores):
    heading, rows = table_of(scores)
    print(heading + "\n")
    for label, *cells in rows:
        print(f"{label:38}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (9, 9, 20))))
    if "random" not in scores:
        print("(python sft.py --random_weights makes a control: the same fine-tuning, of a network that has read nothing.)")


def show_examples(examples):
    """examples: [{"prompt", "base", "tuned"}]"""
    print("  " + side_by_side("BASE", "TUNED", 78)[0])
    for example in examples:
        prompt, base, tuned = (readable(example[key]) for key in ("prompt", "base", "tuned"))
        print("-" * 80)
        print("\n".join(textwrap.wrap(prompt, 80)))
        print("\n".join("  " + line for line in side_by_side(base, tuned, 78)))
    print("-" * 80 + "\n(The base model does not stop by itself: what it says is cut off.)")


# ---------------------------------------------------------------------------------------------------------------------
# As a page


STYLE = """
:root { color-scheme: light dark; --page: #fcfbf9; --ink: #22252a; --soft: #666b73; --line: #dedbd5; --grey: #f1efec;
  --green: #1a7f4b; --leaf: #e6f4eb; --blue: #2f6fb5; --hot: #d9480f; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e4e5e7; --soft: #9a9fa8; --line: #363a40; --grey: #212428;
  --green: #5fcf94; --leaf: #163328; --blue: #7db4f0; --hot: #ff8a4c; } }
* { box-sizing: border-box; } body { margin: 0 auto; max-width: 56rem; padding: 2.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.25rem; } h3 { margin: 2rem 0 .5rem; font-size: 1rem; }
p { max-width: 46rem; margin: .5rem 0 1rem; }
code, .tokens { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .85em; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .9rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .75rem 1.5rem; }
svg { display: block; width: 100%; fill: var(--soft); font-size: 12px; }
svg path { stroke: var(--line); } .training, .validation { stroke: currentColor; stroke-width: 2; }
polyline { fill: none; stroke-linejoin: round; } circle { fill: var(--page); }
.training { color: var(--blue); } .validation { color: var(--hot); }
.tokens { display: flex; flex-wrap: wrap; gap: .3rem; margin: .6rem 0; padding: 0; list-style: none; line-height: 1.4; }
.tokens li { max-width: 100%; overflow: hidden; border: 1px solid var(--line); border-radius: .35rem; background: var(--grey); color: var(--soft); }
.tokens li.supervised { border-color: var(--green); background: var(--leaf); color: var(--ink); }
.tokens span { display: block; padding: 0 .4rem; text-align: right; }
.tokens .token { padding: .15rem .4rem; text-align: left; font-size: 1.1em; }
.supervised span { background: color-mix(in srgb, var(--hot) calc(var(--heat, 0) * 1%), transparent); }
.supervised .token { font-weight: 600; } .tokens i { opacity: .45; font-style: normal; }
table { display: block; overflow-x: auto; margin: 1rem 0; border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 0 .35rem clamp(.5rem, 4vw, 2.5rem); border-bottom: 1px solid var(--line); text-align: right; overflow-wrap: normal; }
th { vertical-align: bottom; } td:first-child { padding-left: 0; text-align: left; white-space: pre-wrap; }
.said { margin: 0; padding-left: .8rem; border-left: 3px solid var(--line); white-space: pre-wrap; } .said.tuned { border-color: var(--green); }
.said b { display: block; color: var(--soft); font-size: .8rem; font-weight: normal; }
"""

LOSSES = "</span><span>before</span><span>after</span></li>"
LEGEND = f'<li class="supervised"><span class="token">supervised{LOSSES}<li><span class="token">not supervised{LOSSES}'


def safe(text):
    """Any text as HTML that shows it and does nothing else."""
    return escape(readable(str(text), "\ufffd"))


def points(rows, key):
    """[(step, value)] of the rows of a log that hold this value, in nats. (A logarithmic axis has no room for 0.)"""
    number = lambda x: isinstance(x, (int, float)) and abs(x) < 1e9  # (NaN is not)
    rows = [row for row in rows if isinstance(row, dict) and number(row.get("step")) and number(row.get(key))]
    return [(row["step"], max(row[key], 1e-6)) for row in rows]


def marks_around(values):
    """The marks of a logarithmic axis that holds the values: 1, 2, 5, 10 ...; where those would be many, the powers of ten alone."""
    for digits in ((1, 2, 5), (1,)):
        marks = [float(f"{digit}e{power}") for power in range(-6, 11) for digit in digits]
        marks = marks[bisect_right(marks, min(values)) - 1 : bisect_right(marks, max(values)) + 1]
        if len(marks) <= 8:
            break
    return marks


def curve(title, path, rows):
    """The losses of one stage, as a figure. rows: of its log, each with step, loss and perhaps val_loss, in nats per token."""
    lines = {"training": points(rows, "loss"), "validation": points(rows, "val_loss")}
    if not lines["training"]:
        return f"<figure><figcaption><b>{title}</b> is left out: <code>{safe(path)}</code> is no log of a finished run.</figcaption></figure>"
    both = lines["training"] + lines["validation"]
    marks, last = marks_around([value for _, value in both]), max(1, *(step for step, _ in both))
    # The drawing is 400 wide and 250 high; the axes reach from 44 to 384 and, upwards, from 210 to 24.
    x = lambda step: 44 + 340 * step / last
    y = lambda value: 210 - 186 * math.log(value / marks[0]) / math.log(marks[-1] / marks[0])
    drawn = ['<text x="0" y="11">loss, nats per token (logarithmic)</text><text x="384" y="248" text-anchor="end">optimizer steps</text>']
    for mark in marks:
        drawn.append(f'<path d="M44 {y(mark):.1f}H384"/><text x="38" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    between = next(digit * 10**power for power in range(10) for digit in (1, 2, 5) if last <= 5 * digit * 10**power)
    for step in range(0, int(last) + 1, between):
        drawn.append(f'<path d="M{x(step):.1f} 210v4"/><text x="{x(step):.1f}" y="229" text-anchor="middle">{step:,}</text>')
    for name, line in lines.items():
        drawn.append(f'<polyline class="{name}" points="{" ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)}"/>')
    for step, value in lines["validation"]:
        circle = f'<circle class="validation" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3">'
        drawn.append(f"{circle}<title>validation, step {step:,}: {value:.3f}</title></circle>")
    ends = ", ".join(f'<b class="{name}">{name}</b> {line[-1][1]:.3f}' for name, line in lines.items() if line)
    svg = f'<svg viewBox="0 0 400 250" role="img" aria-label="{title}: loss over steps">{"".join(drawn)}</svg>'
    return f"<figure>{svg}<figcaption><b>{title}</b>, {last:,} steps. At the end: {ends}.</figcaption></figure>"


def box(text, supervised, *losses):
    """One token as a box, above its losses (in nats; None where there is none)."""
    signs = {"\n": "↵", "\t": "⇥"}
    text = "".join(c if c.isprintable() else signs.get(c, c.encode("unicode_escape").decode()) for c in text)
    text = safe(text).replace(" ", "<i>·</i>")
    cells = (f'<span style="--heat: {min(45, 8 * x):.0f}">{max(0.0, x):.2f}</span>' if x is not None else "<span>–</span>" for x in losses)
    return f'<li{" class=supervised" if supervised else ""}><span class="token">{text}</span>{"".join(cells)}</li>'


def conversation(source, tokens):
    """A conversation, token by token. source: where it is from; tokens: [{"text", "supervised", "base", "tuned"}], losses in nats."""
    if not tokens:
        return "<p>Left out: the prompts at hand fill the model's block.</p>"
    counted = [token for token in tokens if token["supervised"]]
    base, tuned = (sum(token[name] for token in counted) / len(counted) for name in ("base", "tuned"))
    turns = []
    for token in tokens:
        if token["text"] in ("<|user|>", "<|assistant|>") or not turns:  # (only ever the special tokens: text makes several)
            turns.append([])
        turns[-1].append(box(token["text"], token["supervised"], token["base"], token["tuned"]))
    return (
        f"<p>{safe(source)} Each box is a token. Below it stands its loss, with the base model and with the tuned one: −ln of the probability "
        "that the model gave to it (0.01 is a probability of 99%, 0.69 of a half, 4.6 of 1%). Fine-tuning looks at the green boxes alone, the "
        "assistant's own words and the <code>&lt;|end|&gt;</code> that closes them; the grey ones are read, but their labels are −100.</p>"
        f'<ul class="tokens">{LEGEND}</ul>' + "".join(f'<ul class="tokens">{"".join(turn)}</ul>' for turn in turns)
        + f"<p>Over the {len(counted)} supervised tokens the mean loss was {base:.2f} nats before, and is {tuned:.2f} after."
        + ("</p>" if tokens[-1]["text"] == "<|end|>" else " (The conversation is longer: it is cut where the model's block ends.)</p>")
    )  # fmt: skip


def page(paths, logs, talk, examples, scores):
    """The whole page, a str.

    paths: of the base and the tuned model. logs: [(title, path, rows)], for curve(). talk: {"source", "tokens"}, for conversation().
    examples: [{"prompt", "base", "tuned"}]. scores: a heading and the rows of a table, all str, the first row its head; or None.
    """
    base, tuned = (f"<code>{safe(path)}</code>" for path in paths)
    parts = [f"<h1>From parrot to assistant</h1><p>The base model, {base}, has read plain text; {tuned} is what conversations made of it.</p>"]
    parts.append(f'<h2>The loss, step by step</h2><div class="two">{"".join(curve(*log) for log in logs)}</div>')
    parts.append(f"<h2>What fine-tuning looks at</h2>{conversation(**talk)}")
    if scores:
        heading, (head, *rows) = scores
        rows = ["".join(f"<td>{safe(cell)}</td>" for cell in row) for row in rows]
        head = "".join(f"<th>{safe(cell)}</th>" for cell in head)
        parts.append(f"<h2>What it can answer</h2><p>{safe(heading)}</p><table><tr>{head}</tr><tr>{'</tr><tr>'.join(rows)}</tr></table>")
    parts.append("<h2>Base and tuned, side by side</h2>")
    for example in examples:
        said = "".join(f'<div class="said {name}"><b>{name}</b><div dir="auto">{safe(example[name])}</div></div>' for name in ("base", "tuned"))
        parts.append(f'<h3 dir="auto">{safe(example["prompt"])}</h3><div class="two">{said}</div>')
    # The policy lets the page fetch and run nothing, whatever it shows.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>From parrot to assistant</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
