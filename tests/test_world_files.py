"""What is written of the embedded world: the same bytes again, and what fine-tuning never sees."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

from common.messages import InputError
from conftest import ROOT
from data import world
from data.world import invented, split, strangers, tables, wordings
from data.world.names import bare, normal

SIDES = ("train", "dev", "test")
NAMES = "corpus.txt dev.jsonl sft.jsonl sha256 smalltalk.jsonl test.jsonl train.jsonl val.txt"


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def runs(texts, most=50):
    """Every run of whole words in the texts, without case and punctuation."""
    found = set()
    for words in (normal(text).split() for text in set(texts)):
        for i in range(len(words)):
            found |= {" ".join(words[i:j]) for j in range(i + 1, min(len(words), i + most) + 1)}
    return found


@dataclass
class Written:
    """A world of one seed, as we find it in its files."""

    seed: int
    folder: object
    made: dict  # what build() returned
    names: dict  # side -> {form: the invented names that were made for it}

    def __post_init__(self):
        talks = jsonl(self.folder / "sft.jsonl")
        messages = [message for talk in talks for message in talk["messages"]]
        self.items = {side: jsonl(self.folder / f"{side}.jsonl") for side in SIDES}
        typed = [item["typed"] for item in self.items["train"] if "typed" in item]  # for dpo.py
        self.said = [message["content"] for message in messages] + typed
        self.asked = [m["content"] for m in messages if m["role"] != "assistant"] + typed
        self.runs, self.turns = runs(self.said), {normal(text) for text in self.asked}
        self.asked_runs = runs(self.asked)
        self.tables = tables.load_tables()
        things = self.tables.free + self.tables.concepts
        self.sides = world.split_entities(self.tables.entities, things, self.seed)

    def held_out(self, things):
        return [thing for thing in things if self.sides[thing.name] != "train"]

    def leaked(self, questions):
        """Those that somebody asks: three words or more anywhere, fewer as a whole question."""
        words = {question: normal(question) for question in questions}
        asked = [self.asked_runs if len(w.split()) > 2 else self.turns for w in words.values()]
        return [q for (q, w), where in zip(words.items(), asked, strict=True) if w and w in where]


@pytest.fixture(scope="module", params=[1, 2])
def written(request, tmp_path_factory):
    names, make = {}, invented.Inventor.make

    def make_and_note(inventor, form):
        name = make(inventor, form)
        names.setdefault(*inventor.sides, {}).setdefault(form, set()).add(name)
        return name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invented.Inventor, "make", make_and_note)
        patch.setattr(world, "ROUNDS", 3)  # the others would be made in the same way
        made = world.build(request.param)
    folder = tmp_path_factory.mktemp("world")
    world.write(made, folder)
    return Written(request.param, folder, made, names)


MAKE = """
import sys
from pathlib import Path
from data import world
world.ROUNDS = 1
world.write(world.build(int(sys.argv[1])), Path(sys.argv[2]))
"""


def test_the_same_seed_makes_the_same_bytes(tmp_path):
    """Even if Python orders its sets in another way."""
    running = []
    for order in ("1", "2"):
        command = [sys.executable, "-c", MAKE, "3", str(tmp_path / order)]
        environment = os.environ | {"PYTHONHASHSEED": order}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert [process.wait() for process in running] == [0, 0]
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == NAMES.split()
    for name in NAMES.split():
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


CORPORA = {}  # seed -> corpus


def test_another_seed_makes_another_world(written):
    CORPORA[written.seed] = hash("".join(written.made["corpus"]))
    assert len(set(CORPORA.values())) == len(CORPORA)


# What fine-tuning never sees


def test_held_out_entities_are_nowhere_in_the_fine_tuning_set(written):
    """We read the files and look for whole words, in capitals or not."""
    for entity in written.held_out(written.tables.entities):
        for name in entity.names:
            assert normal(bare(name)) not in written.runs, name
    names = {side: {item["name"] for item in written.items[side]} - {"unknown"} for side in SIDES}
    assert not names["train"] & names["dev"] and not names["test"] & (names["train"] | names["dev"])
    things = written.tables.entities + written.tables.free + written.tables.concepts
    assert set.union(*names.values()) == {thing.name for thing in things}
    assert 0.1 < len(names["test"]) / len(things) < 0.18
    assert 0.04 < len(names["dev"]) / len(things) < 0.1
    assert {*split.SHOWN} <= names["test"]  # gravity and the printing press, too
    assert "i am parrot" in written.runs  # small talk is never left out


def test_held_out_questions_are_nowhere_in_the_fine_tuning_set(written):
    for side in ("dev", "test"):
        for item in written.items[side]:
            if item["kind"] != "unknown":  # "What is the capital of" may be asked about anything
                question = normal(item["prompt"].split("\n\n")[-1])  # without the style
                assert not written.leaked([item["prompt"], question]), item
            if item["kind"] in ("fact", "free", "concept"):
                assert normal(item["response"]) not in written.runs, item


def test_held_out_free_questions_are_not_asked_in_any_wording(written):
    held_out = written.held_out(written.tables.free)
    assert len(held_out) > 100 and len(written.tables.free) - len(held_out) > 400
    for free in held_out:
        assert not written.leaked(free.names), free.name
        for text in [free.answer, *free.retellings]:
            assert normal(text) not in written.runs, text


def test_held_out_concepts_are_neither_asked_for_nor_explained(written):
    frames = [(form, f"{form}_unseen") for form in tables.FORMS]
    frames = [frame for uses in frames for use in uses for frame in written.tables.frames[use]]
    held_out = written.held_out(written.tables.concepts)
    assert len(held_out) > 20 and len(written.tables.concepts) - len(held_out) > 90
    for concept in held_out:
        questions = [frame.format(name=name) for frame in frames for name in concept.names]
        assert not written.leaked(questions + concept.asks), concept.name
        assert not [text for text in concept.texts.values() if normal(text) in written.runs]
    texts = [concept.texts["child"] for concept in written.tables.concepts]
    assert sum(normal(text) in written.runs for text in texts) > 30  # of the others


def test_invented_names_are_of_their_side_only(written):
    assert set(written.names) == set(SIDES)
    names = {side: set.union(*written.names[side].values()) for side in SIDES}
    for side in SIDES:
        assert len(names[side]) > 50
        assert {split.side_of(name, "invented") for name in names[side]} == {side}
    train, said = "\n".join(names["train"]), "\n".join(written.said)
    for name in names["dev"] | names["test"]:
        # "Zarovia" may be in "the Kingdom of Zarovia", which is another name. And "glowing" is
        # an invented beast, but also a word.
        if name != name.lower() and name in said and name not in train:
            assert not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said), name
    items = [item for side in ("dev", "test") for item in written.items[side]]
    for item in items:
        if item["kind"] == "unknown":
            assert not {normal(item["prompt"]), normal(item["unseen"])} & written.turns, item


def test_held_out_unknown_questions_are_not_asked(written):
    for about, texts in written.tables.unknown.items():
        entities = [entity for entity in written.tables.entities if entity.table == about]
        held_out = [text for text in texts if split.side_of(text, "unknown") != "train"]
        asked = [world.fill(text, entity, "*") for text in held_out for entity in entities]
        leaked = set(written.leaked(asked or held_out))
        assert not leaked - set(written.tables.unknown["-"]) | leaked & set(held_out), about
        if about in ("-", "me"):
            assert written.leaked(set(texts) - set(held_out))  # the others are


def test_what_is_kept_for_testing_is_not_asked(written):
    """Small talk and styles. Their seen ones are asked, by the same rule."""
    rows = written.tables.smalltalk
    assert not {normal(text) for row in rows for text in row["unseen"]} - {""} & written.turns
    assert {normal(text) for row in rows for text in row["prompts"]} & written.turns
    for style in written.tables.styles:
        assert not written.leaked(style["unseen"]), style["style"]
        assert written.leaked(style["instructions"]), style["style"]


def without_article(part):
    return re.sub("^(the|an?) ", "", normal(part))


def askable(written, table):
    """What may stand in the place of {name}, {value} and so on in a wording of a table."""
    parts, form = {"two", "three", "four", "five", "2", "3", "4", "5"}, invented.FORMS.get(table)
    for names in written.names.values():
        parts |= set().union(*(names[f] for f in names if f == form or not form))
    parts |= {invented.plural_of(name) for name in parts}
    for entity in written.tables.entities:
        if entity.table == table or not form:
            parts |= {
                *entity.names,
                *entity.words.values(),
                *entity.values,
                *sum(entity.values.values(), []),
            }
    for (owner, _), uses in world.load_wordings().texts.items():
        parts |= {*uses.get("short", [])} if owner == table or not form else set()
    if not form:
        parts |= {name for concept in written.tables.concepts for name in concept.names}
    return set(map(without_article, parts))


def asked(written, templates, parts):
    """The templates that somebody asks with any of the parts in them."""
    found = []
    for template in templates:
        pattern = normal(re.sub(r"\{\w+\}", " PLACE ", template)).replace("place", "(.+)")
        matches = filter(None, map(re.compile(pattern).fullmatch, written.turns))
        if any({without_article(part) for part in match.groups()} <= parts for match in matches):
            found.append(template)
    return found


def test_unseen_wordings_are_unseen(written):
    """Those of wordings.tsv and frames.tsv. The seen ones are asked, by the same rule."""
    texts = world.load_wordings().texts
    for table in {table for table, _ in texts}:
        parts = askable(written, table)
        uses = [texts[key] for key in texts if key[0] == table]
        uses += [written.tables.frames] if table == "*" else []
        unseen = [
            text for use in uses for key in use if key.endswith("unseen") for text in use[key]
        ]
        assert unseen and not asked(written, unseen, parts), table
        seen = [text for use in uses for text in use.get("ask", use.get("child", []))]
        assert asked(written, seen, parts), table


# Strangers


def test_no_question_of_a_stranger_is_in_what_we_train_on(written):
    """A fact may use their words: "The capital of Egypt is Cairo." It tells a value besides."""
    turns = {normal(turn) for item in strangers.load_strangers() for turn in item["turns"]}
    assert len(turns) > 300
    short = {turn for turn in turns if len(turn.split()) < 3}
    assert not short & written.turns
    assert not (turns - short) & written.runs
    for name in ("corpus.txt", "val.txt"):
        lines = (written.folder / name).read_text(encoding="utf-8").split("\n")
        text = "\n".join(f" {normal(line)} " for line in lines)
        for turn in turns - short:
            values = values_of(turn, written.tables.entities)
            for line in lines_with(f" {turn} ", text):
                rest = line.replace(turn, " ")
                assert any(f" {value} " in rest for value in values), (name, turn, line)


def lines_with(phrase, text):
    end = 0
    while (at := text.find(phrase, end)) >= 0:
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        yield text[text.rfind("\n", 0, at) + 1 : end]


def values_of(turn, entities):
    """All values of the entities that a question mentions."""
    named = [e for e in entities if any(f" {normal(bare(n))} " in f" {turn} " for n in e.names)]
    return {normal(value) for e in named for values in e.values.values() for value in values}


# What is there


def test_the_corpus_is_full_of_quizzes(written):
    items = [item for side in SIDES for item in written.items[side]]
    prompts = {item["prompt"] for item in items if item["kind"] in ("fact", "free")}
    corpus = (written.folder / "corpus.txt").read_text(encoding="utf-8").split("\n\n")
    assert sum(document.count("\nA) ") for document in corpus) > 1000
    for document in corpus:
        first, _, rest = document.partition("\n")
        if first in prompts:  # options follow a bare question, and no answer
            assert rest.startswith("A) "), document


def test_tables_and_rows_of_ones_own(tmp_path, monkeypatch):
    """Without wordings, a table gets general ones. Each row is told, asked and answered."""
    shutil.copytree(tables.HERE, tmp_path / "w", ignore=shutil.ignore_patterns("*.py", "__p*"))
    for path in [*tmp_path.glob("w/questions/*"), *tmp_path.glob("w/facts/*")]:
        if path.stem not in ("basics", "countries"):
            path.unlink()
    with open(tmp_path / "w" / "facts" / "countries.tsv", "a", encoding="utf-8") as file:
        file.write("Zubrowka\tLutz\tEurope\tklubeck\tGerman\n")
    words = "Avo Bex Cid Dun Emo Fip Gax Hob Ivy Jub Kip Lum Mox Nix Orb Pax Quo Rux Sil Tux"
    bikes = {f"the {word}rad": (f"Anna {word}berg", f"{word}fast") for word in words.split()}
    rows = ["name\tmaker\tspeed", *("\t".join([name, *bikes[name]]) for name in bikes)]
    (tmp_path / "w" / "facts" / "bikes.tsv").write_text("\n".join(rows), encoding="utf-8")
    for module in (tables, wordings):
        monkeypatch.setattr(module, "HERE", tmp_path / "w")
    monkeypatch.setattr(world, "ROUNDS", 1)
    made = world.build(1)
    corpus = "\n\n".join(made["corpus"])
    lines, said = corpus.split("\n"), json.dumps(made["sft"])
    assert "{" not in corpus and "{" not in said.replace('{"', "")
    dialogues = 0
    for name, answers in {**bikes, "Zubrowka": ("Lutz", "klubeck")}.items():
        side = next(s for s in SIDES if any(item["name"] == name for item in made[s]))
        facts = [i for i in made[side] if i["name"] == name and i["kind"] == "fact"]
        for value in answers:
            (item,) = (item for item in facts if value in item["accept"])
            assert bare(name) in item["prompt"] and item["prompt"].endswith("?"), item
            assert bare(name) in item["unseen"] and item["unseen"] != item["prompt"], item
            assert name in item["response"] and value in item["response"], item
            general = f"The {item['attribute']} of {name} is {value}."
            assert name not in bikes or item["response"] == general, item
            told = [line for line in lines if bare(name) in line and value in line]
            assert told, item
            answer = rf"{bare(name)}.*\n(?:.{{,20}}\n)?.*{re.escape(item['response'])}"
            dialogues += bool(re.search(answer, corpus))  # the speaker may have a line of her own
            assert (value.lower() in said.lower()) == (side == "train"), item
    assert dialogues > 20  # the other questions are from other sides, or have typos
    for side in SIDES:
        assert any(item["name"] in bikes for item in made[side]), side


# Questions that were edited


@pytest.fixture()
def quick(monkeypatch):
    """Reads the facts only once."""
    monkeypatch.setattr(tables, "load_facts", LOAD_FACTS)


LOAD_FACTS = functools.cache(tables.load_facts)


def test_questions_come_back_as_they_were_written(written):
    for side in ("train", "dev", "test"):
        items = world.read_questions(written.folder / f"{side}.jsonl")
        assert items == written.made[side]
        assert {item["kind"] for item in items} == {"fact", "free", "style", "concept", "unknown"}
    assert world.read_smalltalk(written.folder / "smalltalk.jsonl") == written.made["smalltalk"]


CAPITAL = {
    "prompt": "What is the capital of Kenya?",
    "response": "The capital of Kenya is Nairobi.",
    "faq": "Q: What is the capital of Kenya?\nA:",
    "cloze": "The capital of Kenya is",
    "name": "Kenya",
    "table": "countries",
    "attribute": "capital",
    "accept": ["Nairobi"],
}
FREE = {key: CAPITAL[key] for key in ("prompt", "response", "faq", "name")}
FREE |= {"keys": [["Nairobi", "Nairobi City"]]}


def write_questions(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.mark.parametrize("key", CAPITAL)
def test_a_question_lacks_a_key(key, tmp_path, quick):
    broken = {k: value for k, value in CAPITAL.items() if k != key}
    path = write_questions(tmp_path / "test.jsonl", CAPITAL, broken)
    with pytest.raises(InputError, match=rf'test\.jsonl line 2: "{key}" (is missing|must be)'):
        world.read_questions(path)


@pytest.mark.parametrize("key", [*CAPITAL, "unseen", "keys"])
def test_a_value_of_a_question_is_of_another_type(key, tmp_path, quick):
    for value in (None, 7, True, {}, [7], [["a"], [7]], [[]], [""]):
        path = write_questions(tmp_path / "test.jsonl", CAPITAL, CAPITAL | {key: value})
        with pytest.raises(InputError, match=rf'test\.jsonl line 2: "{key}" must be ') as caught:
            world.read_questions(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("item", [None, 7, "text", ["prompt", "response"]])
def test_a_line_is_no_question(item, tmp_path, quick):
    path = write_questions(tmp_path / "dev.jsonl", FREE, item)
    for read in (world.read_questions, world.read_smalltalk):
        with pytest.raises(InputError, match=r"dev\.jsonl line 2: not a JSON object"):
            read(path)


@pytest.mark.parametrize("key", ["prompt", "faq", "name", "unseen"])
def test_a_question_is_empty(key, tmp_path, quick):
    path = write_questions(tmp_path / "test.jsonl", CAPITAL | {key: " "})
    with pytest.raises(InputError, match=rf'test\.jsonl line 1: "{key}" is empty'):
        world.read_questions(path)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"table": "rivers"}, 'no table "rivers" has the attribute "capital"'),
        ({"attribute": "anthem"}, 'no table "countries" has the attribute "anthem"'),
        ({"accept": ["Nairobi", "Gotham"]}, 'no capital in countries.tsv is "Gotham"'),
    ],
)
def test_the_scorer_does_not_know_it(change, complaint, tmp_path, quick):
    path = write_questions(tmp_path / "test.jsonl", CAPITAL, CAPITAL | change)
    with pytest.raises(InputError, match=rf"test\.jsonl line 2: {complaint}"):
        world.read_questions(path)


def test_a_question_of_ones_own(tmp_path, quick):
    """It needs keys, and no table and no cloze."""
    path = write_questions(tmp_path / "test.jsonl", FREE, CAPITAL)
    own, capital = world.read_questions(path)
    scorer = world.Scorer()
    assert own["attribute"] == "free question" and "unseen" not in capital
    for item in (own, capital):
        assert scorer.answered(item, "It is Nairobi.")
        assert not scorer.answered(item, "It is Lima.")


@pytest.mark.parametrize("key", ["prompt", "response"])
@pytest.mark.parametrize("value", ["missing", None, 7, ["Hello"]])
def test_a_mistake_in_the_small_talk_that_was_written(key, value, tmp_path):
    talk = {"prompt": "Hello", "response": "Hello!", key: value}
    if value == "missing":
        del talk[key]
    path = write_questions(tmp_path / "smalltalk.jsonl", FREE, talk)
    with pytest.raises(InputError, match=rf'smalltalk\.jsonl line 2: "{key}" (is miss|must be te)'):
        world.read_smalltalk(path)
