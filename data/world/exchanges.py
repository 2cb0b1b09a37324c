"""
Exchanges: a question and its answer. Facts are asked for from all sides.

    plain       What is the capital of Kenya?           The capital of Kenya is Nairobi.
    back        Which country has Nairobi as capital?   Nairobi is the capital of Kenya.
    some        Name two countries in Africa.           Algeria and Angola are countries in Africa.
    members     Name two planets.                       Mercury and Venus are planets.
    yes_no      Is Mombasa the capital of Kenya?        The capital of Kenya is Nairobi.
    either      Is Kenya in Africa or in Asia?          The continent of Kenya is Africa.
    compare     Which came first, the ... or the ...?   ..., so the ... came first.
    same        Do Kenya and Peru have the same ...?    ... ... So no.
    both        What are the capital and currency ...?  ... ...
    about       Tell me about Kenya.                    Kenya is a country in Africa. ...
    contrast    Compare Kenya and Peru.                 ... ...
    unknown     What is the capital of Zarovia?         I don't know that.

We answer yes-or-no questions about one thing with the fact, without a verdict. If we compare two
things, the answer states both facts before it decides. So the model can read its own facts.
"""

from dataclasses import dataclass
from itertools import takewhile

from data.world.invented import Inventor, plural_of
from data.world.split import side_of
from data.world.tables import FORMS
from data.world.wordings import fill, with_article, words_of

# How often we ask for a fact in each way. If one doesn't fit a fact, we ask for it plainly.
WAYS = {
    "plain": 10,
    "back": 22,
    "some": 14,
    "yes_no": 14,
    "either": 12,
    "same": 16,
    "both": 8,
    "about": 15,
    "contrast": 3,
}
SMALL = 80  # a table with fewer rows than this has its facts asked for more often
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()


@dataclass
class Exchange:
    question: str
    answer: str
    value: str = ""  # the bare answer, if it has one
    fact: object = None  # what it is about, if a second turn can refer to it
    way: str = ""


def joined(names):
    """Kenya, Ghana and Togo"""
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + [names[-1]])


def magnitude(value):
    """The number in a value, to compare it with others: "12 years" is 4383 (days). Or None."""
    if value in ORDINALS:
        return ORDINALS.index(value)
    number, _, unit = value.removeprefix("about ").partition(" ")
    try:
        return float(number.replace(",", "")) * {"years": 365.25}.get(unit, 1)
    except ValueError:
        return None


class Asker:
    """Makes exchanges about some of the world. Everything random comes from rng.

    tables: the whole world. entities, free, concepts: what to ask about. sides: which invented
    names and unknown questions to use. unseen: use the wordings that are kept for testing.
    """

    def __init__(self, tables, wordings, entities, free, concepts, sides, rng, unseen=False):
        self.tables, self.wordings, self.rng = tables, wordings, rng
        self.entities, self.free, self.concepts = entities, free, concepts
        self.suffix = "_unseen" if unseen else ""
        self.unseen = unseen
        real = [name for entity in tables.entities for name in entity.names]
        real += [v for entity in tables.entities for vs in entity.values.values() for v in vs]
        self.inventor = Inventor(tables.invented, sides, rng, real)
        self.facts = [fact for entity in entities for fact in entity.facts]
        self.by_key, self.holders, self.by_table = {}, {}, {}
        for entity in entities:
            self.by_table.setdefault(entity.table, []).append(entity)
        for fact in self.facts:
            self.by_key.setdefault(fact.key, []).append(fact)
        self.ours = {entity.name for entity in entities}  # what we may mention
        # Who has a value, by the alphabet. It's the whole world, so that the conversations give the
        # same lists as the texts. We skip a list that names something that isn't ours.
        for entity in tables.entities:
            for fact in entity.facts:
                self.holders.setdefault((fact.key, fact.values[0]), []).append(fact)
        for facts in self.holders.values():
            facts.sort(key=lambda fact: fact.name.lower().removeprefix("the "))
        self.ordered = [fact for fact in self.facts if self.wordings.get(*fact.key, "more")]
        self.values = {
            key: sorted({fact.values[0] for fact in facts}) for key, facts in self.by_key.items()
        }
        self.unknown = {
            about: [text for text in texts if side_of(text, "unknown") in sides]
            for about, texts in tables.unknown.items()
        }

    def weighted(self):
        """All facts, those of small tables several times. So each wording comes up often."""
        return [
            fact
            for facts in self.by_key.values()
            for fact in facts * max(1, round(SMALL / len(facts)))
        ]

    # Wordings

    def say(self, fact, use, **more):
        """One wording of a fact, or None if there is none for this use."""
        templates = self.wordings.get(*fact.key, use)
        if not templates:
            return None
        return fill(self.rng.choice(templates), fact.entity, fact.attribute, **more)

    def frame(self, use, **words):
        """One wording that fits anything, from frames.tsv."""
        template = self.rng.choice(self.tables.frames[use])
        text = template.format(**words)
        return text if template[0].islower() else text[0].upper() + text[1:]

    def mention(self, entity):
        """A name as in the middle of a sentence: "Kenya", "a lion"."""
        (template,) = self.wordings.get(entity.table, "*", "mention") or ["{name}"]
        return template.format(**words_of(entity, "*"))  # fill() would make it "Helium"

    def short(self, fact):
        template = (self.wordings.get(*fact.key, "short") or ["the {attribute}"])[0]
        return template.format(attribute=fact.attribute)

    def same_value(self, fact):
        """All facts with the same value, by the alphabet."""
        return self.holders[fact.key, fact.values[0]]

    # Facts from all sides

    def ask(self, fact):
        """An exchange about a fact, from a random side."""
        (way,) = self.rng.choices(list(WAYS), WAYS.values())
        return getattr(self, way)(fact) or self.plain(fact)

    def plain(self, fact):
        use = "unseen" if self.unseen else self.rng.choice(("ask", "request", "request"))
        question, answer = self.say(fact, use), self.say(fact, "answer")
        return Exchange(question, answer, fact.values[0], fact, "plain")

    def back(self, fact):
        fact = self.same_value(fact)[0]  # of many right answers, the first by the alphabet
        question = self.say(fact, "back" + self.suffix)
        if not question or fact.name not in self.ours:
            return None
        return Exchange(question, self.say(fact, "back_answer"), fact.name, fact, "back")

    def some(self, fact):
        holders = self.same_value(fact)
        if len(holders) < 2:
            return None
        templates = self.wordings.get(*fact.key, "list" + self.suffix)
        if not templates or not self.wordings.get(*fact.key, "list_answer"):
            return None
        template = self.rng.choice(templates)
        listed = self.first(holders, None if "{n}" in template else 5)
        if not listed:
            return None
        names = joined([other.name for other in listed])
        question = fill(template, fact.entity, fact.attribute, n=NUMBERS[len(listed)])
        answer = self.say(fact, "list_answer", names=names)
        return Exchange(question, answer, names, None, "some")

    def first(self, things, n=None):
        """The first n things, or two to five if n is None. None if that needs a held-out thing."""
        ours = list(takewhile(lambda thing: thing.name in self.ours, things))
        n = min(len(things), n or min(len(ours), self.rng.choice((2, 3, 3, 4, 5))))
        return ours[:n] if 2 <= n <= len(ours) else None

    def members(self, table):
        """The first few of a table, or all of a short table if the question gives no number."""
        entities = [entity for entity in self.tables.entities if entity.table == table]
        templates = self.wordings.get(table, "*", "list" + self.suffix)
        if not templates:
            return None
        template, whole = self.rng.choice(templates), len(entities)
        listed = self.first(entities, None if "{n}" in template or whole > 10 else whole)
        if not listed:
            return None
        names = joined([entity.name for entity in listed])
        question = fill(template, listed[0], "*", n=NUMBERS.get(len(listed)))
        (answer,) = self.wordings.get(table, "*", "list_answer")
        return Exchange(question, fill(answer, listed[0], "*", names=names), names)

    def wrong_value(self, fact):
        others = [value for value in self.values[fact.key] if value not in fact.values]
        if not others or (len(others) > 20 and self.rng.random() < 0.2):
            return self.inventor.make("form_country")
        return self.rng.choice(others)

    def yes_no(self, fact):
        right = self.rng.random() < 0.5
        value = fact.values[0] if right else self.wrong_value(fact)
        words = dict(value=value, a_value=with_article(value))
        question = self.say(fact, "yes" + self.suffix, **words)
        if not question:
            return None
        return Exchange(question, self.say(fact, "answer"), fact.values[0], fact, "yes_no")

    def either(self, fact):
        options = [fact.values[0], self.wrong_value(fact)]
        self.rng.shuffle(options)
        words = dict(value=options[0], other=options[1], a_value=with_article(options[0]))
        question = self.say(fact, "either" + self.suffix, a_other=with_article(options[1]), **words)
        if not question:
            return None
        return Exchange(question, self.say(fact, "answer"), fact.values[0], fact, "either")

    def another(self, fact):
        """The same attribute of another entity of the same table."""
        others = self.by_key[fact.key]
        other = self.rng.choice(others)
        return other if other.name != fact.name else None

    def compare(self, fact):
        other = self.another(fact)
        if not other:
            return None
        sizes = magnitude(fact.values[0]), magnitude(other.values[0])
        which = self.rng.choice(("more", "less"))
        if None in sizes or sizes[0] == sizes[1] or not self.wordings.get(*fact.key, which):
            return None
        winner = fact if (sizes[0] > sizes[1]) == (which == "more") else other
        words = dict(name2=other.name, value2=other.values[0], winner=winner.name)
        question = self.say(fact, which + self.suffix, **words)
        answer = self.say(fact, which + "_answer", **words)
        if not question or not answer:
            return None
        return Exchange(question, answer, winner.name)

    def comparisons(self, n):
        """At most n questions for the higher or lower value. Only a few attributes have one."""
        facts = self.rng.choices(self.ordered, k=n) if self.ordered else []
        return [exchange for exchange in map(self.compare, facts) if exchange]

    def same(self, fact):
        holders = [other for other in self.same_value(fact) if other.name in self.ours]
        if len(holders) < 2:  # nothing else has this value: the answer would always be no
            return None
        other = self.rng.choice(holders) if self.rng.random() < 0.5 else self.another(fact)
        if not other or other.name == fact.name:
            return None
        words = dict(mention=self.mention(fact.entity), mention2=self.mention(other.entity))
        question = self.say(fact, "same" + self.suffix, short=self.short(fact), **words)
        equal = fact.values[0] == other.values[0]
        if not question or (not equal and set(fact.values) & set(other.values)):
            return None  # Belgium has Dutch and French: neither yes nor no
        told = self.say(fact, "answer"), self.say(other, "answer")
        return Exchange(question, " ".join([*told, "So yes." if equal else "So no."]))

    def both(self, fact):
        others = [other for other in fact.entity.facts if other.attribute != fact.attribute]
        if not others:
            return None
        other = self.rng.choice(others)
        words = dict(short=self.short(fact), short2=self.short(other))
        question = self.frame("both", name=self.mention(fact.entity), **words)
        return Exchange(question, f"{self.say(fact, 'answer')} {self.say(other, 'answer')}")

    def about(self, fact):
        entity = fact.entity
        question = self.tell(entity)
        return question and Exchange(question, self.describe(entity), "", fact)

    def tell(self, entity):
        templates = self.wordings.get(entity.table, "*", "tell" + self.suffix)
        return templates and fill(self.rng.choice(templates), entity, "*")

    def describe(self, entity):
        """The standard text about an entity."""
        templates = self.wordings.get(entity.table, "*", "about")
        if templates:
            return fill(templates[0], entity, "*")
        return " ".join(self.say(fact, "answer") for fact in entity.facts)

    def contrast(self, fact):
        others = self.by_table[fact.entity.table]
        other = self.rng.choice(others)
        templates = self.wordings.get(fact.entity.table, "*", "compare" + self.suffix)
        if other is fact.entity or not templates:
            return None
        question = fill(self.rng.choice(templates), fact.entity, "*", name2=other.name)
        return Exchange(question, f"{self.describe(fact.entity)} {self.describe(other)}")

    # What is in no table

    def ask_free(self, free):
        return Exchange(self.rng.choice(free.names), free.answer)

    def explain(self, concept, form=None):
        """An explanation of a concept in one of three forms, as the question asks for."""
        form = form or self.rng.choice(FORMS)
        if form == "encyclopedia" and self.rng.random() < 0.3 and not self.unseen:
            question = self.rng.choice(concept.asks)
        else:
            question = self.frame(form + self.suffix, name=self.rng.choice(concept.names))
        return Exchange(question, concept.texts[form])

    def chat(self, row):
        prompts = row["unseen" if self.unseen else "prompts"]
        return Exchange(self.rng.choice(prompts), row["response"], way="chat")

    def refuse(self):
        return self.rng.choice(self.tables.refusals)

    def unknowable(self):
        """A question about what is in no table: about an invented thing, or a real one."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.55:
            return Exchange(self.ask_invented(rng.choice(self.facts)), self.refuse())
        if kind < 0.8:
            return Exchange(rng.choice(self.unknown["-"]), self.refuse())
        if kind < 0.88:
            return Exchange(rng.choice(self.unknown["me"]), self.refuse())
        entity = rng.choice(self.entities)
        if not self.unknown.get(entity.table):
            return self.unknowable()
        return Exchange(fill(rng.choice(self.unknown[entity.table]), entity, "*"), self.refuse())

    def ask_invented(self, fact):
        """A question like those about a fact, with an invented name in place of the real one."""
        name = self.inventor.name(fact.entity.table)
        use = "unseen" if self.unseen else self.rng.choice(("ask", "request", "request"))
        if self.rng.random() < 0.15 and self.wordings.get(*fact.key, "back" + self.suffix):
            a_name = with_article(name)
            values = dict(value=name, a_value=a_name, adjective=name, a_adjective=a_name)
            values["values"] = plural_of(name)
            return self.say(fact, "back" + self.suffix, **values)
        words = dict(name=name, a_name=with_article(name), plural=plural_of(name))
        if self.rng.random() < 0.1:
            templates = self.wordings.get(fact.entity.table, "*", "tell" + self.suffix)
            if templates:
                return fill(self.rng.choice(templates), fact.entity, "*", **words)
        return self.say(fact, use, **words)
