"""
Repeat the measurements of the preference stage in docs/measurements.md.

    python docs/preferences.py                      # all of them, seeds 1, 2 and 3
    python docs/preferences.py terse --seeds 1      # one of: knows, beta, terse
    python docs/preferences.py --out FOLDER         # use FOLDER/S/base.pt and sft.pt if they exist

knows   the tuned model, dpo.py, and the opponent: the same steps of plain fine-tuning on the chosen
        answers. Does each model know what it knows?
beta    the same pairs with beta over a factor of a hundred, and with a likelihood term
terse   a model that was fine-tuned on half terse, half whole answers; then with the whole ones
        preferred, and the other way round
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle threads free the CPU for others sooner

import argparse
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from common.checkpoint import read_checkpoint
from common.completion import complete
from common.evaluation import text_loss
from common.scores import ANSWER, of_kinds, score_strangers, write_own_pairs
from data import world
from data.text import open_tokens
from dpo import DPOConfig
from experiments import ROOT, changed_copy, experiments, row, run

BETAS = (0.03, 0.3, 1, 3)
LONGER = "--max_steps 300 "  # for terse or whole, as there are twice as many pairs
OPPONENT = "--beta 1e-6 --likelihood 1"  # the preferences vanish, and only the imitation is left
DRAWS = 2  # how often we sample each answer at temperature 1
NAMES = {  # what we count: of questions with an answer, of those from the tables, and of others
    "known": ("right", "wrong", "refused"),
    "fact": ("terse",),
    "unknown": ("refused", "answered"),
}


def figures(path, folder):
    """What a model says to the test questions: {column: number}.

    path: the model. folder: of its base model. Of the questions with an answer, in both wordings:
    the share that it answers rightly or wrongly, or refuses; of those from the tables, the share of
    terse answers, right or wrong. Of those that it can't answer: the share that it refuses or
    answers. errors: wrong answers and wrong refusals.
    """
    checkpoint = read_checkpoint(path)
    model, tokenizer, scorer = checkpoint.model, checkpoint.tokenizer, world.Scorer()
    items = world.read_questions(folder / "world" / "test.jsonl")
    asked = [
        (item, item[key])
        for item in of_kinds(items, "fact", "free", "unknown")
        for key in ("prompt", "unseen")
        if key in item
    ]
    prompts, found = [prompt for _, prompt in asked], {}
    for temperature, draws in ((0, 1), (1, DRAWS)):
        counts = {kind: [] for kind in NAMES}
        for draw in range(draws):
            torch.manual_seed(draw)
            answers = complete(model, tokenizer, prompts, True, ANSWER, temperature)
            for (item, _), (text, stopped) in zip(asked, answers, strict=True):
                right = stopped and scorer.answered(item, text)
                refused, terse = world.refuses(text), scorer.is_terse(item, text)
                if item["kind"] == "unknown":
                    counts["unknown"].append((right, not right))
                else:
                    counts["known"].append((right, not right and not refused, refused))
                if item["kind"] == "fact":
                    counts["fact"].append((terse,))
        for kind, names in NAMES.items():
            columns = zip(*counts[kind], strict=True)
            for name, flags in zip(names, columns, strict=True):
                found[f"{kind} {name} {temperature}"] = 100 * sum(flags) / len(flags)
        wrong = sum(not right for right, *_ in counts["known"])
        wrong += sum(answered for _, answered in counts["unknown"])
        found[f"errors {temperature}"] = wrong / draws
    strangers = score_strangers(checkpoint)
    found["strangers"] = 100 * strangers["in all"]
    found["strangers refused"] = 100 * strangers["refuses"]
    found["bits per byte"] = text_loss(
        model, open_tokens(folder / "val.bin", tokenizer), tokenizer
    )[1]
    log = path.with_suffix(".jsonl")
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1]) if log.exists() else {}
    for key in ("told_apart", "margin", "chosen", "rejected", "seconds"):
        found[key] = last.get(key, float("nan"))
    return found


def tune(out, tuned, base, seed, options=""):
    """Run dpo.py from a tuned model, and write to a folder. Returns the path of dpo.pt."""
    if not (out / "dpo.pt").exists():
        sources = f"--sft {shlex.quote(str(tuned))} --out {shlex.quote(str(out))}"
        run([f"python dpo.py {sources} {options}"], ROOT, base, seed)
    return out / "dpo.pt"


def data(path):
    return f"--data {shlex.quote(str(path))} "


def knows(folder, seed):
    base, tuned = folder / "base.pt", folder / "sft.pt"
    yield "tuned", tuned
    yield "dpo", tune(folder / "dpo", tuned, base, seed)
    pairs = data(folder / "dpo" / "world" / "pairs.jsonl")
    yield "opponent", tune(folder / "opponent", tuned, base, seed, pairs + OPPONENT)


def beta(folder, seed):
    base, tuned = folder / "base.pt", folder / "sft.pt"
    tune(folder / "dpo", tuned, base, seed)
    pairs = data(folder / "dpo" / "world" / "pairs.jsonl")
    for value in BETAS:
        options = f"{pairs} --beta {value}"
        out = folder / ("dpo" if value == DPOConfig.beta else f"beta_{value}")
        yield f"beta {value}", tune(out, tuned, base, seed, options)
    yield "likelihood 1", tune(folder / "likely_1", tuned, base, seed, pairs + "--likelihood 1")


def terse(folder, seed):
    base, copy = folder / "base.pt", folder / "terse"
    tuned = copy / "out" / "terse" / "sft.pt"
    if not tuned.exists():
        diff, commands = experiments()["terse"]
        changed_copy(diff, copy)
        run(commands, copy, base, seed)
    yield "half terse", tuned
    yield "whole preferred", tune(folder / "whole", tuned, base, seed, LONGER)
    pairs = folder / "tersely" / "pairs.jsonl"
    if not pairs.exists():
        grade, flipped = world.Scorer().grade, {2: 3, 3: 2}  # 3: a right answer that is terse
        write_own_pairs(
            read_checkpoint(tuned),
            folder / "world",
            pairs,
            seed,
            lambda *answer: flipped.get(found := grade(*answer), found),
        )
    yield "terse preferred", tune(folder / "tersely", tuned, base, seed, LONGER + data(pairs))
    options = LONGER + data(folder / "whole" / "world" / "pairs.jsonl") + OPPONENT
    yield "opponent", tune(folder / "whole_opponent", tuned, base, seed, options)


def parse_arguments():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="NAME", help="knows, beta, terse")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    out = ROOT / "out" / "preferences"
    parser.add_argument("--out", type=Path, default=out, metavar="FOLDER")
    args = parser.parse_args()
    if unknown := set(args.names) - {"knows", "beta", "terse"}:
        parser.error(f"no experiment is called {', '.join(unknown)}")
    return args


def main():
    args = parse_arguments()
    measured = {}
    for seed in args.seeds:
        folder = args.out.resolve() / str(seed)
        for program, made in (("pretrain.py", "base.pt"), ("sft.py", "sft.pt")):
            if not (folder / made).exists():
                print(f"seed {seed}: {program}", file=sys.stderr)
                run([f"python {program} --out {folder}"], ROOT, folder / "base.pt", seed)
        for experiment in (knows, beta, terse):
            if args.names and experiment.__name__ not in args.names:
                continue
            for name, path in experiment(folder, seed):
                found = figures(path, folder)
                if not measured:
                    row("", "seed", *found)
                    row(*["---"] * (len(found) + 2))
                measured.setdefault((experiment.__name__, name), []).append(found)
                row(name, str(seed), *(f"{value:.2f}" for value in found.values()))
    for (_, name), runs in measured.items():
        means = [sum(found[key] for found in runs) / len(runs) for key in runs[0]]
        row(name, "mean", *(f"{mean:.2f}" for mean in means))


if __name__ == "__main__":
    main()
