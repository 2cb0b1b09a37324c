"""
The questions that we ask the models. We write them to files, and you may edit those files.

    kind            fact, free, style, concept or unknown
    prompt          a wording that fine-tuning uses, too
    response        the answer we expect
    unseen          a wording that fine-tuning never uses (not for free questions)
    typed           the prompt as somebody might type it (in train.jsonl, for preference pairs)
    faq             for the base model: "Q: ...?\\nA:"
    cloze           for the base model, if there is a table: "The capital of Kenya is"
    name            the entity, or the free question itself
    accept          the right values, if there is a table; any of them will do
    keys            for a free question: lists of phrases, and an answer needs one from each list
    options         for a free question: the right option of its quiz, then the wrong ones
    use             for a style: its answer, as in styles.tsv
    form, texts     for a concept: which of its texts it should be
"""

from common.files import read_json
from common.messages import InputError
from data.world.names import bare, normal, pattern_of
from data.world.scorer import Scorer
from data.world.tables import FORMS, STYLE, load_facts
from data.world.texts import in_style

MEND = "fix the line, or run python pretrain.py again"
KINDS = ("fact", "free", "style", "concept", "unknown")
STYLE_SHARE = 0.3  # of the facts, which we also ask for in a style
UNKNOWN = 0.7  # questions that the model can't answer, for each fact


def questions_about(asker, hidden):
    """Questions about everything that an Asker knows, in the order of the tables: [dict]

    hidden: an Asker about the same, with the wordings that are kept for testing.
    """
    items = [question(fact, asker, hidden) for fact in asker.facts]
    items += [free_question(free) for free in asker.free]
    rng = asker.rng
    for fact in rng.sample(asker.facts, int(STYLE_SHARE * len(asker.facts))):
        items.append(style_question(asker.plain(fact), asker, rng.choice(asker.tables.styles)))
    for concept in asker.concepts:
        for form in FORMS:
            items.append(
                {
                    "kind": "concept",
                    "prompt": asker.explain(concept, form).question,
                    "response": concept.texts[form],
                    "unseen": hidden.explain(concept, form).question,
                    "name": concept.name,
                    "form": form,
                    "texts": concept.texts,
                }
            )
    for _ in range(int(UNKNOWN * len(asker.facts))):
        exchange = asker.unknowable()
        items.append(
            {
                "kind": "unknown",
                "prompt": exchange.question,
                "response": exchange.answer,
                "unseen": hidden.unknowable().question,
                "name": "unknown",
            }
        )
    return items


def with_typed(items, writer, forbidden):
    """The same questions. Facts, free and unknown ones get a "typed" prompt, if it isn't forbidden.

    forbidden: see forbids().
    """
    for item in items:
        if item["kind"] in ("fact", "free", "unknown"):
            name = item["name"] if item["kind"] == "fact" else ""
            typed = writer.type_out(item["prompt"], name)
            if not forbidden(typed):
                item["typed"] = typed
    return items


def question(fact, asker, hidden):
    prompt = asker.say(fact, "ask")
    table, attribute = fact.key
    return {
        "kind": "fact",
        "prompt": prompt,
        "response": asker.say(fact, "answer"),
        "faq": f"Q: {prompt}\nA:",
        "name": fact.name,
        "table": table,
        "attribute": attribute,
        "accept": fact.values,
        "unseen": hidden.plain(fact).question,
        "cloze": asker.say(fact, "cloze"),
    }


def free_question(free):
    return {
        "kind": "free",
        "prompt": free.name,
        "response": free.answer,
        "faq": f"Q: {free.name}\nA:",
        "name": free.name,
        "attribute": "free question",
        "keys": free.keys,
        "options": [free.right, *free.wrong],
    }


def style_question(exchange, asker, style):
    fact = exchange.fact
    table, attribute = fact.key

    def as_system(instruction):  # as encode_chat() joins a system message and a question
        return f"{instruction}\n\n{exchange.question}"

    return {
        "kind": "style",
        "prompt": as_system(asker.rng.choice(style["instructions"])),
        "response": in_style(style, exchange),
        "unseen": as_system(asker.rng.choice(style["unseen"])),
        "name": fact.name,
        "table": table,
        "attribute": attribute,
        "accept": fact.values,
        "style": style["style"],
        "use": style["use"],
    }


NEEDS = {  # what each kind of question needs besides
    "fact": ["faq", "cloze", "table", "attribute"],
    "free": ["faq"],
    "style": ["table", "attribute", "use"],
    "concept": ["form"],
    "unknown": [],
}


def read_questions(path):
    """The questions of train.jsonl, dev.jsonl or test.jsonl, checked: [dict]

    Raises InputError, naming file and line, for a question that we can't ask or can't score.
    """
    items, values = [], Scorer().values
    for where, item in read_json(path):
        check_texts(where, item, ["prompt", "response", "name"])
        kind = item.setdefault("kind", "fact")
        if kind not in KINDS:
            raise InputError(where, f'"kind" is {kind!r:.20}', f"choose from {', '.join(KINDS)}")
        if kind == "fact" and "keys" in item:  # somebody made a free question out of a fact's line
            kind = item["kind"] = "free"
        more = [key for key in ("unseen", "typed") if key in item]
        check_texts(where, item, NEEDS[kind] + more)
        if kind == "free":
            check_free(where, item)
        elif kind == "concept":
            texts = item.get("texts")
            if not isinstance(texts, dict) or not are_texts([*texts.values()]):
                raise InputError(where, '"texts" must hold a text for each form', MEND)
            if item["form"] not in texts:
                raise InputError(where, f'"texts" has no {item["form"]!r:.20}', MEND)
        elif kind in ("fact", "style"):
            if not are_texts(item.get("accept")):
                raise InputError(where, '"accept" must be a list of texts', MEND)
            check_values(where, item, values)
            if kind == "style" and not STYLE.fullmatch(item["use"]):
                what = '"use" must have {value}, {answer} or {ANSWER} in it, once'
                raise InputError(where, what, MEND)
        items.append(item)
    return items


def held_out_finder(folder):
    """A function that says whether a text mentions what is held out.

    That is an entity of dev.jsonl or test.jsonl, or a whole answer or explanation of theirs.
    """
    names, texts = set(), []
    for side in ("dev", "test"):
        for item in read_questions(folder / f"{side}.jsonl"):
            if item["kind"] == "fact":
                names.add(item["name"])
            elif item["kind"] == "free":
                texts.append(item["response"])
            elif item["kind"] == "concept":
                texts += item["texts"].values()
    for entity in load_facts()[0]:
        if entity.name in names:
            names.update(entity.names)
    pattern, in_full = pattern_of(map(bare, sorted(names))), [f" {normal(t)} " for t in texts]

    def mentions(text):
        padded = f" {normal(text)} "
        return bool(names and pattern.search(text)) or any(t in padded for t in in_full)

    return mentions


def check_free(where, item):
    item.setdefault("attribute", "free question")
    check_texts(where, item, ["attribute"])
    keys = item.get("keys")
    if not isinstance(keys, list) or not keys or not all(map(are_texts, keys)):
        raise InputError(where, '"keys" must be a list of lists of texts', MEND)
    if not are_texts(item.setdefault("options", ["-"])):
        raise InputError(where, '"options" must be a list of texts', MEND)


def read_smalltalk(path):
    """The small talk of smalltalk.jsonl, checked: [{"prompt", "response"}]"""
    items = read_json(path)
    for where, item in items:
        check_texts(where, item, ["prompt", "response"])
        check_texts(where, item, ["unseen"] * ("unseen" in item))
    return [item for _, item in items]


def check_texts(where, item, keys):
    if not isinstance(item, dict):
        raise InputError(where, "not a JSON object", MEND)
    for key in keys:
        if key not in item:
            raise InputError(where, f'"{key}" is missing', MEND)
        if not isinstance(item[key], str):
            raise InputError(where, f'"{key}" must be text', MEND)
        if not item[key].strip():
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
