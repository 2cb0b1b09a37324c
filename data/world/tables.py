"""
The tables of facts, and the small talk: read and checked.

    facts/*.tsv     one row per entity, one column per attribute: "Kenya", capital "Nairobi"
    smalltalk.tsv   what a first visitor types: hello, who are you, thanks

A mistake in a table is an InputError that names the file and the line.
"""

from dataclasses import dataclass
from pathlib import Path

from common.messages import InputError
from data.world.names import pattern_of

HERE = Path(__file__).parent
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

    def wordings(self, use):
        if use == "state":
            return [self.answer, *self.retellings]
        return [self.answer] if use == "answer" else self.names


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
        has_questions = path.stem == "questions"
        for where, row in read_table(path, QUESTION_COLUMNS if has_questions else ["name"]):
            if has_questions:
                thing = read_free_question(where, row)
                free.append(thing)
            else:
                thing = read_entity(path.stem, row)
                entities.append(thing)
            for name in thing.names:
                if name in lines:
                    what = f"the name {name!r} is taken ({lines[name]})"
                    raise InputError(where, what, "rename one of them")
                lines[name] = where
    return entities, free


def load_smalltalk():
    """What a first visitor types, and what to answer: [{"prompt", "response"}]"""
    path = HERE / "smalltalk.tsv"
    return [row for _, row in read_table(path, ["prompt", "response"])]
