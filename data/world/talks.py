"""
The conversations that we fine-tune on. They are about train entities and mention no others.
"""

from data.world.names import bare, pattern_of
from data.world.strangers import Strangers
from data.world.tables import FORMS, FreeQuestion
from data.world.texts import in_style

PLAIN_ASKED = 2
FACT_ASKED = 7
FREE_ASKED = 12
LISTS_ASKED = 30
MEMBERS_ASKED = 60
COMPARED = 3000
CONCEPT_ASKED = 5
SMALLTALK_ASKED = 30
UNKNOWN_SHARE = 0.1
STYLED = 0.2
NOISE = 0.65  # share of the questions that are typed with noise


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversations(writer, forbidden):
    """The fine-tuning set, shuffled: [{"messages": [...]}]. forbidden: see forbids()."""
    asker, rng = writer.asker, writer.rng
    found = [[asker.plain(fact)] for fact in asker.weighted() * PLAIN_ASKED]
    for _ in range(FACT_ASKED):
        found += [[asker.ask(fact)] for fact in asker.weighted()]
    found += [[asker.ask_free(free)] for free in asker.free * FREE_ASKED]
    lists = [facts[0] for facts in asker.holders.values() if len(facts) >= 4]
    listed = [asker.some(fact) for fact in lists * LISTS_ASKED]
    listed += [asker.members(table) for table in asker.by_table for _ in range(MEMBERS_ASKED)]
    found += [[exchange] for exchange in listed + asker.comparisons(COMPARED) if exchange]
    for concept in asker.concepts * CONCEPT_ASKED:
        found += [[asker.explain(concept, form)] for form in FORMS]
    found += [[asker.chat(row)] for row in writer.tables.smalltalk * SMALLTALK_ASKED]
    found += [[asker.unknowable()] for _ in range(int(len(found) * UNKNOWN_SHARE))]
    for fact in asker.weighted():
        found.append(writer.threads.thread(fact, rng.randint(2, 5)))
    talks = []
    for exchanges in found:
        if any(writer.strangers.asked(exchange.question) for exchange in exchanges):
            continue
        if rng.random() < STYLED and exchanges[0].value:
            talks.append(styled(writer, exchanges))
        else:
            talks.append(sum((turn(writer.typed(e), e.answer) for e in exchanges), []))
    talks = [talk for talk in talks if not any(forbidden(turn["content"]) for turn in talk)]
    rng.shuffle(talks)
    return [{"messages": talk} for talk in talks]


def styled(writer, exchanges):
    """A conversation in a style, which a system message asks for, or the first question."""
    rng = writer.rng
    if rng.random() < 0.3:
        return sum((turn(*pair) for pair in writer.styled(exchanges, ("\n", " "))), [])
    style = rng.choice(writer.tables.styles)
    if style["style"] == "word":
        exchanges = [exchange for exchange in exchanges if exchange.value]
    talk = [{"role": "system", "content": rng.choice(style["instructions"])}]
    for exchange in exchanges:
        talk += turn(writer.typed(exchange), in_style(style, exchange))
    return talk


def held_out_texts(things, frames):
    """Everything that asks for a free question or a concept, or answers it: [str]"""
    texts = []
    for thing in things:
        texts += thing.questions
        if isinstance(thing, FreeQuestion):
            texts += [thing.answer, *thing.retellings]
            continue
        texts += thing.texts.values()
        for use in [*FORMS, *(f"{form}_unseen" for form in FORMS)]:
            texts += [frame.format(name=name) for frame in frames[use] for name in thing.names]
    return texts


def forbids(names, texts):
    """A function that says whether a text may not be in what we tune on.

    It may not mention any of the names, say one of the texts, or ask what a stranger asked.
    """
    pattern, asked = pattern_of(map(bare, names)), Strangers(texts).asked
    return lambda text: bool(pattern.search(text)) or asked(text)
