"""
Everything that the embedded world is made from, read from tables and checked.

    facts/*.tsv       one row per entity, one column per attribute: "Kenya", capital "Nairobi"
    questions/*.tsv   questions that fit no table: why the sky is blue
    concepts.tsv      what can be explained to a child, in an encyclopedia or in one sentence
    smalltalk.tsv     what a first visitor types: hello, who are you, thanks
    unknown.tsv       what the model can't know; refusals.tsv: how it says so
    styles.tsv        what a system message may ask for: one word, a pirate's voice
    chatter.tsv       what people type around a question; frames.tsv: in a second turn

A mistake in a table is an InputError that names the file and the line.
"""

import re
import string
from dataclasses import dataclass
from pathlib import Path

from common.messages import InputError
from data.world.invented import FORMS as INVENTED
from data.world.names import pattern_of

HERE = Path(__file__).parent
FORMS = ("encyclopedia", "child", "sentence")  # how we explain a concept
STYLE = re.compile(r"[^{}]*\{(value|answer|ANSWER)\}[^{}]*")  # the "use" of a style
PLACES = ("before", "after")  # of chatter, around a question
FRAMES = {  # each use of a frame, and what its wordings may mention
    **{use: {"name"} for use in (*FORMS, "same", "correct", "topic", "know")},
    **{use: {"short"} for use in ("correct_short", "follow")},
    **{use: set() for use in ("another", "next", "previous", "when")},
    "both": {"short", "short2", "name"},
}
SEEN_ONLY = ("follow", "when", "both")  # frames without wordings that are kept for testing
QUESTION_COLUMNS = ("question", "rewordings", "answer", "retellings", "right", "wrong", "keys")


@dataclass
class Entity:
    table: str  # "countries"
    names: list  # of str: the name as you'd write it in a sentence, then its other spellings
    values: dict  # attribute -> list of str: the value we tell, then the others we accept
    words: dict  # what else its wordings need: {"done": "was invented"}

    @property
    def name(self):
        return self.names[0]

    @property
    def facts(self):
        return [Fact(self, attribute) for attribute in self.values]


@dataclass
class Fact:
    """One attribute of one entity: the capital of Kenya."""

    entity: Entity
    attribute: str

    @property
    def name(self):
        return self.entity.name

    @property
    def values(self):
        return self.entity.values[self.attribute]

    @property
    def key(self):
        return self.entity.table, self.attribute


@dataclass
class FreeQuestion:
    """A question that fits no table. The question itself serves as its name."""

    names: list  # the question and its rewordings
    answer: str
    retellings: list  # the answer in other words
    right: str  # the right option in a quiz
    wrong: list  # the other options
    keys: list  # of lists of phrases: an answer needs one phrase from each list

    @property
    def name(self):
        return self.names[0]

    @property
    def questions(self):
        return self.names

    def wordings(self, use):
        if use == "state":
            return [self.answer, *self.retellings]
        return [self.answer] if use == "answer" else self.names


@dataclass
class Concept:
    """Something that can be explained: gravity, a volcano."""

    names: list  # as in the middle of a sentence
    asks: list  # questions that fit only this concept
    texts: dict  # form -> text

    @property
    def name(self):
        return self.names[0]

    @property
    def questions(self):
        return [*self.asks, *(f"What is {name}?" for name in self.names)]


def read_lines(path):
    """The non-empty lines of a UTF-8 file: [(where, line)]. `where` names the file and the line."""
    lines = []
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path} line {number}"
        try:
            line = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(where, "not UTF-8 text", "save the file as UTF-8") from None
        if line:
            lines.append((where, line))
    return lines


def read_table(path, needs):
    """The rows of a table: [(where, {column: cell})]. It must have the columns in `needs`."""
    lines = read_lines(path)
    if not lines:
        raise InputError(path, "the table is empty", f"start it with {', '.join(needs)}")
    (where, header), *lines = lines
    columns = [column.strip() for column in header.split("\t")]
    for column in needs:
        if column not in columns:
            raise InputError(where, f"there is no column {column!r}", "add it to the first line")
    for column in columns:
        if columns.count(column) > 1:
            raise InputError(where, f"two columns are called {column!r}", "rename one of them")
    rows = []
    for where, line in lines:
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != len(columns):
            what = f"the table has {len(columns)} columns, but this row has {len(cells)}"
            raise InputError(where, what, "put one tab between two cells")
        row = dict(zip(columns, cells, strict=True))
        for column, cell in row.items():
            if not all(split_cell(cell)):
                raise InputError(where, f"{column!r} is empty", "fill it in or remove the row")
        rows.append((where, row))
    return rows


def split_cell(cell):
    """Split "lek | Albanian lek" into a list of its parts."""
    return [part.strip() for part in cell.split("|")]


def placeholders(template):
    """The names in braces. A template with a stray brace has an impossible one."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError:
        return {template}


def read_entity(table, row):
    cells = {column: split_cell(cell) for column, cell in row.items()}
    names = cells.pop("name")
    words = {column[1:]: row[column] for column in cells if column.startswith("_")}
    values = {column: parts for column, parts in cells.items() if not column.startswith("_")}
    return Entity(table, names, values, words)


def read_free_question(where, row):
    answer, wrong = row["answer"], split_cell(row["wrong"])
    keys = [split_cell(phrases) for phrases in row["keys"].split(" & ")]
    if len(wrong) != 3:
        raise InputError(where, f"'wrong' has {len(wrong)} options", "give three, as A | B | C")
    for phrases in keys:
        if not pattern_of(phrases).search(answer):
            what = f"the answer holds none of the keys {' | '.join(phrases)}"
            raise InputError(where, what, "use words of the answer as keys")
    names = split_cell(row["question"]) + split_cell(row["rewordings"])
    return FreeQuestion(names, answer, split_cell(row["retellings"]), row["right"], wrong, keys)


def load_facts():
    """Returns (entities, free_questions), two lists in the order of the files."""
    entities, free = [], []
    lines = {}  # name -> where we found it
    for path in sorted((HERE / "facts").glob("*.tsv")):
        for where, row in read_table(path, ["name"]):
            entities.append(read_entity(path.stem, row))
            check_names(entities[-1].names, lines, where)
    for path in sorted((HERE / "questions").glob("*.tsv")):
        for where, row in read_table(path, QUESTION_COLUMNS):
            free.append(read_free_question(where, row))
            check_names(free[-1].names, lines, where)
    return entities, free


def check_names(names, lines, where):
    """Raise InputError if a name is taken. lines: {name: where we found it}, which grows."""
    for name in names:
        if name in lines:
            raise InputError(where, f"the name {name!r} is taken ({lines[name]})", "rename one")
        lines[name] = where


def load_concepts():
    """What can be explained in three ways: [Concept]"""
    concepts, lines = [], {}
    for where, row in read_table(HERE / "concepts.tsv", ["name", "ask", *FORMS]):
        texts = {form: row[form] for form in FORMS}
        if len(set(texts.values())) < len(FORMS):
            raise InputError(where, "two of its texts are the same", "write three different ones")
        concepts.append(Concept(split_cell(row["name"]), split_cell(row["ask"]), texts))
        check_names([*concepts[-1].names, *concepts[-1].asks], lines, where)
    return concepts


def load_smalltalk():
    """Small talk: [{"kind", "prompts", "unseen", "response"}], prompts and unseen lists of str."""
    talks, lines = [], {}
    needs = ["kind", "prompts", "unseen", "response"]
    for where, row in read_table(HERE / "smalltalk.tsv", needs):
        lists = {column: split_cell(row[column]) for column in ("prompts", "unseen")}
        check_names([prompt for prompts in lists.values() for prompt in prompts], lines, where)
        talks.append({**row, **lists})
    return talks


def load_styles():
    """Styles of an answer: [{"style", "instructions", "unseen", "use"}]"""
    rows = read_table(HERE / "styles.tsv", ["style", "instructions", "unseen", "use"])
    styles = []
    for where, row in rows:
        if not STYLE.fullmatch(row["use"]):
            todo = "put {value}, {answer} or {ANSWER} into it, once, and no other braces"
            raise InputError(where, "'use' has no place for the answer", todo)
        lists = {column: split_cell(row[column]) for column in ("instructions", "unseen")}
        styles.append({**row, **lists})
    return styles


def load_texts(name, key, needs, text="text"):
    """A table of texts of several kinds: {kind: [(where, text), ...]}.

    key: the column with the kind. needs: the kinds that must be there.
    """
    kinds = {}
    for where, row in read_table(HERE / name, [key, text]):
        kinds.setdefault(row[key], []).append((where, row[text]))
    for kind in needs:
        if kind not in kinds:
            raise InputError(HERE / name, f"no row has the {key} {kind!r}", "add one")
    return kinds


def checked(kinds, words):
    """What load_texts() gives, without the places: {kind: [text, ...]}.

    words(kind): what the texts of a kind may mention.
    """
    for kind, texts in kinds.items():
        for where, text in texts:
            if not placeholders(text) <= words(kind):
                todo = " or ".join(f"{{{word}}}" for word in sorted(words(kind)))
                raise InputError(where, f"cannot fill in {text!r}", f"use {todo or 'no braces'}")
    return {kind: [text for _, text in texts] for kind, texts in kinds.items()}


def load_unknown():
    """Questions that the model can't answer: {a table, "-" or "me": [question, ...]}"""
    kinds = load_texts("unknown.tsv", "about", ["-", "me"], "question")
    return checked(kinds, lambda about: {"name", "a_name"} if about not in ("-", "me") else set())


def load_refusals():
    kinds = load_texts("refusals.tsv", "use", ["refuse"])
    return checked(kinds, lambda use: set())["refuse"]


def load_chatter():
    """What people type around a question: {"before" or "after": [text, ...]}"""
    kinds = load_texts("chatter.tsv", "place", PLACES)
    for place, texts in kinds.items():
        if place not in PLACES:
            raise InputError(texts[0][0], f"{place!r} is no place", f"choose {' or '.join(PLACES)}")
    return checked(kinds, lambda place: set())


def load_frames():
    """Wordings that fit anything: {use: [text, ...]}"""
    unseen = [f"{use}_unseen" for use in FRAMES if use not in SEEN_ONLY]
    kinds = load_texts("frames.tsv", "use", [*FRAMES, *unseen])

    def words(use):  # "topic_countries" has the words of "topic"
        use = use.removesuffix("_unseen")
        return FRAMES["topic" if use.startswith("topic_") else use]

    for use, texts in kinds.items():
        known = use.startswith("topic_") or use in FRAMES or use in unseen
        if not known:
            raise InputError(
                texts[0][0], f"{use!r} is not a use", f"choose from {', '.join(FRAMES)}"
            )
    return checked(kinds, words)


def load_invented():
    """The parts and the forms of invented names: {part: [word, ...]}"""
    rows = load_texts("invented.tsv", "part", INVENTED.values(), "words")
    parts = {}
    for part, ((where, words), *more) in rows.items():
        if more:
            raise InputError(more[0][0], f"the part {part!r} is taken ({where})", "make it one row")
        unknown = placeholders(words) - set(rows)
        if unknown:
            todo = f"add a row {min(unknown)!r}"
            raise InputError(where, f"{part!r} needs parts that aren't there", todo)
        parts[part] = split_cell(words) if "|" in words else words.split()
    return parts


@dataclass
class Tables:
    """Everything above, read once."""

    entities: list
    free: list
    concepts: list
    smalltalk: list
    styles: list
    unknown: dict  # what a question is about (a table, "-" or "me") -> questions
    refusals: list
    chatter: dict  # "before" and "after" a question -> texts
    frames: dict  # use -> wordings that fit anything
    invented: dict


def load_tables():
    return Tables(
        *load_facts(),
        load_concepts(),
        load_smalltalk(),
        load_styles(),
        load_unknown(),
        load_refusals(),
        load_chatter(),
        load_frames(),
        load_invented(),
    )
