"""
The plain text that we pretrain on: entries, lists, paragraphs, dialogues and quizzes.

We tell every fact in several wordings, next to different facts, and we ask for it too. If a model
reads a fact in only one wording, it memorizes the fact but can't answer questions about the fact
(Allen-Zhu and Li, Physics of Language Models 3.1, arXiv 2309.14316; chapter 6 of README.md).

Many facts also appear in quizzes with options A) to D). That's why the base model follows a bare
question with options, and not with an answer.
"""

from data.world.tables import FreeQuestion
from data.world.wordings import check_wordings, fill

# Pairs of speakers, and below, the marks after their names. The model meets many pairs, so one more
# pair, <|user|> and <|assistant|>, is nothing new.
SPEAKERS = [
    ("Q", "A"),
    ("Question", "Answer"),
    ("Student", "Teacher"),
    ("Reader", "Editor"),
    ("Guest", "Host"),
    ("Child", "Parent"),
]
NAMES = (
    "Ada Ben Cleo Dan Eva Finn Gus Hana Ida Jon Kim Leo "
    "Mia Noah Olga Paul Rosa Sam Tom Uma Vera Will Yuri Zoe"
).split()
MARKS = [":", ":", ":", " -", ">", " |", " says", ""]
# A speaker's words mostly start a new line, without a space before them. So they start with the
# same tokens as in the chat template: "Fog" and " Fog" are different tokens.
SPACES = ["\n", "\n", "\n", " "]
REQUESTS = 0.3  # share of the questions that we word as requests
QUIZ_SHARE = 0.1  # share of the facts that we quiz in each round
FREE_COPIES = 6  # per round; free questions have long answers that share no wording
SMALLTALK_TOLD = 3  # copies of each piece of small talk per round


def chunks(items, rng, low, high):
    """The items in a new order, in groups of low to high."""
    items = rng.sample(items, len(items))
    while items:
        n = rng.randint(low, high)
        yield items[:n]
        items = items[n:]


class Writer:
    """Tells facts as documents, which are strings without blank lines.

    A fact is a Fact or a FreeQuestion. Everything random comes from rng.
    """

    def __init__(self, entities, free, smalltalk, wordings, rng):
        self.entities, self.free, self.smalltalk = entities, free, smalltalk
        self.wordings, self.rng = wordings, rng
        self.facts = [fact for entity in entities for fact in entity.facts]
        check_wordings(self.facts, wordings)
        self.by_attribute = {}  # (table, attribute) -> [fact]
        for fact in self.facts:
            self.by_attribute.setdefault(fact.key, []).append(fact)
        self.choices = {  # (table, attribute) -> all values, for the wrong options of a quiz
            key: sorted({fact.values[0] for fact in facts})
            for key, facts in self.by_attribute.items()
        }

    def say(self, fact, use):
        """One wording of a fact: a statement, a question ..."""
        if isinstance(fact, FreeQuestion):
            return self.rng.choice(fact.wordings(use))
        template = self.rng.choice(self.wordings[fact.key][use])
        return fill(template, fact.entity, fact.attribute)

    def entries(self):
        """Encyclopedia entries: everything about one entity, in any order."""
        for entity in self.entities:
            facts = entity.facts
            facts = self.rng.sample(facts, len(facts)) if len(facts) > 1 else facts * 2
            yield " ".join(self.say(fact, "state") for fact in facts)

    def boxes(self):
        """The same as a list: "capital: Nairobi"."""
        for entity in self.entities:
            title = entity.name[0].upper() + entity.name[1:]
            facts = self.rng.sample(entity.facts, len(entity.facts))
            yield "\n".join([title, *(f"{fact.attribute}: {fact.values[0]}" for fact in facts)])

    def paragraphs(self):
        """Textbook paragraphs: one attribute of several entities."""
        for facts in [*self.by_attribute.values(), self.free * FREE_COPIES]:
            for group in chunks(facts, self.rng, 3, 6):
                yield " ".join(self.say(fact, "state") for fact in group)

    def dialogues(self):
        """Somebody asks two to four questions, and somebody else answers."""
        # Some facts are harder to remember, so we tell them three times: numbers, because a name
        # doesn't hint at them, and a fact that is the only one about its entity.
        hard = [f for f in self.facts if len(f.entity.values) == 1 or f.values[0].isdigit()]
        smalltalk = [
            FreeQuestion([talk["prompt"]], talk["response"], [], "", [], [])
            for talk in self.smalltalk
        ]
        asked = self.facts + hard * 2
        asked += self.free * FREE_COPIES + smalltalk * SMALLTALK_TOLD
        for group in chunks(asked, self.rng, 2, 4):
            yield self.dialogue(group)

    def dialogue(self, facts):
        rng = self.rng
        if rng.random() < 0.5:
            asker, answerer = rng.choice(SPEAKERS)
        else:
            asker, answerer = rng.sample(NAMES, 2)
        mark, space = rng.choice(MARKS), rng.choice(SPACES)
        turns = []
        for fact in facts:
            use = "request" if rng.random() < REQUESTS else "ask"
            turns.append(f"{asker}{mark}{space}{self.say(fact, use)}")
            turns.append(f"{answerer}{mark}{space}{self.say(fact, 'answer')}")
        return "\n".join(turns)

    def quizzes(self, share):
        """Quiz sheets about a share of the facts and all free questions."""
        facts = self.rng.sample(self.facts, int(len(self.facts) * share))
        for group in chunks(facts + self.free * 2, self.rng, 1, 3):
            yield "\n".join(self.quiz(fact) for fact in group)

    def quiz(self, fact):
        """A question, options A) to D), the right option, and the answer as a sentence."""
        if isinstance(fact, FreeQuestion):
            right, wrong = fact.right, fact.wrong
        else:
            right = fact.values[0]
            others = [value for value in self.choices[fact.key] if value not in fact.values]
            wrong = self.rng.sample(others, min(3, len(others)))
        options = self.rng.sample([right, *wrong], 1 + len(wrong))
        lines = [f"{letter}) {option}" for letter, option in zip("ABCD", options, strict=False)]
        answer = lines[options.index(right)]
        question = self.say(fact, "ask")
        return "\n".join([question, *lines, f"Answer: {answer}", self.say(fact, "answer")])

    def documents(self, rounds):
        """All kinds of documents, shuffled. Returns a list of str."""
        documents = []
        for _ in range(rounds):
            documents += self.entries()
            documents += self.boxes()
            documents += self.paragraphs()
            documents += self.dialogues()
            documents += self.quizzes(QUIZ_SHARE)
        self.rng.shuffle(documents)
        return documents
