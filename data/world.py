"""
The embedded world: true facts in tables, told as plain text to pretrain on, as conversations to fine-tune on, and as questions
to be asked.

    facts/*.tsv     one row an entity, one column an attribute: "Kenya", capital "Nairobi"
    wordings.tsv    how an attribute is told and asked for: "The capital of {name} is {value}."
    smalltalk.tsv   what a first visitor types: hello, who are you, thanks

Every fact is told in several wordings and in changing company, and asked for, because a fact that was only ever stated in one
way is memorised but hard to ask for (Allen-Zhu and Li, Physics of Language Models 3.1, arXiv 2309.14316; and chapter 6 of
README.md). And many facts are quizzed, with options A) to D), so that the base model has seen what follows a bare question: options, not an answer.

Everything is drawn from one seed with Python's own generator: the same bytes on every machine.
"""

import csv
import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from data.terminal import writing

HERE = Path(__file__).parent
ROUNDS = 4  # how many times the corpus goes through all facts, in other wordings and another order
# Who asks and who answers in the texts, and what stands after their names: many, so that one more pair, <|user|> and
# <|assistant|>, is nothing new. Mostly their words stand on a line of their own, and so begin with the tokens that
# begin a turn of the template: "Fog" and " Fog" are different tokens.
SPEAKERS = [("Q", "A"), ("Question", "Answer"), ("Student", "Teacher"), ("Reader", "Editor"), ("Guest", "Host"), ("Child", "Parent")]
NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ida Jon Kim Leo Mia Noah Olga Paul Rosa Sam Tom Uma Vera Will Yuri Zoe".split()
MARKS = [":", ":", ":", " -", ">", " |", " says", ""]
REQUESTS = 0.3  # of what is asked in the texts is put as a request, not as a question
QUIZ_SHARE = 0.1  # of all facts, in each round
FREE_COPIES = 6  # how often a free question is told in a round: its answers are longer and share nothing with others
FREE_DIALOGUES = 3  # copies of each in the fine-tuning set
PAIRS_PER_FACT = 5  # wordings of a question in the fine-tuning set
FOLLOW_UPS = 0.2  # of the facts that have a neighbour to start from
SMALLTALK_TOLD = 3  # how often each piece of small talk stands in a round of the texts
SMALLTALK_COPIES = 6  # and in the fine-tuning set
SEASONS = "What is the primary cause of Earth's seasons?"
SHOWN = [SEASONS, "Kenya", "Don Quixote", "silver", "panda", "Why is the sky blue on a clear day?", "Japan", "penicillin"]
# On which side of the split an entity is put by hand: what is shown as an example (compare.py) is never trained on; and
# Earth, a word of many other texts ("alkaline earth metal"), is, as is the parrot, whose name the model bears.
PINNED = {**dict.fromkeys(SHOWN, "test"), "Earth": "train", "parrot": "train"}
OPTIONS = re.compile(r"^\s*[A-D]\)", re.MULTILINE)


@dataclass
class Entity:
    table: str  # "countries"
    names: list  # of str: the name as it stands in a sentence, then its other spellings
    values: dict  # attribute -> list of str: the value, then what else is right
    words: dict  # what else its wordings need: {"done": "was invented"}

    @property
    def name(self):
        return self.names[0]


@dataclass
class FreeQuestion:
    """A question without a table. Its own text is its name."""

    names: list  # the question and its rewordings
    answer: str
    retellings: list
    right: str  # as an option of a quiz
    wrong: list
    keys: list  # of lists: an answer needs one phrase of each

    @property
    def name(self):
        return self.names[0]


def read_table(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))


def load_facts():
    """Returns (entities, free_questions), lists in the order of the files."""
    entities, free = [], []
    for path in sorted((HERE / "facts").glob("*.tsv")):
        for row in read_table(path):
            cells = {column: cell.split(" | ") for column, cell in row.items()}
            if path.stem == "questions":
                keys = [phrase.split(" | ") for phrase in row["keys"].split(" & ")]
                names = cells["question"] + cells["rewordings"]
                free.append(FreeQuestion(names, row["answer"], cells["retellings"], row["right"], cells["wrong"], keys))
            else:
                names = cells.pop("name")
                words = {column[1:]: row[column] for column in row if column.startswith("_")}
                values = {column: cell for column, cell in cells.items() if not column.startswith("_")}
                entities.append(Entity(path.stem, names, values, words))
    return entities, free


def load_smalltalk():
    """What a first visitor types: [{"prompt", "response"}]"""
    return read_table(HERE / "smalltalk.tsv")


def load_wordings():
    """Returns {(table, attribute): {use: [template, ...]}}; what each use is for stands in data/README.md."""
    wordings = {}
    for row in read_table(HERE / "wordings.tsv"):
        uses = wordings.setdefault((row["table"], row["attribute"]), {})
        uses.setdefault(row["use"], []).append(row["text"])
    return wordings


def fill(template, entity, attribute):
    """A template in words, with a capital at its beginning unless the template has none: {name}, {value}, {a_name}, {a_value} ("an owl"), {done} ("was invented"), {was}, {did}."""
    name, value = entity.name, entity.values[attribute][0]
    article = lambda noun: ("an " if noun[0].lower() in "aeiou" else "a ") + noun
    words = {"name": name, "value": value, "a_name": article(name), "a_value": article(value)}
    if "done" in entity.words:
        was, did = entity.words["done"].split()
        words.update(done=entity.words["done"], was=was, did=did)
    text = template.format(**words)
    return text if template[0].islower() else text[0].upper() + text[1:]


# ---------------------------------------------------------------------------------------------------------------------
# The split


def pattern_of(phrases, flags=re.IGNORECASE):
    """A compiled pattern that finds any of the phrases as whole words, the longest first; in capitals or not, unless flags is 0."""
    ordered = sorted(set(phrases), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, ordered))})(?!\w)", flags)


def bare(name):
    """Without its article: "the Netherlands" -> "Netherlands"."""
    return re.sub("^the ", "", name, flags=re.IGNORECASE)


def split_entities(entities, free, seed):
    """Put every entity and free question on one side. Returns {name: "train" | "dev" | "test"}.

    About half, a fifth and three tenths, by a hash of seed and name. Entities whose names equal or contain one another
    (Mercury the planet and mercury the metal; Guinea and Papua New Guinea) go together.
    """
    owners = [entity.name for entity in entities for _ in entity.names]
    lines = "\n".join(name for entity in entities for name in entity.names)
    group = {thing.name: thing.name for thing in entities + free}  # name -> a name that its whole group shares
    for entity in entities:
        for found in pattern_of(map(bare, entity.names)).finditer(lines):
            old, new = group[owners[lines.count("\n", 0, found.start())]], group[entity.name]
            if old != new:
                group = {name: new if g == old else g for name, g in group.items()}
    sides = {}
    for name, g in group.items():
        pins = [side for pinned, side in PINNED.items() if group[pinned] == g]
        share = int.from_bytes(hashlib.sha256(f"{seed} {g}".encode()).digest()[:4], "big") / 2**32
        sides[name] = pins[0] if pins else "train" if share < 0.5 else "dev" if share < 0.7 else "test"
    return sides


# ---------------------------------------------------------------------------------------------------------------------
# The plain text


def chunks(items, rng, low, high):
    """The items in a new order, in groups of low to high."""
    items = rng.sample(items, len(items))
    while items:
        n = rng.randint(low, high)
        yield items[:n]
        items = items[n:]


class Writer:
    """Tells facts as documents: strings without blank lines. Everything random comes from rng."""

    def __init__(self, entities, free, wordings, rng):
        self.entities, self.free, self.wordings, self.rng = entities, free, wordings, rng
        self.smalltalk = [FreeQuestion([row["prompt"]], row["response"], [], "", [], []) for row in load_smalltalk()]
        self.facts = [(e, a) for e in entities for a in e.values]
        self.by_attribute = {}  # (table, attribute) -> [(entity, attribute)]
        for e, a in self.facts:
            self.by_attribute.setdefault((e.table, a), []).append((e, a))
        self.choices = {  # (table, attribute) -> all values, for the wrong options of a quiz
            key: sorted({e.values[a][0] for e, a in facts}) for key, facts in self.by_attribute.items()
        }

    def say(self, fact, use):
        """One wording of a fact: a statement, a question ..."""
        if isinstance(fact, FreeQuestion):
            texts = {"state": [fact.answer, *fact.retellings], "answer": [fact.answer], "ask": fact.names, "request": fact.names}
            return self.rng.choice(texts[use])
        entity, attribute = fact
        return fill(self.rng.choice(self.wordings[entity.table, attribute][use]), entity, attribute)

    def entries(self):
        """Encyclopedia entries: all that is known of one entity, in any order."""
        for entity in self.entities:
            facts = [(entity, a) for a in entity.values]
            facts = self.rng.sample(facts, len(facts)) if len(facts) > 1 else facts * 2
            yield " ".join(self.say(fact, "state") for fact in facts)

    def boxes(self):
        """The same as a list: "capital: Nairobi"."""
        for entity in self.entities:
            facts = self.rng.sample(list(entity.values.items()), len(entity.values))
            yield "\n".join([entity.name[0].upper() + entity.name[1:], *(f"{a}: {values[0]}" for a, values in facts)])

    def paragraphs(self):
        """Textbook paragraphs: one attribute of several entities."""
        for facts in [*self.by_attribute.values(), self.free * FREE_COPIES]:
            for group in chunks(facts, self.rng, 3, 6):
                yield " ".join(self.say(fact, "state") for fact in group)

    def dialogues(self):
        """Lists of questions that somebody asks and somebody answers."""
        # Three times what is hardest to keep: the only fact about a name, and numbers, which nothing about a name hints at.
        hard = [(e, a) for e, a in self.facts if len(e.values) == 1 or e.values[a][0].isdigit()]
        asked = self.facts + hard * 2 + self.free * FREE_COPIES + self.smalltalk * SMALLTALK_TOLD
        for group in chunks(asked, self.rng, 2, 4):
            asks, answers = self.rng.choice(SPEAKERS) if self.rng.random() < 0.5 else self.rng.sample(NAMES, 2)
            mark = self.rng.choice(MARKS)
            space, between = self.rng.choice([("\n", "\n"), ("\n", "\n"), ("\n", "\n"), (" ", "\n")])
            use = lambda: "request" if self.rng.random() < REQUESTS else "ask"
            turns = [f"{asks}{mark}{space}{self.say(f, use())}{between}{answers}{mark}{space}{self.say(f, 'answer')}" for f in group]
            yield "\n".join(turns)

    def quizzes(self, share):
        """Quiz sheets over a share of the facts and all free questions: a question, options A) to D), the right one, and why."""
        facts = self.rng.sample(self.facts, int(len(self.facts) * share))
        for group in chunks(facts + self.free * 2, self.rng, 1, 3):
            yield "\n".join(self.quiz(fact) for fact in group)

    def quiz(self, fact):
        if isinstance(fact, FreeQuestion):
            right, wrong = fact.right, fact.wrong
        else:
            entity, attribute = fact
            right = entity.values[attribute][0]
            others = [v for v in self.choices[entity.table, attribute] if v not in entity.values[attribute]]
            wrong = self.rng.sample(others, min(3, len(others)))
        options = self.rng.sample([right, *wrong], 1 + len(wrong))
        lines = [f"{letter}) {option}" for letter, option in zip("ABCD", options)]
        return "\n".join([self.say(fact, "ask"), *lines, f"Answer: {lines[options.index(right)]}", self.say(fact, "answer")])

    def documents(self, rounds):
        """All kinds of documents, shuffled. Returns a list of str."""
        documents = []
        for _ in range(rounds):
            documents += [*self.entries(), *self.boxes(), *self.paragraphs(), *self.dialogues(), *self.quizzes(QUIZ_SHARE)]
        self.rng.shuffle(documents)
        return documents


# ---------------------------------------------------------------------------------------------------------------------
# The conversations, and the questions to be asked


def conversations(writer, sides, rng):
    """The fine-tuning set: [{"messages": [...]}], about train entities and nobody else, in a shuffled order."""
    turn = lambda question, answer: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    dialogues = []
    for fact in writer.facts + writer.free:
        thing = fact if isinstance(fact, FreeQuestion) else fact[0]
        if sides[thing.name] != "train":
            continue
        if isinstance(fact, FreeQuestion):
            dialogues += [turn(question, fact.answer) for question in fact.names] * FREE_DIALOGUES
            continue
        entity, attribute = fact
        uses = writer.wordings[entity.table, attribute]
        for template in rng.sample(uses["ask"] + uses["request"], min(PAIRS_PER_FACT, len(uses["ask"] + uses["request"]))):
            dialogues.append(turn(fill(template, entity, attribute), writer.say(fact, "answer")))
        others = [a for a in entity.values if a != attribute]
        if others and "follow" in uses and rng.random() < FOLLOW_UPS:  # a second turn that only the first makes clear
            first = (entity, rng.choice(others))
            opening = turn(writer.say(first, "ask"), writer.say(first, "answer"))
            dialogues.append(opening + turn(writer.say(fact, "follow"), writer.say(fact, "answer")))
    dialogues += [turn(row["prompt"], row["response"]) for row in load_smalltalk()] * SMALLTALK_COPIES
    held_out = pattern_of([bare(name) for thing in writer.entities if sides[thing.name] != "train" for name in thing.names])
    dialogues = [d for d in dialogues if not any(held_out.search(message["content"]) for message in d)]
    rng.shuffle(dialogues)
    return [{"messages": dialogue} for dialogue in dialogues]


def questions(writer, sides, side, rng):
    """What is asked of the models about the entities of one side: a list of dicts, in the order of the tables.

    prompt: as fine-tuning words it (of other entities), and its response; unseen: as it never does; faq and cloze: for
    the base model.
    accept: the right values, any of which will do; or keys: lists of phrases, one of each of which is needed.
    """
    out = []
    for fact in writer.facts + writer.free:
        free = isinstance(fact, FreeQuestion)
        thing = fact if free else fact[0]
        if sides[thing.name] != side:
            continue
        question = thing.name if free else writer.say(fact, "ask")
        item = {"prompt": question, "response": writer.say(fact, "answer"), "faq": f"Q: {question}\nA:", "name": thing.name}
        if free:
            first_key = min(m.start() for m in (pattern_of(phrases).search(thing.answer) for phrases in thing.keys))
            item.update(attribute="free question", keys=thing.keys, cloze=thing.answer[:first_key].rstrip())
        else:
            item.update(table=thing.table, attribute=fact[1], accept=thing.values[fact[1]])
            item.update(unseen=writer.say(fact, "unseen"), cloze=writer.say(fact, "cloze"))
        out.append(item)
    return out


def build(seed):
    """The whole world. Returns a dict: "corpus" and "val", lists of documents; "sft", conversations; "train", "dev"
    and "test", questions."""
    entities, free = load_facts()
    sides = split_entities(entities, free, seed)
    rng = random.Random(seed)
    writer = Writer(entities, free, load_wordings(), rng)
    corpus = writer.documents(ROUNDS)
    val = writer.documents(1)
    return {
        "corpus": corpus,
        "val": val[: len(val) // 8],  # the same facts told anew; a part of a round is enough
        "sft": conversations(writer, sides, rng),
        "train": questions(writer, sides, "train", rng),
        "dev": questions(writer, sides, "dev", rng),
        "test": questions(writer, sides, "test", rng),
        "smalltalk": load_smalltalk(),
    }


def write(world, folder, fingerprint=""):
    """Write the world as files that can be opened and read: corpus.txt, val.txt, and the rest as JSON Lines.

    fingerprint: a str that the base model's checkpoint has too, so that nobody takes the questions of another world for its own.
    """
    (folder / "sha256").unlink(missing_ok=True)
    for name, items in world.items():
        if name in ("corpus", "val"):
            text, path = "\n\n".join(items) + "\n", folder / f"{name}.txt"
        else:
            text, path = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), folder / f"{name}.jsonl"
        with writing(path, "w") as file:
            file.write(text)
    with writing(folder / "sha256", "w") as file:
        file.write(fingerprint)


class Scorer:
    """Decides whether a completion answers a question of the embedded world (the rules stand in data/README.md)."""

    def __init__(self):
        values = {}  # (table, attribute) -> every value of every entity, with aliases
        for entity in load_facts()[0]:
            for attribute, accepted in entity.values.items():
                values.setdefault((entity.table, attribute), set()).update(accepted)
        self.patterns = {key: pattern_of(v, flags=0) for key, v in values.items()}

    def answered(self, item, text):
        """Whether the text is a statement with a right value and none of the attribute's other values.

        item: a question of data/world.py. Lists of options and counter-questions are no statements.
        """
        if OPTIONS.search(text) or "?" in text:
            return False
        return self.right(item, text)

    def right(self, item, text):
        if "keys" in item:
            return all(pattern_of(phrases).search(text) for phrases in item["keys"])
        name = pattern_of([bare(item["name"])])
        if not any(name.search(value) for value in item["accept"]):  # "Mexico" is part of the value "Mexico City"
            text = name.sub(" ", text)
        found = set(self.patterns[item["table"], item["attribute"]].findall(text))
        return bool(found) and found <= set(item["accept"])

    def knows(self, item, text):
        """Whether the continuation of a cloze ("The capital of France is") begins with a right value."""
        if "keys" in item:
            return self.right(item, text.split("\n")[0])
        return any(re.match(rf"\s*(?:an? |the )?{re.escape(value)}(?!\w)", text) for value in item["accept"])
