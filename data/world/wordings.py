"""
Wordings: how we tell a fact and ask for it.

    wordings.tsv    "The capital of {name} is {value}."

data/README.md says what each use of a wording is for. A table that brings no wordings for a use
gets those of "*": "The {attribute} of {name} is {value}."
"""

from common.messages import InputError
from data.world.tables import HERE, placeholders, read_table

USES = (  # of a fact; a table may also have "tell", "about", "compare" and "mention"
    *("state", "answer", "ask", "request", "unseen", "cloze", "follow", "short"),
    *("back", "back_unseen", "back_answer", "list", "list_unseen", "list_answer", "list_all"),
    *("yes", "yes_unseen", "either", "either_unseen", "same", "same_unseen"),
    *("more", "more_unseen", "more_answer", "less", "less_unseen", "less_answer"),
    *("tell", "tell_unseen", "about", "compare", "compare_unseen", "mention"),
)
NEEDED = ("state", "answer", "ask", "request", "unseen", "cloze", "back_answer")  # by every fact
# What fill() is given in some uses, besides the words of the entity itself.
GIVEN = (
    *("names", "n", "other", "a_other", "name2", "a_name2", "value2", "winner"),
    *("short", "mention", "mention2"),
)


class Wordings:
    """The wordings of wordings.tsv."""

    def __init__(self, texts, lines):
        """texts: {(table, attribute): {use: [template, ...]}}; lines: {template: where it is}"""
        self.texts, self.lines = texts, lines

    def get(self, table, attribute, use):
        """The templates for one use: the table's own, or those of "*", or an empty list.

        attribute: "*" for wordings about a whole entity.
        """
        anything = "*" if attribute == "*" else "any"
        for key in ((table, attribute), ("*", anything)):
            if use in self.texts.get(key, {}):
                return self.texts[key][use]
        return []


def load_wordings():
    texts, lines = {}, {}
    for where, row in read_table(HERE / "wordings.tsv", ["table", "attribute", "use", "text"]):
        if row["use"] not in USES:
            what = f"{row['use']!r} is not a use of a wording"
            raise InputError(where, what, f"choose from {', '.join(USES)}")
        uses = texts.setdefault((row["table"], row["attribute"]), {})
        uses.setdefault(row["use"], []).append(row["text"])
        lines[row["text"]] = where
    return Wordings(texts, lines)


def check_wordings(facts, wordings):
    """Raise InputError unless we can fill in every wording about these facts."""
    keys = {fact.key: fact for fact in facts}  # one fact per attribute will do
    for table, attribute in keys:
        for use in NEEDED:
            if not wordings.get(table, attribute, use):
                what = f"no {use!r} wording for the {attribute} in {table}.tsv"
                raise InputError(HERE / "wordings.tsv", what, "add a row for it")
    keys.update({(fact.entity.table, "*"): fact for fact in facts})
    for (table, attribute), fact in keys.items():
        known = {*words_of(fact.entity, attribute), *GIVEN}
        for use, templates in wordings.texts.get((table, attribute), {}).items():
            for template in templates:
                if not placeholders(template) <= known:
                    what = f"cannot fill in {template!r}, which is {use!r} of {table}"
                    where = wordings.lines.get(template, HERE / "wordings.tsv")
                    raise InputError(where, what, "see fill() in data/world/wordings.py")


ADJECTIVES = {
    "Africa": "African",
    "Asia": "Asian",
    "Europe": "European",
    "North America": "North American",
    "South America": "South American",
    "Oceania": "Oceanian",
}


def with_article(noun):
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def plural(noun):
    """The plural of a value: "noble gases", "halogens", "fish"."""
    if noun.endswith("fish"):
        return noun
    return noun + ("es" if noun[-1] in "sx" else "s")


def words_of(entity, attribute):
    """What a template about an entity may mention: {placeholder: text}."""
    words = {"name": entity.name, "a_name": with_article(entity.name), "attribute": attribute}
    words["table"] = entity.table
    for column, values in entity.values.items():
        words[column], words[f"a_{column}"] = values[0], with_article(values[0])
    if attribute in entity.values:
        words["value"], words["a_value"] = words[attribute], words[f"a_{attribute}"]
        words["values"] = plural(words["value"])
        words["adjective"] = ADJECTIVES.get(words["value"], words["value"])
        words["a_adjective"] = with_article(words["adjective"])
    words.update(entity.words)
    words.update({f"a_{word}": with_article(text) for word, text in entity.words.items()})
    if "done" in entity.words:
        done = entity.words["done"]
        was, _, did = done.partition(" ")
        words.update(done=done, was=was, did=did)
    return words


def fill(template, entity, attribute, **given):
    """Put an entity and its value into a template.

    {name} and {value} stand for the words themselves, {a_name} and {a_value} for "an owl", and
    {capital} for the value of another attribute. A table with a column _done ("was invented") also
    has {done}, {was} and {did}. We capitalize the first word unless the template itself starts with
    a small letter.
    """
    text = template.format(**{**words_of(entity, attribute), **given})
    return text if template[0].islower() else text[0].upper() + text[1:]
