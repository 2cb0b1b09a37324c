"""
Conversations of several turns, in which a question may depend on the ones before.

    What is the capital of Kenya?       The capital of Kenya is Nairobi.
    And its currency?                   The currency of Kenya is the Kenyan shilling.
    what about peru                     The currency of Peru is the sol.
"""

from data.world.exchanges import Exchange, magnitude

MOVES = {  # what the next question may be about
    "follow": 34,  # another attribute of the same thing
    "same": 28,  # the same attribute of another thing
    "correct": 8,  # "no, I meant Peru"
    "correct_short": 5,  # "no, I meant the capital"
    "another": 8,  # another thing with the same value
    "step": 6,  # the next element or planet
    "thanks": 7,
    "new": 4,
}


class Threads:
    """Makes conversations out of the exchanges of an Asker."""

    def __init__(self, asker):
        self.asker, self.rng = asker, asker.rng
        self.thanks_rows = [row for row in asker.tables.smalltalk if row["kind"] == "thanks"]

    def thread(self, fact, length):
        """A conversation of `length` exchanges that begins with a fact: [Exchange]"""
        asker, rng = self.asker, self.rng
        exchanges = self.opening(fact)
        while len(exchanges) < length:
            (move,) = rng.choices(list(MOVES), MOVES.values())
            last = exchanges[-1]
            if last.way == "chat":  # after thanks, we still talk about the same thing
                last = next(e for e in reversed(exchanges) if e.way != "chat")
                move = "follow"
            exchange = last.fact and getattr(self, move)(last)
            exchanges.append(exchange or asker.ask(rng.choice(asker.facts)))
        return exchanges[:length]

    def opening(self, fact):
        """One or two exchanges."""
        asker, rng = self.asker, self.rng
        name, kind = asker.mention(fact.entity), rng.random()
        if kind < 0.15:
            special = f"topic_{fact.entity.table}"
            use = special if special in asker.tables.frames and rng.random() < 0.6 else "topic"
            answer = f"Gladly. What would you like to know about {name}?"
            return [Exchange(asker.frame(use + asker.suffix, name=name), answer, "", fact, "topic")]
        if kind < 0.22:
            answer = f"Yes. {asker.describe(fact.entity)}"
            question = asker.frame("know" + asker.suffix, name=name)
            return [Exchange(question, answer, "", fact, "topic")]
        if kind < 0.35:
            return [asker.yes_no(fact) or asker.plain(fact)]
        if kind < 0.5:
            return [asker.back(fact) or asker.plain(fact)]
        return [asker.plain(fact)]

    def follow(self, last):
        asker, fact = self.asker, last.fact
        others = [f for f in fact.entity.facts if f.attribute != fact.attribute]
        if last.way in ("topic", "about"):
            others = fact.entity.facts
        if not others:
            return None
        other = self.rng.choice(others)
        question = asker.say(other, "follow")
        if not question or self.rng.random() < 0.4 or asker.unseen:
            question = asker.frame("follow", short=asker.short(other))
        dated = other.attribute == "year" and "done" in fact.entity.words  # "was invented"
        if dated and fact.attribute != "year" and self.rng.random() < 0.4:
            question = asker.frame("when")
        return Exchange(question, asker.say(other, "answer"), other.values[0], other, "plain")

    def same(self, last, use="same"):
        asker = self.asker
        if last.way != "plain":
            return None
        other = asker.another(last.fact)
        if not other:
            return None
        question = asker.frame(use + asker.suffix, name=asker.mention(other.entity))
        return Exchange(question, asker.say(other, "answer"), other.values[0], other, "plain")

    def correct(self, last):
        return self.same(last, "correct")

    def correct_short(self, last):
        asker, fact = self.asker, last.fact
        others = [f for f in fact.entity.facts if f.attribute != fact.attribute]
        if not others or last.way != "plain":
            return None
        other = self.rng.choice(others)
        question = asker.frame("correct_short" + asker.suffix, short=asker.short(other))
        return Exchange(question, asker.say(other, "answer"), other.values[0], other, "plain")

    def another(self, last):
        """Another thing with the same value: the next one by the alphabet."""
        asker, fact = self.asker, last.fact
        holders = asker.same_value(fact)
        if last.way not in ("back", "plain") or len(holders) < 2:
            return None
        if last.way == "plain" and fact.attribute not in ("author", "painter", "composer"):
            return None
        i = next(i for i, holder in enumerate(holders) if holder.name == fact.name)
        other = holders[(i + 1) % len(holders)]
        if other.name not in asker.ours:
            return None
        question = asker.frame("another" + asker.suffix)
        return Exchange(question, asker.say(other, "back_answer"), other.name, other, "back")

    def step(self, last):
        """The next or the previous one of a table in which every thing has a place of its own."""
        asker, fact = self.asker, last.fact
        place = {"elements": "number", "planets": "position"}.get(fact.entity.table)
        if not place:
            return None
        up = self.rng.random() < 0.6
        (here,) = (f for f in fact.entity.facts if f.attribute == place)
        there = magnitude(here.values[0]) + (1 if up else -1)
        facts = [f for f in asker.by_key[here.key] if magnitude(f.values[0]) == there]
        if not facts:
            return None
        question = asker.frame(("next" if up else "previous") + asker.suffix)
        answer = asker.say(facts[0], "back_answer")
        return Exchange(question, answer, facts[0].name, facts[0], "back")

    def thanks(self, last):
        return self.thanks_rows and self.asker.chat(self.rng.choice(self.thanks_rows))

    def new(self, last):
        return self.asker.ask(self.rng.choice(self.asker.facts))
