"""The experiments of docs/experiments.md: their changes apply, run, and do what the page says."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import experiments
from common.checkpoint import load
from conftest import ROOT, SIZES
from data import world
from data.world import tables
from sft import encode, sft_data_collator

EXPERIMENTS = experiments.experiments()
# These differ from others only in a number, or in a world that other tests make.
LIKE_OTHERS = ("few_30", "few_100", "few_300", "one_wording", "not_asked")
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
from data.world import exchanges

world.ROUNDS = 1
exchanges.WAYS = {"plain": 1, "yes_no": 1}
result = world.build(1)
"""
# The same, but each question from a table says in which way it asks, and none is typed with noise.
MARKED = """
from data import world
from data.world import exchanges, talks


def marked(way, ask):
    def ask_marked(asker, fact):
        exchange = ask(asker, fact)
        if exchange:
            exchange.question = f"({way}) {exchange.question}"
        return exchange

    return ask_marked


world.ROUNDS, talks.NOISE = 1, 0
exchanges.WAYS = {"plain": 1, "yes_no": 1}
exchanges.Asker.plain = marked("plain", exchanges.Asker.plain)
exchanges.Asker.yes_no = marked("yes or no", exchanges.Asker.yes_no)
result = world.build(1)
"""
TABLES_ONLY = """
from data import world
from data.world import tables, texts
from data.world.texts import Writer

world.ROUNDS = 1
texts.Writer.spellings = lambda writer: []  # they tell no facts
made = tables.load_tables()
made.free, made.concepts, made.smalltalk = [], [], []
tables.load_tables = lambda: made
wordings = world.load_wordings()
told = [
    [world.fill(template, entity, fact.attribute) for template in wordings.get(*fact.key, "state")]
    for entity in made.entities
    for fact in entity.facts
]
result = {"corpus": world.build(1)["corpus"], "told": told}
"""


def few_tables(copy):
    """Leave so little in the tables of a copy that its world is made in a second.

    The countries are those of the small world.
    """
    tables_of_copy = copy / "data" / "world"
    for path in tables_of_copy.glob("facts/*.tsv"):
        if path.stem != "countries":
            path.unlink()
    few = {path: 9 for path in tables_of_copy.glob("questions/*.tsv")}
    few |= {tables_of_copy / f"{name}.tsv": 9 for name in ("concepts", "smalltalk")}
    few |= {tables_of_copy / "facts" / "countries.tsv": 49, copy / "data" / "strangers.jsonl": 9}
    for path, count in few.items():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:count]), encoding="utf-8")


def result_of(name, code, tmp_path, few=False):
    """Run code in a copy of the program with this experiment's change. Returns its `result`.

    name: "unchanged" has no change. few: with few tables.
    """
    diff = experiments.UNCHANGED[0] if name == "unchanged" else EXPERIMENTS[name][0]
    copy = experiments.changed_copy(diff, tmp_path / name)
    if few:
        few_tables(copy)
    code += "\nimport json\nprint(json.dumps(result))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, encoding="utf-8")
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def sources(folder):
    return {p.relative_to(folder): p.read_text(encoding="utf-8") for p in folder.rglob("*.py")}


def test_the_page_is_what_the_runner_expects():
    few = [f"few_{n}" for n in experiments.FEW]
    wordings = ["one_wording", "not_asked", "one_wording_not_asked"]
    tricks = ["no_line_break", "no_freezing"]
    names = ["no_mask", "no_end", *few, "terse", *tricks, *wordings, "never_shown"]
    assert list(EXPERIMENTS) == names
    page = experiments.PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"`python docs/experiments.py ([^`]*)`", page)
    named = {name for command in commands for name in command.split()}
    for name in [*names, *experiments.LOOKS]:
        assert name in named
    sections = page.split("\n## ")[1:]
    for section in sections:  # each asks before it tells
        assert section.index("**What do you expect?**") < section.index("<details>")
    assert len(sections) == len(experiments.NAMES) + len(experiments.LOOKS)
    assert len({diff for diff, _ in EXPERIMENTS.values()} - {""}) == len(names)  # all differ
    assert experiments.NOBODY_KNOWS in EXPERIMENTS["never_shown"][1][-1]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_line_numbers_in_a_change_are_exact(name):
    """git apply forgives wrong numbers, but a reader looks for the line that the page names."""
    moved_by = {}  # path -> lines that the hunks above have added
    for path, number, old, new in experiments.hunks_of(EXPERIMENTS[name][0]):
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines(keepends=True)
        there = "".join(lines[number - 1 :][: old.count("\n")])
        assert there == old, f"{path}: these lines are not at line {number}"
        counts = old.count("\n"), new.count("\n")
        wanted = f"@@ -{number},{counts[0]} +{number + moved_by.get(path, 0)},{counts[1]} @@"
        assert wanted in EXPERIMENTS[name][0]
        moved_by[path] = moved_by.get(path, 0) + counts[1] - counts[0]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_git_can_make_the_change_and_take_it_back(name, tmp_path):
    diff = EXPERIMENTS[name][0]
    copy, ours = experiments.changed_copy("", tmp_path / "git"), tmp_path / "ours"
    experiments.changed_copy(diff, ours)
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
            experiments.apply(diff.format(gone), tmp_path)
    experiments.apply(diff.format("    two"), tmp_path)
    assert (tmp_path / "a.py").read_text(encoding="utf-8") == "one\n    two\nthree\n"


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in LIKE_OTHERS])
def test_the_changed_program_runs(name, small_world, tmp_path):
    """With the commands of the page, but two steps of a small network and few tables."""
    diff, commands = EXPERIMENTS[name]
    copy = experiments.changed_copy(diff, tmp_path / name)
    few_tables(copy)
    printed = experiments.run(commands, copy, small_world / "base.pt", 1, TINY)
    out = next(copy.glob("out/*/sft.pt")).parent
    base = experiments.own_base(out, small_world / "base.pt")
    assert (base.parent == out) == ("pretrain.py" in commands[0])
    assert experiments.figures(out, base, 1).keys() == experiments.COLUMNS.keys()
    assert isinstance(experiments.answer(out, experiments.NOBODY_KNOWS), str)
    if name.startswith("few"):
        lines = (small_world / "world" / "sft.jsonl").read_text(encoding="utf-8").splitlines()
        assert f" on {min(int(name[4:]), len(lines))} conversations" in printed


def test_without_the_mask_everything_except_padding_is_labelled(tmp_path):
    batch = result_of("no_mask", LABELS, tmp_path)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert labels == [-100 if token == batch["pad"] else token for token in ids]
    assert any(batch["pad"] in ids for ids in batch["input_ids"])


def test_without_the_closing_token_only_words_are_labelled(tmp_path):
    batch = result_of("no_end", LABELS, tmp_path)
    whole = result_of("unchanged", LABELS, tmp_path)
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
    """Without free questions and small talk, the corpus is one sentence per fact."""
    made = result_of("one_wording_not_asked", TABLES_ONLY, tmp_path)
    assert len(made["told"]) > 1600 and all(len(sentences) == 1 for sentences in made["told"])
    sentences, corpus = [sentence for (sentence,) in made["told"]], "\n".join(made["corpus"])
    assert all(corpus.count(sentence) >= 2 for sentence in sentences)  # an entry, a paragraph
    assert not without(sentences, corpus).strip()


def test_each_of_the_two_changes_leaves_the_other_half_as_it_was(tmp_path):
    asked = result_of("one_wording", TABLES_ONLY, tmp_path)
    assert all(len(sentences) == 1 for sentences in asked["told"])
    assert any("?" in text for text in asked["corpus"])
    assert any("A) " in text for text in asked["corpus"])
    stated = result_of("not_asked", TABLES_ONLY, tmp_path)
    assert all(len(sentences) > 1 for sentences in stated["told"])
    corpus = "\n".join(stated["corpus"])
    various = [any(sentence in corpus for sentence in told[1:]) for told in stated["told"]]
    assert sum(various) > 0.5 * len(various)
    assert not any("\n" in text for text in stated["corpus"])  # no dialogues, quizzes, boxes


def test_without_facts_people_still_ask_for_other_things(tmp_path):
    made = result_of("not_asked", WORLD, tmp_path, few=True)
    talks = "\n".join(text for text in made["corpus"] if "\n" in text).lower()
    questions = made["train"] + made["dev"] + made["test"]

    def asked(kind):
        return [item["response"].lower() in talks for item in questions if item["kind"] == kind]

    assert len(asked("fact")) > 100 and not any(asked("fact"))
    others = asked("free") + asked("concept")
    others += [item["response"].lower() in talks for item in made["smalltalk"]]
    assert sum(others) > 0.9 * len(others) > 30
    instructions = sum((style["instructions"] for style in tables.load_styles()), [])
    long = [text for text in instructions if len(text.split()) > 3]  # not "shout"
    assert not any(text.lower() in talks for text in long + tables.load_refusals())


def test_half_of_the_answers_are_terse(tmp_path):
    entities, _ = world.load_facts()
    facts, wordings = [fact for e in entities for fact in e.facts], world.load_wordings()
    terse = {f"It is {fact.values[0]}." for fact in facts}
    whole = {
        world.fill(template, fact.entity, fact.attribute)
        for fact in facts
        for template in wordings.get(*fact.key, "answer")
    }
    made, before = (result_of(n, MARKED, tmp_path, few=True) for n in ("terse", "unchanged"))
    assert made["corpus"] == before["corpus"]  # the base model stays what it was

    def answers(talks, several, mark=""):
        """What the assistant says in conversations of one turn, or of several."""
        talks = [[m["content"] for m in t["messages"] if m["role"] != "system"] for t in talks]
        talks = [texts[1::2] for texts in talks if texts[0].startswith(mark)]
        return [answer for talk in talks if (len(talk) > 1) == several for answer in talk]

    plain, yes_no = (answers(made["sft"], False, mark) for mark in ("(plain) ", "(yes or no) "))
    halves = [sum(answer in kind for answer in plain) for kind in (terse, whole)]
    assert sum(halves) > 150 and 0.4 < halves[0] / sum(halves) < 0.6
    assert len(set(yes_no) & whole) > 50  # a yes or no is answered by the fact, and stays whole
    untouched = answers(made["sft"], several=True) + answers(before["sft"], several=False)
    assert not terse & {*untouched, *yes_no}


def test_never_shown_what_nobody_can_know(tmp_path):
    """Neither texts nor conversations refuse to answer, but we still ask what nobody can know."""

    def refusals(texts):
        said = "\n".join(texts).lower()
        return sum(said.count(refusal.lower()) for refusal in tables.load_refusals())

    def contents(talks):
        return [message["content"] for talk in talks for message in talk["messages"]]

    made, before = (result_of(n, WORLD, tmp_path, few=True) for n in ("never_shown", "unchanged"))
    assert refusals(before["corpus"]) and refusals(contents(before["sft"]))
    assert not refusals(made["corpus"]) and not refusals(contents(made["sft"]))
    assert any(item["kind"] == "unknown" for item in made["test"])


def test_an_answer_is_terse_if_it_leaves_out_its_subject():
    fact = {"kind": "fact", "name": "the Netherlands", "accept": ["Amsterdam"]}
    free = {"kind": "free", "name": "Why is the sky blue?"}
    for item, text, terse in (
        (fact, "It is Amsterdam.", True),
        (fact, "Amsterdam", True),
        (fact, "The capital of the Netherlands is Amsterdam.", False),
        (fact, "The capital of the netherlands is Rome.", False),
        (fact, "I don't know that.", False),
        (free, "It is blue.", False),
    ):
        assert world.Scorer().is_terse(item, text) == terse, text


def test_the_figures_are_about_facts_and_free_questions(small_world, monkeypatch):
    """A model that answers well at temperature 0 and tersely at 1 gets the figures it should."""
    questions = world.read_questions(small_world / "world" / "test.jsonl")
    facts = {item["prompt"]: item for item in questions if item["kind"] in ("fact", "free")}
    assert len(facts) < len(questions)

    def complete(model, tokenizer, prompts, max_new_tokens, temperature):
        items = [facts[prompt] for prompt in prompts]  # KeyError for any other question
        terse = [(f"It is {item['accept'][0]}.", True) for item in items]
        return (
            terse if temperature else [(f"{item['response']}\nWhat else?", True) for item in items]
        )

    monkeypatch.setattr(experiments, "complete", complete)
    shares = experiments.figures(small_world, small_world / "base.pt", 1)
    for column, expected in {
        "right in its first line": 1.0,
        "terse at 0": 0.0,
        "right at 1": 1.0,
        "right if terse": 1.0,
    }.items():
        assert shares[column] == expected, column
    assert 0.8 < shares["terse at 1"] < 1  # "It is Djibouti." names Djibouti


def test_the_runner_prints_all_runs_their_means_and_the_answers(tmp_path, monkeypatch, capsys):
    """Without training: what it would train and measure is made up here."""
    ran = []

    def run(commands, folder, base, seed, options=None):
        ran.append((commands[-1], folder.name, seed))
        (folder / "out" / "x").mkdir(parents=True, exist_ok=True)
        (folder / "out" / "x" / "sft.pt").touch()
        base.touch()

    def figures(out, base, seed):
        return dict.fromkeys(experiments.COLUMNS, seed / 10)

    monkeypatch.setattr(experiments, "run", run)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "apply", lambda diff, folder: folder.mkdir(parents=True))
    monkeypatch.setattr(experiments, "figures", figures)
    monkeypatch.setattr(experiments, "answer", lambda out, prompt: f"to {prompt}")
    looked = []
    monkeypatch.setattr(experiments, "look", lambda names, args: looked.extend(names))
    arguments = ["no_mask", "surprise", "--seeds", "1", "2", "--out", str(tmp_path / "w")]
    monkeypatch.setattr(sys, "argv", ["experiments.py", *arguments])
    for seed in ("1", "2"):
        (tmp_path / "w" / seed).mkdir(parents=True)
    experiments.main()
    names = [name for _, name, seed in ran if seed == 1]
    assert names == [tmp_path.name, "unchanged", "no_mask"] and looked == ["surprise"]
    printed = capsys.readouterr().out
    for name in ("unchanged", "no_mask"):
        for label, share in (("1", "10.0%"), ("2", "20.0%"), ("mean", "15.0%")):
            cells = " | ".join([share] * len(experiments.COLUMNS))
            assert f"| {name} | {label} | {cells}" in printed
        assert f"| {name} | 2 | to {experiments.NOBODY_KNOWS} |" in printed


def test_where_the_surprise_is(small_world):
    """The parts of an answer add up to the loss that sft.py would see."""
    found = experiments.surprise(small_world)
    items = world.read_questions(small_world / "world" / "test.jsonl")
    items = [item for item in items if item["kind"] in ("fact", "free")]
    for name, file in (("base", "base.pt"), ("tuned", "sft.pt")):
        name += ", in the template"
        model, tokenizer = load(small_world / file)
        rows = [encode(item, tokenizer) for item in items]
        counts = [sum(label != -100 for label in row["labels"]) for row in rows]
        lengths = {
            "its first three tokens": sum(min(3, n) for n in counts),
            "in between": sum(max(0, n - 4) for n in counts),
            "the end": len(counts),
        }
        with torch.inference_mode():
            total = sum(
                model(**sft_data_collator([row], tokenizer))[1].item() * n
                for row, n in zip(rows, counts, strict=True)
            )
        ours = sum(found[name][place] * n for place, n in lengths.items())
        assert ours == pytest.approx(total, rel=1e-4)
    base, dialogue, head_start, tuned = found.values()
    assert base["the end"] > 5 * tuned["the end"]
    # Its texts have such dialogues, with line breaks.
    assert all(dialogue[place] < base[place] for place in list(lengths))
    assert dialogue["<|pad|> there"] > 5 > dialogue["the end"]
    assert tuned["the end"] < head_start["the end"] < base["the end"]


def test_what_a_base_model_can_do_before_any_training(small_world, monkeypatch, capsys):
    """It answers in a dialogue. Only the first line counts, without the speaker's label."""

    def shown():
        experiments.show_before(small_world, 7)
        rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
        assert [seed for _, seed, *_ in rows] == ["7"] * 4
        return [
            dict(zip([*experiments.REPLIES, "small talk"], row[2:], strict=True)) for row in rows
        ]

    base, dialogue, _, tuned = (float(row["answered"].rstrip("%")) for row in shown())
    assert dialogue > 50 and tuned > 50 and dialogue > base
    refusal = "A:\nI don't know that.\nQ:\nWhat is it?"
    monkeypatch.setattr(experiments, "respond", lambda m, t, prompts, *_: [refusal] * len(prompts))
    for row in shown():
        assert row["answered"] == "0.0%" and row["says it doesn't know"] == "100.0%"


def test_the_styles(small_world, monkeypatch, capsys):
    """Whether it obeys each one, and whether it still refuses what it can't know."""
    prompts = []

    def respond(model, tokenizer, asked, *_):
        prompts.extend(asked)
        return ["Arr, I don't know that."] * len(asked)

    monkeypatch.setattr(experiments, "respond", respond)
    experiments.show_styles(small_world, 7)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    styles = tables.load_styles()
    assert [name for name, *_ in rows] == [style["instructions"][0] for style in styles]
    questions = world.read_questions(small_world / "world" / "test.jsonl")
    for (_, seed, obeyed, refused), style in zip(rows, styles, strict=True):
        n = sum(item.get("style") == style["style"] for item in questions)
        assert (seed, refused) == ("7", "100.0%") and obeyed.endswith(f" of {n}")
        assert obeyed.startswith("0.0%") or n == 0
        asked = [p for p in prompts if p.startswith(style["instructions"][0] + "\n\n")]
        assert len(asked) >= sum(item["kind"] == "unknown" for item in questions)


def test_the_steps(small_world, monkeypatch, capsys):
    """The base model first, then models of more and more steps, each from the base model."""
    ran = []

    def run(commands, folder, base, seed, options=None):
        ran.append((commands[0], base))

    monkeypatch.setattr(experiments, "run", run)
    monkeypatch.setattr(
        experiments, "answer", lambda out, prompt, name="sft.pt": f"{out.name} {name}"
    )
    arguments = ["steps", "--seeds", "7", "--out", str(small_world.parent)]
    monkeypatch.setattr(sys, "argv", ["experiments.py", *arguments])
    monkeypatch.setattr(experiments, "pretrained", lambda args, seed: small_world)
    experiments.main()
    printed = capsys.readouterr().out.splitlines()
    name = small_world.name
    assert printed[2:] == [
        f"| 0 | 7 | {name} base.pt |",
        *(f"| {n} | 7 | {n} sft.pt |" for n in (10, 50, 150)),
    ]
    assert [command.split()[-1] for command, _ in ran] == ["10", "50", "150"]
    assert {base for _, base in ran} == {small_world / "base.pt"}


def test_the_ways_to_ask(small_world, monkeypatch, capsys):
    """About the things of one side only. An answer counts if it is right word for word."""
    made = tables.load_tables()
    sides = world.split_entities(made.entities, made.free + made.concepts, 3)
    answers = {}
    for side in ("test", "train"):
        for way, exchanges in experiments.asked_in_ways(side, 3).items():
            assert exchanges and all(x.way in ("", way) for x in exchanges)
            about = {x.fact.entity.name for x in exchanges if x.fact}
            assert {sides[name] for name in about} <= {side}
            answers.update({x.question: x.answer for x in exchanges})

    def respond(model, tokenizer, prompts, **options):
        """Right, except that it never tells about a thing in full."""
        said = [answers[prompt] for prompt in prompts]
        return [text.partition(". ")[0] + "." if ". " in text else f" {text}\n" for text in said]

    monkeypatch.setattr(experiments, "respond", respond)
    experiments.show_ways(small_world, 3)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [(way, seed) for way, seed, *_ in rows] == [(way, "3") for way in experiments.WAYS]
    for way, _, question, held_out, trained_on in rows:
        assert question in answers
        for cell in (held_out, trained_on):
            share, number = cell.split("% of ")
            if way in ("plain", "yes_no", "either"):
                assert float(share) > 90
            if way in ("same", "both", "contrast"):
                assert share == "0.0" and int(number) > 50
