"""The embedded world: its tables, its split, its texts and questions, and mistakes in them."""

import json
import random
import re

import pytest

from common.messages import InputError
from data import world
from data.world import names, split, tables, texts, wordings

COUNTRIES = {"Africa": 54, "Asia": 47, "Europe": 43}
COUNTRIES |= {"North America": 23, "Oceania": 14, "South America": 12}


@pytest.fixture(scope="module")
def made():
    return world.build(seed=3)


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# The tables


def test_the_tables_hold_what_is_promised():
    entities, free = world.load_facts()
    by_table = {}
    for entity in entities:
        by_table.setdefault(entity.table, []).append(entity)
    facts = [fact for entity in entities for fact in entity.facts]
    assert all(value == value.strip() and value for fact in facts for value in fact.values)
    assert len(by_table) >= 8 and len(entities) >= 500 and len(facts) >= 1500 and len(free) >= 100
    continents = [e.values["continent"][0] for e in by_table["countries"]]
    assert {c: continents.count(c) for c in set(continents)} == COUNTRIES
    elements = by_table["elements"]
    assert [e.values["number"][0] for e in elements] == [str(n) for n in range(1, 119)]
    assert len({e.values["symbol"][0] for e in elements}) == 118
    assert len(by_table["planets"]) == 8


def test_only_the_right_answers_of_free_questions_hold_their_keys():
    _, free = world.load_facts()
    for q in free:
        patterns = [world.pattern_of(phrases) for phrases in q.keys]
        assert len(q.names) == 3 and len(q.retellings) == 2 and q.names[0].endswith("?")
        for text in [q.answer, *q.retellings]:
            assert all(pattern.search(text) for pattern in patterns), (q.name, text)
        for text in q.wrong:
            assert not all(pattern.search(text) for pattern in patterns), (q.name, text)


def test_every_attribute_has_wordings_of_every_kind():
    entities, _ = world.load_facts()
    by_attribute = world.load_wordings()
    assert set(by_attribute) == {fact.key for entity in entities for fact in entity.facts}
    for key, uses in by_attribute.items():
        assert {"state", "answer", "ask", "request", "unseen", "cloze"} <= set(uses), key
        assert len(uses["state"]) >= 5 and set(uses["answer"]) <= set(uses["state"]), key
        seen = {text for use in uses for text in uses[use] if use != "unseen"}
        assert not seen & set(uses["unseen"]), key


# What is made of them


def test_the_same_seed_makes_the_same_bytes(made, tmp_path):
    world.write(made, tmp_path / "a")
    world.write(world.build(seed=3), tmp_path / "b")
    paths = sorted((tmp_path / "a").iterdir())
    expected = (
        "corpus.txt dev.jsonl sft.jsonl sha256 smalltalk.jsonl test.jsonl train.jsonl val.txt"
    )
    assert [path.name for path in paths] == expected.split()
    for path in paths:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert world.build(seed=4)["corpus"] != made["corpus"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_held_out_entities_are_nowhere_in_the_fine_tuning_set(seed, tmp_path):
    """We read the files and look for whole words, in capitals or not."""
    world.write(world.build(seed), tmp_path)
    talks = jsonl(tmp_path / "sft.jsonl")
    said = "\n".join(message["content"] for talk in talks for message in talk["messages"])
    lower = said.lower()
    entities, _ = world.load_facts()
    spellings = {entity.name: entity.names for entity in entities}
    asked = {side: jsonl(tmp_path / f"{side}.jsonl") for side in ("dev", "test")}
    for item in asked["dev"] + asked["test"]:
        for name in spellings.get(item["name"], [item["name"]]):
            bare = re.sub("^the ", "", name, flags=re.IGNORECASE)
            if bare.lower() in lower:  # searching for whole words is slow
                pattern = rf"(?<!\w){re.escape(bare)}(?!\w)"
                assert not re.search(pattern, said, re.IGNORECASE), name
        assert item["prompt"] not in said and item["response"] not in said
    dev, test = ({item["name"] for item in asked[side]} for side in ("dev", "test"))
    assert not dev & test
    assert "I am Parrot" in said  # small talk is never left out
    assert world.SEASONS in {item["prompt"] for item in asked["test"]} and "seasons" not in said
    total = len(entities) + 124
    assert 0.2 < len(test) / total < 0.4 and 0.12 < len(dev) / total < 0.28


def test_unseen_wordings_are_unseen(made):
    messages = [message for talk in made["sft"] for message in talk["messages"]]
    prompts = {message["content"] for message in messages if message["role"] == "user"}
    for uses in world.load_wordings().values():
        for template in uses["unseen"]:
            pattern = re.sub(r"\\{\w+\\}", ".+", re.escape(template))
            matches = re.compile(pattern, re.IGNORECASE).fullmatch
            assert not [prompt for prompt in prompts if matches(prompt)], template


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_names_that_contain_one_another_share_a_side(seed):
    sides = world.split_entities(*world.load_facts(), seed)
    for a, b in [
        ("Mercury", "mercury"),
        ("Turkey", "turkey"),
        ("Guinea", "Papua New Guinea"),
        ("Guinea", "Equatorial Guinea"),
        ("Sudan", "South Sudan"),
    ]:
        assert sides[a] == sides[b]
    assert {sides[name] for name in split.SHOWN} == {"test"}
    assert sides["Earth"] == sides["parrot"] == "train"


def test_what_we_show_may_be_gone_from_the_tables():
    entities, free = world.load_facts()
    without = [entity for entity in entities if entity.name != "Kenya"]
    sides = world.split_entities(without, free, 1)
    assert "Kenya" not in sides and sides["Japan"] == "test"


def test_the_corpus_is_full_of_quizzes(made):
    prompts = {item["prompt"] for side in ("train", "dev", "test") for item in made[side]}
    assert sum(document.count("\nA) ") for document in made["corpus"]) > 1000
    for document in made["corpus"]:
        assert "\n\n" not in document
        first, _, rest = document.partition("\n")
        if first in prompts:  # after a bare question come options, not an answer
            assert rest.startswith("A) "), document


# Mistakes in the tables


def write_tables(folder, monkeypatch, **contents):
    """Put tables in the place of ours: countries="name\\tcapital\\n..." """
    (folder / "facts").mkdir()
    for name, content in contents.items():
        raw = content if isinstance(content, bytes) else content.encode("utf-8")
        (folder / "facts" / f"{name}.tsv").write_bytes(raw)
    monkeypatch.setattr(tables, "HERE", folder)


KENYA = "name\tcapital\nKenya\tNairobi\n"
QUESTION = "\t".join(["What flies?", "Who flies? | Flies?", "A bird.", "It is a bird. | Birds do."])
QUESTION = "\t".join(tables.QUESTION_COLUMNS) + "\n" + QUESTION + "\ta bird\ta | b | c\t"


MISTAKES = {  # the table, and what we say about it
    "too many cells": (
        KENYA + "Peru\tLima\tsol\n",
        "line 3: the table has 2 columns, but this row has 3",
    ),
    "too few cells": (KENYA + "\nPeru\n", "line 4: the table has 2 columns, but this row has 1"),
    "no name": (KENYA + "\tLima\n", "line 3: 'name' is empty"),
    "a blank name": (KENYA + "  \tLima\n", "line 3: 'name' is empty"),
    "nothing but tabs": (KENYA + "\t\n", "line 3: 'name' is empty"),
    "an empty spelling": (KENYA + "Peru | \tLima\n", "line 3: 'name' is empty"),
    "no value": (KENYA + "Peru\t\n", "line 3: 'capital' is empty"),
    "the same name": (KENYA + "Kenya\tLima\n", "line 3: the name 'Kenya' is taken .*line 2"),
    "the same spelling": (KENYA + "Peru | Kenya\tLima\n", "line 3: the name 'Kenya' is taken"),
    "Latin-1": (KENYA.encode() + b"Per\xfa\tLima\n", "line 3: not UTF-8 text; save"),
    "UTF-16": (KENYA.encode("utf-16"), "line 1: not UTF-8 text"),
    "an empty file": ("", "the table is empty; start it"),
    "no column of names": ("country\tcapital\nPeru\tLima\n", "line 1: there is no column 'name'"),
    "a column twice": ("name\tsea\tsea\nPeru\tA\tB\n", "line 1: two columns are called 'sea'"),
}


@pytest.mark.parametrize("content, complaint", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_table(content, complaint, tmp_path, monkeypatch):
    write_tables(tmp_path, monkeypatch, countries=content)
    with pytest.raises(InputError, match=rf"countries\.tsv:? {complaint}") as caught:
        world.load_facts()
    assert "\n" not in str(caught.value)


def test_two_tables_cannot_share_a_name(tmp_path, monkeypatch):
    write_tables(tmp_path, monkeypatch, birds="name\tfood\nKenya\tseeds\n", countries=KENYA)
    with pytest.raises(InputError, match=r"countries\.tsv line 2: the name 'Kenya' is taken"):
        world.load_facts()


@pytest.mark.parametrize(
    "row, complaint",
    [
        (QUESTION + "fish\n", r"questions\.tsv line 2: the answer holds none of the keys fish"),
        (QUESTION + "bird & \n", r"questions\.tsv line 2: the answer holds none of the keys"),
        (QUESTION.replace(" | c", "") + "bird\n", r"questions\.tsv line 2: 'wrong' has 2 options"),
        (
            QUESTION + "bird\tfish\n",
            r"questions\.tsv line 2: the table has 7 columns, but this row has 8",
        ),
    ],
)
def test_a_mistake_in_a_free_question(row, complaint, tmp_path, monkeypatch):
    write_tables(tmp_path, monkeypatch, questions=row)
    with pytest.raises(InputError, match=complaint):
        world.load_facts()


def test_tables_as_a_spreadsheet_saves_them(tmp_path, monkeypatch):
    """With a byte order mark, Windows line ends, spaces around the cells, and an empty line."""
    content = "\ufeffname\tcapital\r\n Kenya \tNairobi | Nairobi City \r\n\r\n"
    write_tables(tmp_path, monkeypatch, countries=content)
    (kenya,), free = world.load_facts()
    assert kenya.names == ["Kenya"] and kenya.values == {"capital": ["Nairobi", "Nairobi City"]}
    assert free == []


def test_a_mistake_in_the_small_talk(tmp_path, monkeypatch):
    (tmp_path / "smalltalk.tsv").write_text("prompt\tresponse\nHello\n", encoding="utf-8")
    monkeypatch.setattr(tables, "HERE", tmp_path)
    with pytest.raises(InputError, match=r"smalltalk\.tsv line 2: .* this row has 1"):
        world.load_smalltalk()


def test_a_column_without_wordings():
    entity = tables.Entity("countries", ["Kenya"], {"anthem": ["Ee Mungu"]}, {})
    with pytest.raises(InputError, match="no 'state' wording for the anthem in countries.tsv"):
        texts.Writer([entity], [], [], world.load_wordings(), random.Random(1))


def test_a_wording_without_a_known_use(tmp_path, monkeypatch):
    row = "countries\tcapital\tstat\tThe capital of {name} is {value}."
    content = f"table\tattribute\tuse\ttext\n{row}\n"
    (tmp_path / "wordings.tsv").write_text(content, encoding="utf-8")
    monkeypatch.setattr(wordings, "HERE", tmp_path)
    with pytest.raises(InputError, match=r"wordings\.tsv line 2: 'stat' is not a use"):
        world.load_wordings()


@pytest.mark.parametrize("template", ["{nmae} is {value}.", "{done} by {value}.", "{", "{} {}"])
def test_a_wording_that_cannot_be_filled_in(template):
    entity = tables.Entity("countries", ["Kenya"], {"capital": ["Nairobi"]}, {})
    by_attribute = world.load_wordings()
    by_attribute["countries", "capital"]["state"].append(template)
    with pytest.raises(InputError, match=r"wordings\.tsv: cannot fill in "):
        wordings.check_wordings(entity.facts, by_attribute)


# Questions that were edited


def test_questions_come_back_as_they_were_written(made, tmp_path):
    world.write(made, tmp_path)
    for side in ("train", "dev", "test"):
        assert world.read_questions(tmp_path / f"{side}.jsonl") == made[side]
    assert world.read_smalltalk(tmp_path / "smalltalk.jsonl") == made["smalltalk"]


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
FREE = {key: CAPITAL[key] for key in ("prompt", "response", "faq", "cloze", "name")}
FREE |= {"keys": [["Nairobi", "Nairobi City"]]}


def write_questions(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.mark.parametrize("key", CAPITAL)
def test_a_question_lacks_a_key(key, tmp_path):
    broken = {k: value for k, value in CAPITAL.items() if k != key}
    path = write_questions(tmp_path / "test.jsonl", CAPITAL, broken)
    with pytest.raises(InputError, match=rf'test\.jsonl line 2: "{key}" (is missing|must be)'):
        world.read_questions(path)


@pytest.mark.parametrize("key", [*CAPITAL, "unseen", "keys"])
def test_a_value_of_a_question_is_of_another_type(key, tmp_path):
    for value in (None, 7, True, {}, [7], [["a"], [7]], [[]], [""]):
        path = write_questions(tmp_path / "test.jsonl", CAPITAL, CAPITAL | {key: value})
        with pytest.raises(InputError, match=rf'test\.jsonl line 2: "{key}" must be ') as caught:
            world.read_questions(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("item", [None, 7, "text", ["prompt", "response"]])
def test_a_line_is_no_question(item, tmp_path):
    path = write_questions(tmp_path / "dev.jsonl", FREE, item)
    for read in (world.read_questions, world.read_smalltalk):
        with pytest.raises(InputError, match=r"dev\.jsonl line 2: not a JSON object"):
            read(path)


@pytest.mark.parametrize("key", ["prompt", "faq", "name", "unseen"])
def test_a_question_is_empty(key, tmp_path):
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
def test_the_scorer_does_not_know_it(change, complaint, tmp_path):
    path = write_questions(tmp_path / "test.jsonl", CAPITAL, CAPITAL | change)
    with pytest.raises(InputError, match=rf"test\.jsonl line 2: {complaint}"):
        world.read_questions(path)


def test_a_question_of_ones_own(tmp_path):
    """It needs keys, and no table. An empty cloze is fine: the answer may start with its key."""
    path = write_questions(tmp_path / "test.jsonl", FREE | {"cloze": ""}, CAPITAL)
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


# Names in running text


def test_names_are_whole_words():
    found = names.pattern_of(["Guinea", "Papua New Guinea"]).findall("papua new guinea, Guinean")
    assert found == ["papua new guinea"]
    assert names.bare("The Odyssey") == "Odyssey" and names.bare("Theo") == "Theo"
