"""The chapter "What if?" of the README: its changes can be made, what is changed runs, and each does what it says."""

import json
import re
import shutil
import subprocess
import sys

import pytest

import what_if
from conftest import SIZES
from data import world

EXPERIMENTS = what_if.experiments()
CHANGES = [name for name, (diff, _) in EXPERIMENTS.items() if diff]
TINY = {"pretrain.py": ["--device", "cpu", *SIZES, "--max_steps", "2"], "sft.py": ["--device", "cpu", "--max_steps", "2"]}
LABELS = """
from data import Tokenizer
from sft import sft_data_collator
tokenizer = Tokenizer.train(["What is the capital of Peru? It is Lima."], 270)
chat = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(["of Peru?", "Lima.", "And?", "It is."])]
batch = sft_data_collator([{"prompt": "capital?", "response": "Lima."}, {"messages": chat}], tokenizer)
result = {**{key: rows.tolist() for key, rows in batch.items()}, "end": tokenizer.end, "pad": tokenizer.pad, "user": tokenizer.user}
"""
WORLD = """
from data import world
result = world.build(1)
"""
TABLES_ALONE = """
from data import world
entities, free = world.load_facts()
world.load_facts, world.load_smalltalk, world.PINNED = lambda: (entities, []), lambda: [], {}
state = {key: uses["state"] for key, uses in world.load_wordings().items()}
told = [[world.fill(template, e, a) for template in state[e.table, a]] for e in entities for a in e.values]
result = {"corpus": "\\n".join(world.build(1)["corpus"]), "told": told, "rounds": world.ROUNDS}
"""


def answer_of(name, code, tmp_path):
    """What code calls its result, in a copy of the program with a change of the chapter."""
    copy = what_if.changed_copy(EXPERIMENTS[name][0], tmp_path / name)
    code += "\nimport json\nprint(json.dumps(result))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, encoding="utf-8")
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_the_chapter_is_what_the_runner_expects():
    few, wordings = [f"few_{n}" for n in what_if.FEW], ["one_wording", "not_asked", "one_wording_not_asked"]
    assert list(EXPERIMENTS) == ["no_mask", "no_end", *few, *wordings, "terse", "atlantis"]
    assert len({diff for diff, _ in EXPERIMENTS.values()}) == len(EXPERIMENTS)  # no two are the same
    assert [name for name in EXPERIMENTS if name not in CHANGES] == ["atlantis"]


@pytest.mark.skipif(not shutil.which("git"), reason="git is not there")
@pytest.mark.parametrize("name", CHANGES)
def test_git_can_make_the_change_and_take_it_back(name, tmp_path):
    """The line numbers may have moved, but the counts must be right and the lines there."""
    copy, ours = (what_if.changed_copy(diff, tmp_path / folder) for diff, folder in (("", "git"), (EXPERIMENTS[name][0], "ours")))
    git = lambda *options: subprocess.run(["git", "apply", *options], cwd=copy, input=EXPERIMENTS[name][0].encode(), check=True)
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    git()
    contents = lambda folder: {p.relative_to(folder): p.read_text(encoding="utf-8") for p in folder.rglob("*.py")}
    assert contents(copy) == contents(ours) != contents(what_if.ROOT)
    git("-R")
    assert all((what_if.ROOT / path).read_text(encoding="utf-8") == text for path, text in contents(copy).items())


def test_a_change_whose_lines_are_gone_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("one\n    two\ntwo\n", encoding="utf-8")
    diff = "--- a/a.py\n+++ b/a.py\n@@ -1,2 +1,2 @@\n {}\n-two\n+three\n"
    for gone in ("zwei", "two"):  # (the second is there only as the end of a longer line)
        with pytest.raises(ValueError, match=r"a\.py.*0 times"):
            what_if.apply(diff.format(gone), tmp_path)
    what_if.apply(diff.format("    two"), tmp_path)
    assert (tmp_path / "a.py").read_text(encoding="utf-8") == "one\n    two\nthree\n"


@pytest.mark.parametrize("name", CHANGES)
def test_the_changed_program_runs(name, small_world, tmp_path):
    """With the very commands of the chapter, but two steps of a small network."""
    diff, commands = EXPERIMENTS[name]
    copy = what_if.changed_copy(diff, tmp_path / name)
    printed = what_if.run(commands, copy, small_world / "base.pt", 1, TINY)
    out = next(copy.glob("out/*/sft.pt")).parent
    base = out / "base.pt" if "pretrain.py" in commands[0] else small_world / "base.pt"
    assert len(what_if.figures(out, base, 1)) == len(what_if.COLUMNS)
    if name.startswith("few"):
        assert re.search(rf"on {name[4:]} conversations", printed)


def test_without_the_mask_all_but_padding_is_labelled(tmp_path):
    batch = answer_of("no_mask", LABELS, tmp_path)
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        assert labels == [-100 if token == batch["pad"] else token for token in ids]
    assert any(batch["pad"] in ids for ids in batch["input_ids"])


def test_without_the_closing_token_the_words_alone_are_labelled(tmp_path):
    batch, whole = answer_of("no_end", LABELS, tmp_path), answer_of("atlantis", LABELS, tmp_path)
    assert batch["input_ids"] == whole["input_ids"]
    assert sum(label == whole["end"] for row in whole["labels"] for label in row) == 3  # after each of the assistant's turns
    assert batch["labels"] == [[-100 if label == whole["end"] else label for label in row] for row in whole["labels"]]


def without(sentences, text):
    for sentence in sorted(sentences, key=len, reverse=True):
        text = text.replace(sentence, "")
    return text


def test_one_wording_is_one_wording(tmp_path):
    """But for the free questions and small talk, the corpus is one sentence for each fact, and these alone, in every round."""
    made = answer_of("one_wording_not_asked", TABLES_ALONE, tmp_path)
    assert len(made["told"]) > 1600 and all(len(sentences) == 1 for sentences in made["told"])
    assert all(made["corpus"].count(sentence) >= made["rounds"] for (sentence,) in made["told"])
    assert not without([sentence for (sentence,) in made["told"]], made["corpus"]).strip()


def test_one_wording_alone_leaves_questions_and_the_other_way_round(tmp_path):
    asked, stated = (answer_of(name, TABLES_ALONE, tmp_path) for name in ("one_wording", "not_asked"))
    assert all(len(sentences) == 1 for sentences in asked["told"]) and "?" in asked["corpus"] and "A) " in asked["corpus"]
    assert all(len(sentences) > 1 for sentences in stated["told"])
    assert not without([sentence for sentences in stated["told"] for sentence in sentences], stated["corpus"]).strip()


def test_half_of_the_answers_are_terse(tmp_path):
    values = {f"It is {value}." for e in world.load_facts()[0] for accepted in e.values.values() for value in accepted}
    made, before = answer_of("terse", WORLD, tmp_path), world.build(1)
    assert made["corpus"] == before["corpus"]  # the base model stays what it was
    free = {f.answer for f in world.load_facts()[1]} | {row["response"] for row in world.load_smalltalk()}
    answers = [c["messages"][1]["content"] for c in made["sft"] if len(c["messages"]) == 2]
    terse = [answer in values for answer in answers if answer not in free]
    assert len(terse) > 3000 and 0.47 < sum(terse) / len(terse) < 0.53
    assert not any(m["content"] in values for c in before["sft"] for m in c["messages"])
