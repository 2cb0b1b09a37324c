"""
What the terminal shows: completions, masks, pairs, and the table of scores.

Text from a file, a person or a model goes through readable() before it is printed.
"""

import shutil
import sys
import textwrap
from itertools import zip_longest

from common.completion import first_paragraph, respond
from common.device import say
from common.messages import readable
from data.tokenizer import CAPS_LOCK, SHIFT
from model import IGNORE_INDEX

WIDEST = 100  # columns; longer lines are hard to read
NARROW = 70  # columns; below this, texts don't fit next to each other


def terminal_width():
    """How many columns to fill: those of the terminal, or 80 if the output is a file or a pipe."""
    if sys.stdout is None or not sys.stdout.isatty():
        return 80
    return min(WIDEST, shutil.get_terminal_size().columns)


def wrap(text, width):
    """The text as lines of at most width characters. Line breaks and blank lines stay."""
    lines = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, max(1, width)) or [""]
    return lines


def side_by_side(texts, width):
    """Texts in columns, as lines of at most width characters."""
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    rows = zip_longest(*(wrap(text, column) for text in texts), fillvalue="")
    return [" | ".join(f"{cell:<{column}}" for cell in cells).rstrip() for cells in rows]


def show_examples(examples):
    """Print prompts with all completions. examples: [{"prompt", "base", "tuned", ...}]"""
    width = terminal_width()
    names = [name for name in examples[0] if name != "prompt"]
    if width >= NARROW:
        print("  " + side_by_side([name.upper() for name in names], width - 2)[0])
    for example in examples:
        print("-" * width)
        print("\n".join(wrap(readable(example["prompt"]), width)))
        texts = [readable(example[name]).strip(" ") for name in names]
        if width >= NARROW:
            lines = side_by_side(texts, width - 2)
        else:
            lines = []
            for name, text in zip(names, texts, strict=True):
                lines += [name.upper(), *wrap(text, width - 2)]
        print("\n".join("  " + line for line in lines))
    print("-" * width)
    print("(The base model keeps going, so we show only its first paragraph.)")


def beginnings(tokens, tokenizer):
    """The first words of a few lines of a text, to show how a model continues them."""
    text = tokenizer.decode(tokens[:20_000].tolist()).replace("<|endoftext|>", "\n")
    lines = [line.split() for line in text.split("\n")]
    lines = [words for words in lines if len(words) >= 6] or [text[:40].split()]
    return [" ".join(words[:5])[:60] for words in lines[:: len(lines) // 5 + 1]]


def show_parrot(model, tokenizer, prompts):
    """Print how a base model continues some prompts, each the beginning of a document."""
    width = terminal_width()
    completions = respond(model, tokenizer, prompts, chat=False)
    for prompt, completion in zip(prompts, completions, strict=True):
        print("\n" + "\n".join(wrap("> " + readable(prompt), width)))
        lines = wrap(readable(first_paragraph(completion)), width - 2)
        print("\n".join("  " + line for line in lines))


def show_mask(row, tokenizer):
    """Print each token of a conversation: its id, its label, and whether it is supervised.

    row: {"input_ids", "labels"}, two lists.
    """
    say(f"{'token':>16}  {'input_id':>8}  {'label':>6}  supervised")
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        supervised = "no" if label == IGNORE_INDEX else "yes"
        text = tokenizer.encoding.decode([token])
        text = repr(text.replace(SHIFT, "⇧").replace(CAPS_LOCK, "⇪"))
        say(f"{text:>16}  {token:>8}  {label:>6}  {supervised}")


def show_pairs(pairs, tokenizer):
    """Print pairs of answers. pairs: [chosen, rejected], each {"input_ids", "labels"}."""
    width = terminal_width()
    for chosen, rejected in pairs:
        start = chosen["labels"].count(IGNORE_INDEX)  # where the answers start
        prompt = tokenizer.decode(chosen["input_ids"][1 : start - 2])
        for label, text in (
            ("", prompt),
            ("  chosen    ", tokenizer.decode(chosen["input_ids"][start:-1])),
            ("  rejected  ", tokenizer.decode(rejected["input_ids"][start:-1])),
        ):
            lines = wrap(readable(text.strip()), width - len(label))
            say(("" if label else "\n") + label + ("\n" + " " * len(label)).join(lines))


def show_preference(row, chosen, rejected):
    """Print what preference tuning did to held-out pairs.

    row: the last one of its log. chosen, rejected: their mean log-probabilities before, in nats.
    """
    say(f"In {row['told_apart']:.0%} of the held-out pairs, the chosen answer gained on the other.")
    say("Their mean log-probabilities:")
    for key, before in (("chosen", chosen), ("rejected", rejected)):
        say(f"  {key:8} {before:8.2f} nats before, now {row[key]:.2f}")


# -------------------------------------------------------------------------------------------------
# The scores


def percent(share):
    """0.123 -> "12.3%"; None -> "-"."""
    return "-" if share is None else f"{100 * share:.1f}%"


def score_table(scores):
    """The table of the experiment. scores: what compare() returns.

    Returns (heading, rows): each row is a label and one str per model. The first row names the
    models.
    """
    names = [name for name in ("base", "tuned", "dpo", "random") if name in scores]
    rows = [["", *("control" if name == "random" else name for name in names)]]
    for label, base_key, tuned_key in (
        ("answers the plain question", "plain", None),
        ('answers it as "Q: ... A:"', "faq", None),
        ("answers it in the chat template", "chat", "answered"),
        ("  in wordings it never trained on", None, "unseen"),
        ("  about what it trained on", None, "train"),
        ("  sampled at temperature 1", None, "sampled"),
        ("  in a style, in unseen wordings", None, "style_unseen"),
        ("explains, in unseen wordings", None, "concept_unseen"),
        ("small talk in unseen wordings", None, "smalltalk_unseen"),
        ("refuses what it can't know", None, "unknown_unseen"),
        ("refuses what it should know", None, "refuses_known"),
        ("stops by itself", None, "stops"),
        ("continues with options or questions", "goes_on", None),
        ("  with four different options", "different", None),
        ("  all of the kind asked for", "of_kind", None),
        ("  the right one among them", "has_right", None),
        ("  and an answer that is one of them", "consistent", None),
        ('knows ("The capital of Kenya is")', "knows", None),
    ):
        keys = [base_key if name == "base" else tuned_key for name in names]
        cells = [percent(scores[name].get(key)) for name, key in zip(names, keys, strict=True)]
        rows.append([label, *cells])
    bits = [scores[name].get("val_bpb") for name in names]
    rows.append(["bits per byte of plain text", *("-" if b is None else f"{b:.3f}" for b in bits)])
    kinds = scores.get("tuned", {}).get("strangers", {})
    for kind in sorted(kinds, key=lambda kind: kind != "in all"):
        label = {"in all": "what strangers typed", "refuses": "  refuses what it should know"}
        cells = [percent(scores[name].get("strangers", {}).get(kind)) for name in names]
        rows.append([label.get(kind, f"  {kind}"), *cells])
    heading = f"{scores['questions']} held-out {scores['side']} questions: "
    return heading + "fine-tuning never mentioned what they ask about", rows


def show_scores(scores):
    """Print the table. It is 67 columns wide at most."""
    heading, rows = score_table(scores)
    width = terminal_width()
    print("\n" + "\n".join(wrap(heading, width)) + "\n")
    for label, *cells in rows:
        print(f"{label:35}" + "".join(f"{cell:>8}" for cell in cells))
    if "random" in scores:
        note = "(control: fine-tuned from random weights, with every weight trained)"
    else:
        note = (
            "(For a control, run python sft.py --random_weights --lr 0.03 --embed_lr 0.09. It "
            "starts from random weights, trains every weight, and has rates that suit it.)"
        )
    print("\n".join(wrap(note, width)))
