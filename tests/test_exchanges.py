"""Exchanges: invented names, questions from all sides, conversations, and typing."""

import random
import re
from collections import Counter

import pytest

from data.world import exchanges, invented, noise, split, tables, threads, wordings
from data.world.names import normal

# Invented names


def test_invented_names_belong_to_one_side():
    made = tables.load_tables()
    found = {}
    for side in ("train", "dev", "test"):
        inventor = invented.Inventor(made.invented, {side}, random.Random(1))
        found[side] = {inventor.name(table) for table in invented.FORMS for _ in range(100)}
        assert {split.side_of(name, "invented") for name in found[side]} == {side}
        assert not [name for name in found[side] if "{" in name or not name.strip()]
    assert not found["train"] & (found["dev"] | found["test"]) and not found["dev"] & found["test"]
    assert min(map(len, found.values())) > 500
    assert set(invented.FORMS) == {entity.table for entity in made.entities}


def test_no_invented_name_is_a_real_one():
    parts = {"start": ["pa", "vol", "zu"], "middle": ["ki", "ga"], "place": ["stan"]}
    parts |= {"form_country": ["{start}{middle}{place}", "the Republic of {start}{middle}{place}"]}
    parts |= {"form_landform": ["the {start}{middle} River"], "form_title": ["A Real Title", "Zu"]}
    real = ["Pakistan", "the Volga", "a real title", "river", "republic"]
    inventor = invented.Inventor(parts, {"train", "dev", "test"}, random.Random(1), real)
    found = {inventor.make(form) for form in parts if "form" in form for _ in range(200)}
    assert found == {
        *("Pagastan", "Volkistan", "Volgastan", "Zukistan", "Zugastan"),
        *(f"the Republic of {name}" for name in ("Pagastan", "Volkistan", "Volgastan")),
        *(f"the Republic of {name}" for name in ("Zukistan", "Zugastan")),
        *("the Paki River", "the Paga River", "the Volki River"),
        *("the Zuki River", "the Zuga River", "Zu"),
    }


# Exchanges about a few facts that we check by hand

SPOKEN = ["Dutch", "French", "German"]
ROWS = [
    *(("countries", name, {"continent": ["Africa"]}) for name in ("Kenya", "Chad", "Togo")),
    *(("countries", name, {"continent": ["Africa"]}) for name in ("the Gambia", "Mali", "Egypt")),
    ("countries", "Belgium", {"continent": ["Europe"], "language": SPOKEN}),
    ("countries", "France", {"continent": ["Europe"], "language": ["French"]}),
    ("countries", "Spain", {"continent": ["Europe"], "language": ["Spanish"]}),
    ("countries", "Peru", {"continent": ["America"], "language": ["Spanish"]}),
    ("elements", "hydrogen", {"number": ["1"], "kind": ["gas"]}),
    ("elements", "helium", {"number": ["2"], "kind": ["gas"]}),
    ("elements", "lithium", {"number": ["3"], "kind": ["metal"]}),
    ("planets", "Mars", {"position": ["fourth"], "year": ["687 days"]}),
    ("planets", "Jupiter", {"position": ["fifth"], "year": ["12 years"]}),
    ("inventions", "dynamite", {"inventor": ["Nobel"], "year": ["1867"]}),
    ("inventions", "the telephone", {"inventor": ["Bell"], "year": ["1876"]}),
    ("books", "Emma", {"author": ["Austen"]}),
    ("books", "Persuasion", {"author": ["Austen"]}),
]
RIGHT = {(name, attribute): v for _, name, values in ROWS for attribute, v in values.items()}
FACT = {  # wordings that we can read again
    "ask": ["ask {attribute} of {name}"],
    "request": ["request {attribute} of {name}"],
    "unseen": ["unseen {attribute} of {name}"],
    "cloze": ["cloze {name}"],
    "state": ["The {attribute} of {name} is {value}."],
    "answer": ["The {attribute} of {name} is {value}."],
    "back": ["back {attribute}: {value}"],
    "back_answer": ["The {attribute} of {name} is {value}."],
    "list": ["list {n} with {attribute}: {value}"],
    "list_answer": ["{names} have the {attribute} {value}."],
    "yes": ["yes {attribute} of {name}: {value}"],
    "either": ["either {attribute} of {name}: {value} or {other}"],
    "same": ["same {short} of {mention} / {mention2}"],
    "more": ["more {attribute}: {name} / {name2}"],
    "more_answer": ["{name} {value}, {name2} {value2}, more: {winner}"],
    "less": ["less {attribute}: {name} / {name2}"],
    "less_answer": ["{name} {value}, {name2} {value2}, less: {winner}"],
    "follow": ["follow {attribute}"],
    "short": ["the {attribute}"],
}
ENTITY = {"mention": ["{name}"], "tell": ["tell {name}"], "compare": ["compare {name} / {name2}"]}
for USES in (FACT, ENTITY):
    for USE in USES.keys() & {*"back list yes either same more less tell compare".split()}:
        USES[f"{USE}_unseen"] = [f"unseen {USES[USE][0]}"]
FRAMED = [use for use in tables.FRAMES if use not in tables.FORMS]
SIDES = {"train", "dev", "test"}
TOLD = re.compile(r"The (\w+) of (.+?) is (.+?)\.(?= |$)")


@pytest.fixture(scope="module")
def tiny():
    entities = []
    for table, name, values in ROWS:
        words = {"done": "was invented"} if table == "inventions" else {}
        entities.append(tables.Entity(table, [name], values, words))
    named = {use: " ".join(f"{{{word}}}" for word in sorted(tables.FRAMES[use])) for use in FRAMED}
    frames = {use: [f"{use} frame {words}"] for use, words in named.items()}
    frames |= {f"{use}_unseen": [f"unseen {text}"] for use, (text,) in frames.items()}
    parts = {form: ["Zarovia", "Nowhere"] for form in set(invented.FORMS.values())}
    thanks = {"kind": "thanks", "prompts": ["ta"], "unseen": ["ta ta"], "response": "Welcome."}
    unknown = {"-": ["Who won?"], "me": ["Who am I?"], "books": []}
    chatter = {"before": ["Hi,"], "after": ["thanks"]}
    about = [[thanks], [], unknown, ["I don't know."], chatter, frames, parts]
    return tables.Tables(entities, [], [], *about)


def asker_of(tiny, seed, unseen=False):
    texts = {("*", "any"): FACT, ("*", "*"): ENTITY}
    said = wordings.Wordings(texts, {})
    rng = random.Random(seed)
    return exchanges.Asker(tiny, said, tiny.entities, [], [], SIDES, rng, unseen)


def each(tiny, way, unseen=False):
    """Exchanges of one way, about each fact, many times: [(fact, Exchange)]"""
    found = []
    for seed in range(40):
        asker = asker_of(tiny, seed, unseen)
        found += [(fact, getattr(asker, way)(fact)) for fact in asker.facts]
    return [(fact, exchange) for fact, exchange in found if exchange]


def facts_in(text):
    """{(name, attribute): value} of everything that the text tells."""
    return {(name, attribute): value for attribute, name, value in TOLD.findall(text)}


def is_true(text):
    return all(value == RIGHT[key][0] for key, value in facts_in(text).items())


def test_facts_of_small_tables_are_asked_for_more_often(tiny, monkeypatch):
    monkeypatch.setattr(exchanges, "SMALL", 20)
    asker = asker_of(tiny, 1)
    times = Counter((fact.name, fact.attribute) for fact in asker.weighted())
    assert set(times) == {(fact.name, fact.attribute) for fact in asker.facts}
    # There are ten continents and two positions of planets.
    assert times["Kenya", "continent"] == 2 and times["Mars", "position"] == 10
    monkeypatch.setattr(exchanges, "SMALL", 1)
    assert asker.weighted() == sum(asker.by_key.values(), [])


@pytest.mark.parametrize("unseen", [False, True])
def test_no_refusal_names_a_real_animal(unseen, monkeypatch):
    """An invented animal has an invented plural."""
    names = ("falwing", "talfish", "grabox")
    assert [*map(invented.plural_of, names)] == ["falwings", "talfishes", "graboxes"]
    monkeypatch.setattr(exchanges, "plural_of", lambda name: f"many {name}")
    made = tables.load_tables()
    animals = [entity for entity in made.entities if entity.table == "animals"]
    rng, said = random.Random(1), wordings.load_wordings()
    asker = exchanges.Asker(made, said, animals, [], [], {"train"}, rng, unseen)
    real = {name for animal in animals for name in (*animal.names, animal.words["plural"])}
    plurals = 0
    for fact in asker.facts * 10:
        question = asker.ask_invented(fact)
        assert not {f" {name} " for name in real if f" {name} " in f" {normal(question)} "}
        plurals += "many " in question.lower()
    assert unseen or plurals > 100


@pytest.mark.parametrize("unseen", [False, True])
def test_every_question_is_in_wordings_of_its_kind_and_every_answer_is_true(unseen, tiny):
    for way in exchanges.WAYS:
        found = each(tiny, way, unseen)
        assert len(found) > 40, way
        for _, exchange in found:
            marked = exchange.question.startswith("unseen")
            assert marked == (unseen and way != "both"), exchange
            assert is_true(exchange.answer), exchange


def test_a_fact_is_asked_for_by_its_name_and_by_its_value(tiny):
    for fact, exchange in each(tiny, "plain"):
        assert exchange.question.endswith(f"{fact.attribute} of {fact.name}")
        assert facts_in(exchange.answer) == {(fact.name, fact.attribute): fact.values[0]}
        assert exchange.value == fact.values[0]
    for fact, exchange in each(tiny, "back"):
        assert exchange.question == f"back {fact.attribute}: {fact.values[0]}"
        assert facts_in(exchange.answer) == {(exchange.value, fact.attribute): fact.values[0]}
        assert RIGHT[exchange.value, fact.attribute][0] == fact.values[0]
        assert exchange.fact.name == exchange.value


def test_a_list_has_different_things_with_that_value(tiny):
    having = {"Africa": ["Chad", "Egypt", "the Gambia", "Kenya", "Mali", "Togo"]}  # by the alphabet
    having |= {"Europe": ["Belgium", "France", "Spain"], "Spanish": ["Peru", "Spain"]}
    having |= {"gas": ["helium", "hydrogen"], "Austen": ["Emma", "Persuasion"]}
    seen = {value: set() for value in having}  # what only one thing has is never listed
    for fact, exchange in each(tiny, "some"):
        value, n = fact.values[0], exchange.question.split()[1]
        listed = re.split(", | and ", exchange.value)
        assert exchange.fact is None
        assert exchanges.NUMBERS[len(listed)] == n and len(set(listed)) == len(listed)
        assert listed == having[value][: len(listed)]  # always the first ones
        told = f"{exchange.value} have the {fact.attribute} {value}."
        assert normal(exchange.answer) == normal(told)
        seen[value].add(len(listed))
    assert seen.pop("Africa") == {2, 3, 4, 5} and seen.pop("Europe") == {2, 3}
    assert all(sizes == {2} for sizes in seen.values()) and exchanges.joined(["Mali"]) == "Mali"
    assert exchanges.joined(["Mali", "Togo", "Chad"]) == "Mali, Togo and Chad"


def test_what_is_held_out_changes_no_list(tiny):
    """A list is the beginning of the whole one, or there is none."""
    whole = ["Chad", "Egypt", "the Gambia", "Kenya", "Mali", "Togo"]
    for held_out, lists in (("Mali", {2, 3, 4}), ("Egypt", set()), ("Chad", set())):
        ours = [entity for entity in tiny.entities if entity.name != held_out]
        said, found = wordings.Wordings({("*", "any"): FACT, ("*", "*"): ENTITY}, {}), set()
        asker = exchanges.Asker(tiny, said, ours, [], [], SIDES, random.Random(1))
        kenya = next(fact for fact in asker.facts if fact.name == "Kenya")
        for _ in range(100):
            if exchange := asker.some(kenya):
                listed = re.split(", | and ", exchange.value)
                assert listed == whole[: len(listed)]
                found.add(len(listed))
        back = asker.back(kenya)
        assert found == lists
        assert back is None if held_out == "Chad" else back.value == "Chad"


PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()


def lists_of(entities, made, unseen=False):
    """Many lists of what is in each table: {table: {(number in the question or None, names)}}"""
    rng, said = random.Random(1), wordings.load_wordings()
    asker = exchanges.Asker(made, said, entities, [], [], SIDES, rng, unseen)
    numbers = {word: n for n, word in exchanges.NUMBERS.items()}
    found = {table: set() for table in asker.by_table}
    for table in list(asker.by_table) * 150:
        if exchange := asker.members(table):
            words = normal(exchange.question).split()
            (n,) = [numbers[word] for word in words if word in numbers] or [None]
            assert normal(exchange.value) in normal(exchange.answer) and exchange.fact is None
            assert "{" not in exchange.question + exchange.answer
            found[table].add((n, exchange.value))
    return found


@pytest.mark.parametrize("unseen", [False, True])
def test_a_list_of_what_is_in_a_table(unseen):
    """As many as the question says, always the first ones. Without a number, all of a few."""
    made = tables.load_tables()
    for table, found in lists_of(made.entities, made, unseen).items():
        names = [entity.name for entity in made.entities if entity.table == table]
        first = {n: exchanges.joined(names[:n]) for n in (2, 3, 4, 5)}  # so nothing comes twice
        assert {(n, value) for n, value in found if n} == set(first.items()), table
        rest = {value for n, value in found if not n}
        assert rest <= ({exchanges.joined(PLANETS)} if table == "planets" else {*first.values()})
        assert rest or unseen, table


def test_all_planets_are_not_asked_for_if_some_are_held_out():
    """If the question's number is too high, we lower it. One name alone is no list."""
    made = tables.load_tables()
    planets = [entity for entity in made.entities if entity.table == "planets"]
    two_or_three = {(2, "Mercury and Venus"), (3, "Mercury, Venus and Earth")}
    assert lists_of(planets[:3] + planets[4:], made) == {"planets": two_or_three}  # without Mars
    assert lists_of(planets[:1], made) == lists_of(planets[1:], made) == {"planets": set()}


def test_yes_or_no_is_answered_by_the_fact(tiny):
    """Whatever the question suggests."""
    suggested = Counter()
    for fact, exchange in each(tiny, "yes_no"):
        asked = exchange.question.split(": ")[1]
        right = asked == fact.values[0]
        suggested[right] += 1
        assert asked not in fact.values[1:]  # "Is French spoken in Belgium?" has no clear answer
        assert exchange.answer == f"The {fact.attribute} of {fact.name} is {fact.values[0]}."
        assert exchange.value == fact.values[0]
    assert min(suggested[True], suggested[False]) > 200
    for fact, exchange in each(tiny, "either"):
        options = exchange.question.split(": ")[1].split(" or ")
        assert [option for option in options if option in fact.values] == [fact.values[0]]
        assert len(set(options)) == 2 and exchange.value == fact.values[0]


def test_the_higher_value_wins(tiny):
    bigger = {"hydrogen": 1, "helium": 2, "lithium": 3, "Mars": 687, "Jupiter": 4383}
    bigger |= {"dynamite": 1867, "the telephone": 1876}
    places, ways = {"Mars": 4, "Jupiter": 5}, Counter()
    for fact, exchange in each(tiny, "compare"):
        way, attribute, pair = re.match(r"(\w+) (\w+): (.+)", exchange.question).groups()
        sizes = places if attribute == "position" else bigger
        pick = max if way == "more" else min
        one, other = pair.split(" / ")
        assert one == fact.name and exchange.value == pick(one, other, key=sizes.get)
        numbers = ", ".join(f"{name} {RIGHT[name, attribute][0]}" for name in (one, other))
        assert normal(exchange.answer) == normal(f"{numbers}, {way}: {exchange.value}")
        ways[way, attribute] += 1
    assert set(ways) == {(w, a) for w in ("more", "less") for a in ("number", "position", "year")}
    assert exchanges.magnitude("about 1,200 days") == 1200 and not exchanges.magnitude("Nairobi")


def test_two_things_have_the_same_value_or_not(tiny):
    equal = Counter()
    for _, exchange in each(tiny, "same"):
        attribute, pair = re.match(r"same the (\w+) of (.+)", exchange.question).groups()
        one, other = pair.split(" / ")
        values = [RIGHT[name, attribute] for name in (one, other)]
        assert one != other
        assert attribute != "language" or {one, other} != {"Belgium", "France"}  # yes and no
        told = [((name, attribute), v[0]) for name, v in zip((one, other), values, strict=True)]
        assert list(facts_in(exchange.answer).items()) == told and not exchange.value
        same = values[0] == values[1]
        assert exchange.answer.endswith("So yes." if same else "So no.")
        equal[same] += 1
    assert min(equal[True], equal[False]) > 50
    # Only one thing has this number, so the answer would always be no.
    assert all("number" not in exchange.question for _, exchange in each(tiny, "same"))


def test_two_facts_at_once(tiny):
    for fact, exchange in each(tiny, "both"):
        told = facts_in(exchange.answer)
        assert len(told) == 2 and {name for name, _ in told} == {fact.name}
        assert all(f"the {attribute}" in exchange.question for _, attribute in told)
    for fact, exchange in each(tiny, "about"):
        assert exchange.question == f"tell {fact.name}"
        assert {attribute for _, attribute in facts_in(exchange.answer)} == set(fact.entity.values)
    for fact, exchange in each(tiny, "contrast"):
        one, other = exchange.question.removeprefix("compare ").split(" / ")
        assert one == fact.name != other
        assert {name for name, _ in facts_in(exchange.answer)} == {one, other}


def test_what_is_asked_about_invented_things_is_refused(tiny):
    asked = [asker_of(tiny, seed).unknowable() for seed in range(600)]
    assert {exchange.answer for exchange in asked} == {"I don't know."}
    questions = {exchange.question for exchange in asked}
    assert {"Who won?", "Who am I?"} < questions
    for question in questions - {"Who won?", "Who am I?"}:
        assert "Zarovia" in question or "Nowhere" in question, question
        assert not any(re.search(rf"\b{name}\b", question) for _, name, _ in ROWS), question


# Conversations of several turns


def place(fact):
    """Where it is among its like: lithium is the third element."""
    values = fact.entity.values
    return exchanges.magnitude(values.get("number", values.get("position"))[0])


def check_move(move, exchange, before):
    """Check that an exchange is what the move leads to, from the exchange before."""
    now, asked, before = exchange.fact, before.way != "topic", before.fact
    if move in ("follow", "when", "correct_short"):
        assert now.name == before.name
        assert move == "when" or f" {now.attribute}" in exchange.question
        assert move != "when" or now.key == ("inventions", "year")
        assert not asked or now.key != before.key
    elif move in ("same", "correct"):
        assert now.key == before.key and now.name != before.name
        assert exchange.question.endswith(f" {now.name}")
    elif move == "another":
        assert now.key == before.key and now.values[0] == before.values[0]
    elif move in ("next", "previous"):
        assert now.entity.table == before.entity.table
        assert place(now) - place(before) == (1 if move == "next" else -1)


@pytest.mark.parametrize("unseen", [False, True])
def test_conversations_of_several_turns_hang_together(unseen, tiny):
    moves = Counter()
    for seed in range(400):
        asker = asker_of(tiny, seed, unseen)
        fact, length = asker.rng.choice(asker.facts), 2 + seed % 4
        thread = threads.Threads(asker).thread(fact, length)
        assert len(thread) == length and thread[0].fact.entity is not None, thread
        before = None  # the exchange before, except for thanks
        for exchange in thread:
            assert exchange.question.strip() and exchange.answer.strip(), thread
            assert is_true(exchange.answer), thread
            assert facts_in(exchange.answer) or exchange.way not in ("plain", "back"), thread
            words = exchange.question.removeprefix("unseen ").split()
            if "frame" in words[1:2] or words[0] == "follow":
                check_move(words[0], exchange, before or exchange)
                moves[words[0]] += 1
            moves["thanks"] += exchange.way == "chat"
            before = before if exchange.way == "chat" else exchange
    assert set(moves) == {*FRAMED, "thanks"} and min(moves.values()) >= 5


def test_a_conversation_without_anybody_to_thank(tiny, monkeypatch):
    monkeypatch.setattr(threads, "MOVES", {"thanks": 1})
    monkeypatch.setattr(tiny, "smalltalk", [])
    asker = asker_of(tiny, 1)
    assert len(threads.Threads(asker).thread(asker.facts[0], 5)) == 5


# Questions as people type them


def test_a_typo_keeps_the_first_letter():
    rng = random.Random(1)
    for word in ("Kenya", "cow", "the", '"hot"', "Côte", "xxx", "well-known"):
        wrong = {noise.misspell(word, rng) for _ in range(300)}
        assert len(wrong) > 3
        assert all(other[0] == word[0] and len(other) >= len(word) - 2 for other in wrong)
    question = "What is the capital of Kenya?"
    for _ in range(300):
        for spoil in (noise.misspelled, noise.with_typos):
            words = spoil(question, rng).split()
            assert [word[0] for word in words] == [word[0] for word in question.split()]
    assert noise.with_typos("a 12 ?", rng) == noise.misspelled("a 12 ?", rng) == "a 12 ?"


def test_small_words_are_left_out():
    question, rng = "What is the name of the author of The Trial?", random.Random(1)
    assert noise.with_fewer_words(question, 1.0, rng) == "author The Trial?"
    assert noise.with_fewer_words("tell me the capital of kenya", 1.0, rng) == "capital kenya"
    assert noise.with_fewer_words("Who is it?", 1.0, rng) == "Who is it?"  # nothing would be left
    assert noise.with_fewer_words(question, 0.0, rng) == question
    found = {noise.with_fewer_words(question, 0.5, rng) for _ in range(300)}
    assert len(found) > 50
    for text in found:
        assert text.endswith("The Trial?") and "author" in text
        rest = iter(question.split())
        assert all(word in rest for word in text.split())  # in the same order


def test_typing_empties_no_question_and_repeats_itself_with_the_same_seed():
    questions = ["What is the capital of Kenya?", "a", "?", "...", "Is it?!", "who", "42."]
    around = ["Hi,", "Tell me:", "please"], ["thanks", "?"]

    def typed(seed, *around):
        rng = random.Random(seed)
        return [noise.as_typed(question, rng, *around) for question in questions * 300]

    assert typed(1, *around) == typed(1, *around) != typed(2, *around)
    for texts in (typed(3, *around), typed(3, [], [])):
        assert all(text.strip() for text in texts)
    found = {text for text in typed(4, [], []) if text.lower().startswith("w")}
    assert len(found) > 20 and questions[0] in found  # some stay as they are
