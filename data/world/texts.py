"""
The plain text that we pretrain on: entries, lists, paragraphs, dialogues and quizzes.

We tell every fact in several wordings, next to different facts, and we ask for it from all sides.
If a model reads a fact in only one wording, it memorizes the fact but can't answer questions about
the fact (Allen-Zhu and Li, Physics of Language Models 3.1, arXiv 2309.14316; see
docs/experiments.md).

Many facts also appear in quizzes with options A) to D). That's why the base model follows a bare
question with options, and not with an answer.
"""

from data.world.names import bare
from data.world.noise import as_typed, misspelled
from data.world.strangers import Strangers
from data.world.tables import FreeQuestion
from data.world.threads import Threads
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

ENTRIES = 0.4  # share of the entities that get an entry in each round, and as many a box
# How often each round asks for a thing, in dialogues.
PLAIN = 0.5
LISTS_ASKED = 4
MEMBERS_ASKED = 10
COMPARED = 250
OTHER_WAYS = 0.4
FREE_ASKED = 4
CONCEPT_ASKED = 8
SMALLTALK_ASKED = 8
UNKNOWN_SHARE = 0.05  # of all exchanges
THREADS = 0.22  # share of the facts that begin a conversation of several turns
STYLED = 0.12  # share of the dialogues in which somebody asks for a style
QUIZ_SHARE = 0.25  # share of the facts that we quiz
FREE_QUIZZED = 0.5  # and of the free questions
TELLING = 0.45  # share of the rounds that tell facts; the later rounds mostly ask
# Share of the questions that are typed with noise: little while we tell, more later. Pretraining
# learns every token, so noise costs capacity. Fine-tuning doesn't look at questions.
LITTLE_NOISE, NOISE = 0.1, 0.35


def chunks(items, rng, low, high):
    """The items in a new order, in groups of low to high."""
    items = rng.sample(items, len(items))
    while items:
        n = rng.randint(low, high)
        yield items[:n]
        items = items[n:]


class Writer:
    """Tells facts as documents, which are strings without blank lines."""

    def __init__(self, asker, noise=NOISE):
        self.asker, self.rng, self.tables = asker, asker.rng, asker.tables
        self.noise = noise
        self.threads, self.strangers = Threads(asker), Strangers()
        check_wordings(asker.facts, asker.wordings)
        self.quartets = {  # (table, attribute) -> the options of quizzes, four to a quiz
            key: in_quartets(values) for key, values in asker.values.items()
        }

    def entries(self):
        """Encyclopedia entries: everything about one entity, in any order."""
        asker, rng = self.asker, self.rng
        for entity in rng.sample(asker.entities, int(len(asker.entities) * ENTRIES)):
            templates = asker.wordings.get(entity.table, "*", "about")
            if templates and rng.random() < 0.5:
                yield fill(rng.choice(templates), entity, "*")
                continue
            facts = entity.facts
            facts = rng.sample(facts, len(facts)) if len(facts) > 1 else facts * 2
            yield " ".join(asker.say(fact, "state") for fact in facts)
        for concept in asker.concepts:
            yield concept.texts["encyclopedia"]

    def boxes(self):
        """The same as a list: "capital: Nairobi"."""
        entities = self.asker.entities
        for entity in self.rng.sample(entities, int(len(entities) * ENTRIES)):
            title = entity.name[0].upper() + entity.name[1:]
            facts = self.rng.sample(entity.facts, len(entity.facts))
            yield "\n".join([title, *(f"{fact.attribute}: {fact.values[0]}" for fact in facts)])

    def paragraphs(self):
        """Textbook paragraphs: one attribute of several entities, or several free questions."""
        for facts in self.asker.by_key.values():
            for use in self.rng.sample(("answer", "back_answer", "state"), 2):
                for group in chunks(facts, self.rng, 4, 8):
                    yield " ".join(self.asker.say(fact, use) for fact in group)
        for group in chunks(self.asker.free, self.rng, 3, 6):
            yield " ".join(self.rng.choice([item.answer, *item.retellings]) for item in group)

    def cards(self):
        """Flash cards, the shortest way to tell a fact: a name and its value, or turned around."""
        for facts in self.asker.by_key.values():
            title = self.asker.short(facts[0])
            few = [fact for fact in facts if len(self.asker.same_value(fact)) < 4]
            for group in chunks(facts, self.rng, 8, 16):
                yield "\n".join([title, *(f"{fact.name}: {fact.values[0]}" for fact in group)])
            for group in chunks(few, self.rng, 8, 16):
                yield "\n".join([title, *(f"{fact.values[0]}: {fact.name}" for fact in group)])

    def lists(self):
        """What has a value in common: The noble gases are helium, neon and argon."""
        for (key, _), facts in self.asker.holders.items():
            if len(facts) < 2 or not self.asker.wordings.get(*key, "list_all"):
                continue
            for i in range(0, len(facts), 10):
                names = [fact.name for fact in facts[i : i + 10]]
                names = ", ".join(names[:-1]) + " and " + names[-1] if names[1:] else names[0]
                yield self.asker.say(facts[0], "list_all", names=names)

    def spellings(self):
        """Names and values as people type them, and as they are written: "keyna, kenya: Kenya"."""
        words = {word for entity in self.asker.entities for word in entity.names}
        words |= {value for values in self.asker.values.values() for value in values}
        words = sorted(word for word in words if len(word) > 3 and not word[0].isdigit())
        for group in chunks(words, self.rng, 4, 8):
            lines = []
            for word in group:
                lower, wrong = word.lower(), misspelled(word, self.rng)
                typed = self.rng.sample([lower, wrong, misspelled(lower, self.rng)], 2)
                lines.append(f"{', '.join(typed)}: {word}")
            yield "\n".join(lines)

    def exchanges(self):
        """Questions about everything, from all sides: [Exchange]"""
        asker, rng, found = self.asker, self.rng, []
        for fact in asker.weighted():
            # Some facts are harder to remember: numbers, because a name doesn't hint at them, and a
            # fact that is the only one about its entity.
            hard = 2 if len(fact.entity.values) == 1 else fact.values[0].isdigit()
            found += [asker.plain(fact)] * (rng.random() < PLAIN) + [asker.plain(fact)] * hard
        for facts in asker.holders.values():
            found += [asker.back(facts[0])]
            found += [asker.some(facts[0]) for _ in range(LISTS_ASKED if len(facts) >= 4 else 1)]
        found += [asker.members(table) for table in asker.by_table for _ in range(MEMBERS_ASKED)]
        found += asker.comparisons(COMPARED)
        for fact in rng.sample(asker.weighted(), int(len(asker.weighted()) * OTHER_WAYS)):
            found.append(asker.ask(fact))
        found = [exchange for exchange in found if exchange]
        found += [asker.ask_free(free) for free in asker.free * FREE_ASKED]
        for concept in asker.concepts:
            found += [asker.explain(concept) for _ in range(CONCEPT_ASKED)]
        found += [asker.chat(row) for row in self.tables.smalltalk * SMALLTALK_ASKED]
        found += [asker.unknowable() for _ in range(int(len(found) * UNKNOWN_SHARE))]
        return found

    def dialogues(self):
        """Somebody asks one to four questions, and somebody answers."""
        for group in chunks(self.exchanges(), self.rng, 1, 4):
            yield self.dialogue(group, style=self.rng.random() < STYLED)
        facts = self.asker.facts
        for fact in self.rng.sample(facts, int(len(facts) * THREADS)):
            yield self.dialogue(self.threads.thread(fact, self.rng.randint(2, 5)))

    def typed(self, exchange):
        """The question of an exchange as somebody might type it."""
        return self.type_out(exchange.question, exchange.fact.name if exchange.fact else "")

    def type_out(self, question, name=""):
        """A question as somebody might type it. name: what it is about."""
        if self.rng.random() > self.noise:
            return question
        chatter = self.tables.chatter
        return as_typed(question, self.rng, chatter["before"], chatter["after"], bare(name))

    def dialogue(self, exchanges, style=False):
        rng = self.rng
        if rng.random() < 0.85:
            asker, answerer = rng.choice(SPEAKERS)
        else:
            asker, answerer = rng.sample(NAMES, 2)
        mark, space = rng.choice(MARKS), rng.choice(SPACES)
        turns = []
        if style:
            pairs = self.styled(exchanges, ("\n", " "))
        else:
            pairs = [(self.typed(exchange), exchange.answer) for exchange in exchanges]
        asked = [exchange.question for exchange in exchanges] + [question for question, _ in pairs]
        if any(map(self.strangers.asked, asked)):
            return None
        for question, answer in pairs:
            turns.append(f"{asker}{mark}{space}{question}")
            turns.append(f"{answerer}{mark}{space}{answer}")
        return "\n".join(turns)

    def styled(self, exchanges, gaps):
        """The exchanges in a style that the first question asks for: [(question, answer)]"""
        rng = self.rng
        style = rng.choice(self.tables.styles)
        if style["style"] == "word":
            exchanges = [e for e in exchanges if e.value] or [
                self.asker.plain(rng.choice(self.asker.facts))
            ]
        pairs = [(self.typed(e), in_style(style, e)) for e in exchanges]
        instruction, gap = rng.choice(style["instructions"]), rng.choice(gaps)
        first, answer = pairs[0]
        first = instruction + gap + first if rng.random() < 0.8 else first + gap + instruction
        return [(first, answer), *pairs[1:]]

    def quizzes(self):
        """Quiz sheets about a share of the facts and of the free questions."""
        asker, rng = self.asker, self.rng
        facts = rng.sample(asker.facts, int(len(asker.facts) * QUIZ_SHARE))
        facts += rng.sample(asker.free, int(len(asker.free) * FREE_QUIZZED))
        for group in chunks(facts, rng, 1, 3):
            yield "\n".join(filter(None, map(self.quiz, group)))

    def quiz(self, fact):
        """A question, options A) to D), the right option, and the answer as a sentence."""
        if isinstance(fact, FreeQuestion):
            right, question, sentence = fact.right, fact.name, fact.answer
            if self.rng.random() < 0.5:
                question = self.rng.choice(fact.names)
            options = sorted([right, *fact.wrong])
        else:
            right = fact.values[0]
            options = next(four for four in self.quartets[fact.key] if right in four)
            question, sentence = self.asker.say(fact, "ask"), self.asker.say(fact, "answer")
        if self.strangers.asked(question):
            return ""
        lines = [f"{letter}) {option}" for letter, option in zip("ABCD", options, strict=False)]
        answer = lines[options.index(right)]
        return "\n".join([question, *lines, f"Answer: {answer}", sentence])

    def documents(self, rounds):
        """All kinds of documents, in the order to read them. Returns a list of str.

        The first rounds tell the facts, with few typos in the questions. The later ones mostly ask.
        """
        documents = []
        for r in range(rounds):
            telling = r < TELLING * rounds
            self.noise = LITTLE_NOISE if telling else NOISE
            found = [*self.lists(), *self.dialogues(), *self.quizzes()]
            if telling:
                found += [*self.entries(), *self.boxes(), *self.paragraphs()]
            if telling and r % 2:
                found += self.cards()
            if r % 2 == 0:
                found += self.spellings()
            found = [text for text in found if text]
            self.rng.shuffle(found)
            documents += found
        return documents


def in_style(style, exchange):
    value = exchange.value or exchange.answer
    words = dict(value=value, answer=exchange.answer, ANSWER=exchange.answer.upper())
    return style["use"].format(**words)


def in_quartets(values):
    """All values in groups of four, by the alphabet. The last group borrows from the one before."""
    starts = [min(i, max(0, len(values) - 4)) for i in range(0, len(values), 4)]
    return [values[i : i + 4] for i in starts]
