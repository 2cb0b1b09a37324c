"""
The conversations that we fine-tune on. They are about train entities and mention no others.
"""

from data.world.names import bare, pattern_of
from data.world.tables import FreeQuestion
from data.world.wordings import fill

PAIRS_PER_FACT = 5  # how many wordings of the question
FOLLOW_UPS = 0.2  # share of the facts that we also ask for in a second turn
FREE_COPIES = 3  # copies of each wording of a free question
SMALLTALK_COPIES = 6  # copies of each piece of small talk


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversations(writer, sides):
    """The fine-tuning set, shuffled: [{"messages": [...]}]"""
    talks = []
    for fact in writer.facts + writer.free:
        if sides[fact.name] == "train":
            talks += talks_about(fact, writer)
    smalltalk = [turn(talk["prompt"], talk["response"]) for talk in writer.smalltalk]
    talks += smalltalk * SMALLTALK_COPIES
    talks = without_held_out(talks, writer.entities, sides)
    writer.rng.shuffle(talks)
    return [{"messages": talk} for talk in talks]


def talks_about(fact, writer):
    """Several wordings of the question, and perhaps a conversation of two turns."""
    if isinstance(fact, FreeQuestion):
        return [turn(question, fact.answer) for question in fact.names] * FREE_COPIES
    talks, rng = [], writer.rng
    entity, uses = fact.entity, writer.wordings[fact.key]
    questions = uses["ask"] + uses["request"]
    for template in rng.sample(questions, min(PAIRS_PER_FACT, len(questions))):
        question = fill(template, entity, fact.attribute)
        talks.append(turn(question, writer.say(fact, "answer")))
    others = [other for other in entity.facts if other.attribute != fact.attribute]
    if others and "follow" in uses and rng.random() < FOLLOW_UPS:
        first = rng.choice(others)  # "And its currency?" makes sense only after a first question
        opening = turn(writer.say(first, "ask"), writer.say(first, "answer"))
        talks.append(opening + turn(writer.say(fact, "follow"), writer.say(fact, "answer")))
    return talks


def without_held_out(talks, entities, sides):
    """The conversations that don't mention an entity of dev or test."""
    held_out = [entity for entity in entities if sides[entity.name] != "train"]
    pattern = pattern_of([bare(name) for entity in held_out for name in entity.names])

    def mentions_one(talk):
        return any(pattern.search(message["content"]) for message in talk)

    return [talk for talk in talks if not mentions_one(talk)]
