"""
Draw the pictures of the documentation, from a finished run.

    python docs/figures.py                  # from out/, into docs/figures/
    python docs/figures.py FOLDER --to DIR  # from another run, into another folder

The run needs base.pt, sft.pt, their logs, and the comparison.json that compare.py writes. Without
dpo.pt, one picture is left out. Each picture is an SVG of text and simple shapes, in two files: for
light and for dark pages. The titles say what we saw in the default run.
"""

import re
import sys
from math import ceil, log, log2
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import model as network
from common.files import parse_json, read_log, read_pieces, writing
from common.messages import InputError, command
from common.options import Parser
from common.page import distance_between_marks, is_number, marks_around, part, points, safe
from common.stages import load_stages
from data.tokenizer import CAPS_LOCK, SHIFT
from model import IGNORE_INDEX
from sft import encode

# From docs/measurements.md: with seed 1, for N = 900, 1800 and 3600,
# `python pretrain.py --max_steps N --out out/curveN`, `python sft.py --out out/curveN`. In %.
TOKENS = (3.7, 7.4, 14.7)  # millions
CURVE = {
    "tuned answers": ("green", (90.5, 98.4, 99.7)),
    "base knows": ("soft", (89.3, 93.5, 97.9)),
    "in unseen wordings": ("blue", (93.5, 94.8, 96.6)),
    "explains as asked": ("hot", (31.7, 70.0, 81.7)),
    "strangers, in all": ("ink", (68.3, 77.7, 76.3)),
}
CAPITAL = "⇧ makes the next letter a capital."
LEFT, RIGHT = 24, 776  # where drawings begin and end; a picture is 800 wide
STYLE = """
text { font: 18px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: currentColor; }
.mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.head { font-size: 24px; } .head, .bold { font-weight: 700; }
.name { paint-order: stroke; stroke: var(--page); stroke-width: 5px; }
svg, .ink { color: var(--ink); } .soft, .axis { color: var(--soft); } .line { color: var(--line); }
.green { color: var(--green); } .blue { color: var(--blue); } .hot { color: var(--hot); }
path, polyline, circle { fill: none; stroke: currentColor; stroke-width: 2.5; }
path.line { stroke-width: 1; } path.blue { opacity: .6; } circle { fill: var(--page); }
rect { fill: var(--grey); stroke: var(--line); stroke-width: 1.5; }
rect.page { fill: var(--page); stroke: none; } rect.solid { fill: currentColor; stroke: none; }
rect.leaf { fill: var(--leaf); stroke: var(--green); }
rect.active { fill: var(--page); stroke: var(--blue); stroke-width: 2.5; }
"""


# -------------------------------------------------------------------------------------------------
# Shapes


def clean(text):
    """Any text as XML that shows the text and does nothing else."""
    return safe("".join(c if c.isprintable() else "\ufffd" for c in str(text)))


def words(x, y, text, look="", anchor="start", more=""):
    """A line of text. text: a str or a number, or a list of (text, look)."""
    parts = text if isinstance(text, list) else [(text, "")]
    inside = "".join(f'<tspan class="{c}">{clean(t)}</tspan>' if c else clean(t) for t, c in parts)
    place = f'x="{x:.1f}" y="{y:.1f}" class="{look}" text-anchor="{anchor}"{more}'
    return f"<text {place}>{inside}</text>"


def rect(x, y, width, height, look="", radius=5):
    size = f'width="{width:.1f}" height="{height:.1f}" rx="{radius}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{look}"/>'


def arrow(x, y, length, down=False):
    turned = f' transform="rotate(90 {x} {y})"' if down else ""
    head = f"M{x + length - 8} {y - 6}l8 6l-8 6"
    return f'<path class="soft" d="M{x} {y}h{length}{head}"{turned}/>'


def token_text(text):
    """A token as we show it: with signs for capitals and line breaks, and not too long."""
    signs = {"\n": "↵", "\t": "⇥", SHIFT: "⇧", CAPS_LOCK: "⇪"}
    text = "".join(signs.get(c, c) for c in text.lstrip(" ")) or "·"
    return text if len(text) <= 14 else text[:13] + "…"


def texts(ids, tokenizer):
    pieces = tokenizer.encoding.decode_tokens_bytes(ids)
    return [token_text(piece.decode("utf-8", "backslashreplace")) for piece in pieces]


def diagram(frame, given):
    """Lines over an x axis, as a list of shapes.

    frame: (left, right, top, bottom). given: (title, lines, marks, ends, form, scale). lines:
    [(look, [(x, y)])], perhaps with a name after that. marks: of the y axis, from bottom to top.
    ends: {x: label}, from left to right. form: how to write the last y of each line below the
    title. scale: float, or log for a logarithmic y axis.
    """
    (left, right, top, bottom), (title, lines, marks, ends, form, scale) = frame, given
    xs, last = list(ends), [("ends at ", "soft")]

    def place(x, y):
        high = (scale(y) - scale(marks[0])) / (scale(marks[-1]) - scale(marks[0]))
        across = (x - xs[0]) / (xs[-1] - xs[0])
        return left + (right - left) * across, bottom - (bottom - top) * high

    drawn = [words(left, top - 46, title, "bold")]
    for mark in marks:
        y = place(xs[0], mark)[1]
        drawn.append(f'<path class="line" d="M{left} {y:.1f}H{right}"/>')
        drawn.append(words(left - 8, y + 6, f"{mark:g}".replace("-", "−"), "axis", "end"))
    for x, label in ends.items():
        anchor = {xs[0]: "start", xs[-1]: "end"}.get(x, "middle")
        drawn.append(words(place(x, marks[0])[0], bottom + 26, label, "axis", anchor))
    for i, (look, line, *names) in enumerate(lines):
        dots = [place(*point) for point in line]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        drawn.append(f'<polyline class="{look}" points="{joined}"/>')
        if len(dots) < 10:
            drawn += [f'<circle class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in dots]
        for name in names:
            drawn.append(words(dots[0][0], dots[0][1] + (-14 if i else 28), name, f"{look} name"))
        last += [(", ", "soft")] * (i > 0) + [(form.format(line[-1][1]).replace("-", "−"), look)]
    return [*drawn, words(left, top - 20, last)] if form else drawn


def side_by_side(diagrams):
    """Up to three diagrams. diagrams: what diagram() takes."""
    frames = [(80 + 252 * i, 272 + 252 * i, 184, 420) for i in range(3)]
    return sum((diagram(*both) for both in zip(frames, diagrams, strict=False)), [])


# -------------------------------------------------------------------------------------------------
# The pictures. Each returns a title, the height and the shapes; a screen reader says its docstring.


def pipeline(run):
    """Every stage gives input_ids and labels to the same train(), and makes the next model."""
    both, chat = [("chosen", "green"), (" and ", "soft"), ("rejected", "hot")], "→ template, mask"
    rows = (
        ("1 Pretraining", "plain text", "→ tokens", "labels = input_ids", "base.pt", "continues"),
        ("2 Fine-tuning", "conversations", chat, "the question: −100", "sft.pt", "answers"),
        ("3 Preferences", "pairs of answers", chat, both, "dpo.pt", "prefers"),
    )
    parts = [rect(544, 84, 104, 430, "active")]
    for i, (stage, source, made, batch, file, does) in enumerate(rows):
        y, answers = 84 + 150 * i, ([("green", 4 * i)], [("green", 4), ("hot", 3)])[i == 2]
        parts += [rect(LEFT, y, 186, 130), words(LEFT + 16, y + 36, stage, "bold")]
        parts += [words(LEFT + 16, y + 74, source), words(LEFT + 16, y + 102, made, "soft")]
        parts += [arrow(x, y + 65, length) for x, length in ((216, 30), (508, 30), (652, 16))]
        for k, key in enumerate(("input_ids", "labels")):
            parts.append(words(258, y + 29 + 42 * k, key, "mono"))
            for n, (look, start) in enumerate(answers):
                for t in range(8):
                    color = "soft" if k == 0 else look if t >= start else "line"
                    top, height = y + 6 + 42 * k + 17 * n, 34 / len(answers) - 2
                    parts.append(rect(362 + 17 * t, top, 14, height, f"solid {color}", 2))
        parts += [words(258, y + 118, batch, "soft"), rect(672, y + 13, 104, 104)]
        parts.append(words(724, y + 58, file, "mono bold", "middle"))
        parts.append(words(724, y + 88, does, "", "middle"))
    for y, text in ((155, "train()"), (294, "the same"), (318, "loop"), (455, "new loss")):
        parts.append(words(596, y, text, "mono bold" if y == 155 else "", "middle"))
    parts += [arrow(724, y, 36, down=True) for y in (204, 354)]
    parts.append(words(LEFT, 552, "Each stage starts from the model before it.", "soft"))
    return "Three stages, one training loop", 576, parts


def mask(run):
    """Each token of a conversation, its id, and its label: -100 except in the answer."""
    tokenizer, (ids, labels) = run.tuned.tokenizer, run.row.values()
    parts, x, y = [], RIGHT, -28
    for piece, i, label in zip(texts(ids, tokenizer), ids, labels, strict=True):
        width = 11 * max(len(piece), len(str(label))) + 14
        if x + width > RIGHT or i == tokenizer.assistant:  # start a new line
            x, y = LEFT + 110, y + 112
            parts.append(words(LEFT, y + 36, "input_ids", "mono soft"))
            parts.append(words(LEFT, y + 79, "labels", "mono soft"))
        box, look = ("", "mono soft") if label == IGNORE_INDEX else ("leaf", "mono green bold")
        parts += [rect(x, y, width - 4, 56), rect(x, y + 60, width - 4, 29, box)]
        for below, text, style in ((23, piece, "mono"), (47, i, "mono soft"), (80, label, look)):
            parts.append(words(x + width / 2 - 2, y + below, text, style, "middle"))
        x += width
    parts.append(words(LEFT, y + 126, CAPITAL, "soft"))
    return "The model reads it all. The loss sees the answer.", y + 150, parts


def losses(run):
    """The loss of each stage over its steps, in nats: training, then validation."""
    diagrams = []
    values = [y for r in run.logs.values() for k in ("loss", "val_loss") for _, y in points(r, k)]
    for stage, rows in run.logs.items():
        lines = [("blue", points(rows, "loss")), ("hot", points(rows, "val_loss"))]
        if not lines[0][1]:
            raise InputError(stage, "the log holds no finished run", "run that stage again")
        last, lines = max(1, lines[0][1][-1][0]), [line for line in lines if line[1]]
        ends = {0: "0", last: f"{last:,} steps"}
        diagrams.append((stage, lines, marks_around(values), ends, "{:.2f}", log))
    both = [("training", "blue bold"), (" and ", "soft"), ("validation", "hot bold")]
    parts = [*side_by_side(diagrams), words(RIGHT, 84, both, "", "end")]
    parts.append(words(LEFT, 84, "in nats, on a logarithmic scale", "soft"))
    if "Preferences" in run.logs:
        note = "The third loss is about pairs, not tokens. It starts at ln 2 = 0.69."
        parts.append(words(LEFT, 486, note, "soft"))
    return "The loss of each stage", 510, parts


def surprise(run):
    """The loss of each token of an answer, in nats: with the base model, then the tuned one."""
    answer, cut = run.answer, [*run.answer[:22], ("…", 0.0, 0.0), *run.answer[-9:]]
    names, before, after = zip(*(cut if len(answer) > len(cut) else answer), strict=True)
    shown = [token_text(name) for name in names]
    strip, scale = 11 * max(map(len, shown)) + 22, 250 / max(1.0, *before, *after)
    parts = []
    for i, (text, base, tuned) in enumerate(zip(shown, before, after, strict=True)):
        x = LEFT + (RIGHT - LEFT) / len(shown) * (i + 0.5)
        turned = f' transform="rotate(-90 {x + 6:.1f} 380)"'
        parts.append(words(x + 6, 380, text, "mono", "end", turned))
        for loss, look, up in ((base, "hot", True), (tuned, "green", False)):
            height = max(1.5, scale * loss)
            top = 370 - height if up else 370 + strip
            parts.append(rect(x - 7, top, 14, height, f"solid {look}", 1))
            if height > 25:
                y = top - 8 if up else top + height + 20
                parts.append(words(x, y, f"{loss:.1f}", look, "middle"))
    low = 370 + strip + max(25, scale * max(after)) + 22
    for i, name, look, y in ((1, "base", "hot", 92), (2, "tuned", "green", low)):
        mean = sum(token[i] for token in answer) / len(answer)
        parts.append(words(LEFT, y, f"{name}: {mean:.2g} nats per token", f"{look} bold"))
    parts.append(words(140, 318, "It expected another layout.", "soft"))
    parts.append(words(724, 160, "It has never seen <|end|>.", "soft", "end"))
    return "The surprise is at the beginning and at the end", low + 24, parts


def attention_of(model, input_ids):
    """How much each position looks at each other one, (layers, heads, T, T). input_ids: a list."""
    recorded, attend = [], network.attend

    def record(q, k, v, mask, dropout):
        later = torch.ones(q.size(2), k.size(2), dtype=torch.bool).triu(1)
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(later, float("-inf"))
        recorded.append(scores.softmax(dim=-1)[0])
        return attend(q, k, v, mask, dropout)

    with mock.patch.object(network, "attend", record), torch.inference_mode():
        model.hidden(torch.tensor([input_ids]))
    return torch.stack(recorded)


def attention(run):
    """What one head looks at in the question, just before the answer repeats a word of it."""
    model, tokenizer = run.tuned.model, run.tuned.tokenizer
    question, answer = "What is the capital of Kenya?", "The capital of Kenya is Nairobi."
    ids = encode({"prompt": question, "response": answer}, tokenizer)["input_ids"]
    if len(ids) > model.config.block_size:
        raise InputError(
            run.tuned.path, f"its block has no room for {answer!r}", "draw another run"
        )
    shown, half, looks = (
        texts(ids, tokenizer),
        ids.index(tokenizer.assistant),
        attention_of(model, ids),
    )
    # For a word of the answer: the token just before it, and the same word in the question. Of all
    # heads, we show the one that looks most from there to there.
    kenya = tokenizer.encode(" Kenya")[tokenizer.marks]  # the mark for a capital comes before it
    first = {"capital": tokenizer.encode(" capital")[0], "Kenya": kenya}
    pairs = [(ids.index(i, half) - 1, ids.index(i), word) for word, i in first.items()]
    best = torch.stack([looks[:, :, t, s] for t, s, _ in pairs]).amin(dim=0)  # (layers, heads)
    layer, head = divmod(best.argmax().item(), best.size(1))
    where = f"Layer {layer + 1}, head {head + 1} of the tuned model. Of its {best.numel()} heads,"
    where += " this one looks there most."
    rows = shown[:half], shown[half:]
    size = min(18, *(752 / (0.6 * len("".join(row)) + 0.78 * len(row)) for row in rows))
    parts, boxes, centers, x = [words(LEFT, 84, where, "soft")], [], [], LEFT
    for t, text in enumerate(shown):
        x, y = (LEFT if t == half else x), (160 if t < half else 340)
        width = size * (0.6 * len(text) + 0.56)
        boxes.append(rect(x, y, width, 36, "active" if any(t in pair for pair in pairs) else ""))
        centers.append(x + width / 2)
        style = f' style="font-size:{size:.1f}px"'
        boxes.append(words(centers[t], y + 24, text, "mono", "middle", style))
        x += width + 0.22 * size
    for t, s, word in pairs:
        for to, weight in zip(centers[:half], looks[layer, head, t].tolist(), strict=False):
            if weight >= 0.005:
                bend = f"M{centers[t]:.1f} 340C{centers[t]:.1f} 270 {to:.1f} 266 {to:.1f} 196"
                thick = f"stroke-width:{30 * weight:.1f}"
                parts.append(f'<path class="blue" style="{thick}" d="{bend}"/>')
        percent = f"{100 * looks[layer, head, t, s].item():.0f}%"
        parts.append(words(centers[s], 148, percent, "blue bold", "middle"))
        parts.append(words(centers[t], 402, "next:", "soft", "middle"))
        parts.append(words(centers[t], 426, word, "bold", "middle"))
    parts += [*boxes, words(LEFT, 470, f"In %: how much of its attention. {CAPITAL}", "soft")]
    return "To repeat a word, it looks at that word", 494, parts


def curve(run):
    """Scores of three runs that read more and more in pretraining, and their last values."""
    ends = {log2(millions): f"{millions} million" for millions in TOKENS}
    lines = [(look, list(zip(ends, scores, strict=True))) for look, scores in CURVE.values()]
    parts = diagram((76, 526, 124, 440), ("", lines, range(0, 101, 20), ends, "", float))
    parts.append(words(LEFT, 84, "scores in %, by the tokens read in pretraining", "soft"))
    y = 0
    for name, (look, scores) in CURVE.items():  # the best at the end comes first
        y = max(y + 26, 446 - 3.16 * scores[-1])
        parts.append(words(542, y, f"{scores[-1]} {name}", look))
    return "It knows early. It explains late.", 490, parts


def margins(run):
    """Preferences on held-out pairs: how many are told apart, the margin, both answers."""
    found, rows = {}, run.logs.get("Preferences", [])
    rows = [row for row in rows if isinstance(row, dict) and is_number(row.get("step"))]
    for key in ("told_apart", "margin", "chosen", "rejected"):
        found[key] = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    if not all(found.values()):
        return None
    apart, margin, chosen, rejected = found.values()
    last = max(1, apart[-1][0])
    ends = {0: "0", last: f"{last:,} steps"}

    def marks(*lines):
        values = [0, *(y for line in lines for _, y in line)]
        step = distance_between_marks(max(1, *map(abs, values)))
        return [step * i for i in range(-ceil(-min(values) / step), ceil(max(values) / step) + 1)]

    apart, margin = [(step, 100 * share) for step, share in apart], [(0, 0.0), *margin]
    answers = [("blue", chosen, "chosen"), ("hot", rejected, "rejected")]
    diagrams = (
        ("told apart", [("green", apart)], [0, 50, 100], ends, "{:.0f}%", float),
        ("margin", [("green", margin)], marks(margin), ends, "{:.2f}", float),
        ("ln p(answer)", answers, marks(chosen, rejected), ends, "{:.2f}", float),
    )
    parts = [*side_by_side(diagrams), words(LEFT, 84, "held-out pairs, step by step", "soft")]
    return "Rejected answers lose, chosen ones hardly gain", 470, parts


PICTURES = {f.__name__: f for f in (pipeline, mask, losses, surprise, attention, curve, margins)}


# -------------------------------------------------------------------------------------------------
# Files


def svg(draw, picture, scheme):
    """A whole picture. draw: which one; picture: what it returned. scheme: "light" or "dark"."""
    title, height, parts = picture
    light, dark = part("page.css").split("@media (prefers-color-scheme: dark)")[:2]
    colors = dict(re.findall(r"(--\w+): (#\w+)", dark if scheme == "dark" else light))
    style = re.sub(r"var\((--\w+)\)", lambda name: colors[name[1]], STYLE)
    read = [re.sub("<.*?>", "", shape) for shape in parts if 'class="axis"' not in shape]
    about = f"{clean(draw.__doc__)} It says: {' '.join(filter(None, read))}"
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height:.0f}" width="800"'
    start += f' role="img"><title>{clean(title)}</title>\n<desc>{about}</desc>'
    page, head = rect(0, 0, 800, height, "page", 12), words(LEFT, 46, title, "head")
    return "\n".join([start, f"<style>{style}</style>", page, head, *parts, "</svg>\n"])


def read_run(out):
    """Read a finished run, with these attributes: tuned, its Checkpoint; logs, {stage: rows}; row,
    a conversation as encode() returns it; answer, [(token, loss with base, loss with tuned)].

    Raises InputError if something is missing or malformed.
    """
    models, logs = load_stages(out), {}
    files = {"base": "pretrain", "tuned": "sft", "dpo": "dpo"}
    stages = {"base": "Pretraining", "tuned": "Fine-tuning", "dpo": "Preferences"}
    for name, checkpoint in models.items():
        logs[stages[name]] = read_log(checkpoint.path.with_name(f"{files[name]}.jsonl"))
    path, todo = Path(out) / "comparison.json", f"make it with python compare.py --out {out}"
    try:
        found = parse_json("".join(read_pieces(path)), path, 1, todo)
        prompt, response = (found["examples"][0][key] for key in ("prompt", "tuned"))
        row = encode({"prompt": prompt, "response": response}, models["tuned"].tokenizer)
        tokens = [token for token in found["conversation"]["tokens"] if token["supervised"]]
        if not tokens or not all(is_number(t[key]) for t in tokens for key in ("base", "tuned")):
            raise ValueError
        answer = [(str(t["text"]), max(0.0, t["base"]), max(0.0, t["tuned"])) for t in tokens]
    except (KeyError, IndexError, TypeError, ValueError):
        raise InputError(path, "holds no conversation to draw", todo) from None
    return SimpleNamespace(tuned=models["tuned"], logs=logs, row=row, answer=answer)


@command
def main(argv=None):
    parser = Parser("docs/figures.py", __doc__)
    option, here = parser.add_argument, Path(__file__).parent
    what = "folder of a finished run (default: out)"
    option("folder", nargs="?", type=Path, default=Path("out"), help=what)
    what = "where to write the pictures (default: docs/figures)"
    option("--to", type=Path, default=here / "figures", metavar="DIR", help=what)
    args = parser.parse_args(argv)
    run = read_run(args.folder)
    for name, draw in PICTURES.items():
        if not (picture := draw(run)):
            print(f"We leave out {name}: {args.folder} has no dpo.pt, or no log of held-out pairs.")
            continue
        for scheme, ending in (("light", ""), ("dark", "-dark")):
            with writing(args.to / f"{name}{ending}.svg", "w") as file:
                file.write(svg(draw, picture, scheme))
    print(f"Wrote the pictures to {args.to}.")


if __name__ == "__main__":
    main()
