"""The chapter "What if?" of the README: its changes apply, run, and do what the page says."""

import json
import re
import shutil
import subprocess
import sys

import pytest

import what_if
from conftest import ROOT, SIZES
from data import world

EXPERIMENTS = what_if.experiments()
CHANGES = [name for name, (diff, _) in EXPERIMENTS.items() if diff]
TINY = {
    "pretrain.py": ["--device", "cpu", *SIZES, "--max_steps", "2"],
    "sft.py": ["--device", "cpu", "--max_steps", "2"],
}
LABELS = """
from data import Tokenizer
from sft import sft_data_collator

tokenizer = Tokenizer.train(["What is the capital of Peru? It is Lima."], 270)
chat = [
    {"role": "user", "content": "of Peru?"},
    {"role": "assistant", "content": "Lima."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "It is."},
]
batch = sft_data_collator(
    [{"prompt": "capital?", "response": "Lima."}, {"messages": chat}], tokenizer
)
result = {key: rows.tolist() for key, rows in batch.items()}
result.update(end=tokenizer.end, pad=tokenizer.pad)
"""
WORLD = """
from data import world

result = world.build(1)
"""
TABLES_ONLY = """
from data import world
from data.world import tables

entities, free = tables.load_facts()
tables.load_facts, tables.load_smalltalk = lambda: (entities, []), lambda: []
state = {key: uses["state"] for key, uses in world.load_wordings().items()}
told = [
    [world.fill(template, entity, fact.attribute) for template in state[fact.key]]
    for entity in entities
    for fact in entity.facts
]
corpus = "\\n".join(world.build(1)["corpus"])
result = {"corpus": corpus, "told": told, "rounds": world.ROUNDS}
"""


def result_of(name, code, tmp_path):
    """Run code in a copy of the program with this experiment's change. Returns its `result`."""
    copy = what_if.changed_copy(EXPERIMENTS[name][0], tmp_path / name)
    code += "\nimport json\nprint(json.dumps(result))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, encoding="utf-8")
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def sources(folder):
    return {p.relative_to(folder): p.read_text(encoding="utf-8") for p in folder.rglob("*.py")}


def test_the_chapter_is_what_the_runner_expects():
    few = [f"few_{n}" for n in what_if.FEW]
    wordings = ["one_wording", "not_asked", "one_wording_not_asked"]
    names = ["no_mask", "no_end", *few, *wordings, "terse", "atlantis"]
    assert list(EXPERIMENTS) == names
    assert len({diff for diff, _ in EXPERIMENTS.values()}) == len(names)  # no two are the same
    assert [name for name in names if name not in CHANGES] == ["atlantis"]


@pytest.mark.parametrize("name", CHANGES)
def test_the_line_numbers_in_a_change_are_exact(name):
    """git apply forgives wrong numbers, but a reader looks for the line that the page names."""
    moved_by = {}  # path -> lines that the hunks above have added
    for path, number, old, new in what_if.hunks_of(EXPERIMENTS[name][0]):
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines(keepends=True)
        there = "".join(lines[number - 1 :][: old.count("\n")])
        assert there == old, f"{path}: these lines are not at line {number}"
        counts = old.count("\n"), new.count("\n")
        wanted = f"@@ -{number},{counts[0]} +{number + moved_by.get(path, 0)},{counts[1]} @@"
        assert wanted in EXPERIMENTS[name][0]
        moved_by[path] = moved_by.get(path, 0) + counts[1] - counts[0]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("name", CHANGES)
def test_git_can_make_the_change_and_take_it_back(name, tmp_path):
    diff = EXPERIMENTS[name][0]
    copy, ours = what_if.changed_copy("", tmp_path / "git"), tmp_path / "ours"
    what_if.changed_copy(diff, ours)
    before = sources(copy)

    def apply(*options):
        command = ["git", "apply", *options]
        return subprocess.run(command, cwd=copy, input=diff.encode(), check=True)

    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    apply()
    assert sources(copy) == sources(ours) != before
    apply("-R")
    assert sources(copy) == before


def test_a_change_whose_lines_are_gone_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("one\n    two\ntwo\n", encoding="utf-8")
    diff = "--- a/a.py\n+++ b/a.py\n@@ -1,2 +1,2 @@\n {}\n-two\n+three\n"
    for gone in ("zwei", "two"):  # "two" is there, but only as the end of a longer line
        with pytest.raises(ValueError, match=r"a\.py.*0 times"):
            what_if.apply(diff.format(gone), tmp_path)
    what_if.apply(diff.format("    two"), tmp_path)
    assert (tmp_path / "a.py").read_text(encoding="utf-8") == "one\n    two\nthree\n"


@pytest.mark.parametrize("name", CHANGES)
def test_the_changed_program_runs(name, small_world, tmp_path):
    """With the commands of the chapter, but two steps of a small network."""
    diff, commands = EXPERIMENTS[name]
    copy = what_if.changed_copy(diff, tmp_path / name)
    printed = what_if.run(commands, copy, small_world / "base.pt", 1, TINY)
    out = next(copy.glob("out/*/sft.pt")).parent
    base = out / "base.pt" if "pretrain.py" in commands[0] else small_world / "base.pt"
    assert len(what_if.figures(out, base, 1)) == len(what_if.COLUMNS)
    if name.startswith("few"):
        assert re.search(rf"on {name[4:]} conversations", printed)


def test_without_the_mask_everything_except_padding_is_labelled(tmp_path):
    batch = result_of("no_mask", LABELS, tmp_path)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert labels == [-100 if token == batch["pad"] else token for token in ids]
    assert any(batch["pad"] in ids for ids in batch["input_ids"])


def test_without_the_closing_token_only_words_are_labelled(tmp_path):
    batch = result_of("no_end", LABELS, tmp_path)
    whole = result_of("atlantis", LABELS, tmp_path)
    end = whole["end"]
    assert batch["input_ids"] == whole["input_ids"]
    assert sum(row.count(end) for row in whole["labels"]) == 3  # one for each answer
    expected = [[-100 if label == end else label for label in row] for row in whole["labels"]]
    assert batch["labels"] == expected


def without(sentences, text):
    for sentence in sorted(sentences, key=len, reverse=True):
        text = text.replace(sentence, "")
    return text


def test_one_wording_is_one_wording(tmp_path):
    """Without free questions and small talk, the corpus is one sentence per fact, in each round."""
    made = result_of("one_wording_not_asked", TABLES_ONLY, tmp_path)
    assert len(made["told"]) > 1600 and all(len(sentences) == 1 for sentences in made["told"])
    sentences = [sentence for (sentence,) in made["told"]]
    assert all(made["corpus"].count(sentence) >= made["rounds"] for sentence in sentences)
    assert not without(sentences, made["corpus"]).strip()


def test_each_of_the_two_changes_leaves_the_other_half_as_it_was(tmp_path):
    asked = result_of("one_wording", TABLES_ONLY, tmp_path)
    assert all(len(sentences) == 1 for sentences in asked["told"])
    assert "?" in asked["corpus"] and "A) " in asked["corpus"]
    stated = result_of("not_asked", TABLES_ONLY, tmp_path)
    assert all(len(sentences) > 1 for sentences in stated["told"])
    sentences = [sentence for several in stated["told"] for sentence in several]
    assert not without(sentences, stated["corpus"]).strip()


def test_half_of_the_answers_are_terse(tmp_path):
    entities, free_questions = world.load_facts()
    accepted = (value for entity in entities for fact in entity.facts for value in fact.values)
    values = {f"It is {value}." for value in accepted}
    made, before = result_of("terse", WORLD, tmp_path), world.build(1)
    assert made["corpus"] == before["corpus"]  # the base model stays what it was
    others = {free.answer for free in free_questions}
    others |= {talk["response"] for talk in world.load_smalltalk()}
    talks = [talk["messages"] for talk in made["sft"]]
    answers = [messages[1]["content"] for messages in talks if len(messages) == 2]
    terse = [answer in values for answer in answers if answer not in others]
    assert len(terse) > 3000 and 0.47 < sum(terse) / len(terse) < 0.53
    assert not any(m["content"] in values for talk in before["sft"] for m in talk["messages"])
