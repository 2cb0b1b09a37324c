"""
Run the experiments of docs/experiments.md and print their figures.

    python docs/experiments.py no_mask                  # one of them, with seeds 1, 2 and 3
    python docs/experiments.py no_mask terse --seeds 1  # two of them, with one seed
    python docs/experiments.py                          # all that change the program: some hours
    python docs/experiments.py before                   # what the base model can do already
    python docs/experiments.py surprise                 # where in an answer the surprise is
    python docs/experiments.py steps                    # one prompt, after more and more steps
    python docs/experiments.py styles                   # how it obeys each style
    python docs/experiments.py ways                     # the same facts, asked for in nine ways
    python docs/experiments.py no_mask --out FOLDER     # use FOLDER/S/base.pt if it exists

Most sections of that page are a change of the program, as a diff, and commands. We make the change
in a copy of the project, FOLDER/S/NAME. The copy stays there with what it trained, so you can look
at it. The first run is of the unchanged program. At the end we print what each model answers to a
question that it can't answer.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle threads free the CPU for others sooner

import argparse
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from common.checkpoint import load
from common.completion import complete, first_reply, respond
from common.report import percent
from common.scores import ANSWER, of_kinds, share
from data import world
from data.world import tables
from data.world.exchanges import WAYS, Asker
from data.world.split import split_entities
from model import IGNORE_INDEX, cross_entropy
from sft import prepare_special_tokens, sft_data_collator

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "experiments.md"
UNCHANGED = ("", ["python sft.py --base out/base.pt --out out/unchanged"])
NAMES = {  # heading of a section -> what we call its outputs
    "Supervise the prompt too": "no_mask",
    "Leave out the closing token": "no_end",
    "Fine-tune on few examples": "few",
    "Tell every fact in one wording": "one_wording",
    "Half of the answers terse": "terse",
    "Ask what nobody can know": "never_shown",
    "Let the template's tokens start as they are": "no_line_break",
    "Freeze nothing": "no_freezing",
}
NOBODY_KNOWS = "What is the capital of Atlantis?"
KENYA = "What is the capital of Kenya?"
STEPS = (10, 50, 150)
BEGINNING = 3  # tokens; the first one is mostly the mark of a capital
PLACES = ("its first three tokens", "in between", "the end", "<|pad|> there")
DIALOGUE = "Guest:\n{}\nHost:\n"  # as some texts have it
REPLIES = {  # what we ask before and after -> (kinds of questions, which wording)
    "answered": (("fact", "free"), "prompt"),
    "unseen wordings": (("fact", "free"), "unseen"),
    "explains": (("concept",), "prompt"),
    "says it doesn't know": (("unknown",), "prompt"),
    "- unseen wordings": (("unknown",), "unseen"),
}
FEW = (10, 30, 100, 300)  # the numbers that we put into the change of "few"
COLUMNS = {  # what we print -> its key in comparison.json, or in figures()
    "answered": "answered",
    "unseen wordings": "unseen",
    "stops": "stops",
    "trained on": "train",
    "small talk": "smalltalk",
    "says it doesn't know": "unknown",
    "strangers": "strangers",
    "base knows": "knows",
    "base faq": "faq",
    "right in its first line": "first_line",
    "terse at 0": "terse 0.0",
    "right at 1": "right 1.0",
    "terse at 1": "terse 1.0",
    "right if terse": "right if terse 1.0",
}


def experiments():
    """The experiments of the page that change the program: {name: (change, commands)}.

    A change is a diff, and commands are a list of str. We try "few" with several numbers. Where
    a section has two changes, we make each one, then both.
    """
    found = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, text = section.split("\n", 1)
        if heading not in NAMES:
            continue
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        (commands,) = (block.splitlines() for kind, block in blocks if not kind)
        diffs, name = [block for kind, block in blocks if kind == "diff"], NAMES[heading]
        if name == "few":
            changes = {f"few_{n}": diffs[0].replace("[:30]", f"[:{n}]") for n in FEW}
        elif name == "one_wording":
            changes = {"one_wording": diffs[0], "not_asked": diffs[1]}
            changes["one_wording_not_asked"] = "".join(diffs)
        else:
            changes = {name: "".join(diffs)}
        found.update({n: (change, commands) for n, change in changes.items()})
    return found


def hunks_of(diff):
    """Yield each hunk of a diff: (path, number of its first line, old text, new text)."""
    for change in re.split(r"^--- .*\n", diff, flags=re.MULTILINE)[1:]:
        header, *parts = re.split(r"^@@ -(\d+).*\n", change, flags=re.MULTILINE)
        path = header.split()[1].removeprefix("b/")
        for number, hunk in zip(parts[::2], parts[1::2], strict=True):
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in k) for k in (" -", " +"))
            yield path, int(number), old, new


def apply(diff, folder):
    """Make a change in the files of a folder, wherever its lines stand now.

    Raises ValueError if the lines are not there, or there more than once.
    """
    for name, _, old, new in hunks_of(diff):
        path = folder / name
        text = "\n" + path.read_text(encoding="utf-8")
        if (n := text.count("\n" + old)) != 1:
            raise ValueError(f"{path}: expected these lines once, found them {n} times:\n{old}")
        text = text.replace("\n" + old, "\n" + new)
        path.write_text(text[1:], encoding="utf-8", newline="\n")


def changed_copy(diff, folder):
    """Copy the program into a new folder and change it there. Returns the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    paths = [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py"), *ROOT.glob("common/browser/*")]
    paths += [path for kind in ("py", "tsv", "jsonl") for path in ROOT.glob(f"data/**/*.{kind}")]
    for path in paths:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    apply(diff, folder)
    return folder


def run(commands, folder, base, seed, options=None):
    """Run commands of the page in a folder, with this base model and seed.

    options: more arguments, such as {"sft.py": ["--max_steps", "2"]}. Returns what was printed.
    """
    printed = ""
    for command in commands:
        _, program, *arguments = shlex.split(command)
        arguments = [a.replace("world.build(1)", f"world.build({seed})") for a in arguments]
        arguments = [str(base) if a == "out/base.pt" else a for a in arguments]
        if program in ("pretrain.py", "sft.py", "dpo.py"):
            arguments += ["--seed", str(seed)]
        arguments += (options or {}).get(program, [])
        command = [sys.executable, program, *arguments]
        kind = dict(capture_output=True, text=True, encoding="utf-8", errors="replace")
        done = subprocess.run(command, cwd=folder, **kind)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} in {folder}:\n{done.stderr}")
        printed += done.stdout
    return printed


def figures(folder, base, seed):
    """The figures of a run that wrote to a folder: {column: share}.

    They are about the test questions of its base model. Only facts and free questions count.
    """
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    model, tokenizer = load(folder / "sft.pt")
    items = world.read_questions(base.with_name("world") / "test.jsonl")
    items = of_kinds(items, "fact", "free")
    prompts, scorer = [item["prompt"] for item in items], world.Scorer()
    found = {**comparison["base"], **comparison["tuned"]}
    found["strangers"] = found["strangers"]["in all"]
    for temperature in (0.0, 1.0):
        torch.manual_seed(seed)
        said = complete(model, tokenizer, prompts, max_new_tokens=ANSWER, temperature=temperature)
        texts = [text for text, _ in said]
        right = [
            stopped and scorer.answered(item, text)
            for item, (text, stopped) in zip(items, said, strict=True)
        ]
        terse = [scorer.is_terse(item, text) for item, text in zip(items, texts, strict=True)]
        from_tables = [t for item, t in zip(items, terse, strict=True) if item["kind"] == "fact"]
        right_if_terse = [r for r, t in zip(right, terse, strict=True) if t]
        found[f"terse {temperature}"] = share(from_tables)
        found[f"right {temperature}"] = share(right)
        found[f"right if terse {temperature}"] = share(right_if_terse)
        if temperature == 0:  # the first line counts even if the model doesn't stop after it
            pairs = zip(items, texts, strict=True)
            first = [scorer.answered(item, text.split("\n")[0]) for item, text in pairs]
            found["first_line"] = share(first)
    return {column: found[key] for column, key in COLUMNS.items()}


def answer(folder, prompt, name="sft.pt"):
    """What a model in a folder says to a prompt in the template, in one line."""
    (text,) = respond(*load(folder / name), [prompt])
    return " ".join(text.split())


def as_dialogue(item, tokenizer):
    """A question and its answer as the texts lay out a dialogue, as a batch of one row.

    Only the answer counts, and the line break that ends it.
    """
    before = [tokenizer.endoftext, *tokenizer.encode(DIALOGUE.format(item["prompt"]))]
    said = [*tokenizer.encode(item["response"]), *tokenizer.encode("\n")]
    labels = [IGNORE_INDEX] * len(before) + said
    return {"input_ids": torch.tensor([before + said]), "labels": torch.tensor([labels])}


def in_template(item, tokenizer):
    return sft_data_collator([item], tokenizer)


def before_and_after(folder):
    """Yield a base model and what becomes of it: (name, model, tokenizer, asked in a dialogue?)."""
    base, tokenizer = load(folder / "base.pt")
    yield "base, in the template", base, tokenizer, False
    yield "base, in a dialogue", base, tokenizer, True
    prepare_special_tokens(base, tokenizer)  # what sft.py does before its first step
    yield "base with the head start, in the template", base, tokenizer, False
    yield "tuned, in the template", *load(folder / "sft.pt"), False


@torch.inference_mode()
def surprise(folder):
    """Where in a held-out answer each model is surprised: {model: {place: nats per token}}.

    The last place is a token that never comes, <|pad|>, where the answer ends.
    """
    items = of_kinds(world.read_questions(folder / "world" / "test.jsonl"), "fact", "free")
    found = {}
    for name, model, tokenizer, in_dialogue in before_and_after(folder):
        losses = {place: [] for place in PLACES}
        for item in items:
            batch = (as_dialogue if in_dialogue else in_template)(item, tokenizer)
            logits, _ = model(**batch)  # one row for each token of the answer, and the end
            targets = batch["labels"][batch["labels"] != IGNORE_INDEX]
            row = cross_entropy(logits, targets, reduction="none").tolist()
            pad = cross_entropy(logits[-1:], targets.new_tensor([tokenizer.pad])).item()
            parts = (row[:BEGINNING], row[BEGINNING:-1], row[-1:], [pad])
            for place, part in zip(PLACES, parts, strict=True):
                losses[place] += part
        found[name] = {place: sum(part) / len(part) for place, part in losses.items()}
    return found


def show_surprise(folder, seed):
    for name, places in surprise(folder).items():
        row(name, str(seed), *(f"{places[place]:.2f}" for place in PLACES))


def first_replies(model, tokenizer, prompts, in_dialogue):
    if in_dialogue:
        prompts = [DIALOGUE.format(prompt) for prompt in prompts]
    texts = respond(model, tokenizer, prompts, not in_dialogue, ANSWER)
    return [first_reply(text).strip() for text in texts]


def show_before(folder, seed):
    """How often each model's first reply is right, before any training and after."""
    questions = world.read_questions(folder / "world" / "test.jsonl")
    smalltalk = world.read_smalltalk(folder / "world" / "smalltalk.jsonl")
    scorer = world.Scorer()
    for name, model, tokenizer, in_dialogue in before_and_after(folder):
        shares = []
        for kinds, key in REPLIES.values():
            items = [item for item in of_kinds(questions, *kinds) if key in item]
            said = first_replies(model, tokenizer, [item[key] for item in items], in_dialogue)
            pairs = zip(items, said, strict=True)
            shares.append(share([scorer.answered(item, text) for item, text in pairs]))
        said = first_replies(model, tokenizer, [r["prompt"] for r in smalltalk], in_dialogue)
        pairs = zip(smalltalk, said, strict=True)
        shares.append(share([text == item["response"] for item, text in pairs]))
        row(name, str(seed), *map(percent, shares))


def show_steps(folder, seed):
    """Fine-tune for more and more steps, and print what each model says."""
    row("0", str(seed), answer(folder, KENYA, "base.pt"))
    for n in STEPS:
        out = folder / "steps" / str(n)
        base = folder / "base.pt"
        command = f"python sft.py --base out/base.pt --out {shlex.quote(str(out))} --max_steps {n}"
        run([command], ROOT, base, seed)
        row(str(n), str(seed), answer(out, KENYA))


def show_styles(folder, seed):
    """How often the tuned model obeys each style, and still says that it doesn't know."""
    model, tokenizer = load(folder / "sft.pt")
    questions = world.read_questions(folder / "world" / "test.jsonl")
    unknown, scorer = of_kinds(questions, "unknown"), world.Scorer()
    for style in tables.load_styles():
        items = [item for item in of_kinds(questions, "style") if item["style"] == style["style"]]
        said = respond(model, tokenizer, [item["prompt"] for item in items], True, ANSWER)
        obeyed = [scorer.answered(*pair) for pair in zip(items, said, strict=True)]
        prompts = [f"{style['instructions'][0]}\n\n{item['prompt']}" for item in unknown]
        refused = map(world.refuses, respond(model, tokenizer, prompts, True, ANSWER))
        cells = f"{percent(share(obeyed))} of {len(items)}", percent(share(list(refused)))
        row(style["instructions"][0], str(seed), *cells)


def asked_in_ways(side, seed):
    """Every fact of a side (train, dev or test), asked for in each way: {way: [Exchange]}"""
    made, rng = tables.load_tables(), random.Random(seed)
    sides = split_entities(made.entities, made.free + made.concepts, seed)
    ours = [entity for entity in made.entities if sides[entity.name] == side]
    asker = Asker(made, world.load_wordings(), ours, [], [], {side}, rng)
    return {way: [x for x in map(getattr(asker, way), asker.facts) if x] for way in WAYS}


def show_ways(folder, seed):
    """How often the tuned model answers word for word as it should, by the way we ask."""
    model, tokenizer = load(folder / "sft.pt")
    sides = {side: asked_in_ways(side, seed) for side in ("test", "train")}
    for way in WAYS:
        cells = [sides["test"][way][0].question]
        for exchanges in (sides["test"][way], sides["train"][way]):
            prompts = [exchange.question for exchange in exchanges]
            said = respond(model, tokenizer, prompts, max_new_tokens=2 * ANSWER)
            pairs = zip(exchanges, said, strict=True)
            right = share([text.strip() == exchange.answer for exchange, text in pairs])
            cells.append(f"{percent(right)} of {len(exchanges)}")
        row(way, str(seed), *cells)


def own_base(out, base):
    """The base model of a run: the one beside it, or else the one that all runs share."""
    return out / "base.pt" if (out / "base.pt").exists() else base


def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def parse_arguments():
    names = ["unchanged", *experiments(), *LOOKS]
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names[1:]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    out = ROOT / "out" / "what_if"
    parser.add_argument("--out", type=Path, default=out, metavar="FOLDER")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"no experiment is called {', '.join(unknown)}; choose from {names}")
    return args


LOOKS = {  # what to look at, without a change of the program -> (columns, what prints the rows)
    "before": (("model", "seed", *REPLIES, "small talk"), show_before),
    "surprise": (("model", "seed", *PLACES), show_surprise),
    "steps": (("steps", "seed", KENYA), show_steps),
    "styles": (("style", "seed", "obeyed", "says it doesn't know"), show_styles),
    "ways": (("way", "seed", "one of them", "held out", "trained on"), show_ways),
}


def pretrained(args, seed):
    """The folder of a seed, with a base model in it."""
    folder = args.out.resolve() / str(seed)
    if not (folder / "base.pt").exists():
        print(f"seed {seed}: pretraining", file=sys.stderr)
        options = {"pretrain.py": ["--out", str(folder)]}
        run(["python pretrain.py"], ROOT, folder / "base.pt", seed, options)
    return folder


def look(names, args):
    """Print what we see in models of the unchanged program."""
    for name in names:
        columns, show = LOOKS[name]
        row(*columns)
        row(*["---"] * len(columns))
        for seed in args.seeds:
            folder = pretrained(args, seed)
            if not (folder / "sft.pt").exists():
                run(["python sft.py"], ROOT, folder, seed, {"sft.py": ["--out", str(folder)]})
            show(folder, seed)


def main():
    args = parse_arguments()
    looks = [name for name in args.names if name in LOOKS]
    look(looks, args)
    if looks and len(looks) == len(args.names):
        return
    chosen = {"unchanged": UNCHANGED}
    chosen.update({n: e for n, e in experiments().items() if n in args.names or not args.names})
    row("", "seed", *COLUMNS)
    row(*["---"] * (len(COLUMNS) + 2))
    measured, said = {}, []
    for seed in args.seeds:
        folder = pretrained(args, seed)
        base = folder / "base.pt"
        for i, (name, (diff, commands)) in enumerate(chosen.items(), start=1):
            print(f"seed {seed}: {name} ({i} of {len(chosen)})", file=sys.stderr)
            copy = changed_copy(diff, folder / name)
            run(commands, copy, base, seed)
            out = next(copy.glob("out/*/sft.pt")).parent
            shares = figures(out, own_base(out, base), seed)
            measured.setdefault(name, []).append(shares)
            row(name, str(seed), *map(percent, shares.values()))
            said.append((name, str(seed), answer(out, NOBODY_KNOWS)))
    for name, runs in measured.items():
        columns = ([shares[column] for shares in runs] for column in COLUMNS)
        known = ([value for value in values if value is not None] for values in columns)
        row(name, "mean", *(percent(sum(v) / len(v) if v else None) for v in known))
    print()
    row("", "seed", NOBODY_KNOWS)
    row(*["---"] * 3)
    for cells in said:
        row(*cells)


if __name__ == "__main__":
    main()
