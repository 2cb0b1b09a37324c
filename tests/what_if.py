"""
Repeats the experiments of the chapter "What if?", from the page that tells of them, and prints their figures.

    python tests/what_if.py                                   # all of them, seeds 1, 2 and 3
    python tests/what_if.py no_mask terse --seeds 1           # some
    python tests/what_if.py --out FOLDER                      # with the base models FOLDER/S/base.pt, if they are there

An experiment is a heading of that chapter, and below it the change, a diff, and the commands. The change is made in a copy of the project,
FOLDER/S/NAME, which stays there, with what was trained, to be looked at. The first run is of the program as it is.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from compare import complete, load, share  # noqa: E402
from data import world  # noqa: E402
from data.report import percent  # noqa: E402
from data.text import read_json  # noqa: E402
from data.world import Scorer  # noqa: E402

CHAPTER = "## 6 What if?\n"
PAGE = ROOT / "README.md"
UNCHANGED = ("", ["python sft.py --base out/base.pt --out out/unchanged"])
NAMES = {  # heading of the chapter -> what its outputs are called
    "Supervise the prompt too": "no_mask",
    "Leave out the closing token": "no_end",
    "Fine-tune on few examples": "few",
    "Tell every fact in one wording": "one_wording",
    "Half of the answers terse": "terse",
    "Ask what nobody can know": "atlantis",
}
FEW = (10, 30, 100, 300)  # what is put in the place of the number in the change of "few"
COLUMNS = {  # what is printed -> what it is called in comparison.json, or by figures()
    "answered": "answered", "unseen wordings": "unseen", "stops": "stops", "trained half": "train", "small talk": "smalltalk",
    "base knows": "knows", "base faq": "faq", "right in its first line": "first_line",
    "terse at 0": "terse 0.0", "right at 1": "right 1.0", "terse at 1": "terse 1.0", "right if terse": "right if terse 1.0",
}  # fmt: skip


def experiments():
    """Returns {name: (change, commands)} of the chapter: a diff, "" if nothing is changed, and a list of str.

    A number in the change is put to several values; of two changes, each is made alone, and both.
    """
    chapter = PAGE.read_text(encoding="utf-8").split(CHAPTER)[1].split("\n## ")[0]
    found = {}
    for section in chapter.split("\n### ")[1:]:
        heading, text = section.split("\n", 1)
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        (commands,) = (block.splitlines() for kind, block in blocks if not kind)
        diffs, name = [block for kind, block in blocks if kind == "diff"], NAMES[heading]
        if name == "few":
            changes = {f"few_{n}": diffs[0].replace("[:30]", f"[:{n}]") for n in FEW}
        elif name == "one_wording":
            changes = {"one_wording": diffs[0], "not_asked": diffs[1], "one_wording_not_asked": "".join(diffs)}
        else:
            changes = {name: "".join(diffs)}
        found.update({n: (change, commands) for n, change in changes.items()})
    return found


def apply(diff, folder):
    """Make the change in the files of folder. Raises ValueError if the lines that it is about are not there, or more than once."""
    for change in re.split(r"^--- .*\n", diff, flags=re.MULTILINE)[1:]:
        header, *hunks = re.split(r"^@@.*\n", change, flags=re.MULTILINE)
        path = folder / header.split()[1].removeprefix("b/")
        text = "\n" + path.read_text(encoding="utf-8")
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            old, new = ("\n" + "".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
            if text.count(old) != 1:
                raise ValueError(f"{path}: these lines should be there once, and are {text.count(old)} times:{old}")
            text = text.replace(old, new)
        path.write_text(text[1:], encoding="utf-8", newline="\n")


def changed_copy(diff, folder):
    """The program alone, changed, in a folder that is made anew. Returns the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py"), *(ROOT / "data").rglob("*.tsv")]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    apply(diff, folder)
    return folder


def run(commands, folder, base, seed, options={}):
    """Run commands of the page in folder, with another base model and seed. options: {"sft.py": [more arguments]}. Returns what they print."""
    printed = ""
    for command in commands:
        _, program, *arguments = shlex.split(command)
        arguments = [str(base) if a == "out/base.pt" else a.replace("world.build(1)", f"world.build({seed})") for a in arguments]
        arguments += ["--seed", str(seed)] * (program in ("pretrain.py", "sft.py")) + options.get(program, [])
        done = subprocess.run([sys.executable, program, *arguments], cwd=folder, capture_output=True, text=True, encoding="utf-8", errors="replace")
        if done.returncode:
            raise RuntimeError(f"{command} in {folder}:\n{done.stderr}")
        printed += done.stdout
    return printed


def figures(folder, base, seed):
    """What is measured of a run that wrote to folder: {column: share}, of the test questions of its base model."""
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    model, tokenizer = load(folder / "sft.pt")
    items, scorer = [item for _, item in read_json(base.with_name("world") / "test.jsonl")], Scorer()
    found = {**comparison["base"], **comparison["tuned"]}
    for temperature in (0.0, 1.0):
        torch.manual_seed(seed)
        said = complete(model, tokenizer, [item["prompt"] for item in items], max_new_tokens=40, temperature=temperature)
        right = [stopped and scorer.answered(i, text) for i, (text, stopped) in zip(items, said)]
        # A whole sentence names what it is about; what doesn't is terse. (Of the free questions, which are long either way, none is.)
        terse = ["accept" in i and not world.pattern_of([world.bare(i["name"])]).search(text) for i, (text, _) in zip(items, said)]
        found[f"terse {temperature}"] = share([t for i, t in zip(items, terse) if "accept" in i])
        found[f"right {temperature}"] = share(right)
        found[f"right if terse {temperature}"] = share([r for r, t in zip(right, terse) if t])
        if temperature == 0:  # what it says first, whether it then stops or not
            found["first_line"] = share([scorer.answered(i, text.split("\n")[0]) for i, (text, _) in zip(items, said)])
    return {column: found[key] for column, key in COLUMNS.items()}


def main():
    chosen = {"unchanged": UNCHANGED, **experiments()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(list(chosen)[1:]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "what_if", metavar="FOLDER")
    args = parser.parse_args()
    if unknown := set(args.names) - set(chosen):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(chosen)}")
    chosen = {name: e for name, e in chosen.items() if name in ("unchanged", *(args.names or chosen))}
    row = lambda *cells: print("| " + " | ".join(cells) + " |", flush=True)
    row("", "seed", *COLUMNS)
    row(*["---"] * (len(COLUMNS) + 2))
    measured, asked = {}, []
    for seed in args.seeds:
        folder = args.out.resolve() / str(seed)
        if not (base := folder / "base.pt").exists():
            print(f"seed {seed}: pretraining", file=sys.stderr)
            run(["python pretrain.py"], ROOT, base, seed, {"pretrain.py": ["--out", str(folder)]})
        for i, (name, (diff, commands)) in enumerate(chosen.items(), start=1):
            print(f"seed {seed}: {name} ({i} of {len(chosen)})", file=sys.stderr)
            if not diff and name != "unchanged":  # nothing is trained, only asked
                out = folder / "unchanged" / "out" / "unchanged"
                asked.append(f"seed {seed}:\n" + run(commands, ROOT, base, seed, {"compare.py": ["--base", str(base), "--out", str(out)]}))
                continue
            copy = changed_copy(diff, folder / name)
            run(commands, copy, base, seed)
            out = next(copy.glob("out/*/sft.pt")).parent
            measured.setdefault(name, []).append(figures(out, out / "base.pt" if (out / "base.pt").exists() else base, seed))
            row(name, str(seed), *map(percent, measured[name][-1].values()))
    for name, runs in measured.items():
        means = [[run[column] for run in runs if run[column] is not None] for column in COLUMNS]
        row(name, "mean", *(percent(sum(values) / len(values) if values else None) for values in means))
    print("\n" + "\n".join(asked))


if __name__ == "__main__":
    main()
