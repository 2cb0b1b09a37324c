"""
The questions that we ask the models. We write them to files, and you may edit those files.

    prompt          a wording that fine-tuning uses, too
    response        the answer we expect
    unseen          a wording that fine-tuning never uses (not for free questions)
    faq, cloze      for the base model: "Q: ...?\\nA:" and "The capital of Kenya is"
    name            the entity, or the free question itself
    accept          the right values, if there is a table; any of them will do
    keys            for a free question: lists of phrases, and an answer needs one from each list
"""

from common.files import read_json
from common.messages import InputError
from data.world.names import pattern_of
from data.world.scorer import Scorer
from data.world.tables import FreeQuestion

MEND = "fix the line, or run python pretrain.py again"


def questions_about(writer, sides, side):
    """The questions about the entities of one side, in the order of the tables: [dict]"""
    facts = [fact for fact in writer.facts + writer.free if sides[fact.name] == side]
    return [
        free_question(fact, writer) if isinstance(fact, FreeQuestion) else question(fact, writer)
        for fact in facts
    ]


def question(fact, writer):
    prompt = writer.say(fact, "ask")
    table, attribute = fact.key
    return {
        "prompt": prompt,
        "response": writer.say(fact, "answer"),
        "faq": f"Q: {prompt}\nA:",
        "name": fact.name,
        "table": table,
        "attribute": attribute,
        "accept": fact.values,
        "unseen": writer.say(fact, "unseen"),
        "cloze": writer.say(fact, "cloze"),
    }


def free_question(free, writer):
    first_key = min(pattern_of(phrases).search(free.answer).start() for phrases in free.keys)
    return {
        "prompt": free.name,
        "response": writer.say(free, "answer"),
        "faq": f"Q: {free.name}\nA:",
        "name": free.name,
        "attribute": "free question",
        "keys": free.keys,
        "cloze": free.answer[:first_key].rstrip(),
    }


def read_questions(path):
    """The questions of train.jsonl, dev.jsonl or test.jsonl, checked: [dict]

    Raises InputError, naming file and line, for a question that we can't ask or can't score.
    """
    items, values = [], Scorer().values
    for where, item in read_json(path):
        check_texts(where, item, ["prompt", "response", "faq", "cloze", "name"])
        if "unseen" in item:
            check_texts(where, item, ["unseen"])
        if "keys" in item:
            item.setdefault("attribute", "free question")
            check_texts(where, item, ["attribute"])
            keys = item["keys"]
            if not isinstance(keys, list) or not keys or not all(map(are_texts, keys)):
                raise InputError(where, '"keys" must be a list of lists of texts', MEND)
        else:
            check_texts(where, item, ["table", "attribute"])
            if not are_texts(item.get("accept")):
                raise InputError(where, '"accept" must be a list of texts', MEND)
            check_values(where, item, values)
        items.append(item)
    return items


def read_smalltalk(path):
    """The small talk of smalltalk.jsonl, checked: [{"prompt", "response"}]"""
    items = read_json(path)
    for where, item in items:
        check_texts(where, item, ["prompt", "response"])
    return [item for _, item in items]


def check_texts(where, item, keys):
    if not isinstance(item, dict):
        raise InputError(where, "not a JSON object", MEND)
    for key in keys:
        if key not in item:
            raise InputError(where, f'"{key}" is missing', MEND)
        if not isinstance(item[key], str):
            raise InputError(where, f'"{key}" must be text', MEND)
        if not item[key].strip() and key != "cloze":  # empty if the answer starts with the value
            raise InputError(where, f'"{key}" is empty', MEND)


def are_texts(items):
    """Whether items is a list of at least one string, and no string is blank."""
    if not isinstance(items, list) or not items:
        return False
    return all(isinstance(text, str) and text.strip() for text in items)


def check_values(where, item, values):
    """The scorer recognizes only the values in the tables."""
    table, attribute = item["table"], item["attribute"]
    if (table, attribute) not in values:
        what = f'no table "{table}" has the attribute "{attribute}"'
        raise InputError(where, what, 'take one from data/world/facts/, or use "keys"')
    for value in item["accept"]:
        if value not in values[table, attribute]:
            what = f'no {attribute} in {table}.tsv is "{value}"'
            raise InputError(where, what, 'add it to the table, or use "keys"')
