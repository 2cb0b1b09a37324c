"""The embedded world: its tables, mistakes in them, and the split."""

import random
import re
import shutil
from collections import Counter

import pytest

from common.messages import InputError
from data import world
from data.world import exchanges, names, noise, split, tables, texts, wordings
from data.world.names import bare, normal

OLD = "animals books countries elements inventions music paintings planets".split()
COUNTRIES = {"Africa": 54, "Asia": 47, "Europe": 43}
COUNTRIES |= {"North America": 23, "Oceania": 14, "South America": 12}


@pytest.fixture(scope="module")
def made():
    return tables.load_tables()


def twice(texts):
    """Those that occur more than once, in whatever case and punctuation."""
    return [text for text, n in Counter(normal(text) or text for text in texts).items() if n > 1]


# The tables


def test_the_facts_are_what_is_promised(made):
    by_table = {}
    for entity in made.entities:
        by_table.setdefault(entity.table, []).append(entity)
    facts = [fact for entity in made.entities for fact in entity.facts]
    assert all(value == value.strip() and value for fact in facts for value in fact.values)
    assert set(OLD) <= set(by_table) and len(made.entities) >= 800 and len(facts) >= 1900
    assert sum(len(rows) >= 60 for table, rows in by_table.items() if table not in OLD) >= 3
    continents = [e.values["continent"][0] for e in by_table["countries"]]
    assert {c: continents.count(c) for c in set(continents)} == COUNTRIES
    elements = by_table["elements"]
    assert [e.values["number"][0] for e in elements] == [str(n) for n in range(1, 119)]
    assert len({e.values["symbol"][0] for e in elements}) == 118
    assert len(by_table["planets"]) == 8
    opposites = {e.name: e.values["opposite"] for e in by_table["opposites"]}
    assert all(word in opposites.get(values[0], [word]) for word, values in opposites.items())


def test_free_questions_are_asked_in_many_ways_and_answered_in_three(made):
    assert len(made.free) >= 600
    for q in made.free:
        assert len(q.names) >= 7 and q.names[0].endswith("?"), q.name
        assert len(q.retellings) == 2 and len({q.right, *q.wrong}) == 4, q.name
        for text in [q.answer, *q.retellings]:
            assert re.match('["A-Z0-9]', text) and text.endswith("."), text
    assert not twice(name for q in made.free for name in q.names)
    assert not twice(text for q in made.free for text in [q.answer, *q.retellings])


def test_only_the_right_answers_of_free_questions_hold_their_keys(made):
    for q in made.free:
        patterns = [world.pattern_of(phrases) for phrases in q.keys]
        for text in [q.answer, *q.retellings, q.right]:
            assert all(pattern.search(text) for pattern in patterns), (q.name, text)
        for text in q.wrong:
            assert not all(pattern.search(text) for pattern in patterns), (q.name, text)


def test_concepts_are_explained_in_three_ways(made):
    assert len(made.concepts) >= 150 and {"gravity", "the printing press"} <= {
        concept.name for concept in made.concepts
    }
    for concept in made.concepts:
        assert set(concept.texts) == set(tables.FORMS) and len(concept.asks) >= 2, concept.name
        assert concept.texts["child"].startswith("Imagine "), concept.name
        assert not concept.texts["encyclopedia"].startswith("Imagine"), concept.name
        assert len(concept.texts["sentence"]) < len(concept.texts["encyclopedia"]), concept.name
        assert all(text.endswith(".") for text in concept.texts.values()), concept.name
    assert not twice(name for c in made.concepts for name in c.names + c.asks)
    assert not twice(text for c in made.concepts for text in c.texts.values())


def test_small_talk_belongs_to_one_row(made):
    assert len(made.smalltalk) >= 150
    for row in made.smalltalk:
        assert len(row["prompts"]) >= 6 and len(row["unseen"]) >= 1 and row["kind"], row
    owner = {}
    for i, row in enumerate(made.smalltalk):
        for prompt in row["prompts"] + row["unseen"]:
            assert owner.setdefault(normal(prompt) or prompt, i) == i, prompt
        assert not set(map(normal, row["prompts"])) & set(map(normal, row["unseen"])) - {""}, row
    assert len({row["response"] for row in made.smalltalk}) >= 100  # similar rows share one
    assert {"greeting", "thanks", "goodbye", "joke"} <= {row["kind"] for row in made.smalltalk}


def test_the_texts_first_tell_and_then_ask(made):
    said, rng = world.load_wordings(), random.Random(1)
    whole = made.entities, made.free, made.concepts
    asker = exchanges.Asker(made, said, *whole, {"train"}, rng)
    documents = texts.Writer(asker).documents(3)
    lines = "\ncapital: ", "\ncurrency: "  # a box has both
    boxes = [i for i, text in enumerate(documents) if all(line in text for line in lines)]
    assert len(boxes) > 50 and max(boxes) < 0.8 * len(documents)
    assert sum("\nAnswer: A) " in text for text in documents[int(0.8 * len(documents)) :]) > 20


def test_what_nobody_knows_is_in_no_other_table(made):
    assert len(made.unknown["-"]) >= 300 and len(made.unknown["me"]) >= 100
    known = {name for q in made.free for name in q.names}
    known |= {ask for concept in made.concepts for ask in concept.asks}
    known |= {prompt for row in made.smalltalk for prompt in row["prompts"] + row["unseen"]}
    questions = [text for texts in made.unknown.values() for text in texts]
    assert not twice(questions) and not set(map(normal, questions)) & set(map(normal, known))
    assert set(made.unknown) - {"-", "me"} <= {entity.table for entity in made.entities}
    for about in ("-", "me"):
        sides = Counter(split.side_of(text, "unknown") for text in made.unknown[about])
        assert min(sides[side] for side in ("train", "dev", "test")) >= 10, about
    assert made.refusals and not twice(made.refusals)


def test_styles_can_be_told_apart(made):
    assert len(made.styles) >= 6 and not twice(style["style"] for style in made.styles)
    assert len({style["use"] for style in made.styles}) == len(made.styles)
    for style in made.styles:
        assert len(style["instructions"]) >= 20 and len(style["unseen"]) >= 5, style["style"]
    assert not twice(i for style in made.styles for i in style["instructions"] + style["unseen"])


def test_chatter_and_frames_are_in_one_place(made):
    assert set(made.chatter) >= {"before", "after"} and min(map(len, made.chatter.values())) >= 20
    assert set(tables.FRAMES) <= set(made.frames) and min(map(len, made.frames.values())) >= 2
    for place in tables.PLACES:
        assert len(set(made.chatter[place])) == len(made.chatter[place]), place
    for use in tables.FRAMES:
        assert not twice(made.frames[use] + made.frames.get(f"{use}_unseen", [])), use
        assert use in tables.SEEN_ONLY or len(made.frames[use]) >= 10, use


# What the wordings of a use mention: a name, a value.
MENTIONS = {
    **{use: (True, False) for use in ("ask", "request", "unseen", "cloze", "tell")},
    **{use: (True, True) for use in ("state", "answer", "back_answer", "yes", "either")},
    **{use: (False, True) for use in ("back", "list", "list_all", "list_answer")},
    **{use: (False, False) for use in ("follow", "short")},
}
OF_EVERY_FACT = [*wordings.NEEDED, "follow", "short", "back", "yes", "either"]
OF_EVERY_FACT += ["back_unseen", "yes_unseen", "either_unseen"]


def mentions(template, *words):
    found = tables.placeholders(template)
    return any(word in found or f"a_{word}" in found for word in words)


def test_every_attribute_has_wordings_of_every_kind(made):
    facts = [fact for entity in made.entities for fact in entity.facts]
    texts, holders = world.load_wordings().texts, Counter((f.key, f.values[0]) for f in facts)
    keys, shared = {fact.key for fact in facts}, {key for (key, _), n in holders.items() if n >= 4}
    about = {key for key in texts if key[1] == "*"} | {("*", "any")}
    assert keys == set(texts) - about and {table for table, _ in keys | {("*", "*")}} == {
        table for table, attribute in about if attribute == "*"
    }
    for key in keys:
        assert set(OF_EVERY_FACT) <= set(texts[key]), key
        assert len(texts[key]["state"]) >= 5 and len(texts[key]["request"]) >= 15, key
        assert set(texts[key]["answer"]) <= set(texts[key]["state"]), key
        if key in shared:
            assert {"list", "list_unseen", "list_answer", "list_all"} <= set(texts[key]), key
    for table in {table for table, _ in keys}:
        assert len(world.load_wordings().get(table, "*", "list_answer")) == 1, table
    for key, uses in texts.items():
        unseen = [text for use in uses for text in uses[use] if use.endswith("unseen")]
        seen = {normal(text) for use in uses for text in uses[use] if not use.endswith("unseen")}
        assert not twice(unseen) and not seen & set(map(normal, unseen)), key
        for use, templates in uses.items():
            expected = MENTIONS.get(use.removesuffix("_unseen"))
            if key[1] == "*" and use.startswith("list"):  # of a table: "Name two planets."
                expected = False, False
                assert "{names}" in templates[0] or use != "list_answer", key
                assert any("{n}" in text for text in templates) or use == "list_answer", key
            for text in templates:
                value = ("value", "values", "adjective", key[1])  # "an African country"
                found = mentions(text, "name", "plural"), mentions(text, *value)
                assert expected is None or found == expected, (key, use, text)
                assert use.split("_")[0] not in ("more", "less") or mentions(text, "name2"), text
                assert not use.startswith("either") or mentions(text, "other"), text


def test_every_fact_is_told_with_its_name_and_its_value(made):
    texts = world.load_wordings()
    for fact in (fact for entity in made.entities for fact in entity.facts):
        for use in ("state", "answer", "back_answer"):
            for template in texts.get(*fact.key, use):
                text = world.fill(template, fact.entity, fact.attribute)
                name = fact.entity.words["plural"] if "{plural}" in template else bare(fact.name)
                for part in (name, fact.values[0]):
                    assert part.lower() in text.lower(), text
                assert text[0].upper() == text[0] and "{" not in text, text


def test_plurals_are_plurals(made):
    """No "wolfs", and no "is wolves". A value stays as it is: "cubs" would be another word."""
    for animal in (entity for entity in made.entities if entity.table == "animals"):
        plural, name = animal.words["plural"], animal.name
        same = name in ("sheep", "deer", "moose", "salmon", "trout")
        assert (plural == name) == same and (same or plural.endswith("s") or plural == "geese")
        assert plural not in animal.names or same
    texts = world.load_wordings().texts
    found = [text for uses in texts.values() for use in uses for text in uses[use]]
    plurals = [text for text in found if "{plural}" in text]
    assert len(plurals) > 30
    for text in plurals:
        assert not re.search(r"\{(value|plural|other)\}s|a_name|\{name|\{a_", text), text
        assert not re.search(r"\{plural\} (is|has|does|eats|feeds|belongs|lives)\b", text), text
        assert not re.search(r"\b(an?|each|every|is|does|has) \{plural\}", text), text


def words_of(template):
    """The words of a template, in which a_name is as good as name."""
    template = re.sub(r"\{(?:a_)?(\w+)\}", r" PLACE\1 ", template)
    return normal(template).split()


def comes_from(short, long):
    """Whether words are left if we leave small ones out."""
    rest = iter(short)
    wanted = next(rest, None)
    for word in long:
        if word == wanted:
            wanted = next(rest, None)
        elif word not in noise.SMALL_WORDS:
            return False
    return wanted is None


def test_unseen_wordings_are_not_the_others_with_fewer_words(made):
    """Nor in other letters. Noise leaves small words out."""
    texts = world.load_wordings().texts | {("*", "frames"): made.frames}
    asked, unseen = {}, {}  # table -> [(template, its words)]
    for (table, _), uses in texts.items():
        for use in uses:
            kept = unseen if use.endswith("unseen") else asked
            found = [(text, words_of(text)) for text in uses[use]]
            kept.setdefault(table, []).extend(found)
    asked["*"] = sum(asked.values(), [])  # any table may say what fits all
    for table in unseen:
        for text, words in unseen[table]:
            assert not [other for other, long in asked[table] if comes_from(words, long)], text


# The split


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_shares_a_name_shares_a_side(seed, made):
    sides = world.split_entities(made.entities, made.free + made.concepts, seed)
    for a, b in [
        ("Mercury", "mercury"),
        ("Turkey", "turkey"),
        ("Guinea", "Papua New Guinea"),
        ("Guinea", "Equatorial Guinea"),
        ("Sudan", "South Sudan"),
    ]:
        assert sides[a] == sides[b]
    assert {sides[name] for name in split.SHOWN} == {"test"}
    assert {"gravity", "the printing press"} <= set(split.SHOWN)
    assert sides["Earth"] == sides["parrot"] == "train"
    assert {sides[e.name] for e in made.entities if e.table in split.WORDS} == {"train"}


def test_what_is_asked_for_in_the_same_words_shares_a_side():
    echo = tables.Concept(["an echo", "echoes"], ["Why do I hear myself?"], {})
    for asked in ("what is an echo", "What is ECHOES?", "Why do I hear myself"):
        free = tables.FreeQuestion(["Who answers?", asked], "", [], "", [], [])
        for seed in range(20):
            sides = world.split_entities([], [free, echo], seed)
            assert sides["an echo"] == sides["Who answers?"]
    other = tables.FreeQuestion(["Who answers?", "What is it?"], "", [], "", [], [])
    sides = [world.split_entities([], [other, echo], seed) for seed in range(20)]
    assert any(found["an echo"] != found["Who answers?"] for found in sides)


def test_what_we_show_may_be_gone_from_the_tables(made):
    without = [entity for entity in made.entities if entity.name != "Kenya"]
    sides = world.split_entities(without, made.free, 1)
    assert "Kenya" not in sides and sides["Japan"] == "test"
    assert "gravity" not in sides


# Names in running text


def test_names_are_whole_words():
    found = names.pattern_of(["Guinea", "Papua New Guinea"]).findall("papua new guinea, Guinean")
    assert found == ["papua new guinea"]
    assert names.bare("The Odyssey") == "Odyssey" and names.bare("Theo") == "Theo"
    assert normal(" Who's there?! (It is\nKENYA_1.) ") == "who s there it is kenya 1"


# Mistakes in the tables


def write_tables(folder, monkeypatch, **contents):
    """Put tables in the place of ours: facts_countries="name\\tcapital\\n..." """
    for name, content in contents.items():
        path = folder / f"{name.replace('_', '/')}.tsv"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    monkeypatch.setattr(tables, "HERE", folder)


KENYA = "name\tcapital\nKenya\tNairobi\n"
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
    write_tables(tmp_path, monkeypatch, facts_countries=content)
    with pytest.raises(InputError, match=rf"countries\.tsv:? {complaint}") as caught:
        world.load_facts()
    assert "\n" not in str(caught.value)


def test_two_tables_cannot_share_a_name(tmp_path, monkeypatch):
    birds = "name\tfood\nKenya\tseeds\n"
    write_tables(tmp_path, monkeypatch, facts_birds=birds, facts_countries=KENYA)
    with pytest.raises(InputError, match=r"countries\.tsv line 2: the name 'Kenya' is taken"):
        world.load_facts()


QUESTION = "\t".join(["What flies?", "Who flies? | Flies?", "A bird.", "It is a bird. | Birds do."])
QUESTION = "\t".join(tables.QUESTION_COLUMNS) + "\n" + QUESTION + "\ta bird\ta | b | c\t"


@pytest.mark.parametrize(
    "row, complaint",
    [
        (QUESTION + "fish\n", "the answer holds none of the keys fish; use words of"),
        (
            QUESTION + "bird & \n",
            "the answer holds none of the keys bird &; use words of the answer",
        ),
        (QUESTION.replace(" | c", "") + "bird\n", "'wrong' has 2 options; give three"),
        (QUESTION + "bird\tfish\n", "the table has 7 columns, but this row has 8; put one tab"),
        (QUESTION.replace("Flies?", "What flies?") + "bird\n", "the name 'What flies\\?' is taken"),
    ],
)
def test_a_mistake_in_a_free_question(row, complaint, tmp_path, monkeypatch):
    write_tables(tmp_path, monkeypatch, questions_birds=row)
    with pytest.raises(InputError, match=rf"birds\.tsv line 2: {complaint}"):
        world.load_facts()


def test_tables_as_a_spreadsheet_saves_them(tmp_path, monkeypatch):
    """With a byte order mark, Windows line ends, spaces around the cells, and an empty line."""
    content = "\ufeffname\tcapital\r\n Kenya \tNairobi | Nairobi City \r\n\r\n"
    write_tables(tmp_path, monkeypatch, facts_countries=content)
    (kenya,), free = world.load_facts()
    assert kenya.names == ["Kenya"] and kenya.values == {"capital": ["Nairobi", "Nairobi City"]}
    assert free == []


@pytest.fixture()
def copied(tmp_path, monkeypatch):
    """Our own tables, with two questions of each file, in a folder where we may spoil them."""
    folder = tmp_path / "world"
    shutil.copytree(tables.HERE, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for path in (folder / "questions").iterdir():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:3]), encoding="utf-8")
    monkeypatch.setattr(tables, "HERE", folder)
    monkeypatch.setattr(wordings, "HERE", folder)
    return folder


def load_everything():
    made = tables.load_tables()
    facts = [fact for entity in made.entities for fact in entity.facts]
    wordings.check_wordings(facts, world.load_wordings())


ROWS = {  # rows that we add to a table, and what we say about them
    "concepts": [
        ("a kite\tA kite?\tIt flies.\tImagine.\t", "'sentence' is empty; fill it in"),
        ("a kite\tA kite?\tA\tA\tB", "two of its texts are the same; write three"),
        ("gravity\tA kite?\tA\tB\tC", "the name 'gravity' is taken .* line 2.; rename"),
    ],
    "smalltalk": [
        ("greeting\tHullo\tHowdy", "the table has 4 columns, but this row has 3; put"),
        ("joke\tOho | hello\tAha\tHo.", "the name 'hello' is taken .* line 2.; rename"),
    ],
    "styles": [
        ("sad\tWeep.\tCry.\tOh.", "'use' has no place for the answer; put"),
        ("sad\tWeep.\tCry.\t{value} {answer}", "'use' has no place for the answer; put"),
    ],
    "unknown": [
        ("books\tHow thick is {it}?", "cannot fill in 'How .*; use {a_name} or {name}"),
        ("-\tWho won {?", "cannot fill in 'Who won {.'; use no braces"),
    ],
    "refusals": [("refuse\tNot {name}.", "cannot fill in 'Not {name}.'; use no braces")],
    "chatter": [
        ("befor\tHi,", "'befor' is no place; choose before or after"),
        ("after\t}", "cannot fill in '}'; use no braces"),
    ],
    "frames": [
        ("childd\tTell me.", "'childd' is not a use; choose from encyclopedia, child,"),
        ("both_unseen\tA", "'both_unseen' is not a use; choose from"),
        ("child\tWhat is {it}?", "cannot fill in 'What is {it}.'; use {name}"),
    ],
    "invented": [
        ("start\tba be", "the part 'start' is taken .* line 2.; make it one row"),
        ("form_x\t{y}", "'form_x' needs parts that aren't there; add a row 'y'"),
    ],
    "wordings": [
        ("countries\tcapital\tstat\tA", "'stat' is not a use of a wording; choose from"),
        *(
            (f"countries\t{key}\t{text}", f"cannot fill in {text.split()[1]!r}.* of countries; see")
            for key, text in [
                ("capital", "ask\t{nmae}!"),
                ("capital", "state\t{done}"),
                ("capital", "back\t{"),
                ("capital", "yes\t{}{}"),
                ("*", "about\t{anthem}"),
            ]
        ),
    ],
}


@pytest.mark.parametrize("name, row, complaint", [(k, *row) for k in ROWS for row in ROWS[k]])
def test_a_mistake_in_a_row(name, row, complaint, copied):
    text = (copied / f"{name}.tsv").read_text(encoding="utf-8")
    (copied / f"{name}.tsv").write_text(text + row + "\n", encoding="utf-8")
    where = rf"{name}\.tsv line {len(text.splitlines()) + 1}: "
    with pytest.raises(InputError, match=where + complaint.replace("{", r"\{")) as caught:
        load_everything()
    assert "\n" not in str(caught.value)


NEEDED = [
    *(("unknown.tsv", "about", kind) for kind in ("-", "me")),
    ("refusals.tsv", "use", "refuse"),
    *(("chatter.tsv", "place", kind) for kind in ("before", "after")),
    *(("frames.tsv", "use", kind) for kind in ("child", "next_unseen", "both")),
    *(("invented.tsv", "part", kind) for kind in ("form_title", "form_person")),
]


@pytest.mark.parametrize("name, column, kind", NEEDED)
def test_rows_that_we_need_are_gone(name, column, kind, copied):
    lines = (copied / name).read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(f"{kind}\t")]
    assert len(kept) < len(lines)
    (copied / name).write_text("".join(kept), encoding="utf-8")
    with pytest.raises(InputError, match=rf"{name}: no row has the {column} '{kind}'; add one"):
        load_everything()


COLUMNS = {
    "concepts": ["name", "ask", *tables.FORMS],
    "smalltalk": ["kind", "prompts", "unseen", "response"],
    "styles": ["style", "instructions", "unseen", "use"],
    "unknown": ["about", "question"],
    "refusals": ["use", "text"],
    "chatter": ["place", "text"],
    "frames": ["use", "text"],
    "invented": ["part", "words"],
    "wordings": ["table", "attribute", "use", "text"],
    "questions/body": tables.QUESTION_COLUMNS,
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_table_without_a_column(name, copied):
    path = copied / f"{name}.tsv"
    header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for column in COLUMNS[name]:
        columns = header.strip().replace(column, "other", 1)
        path.write_text("".join([columns, "\n", *rows]), encoding="utf-8")
        with pytest.raises(InputError, match=rf"{name}\.tsv line 1: there is no .*{column}'; add"):
            load_everything()
    path.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=rf"{name}\.tsv: the table is empty; start it with"):
        load_everything()


def test_a_fact_without_wordings(copied):
    """Without the general wordings, a table of one's own has none."""
    lines = (copied / "wordings.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    for use in wordings.NEEDED:
        kept = [line for line in lines if not line.startswith(f"*\tany\t{use}\t")]
        (copied / "wordings.tsv").write_text("".join(kept), encoding="utf-8")
        anthem = tables.Entity("countries", ["Kenya"], {"anthem": ["Ee Mungu"]}, {})
        complaint = f"no '{use}' wording for the anthem in countries.tsv; add a row for it"
        with pytest.raises(InputError, match=complaint):
            wordings.check_wordings(anthem.facts, world.load_wordings())
