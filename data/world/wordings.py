"""
Wordings: how we tell a fact and ask for it.

    wordings.tsv    "The capital of {name} is {value}."

data/README.md says what each use of a wording is for.
"""

from common.messages import InputError
from data.world.tables import HERE, read_table

USES = ("state", "answer", "ask", "request", "unseen", "cloze")  # and "follow", which is optional


def load_wordings():
    """Returns {(table, attribute): {use: [template, ...]}}."""
    wordings = {}
    for where, row in read_table(HERE / "wordings.tsv", ["table", "attribute", "use", "text"]):
        if row["use"] not in (*USES, "follow"):
            what = f"{row['use']!r} is not a use of a wording"
            raise InputError(where, what, f"choose from {', '.join(USES)}, follow")
        uses = wordings.setdefault((row["table"], row["attribute"]), {})
        uses.setdefault(row["use"], []).append(row["text"])
    return wordings


def check_wordings(facts, wordings):
    """Raise InputError unless we can tell every fact and ask for it."""
    path = HERE / "wordings.tsv"
    examples = {fact.key: fact for fact in facts}  # one fact per attribute will do
    for (table, attribute), fact in examples.items():
        uses = wordings.get((table, attribute), {})
        for use in USES:
            if use not in uses:
                what = f"no {use!r} wording for the {attribute} in {table}.tsv"
                raise InputError(path, what, "add one, or start the column's name with _")
        for template in sum(uses.values(), []):
            try:
                fill(template, fact.entity, attribute)
            except (LookupError, ValueError):
                what = f"cannot fill in {template!r}"
                raise InputError(path, what, "see fill() in data/world/wordings.py") from None


def with_article(noun):
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def fill(template, entity, attribute):
    """Put an entity and its value into a template.

    {name} and {value} stand for the words themselves, {a_name} and {a_value} for "an owl". If a
    table has a column _done, {done} is its cell ("was invented"), {was} the first word, and {did}
    the rest. We capitalize the text's first letter unless the template's is lowercase.
    """
    name, value = entity.name, entity.values[attribute][0]
    words = {"name": name, "value": value}
    words.update(a_name=with_article(name), a_value=with_article(value))
    if "done" in entity.words:
        done = entity.words["done"]
        was, _, did = done.partition(" ")
        words.update(done=done, was=was, did=did)
    text = template.format(**words)
    return text if template[0].islower() else text[0].upper() + text[1:]
