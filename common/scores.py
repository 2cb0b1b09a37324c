"""
Scores of models on the embedded world, for compare.py, and pairs of their own answers, for dpo.py.
"""

import json

import torch

from common.completion import complete, first_paragraph, first_reply, respond
from common.files import writing
from common.messages import InputError, Progress
from data import world
from data.world import strangers

SAMPLES = 6  # answers that we sample to each question
ANSWER = 90  # most tokens of an answer; the longest are explanations of a concept


def share(flags):
    """The mean of a list of bool, or None if it is empty."""
    return sum(flags) / len(flags) if flags else None


def of_kinds(items, *kinds):
    return [item for item in items if item["kind"] in kinds]


def score_base(base, questions, scorer):
    """Ask the base model in four ways. Returns a dict of shares, from 0 to 1."""
    questions = of_kinds(questions, "fact", "free")

    def ask(key, chat=False, length=40, items=questions):
        prompts = [item[key] for item in items]
        return respond(base.model, base.tokenizer, prompts, chat, length)

    def answered(texts):
        pairs = zip(questions, texts, strict=True)
        return share([scorer.answered(question, text) for question, text in pairs])

    plain = [first_paragraph(text) for text in ask("prompt", length=60)]
    quizzes = [scorer.quiz(*pair) for pair in zip(questions, plain, strict=True)]
    facts = of_kinds(questions, "fact")
    clozes = zip(facts, ask("cloze", length=24, items=facts), strict=True)
    return {
        "plain": answered(plain),
        "goes_on": share([bool(world.OPTIONS.search(text)) or "?" in text for text in plain]),
        **{key: share([quiz[key] for quiz in quizzes]) for key in world.QUIZ},
        "chat": answered([first_reply(text) for text in ask("prompt", chat=True)]),
        "faq": answered([text.strip().split("\n")[0] for text in ask("faq")]),
        "knows": share([scorer.knows(fact, text) for fact, text in clozes]),
    }


def score_tuned(tuned, questions, trained_on, smalltalk, scorer):
    """How often the tuned model answers and then stops by itself. Returns a dict of shares.

    questions: held out. trained_on: about what fine-tuning was about.
    """

    def ask(items, key="prompt", **sampling):
        """[(item, answer, whether the model stopped)]"""
        items = [item for item in items if key in item]
        prompts = [item[key] for item in items]
        answers = complete(tuned.model, tuned.tokenizer, prompts, True, ANSWER, **sampling)
        return [(item, *answer) for item, answer in zip(items, answers, strict=True)]

    def right(asked):
        return share([stopped and scorer.answered(item, text) for item, text, stopped in asked])

    def as_taught(key):
        return share([text == item["response"] for item, text, stopped in ask(smalltalk, key)])

    facts = of_kinds(questions, "fact", "free")
    torch.manual_seed(0)  # the same figures every time
    answers, reworded = ask(facts), ask(facts, "unseen")
    scores = {
        "answered": right(answers),
        "unseen": right(reworded),
        "train": right(ask(of_kinds(trained_on, "fact", "free"))),
        "sampled": right(ask(facts, temperature=1.0)),
        "stops": share([stopped for item, text, stopped in answers]),
        "smalltalk": as_taught("prompt"),
        "smalltalk_unseen": as_taught("unseen"),
        "refuses_known": share([world.refuses(text) for item, text, stopped in answers + reworded]),
    }
    for kind in ("style", "concept", "unknown"):
        items = of_kinds(questions, kind)
        scores[kind] = right(ask(items))
        scores[f"{kind}_unseen"] = right(ask(items, "unseen"))
    return scores


def ask_strangers(tuned):
    """Ask what strangers typed, turn by turn. Returns [(item, last answer)].

    The model's own answers are the history.
    """
    items = strangers.load_strangers()
    histories, answers = [[] for _ in items], [""] * len(items)
    for t in range(max(len(item["turns"]) for item in items)):
        live = [k for k, item in enumerate(items) if len(item["turns"]) > t]
        for k in live:
            histories[k].append({"role": "user", "content": items[k]["turns"][t]})
        prompts = [histories[k] for k in live]
        texts = respond(tuned.model, tuned.tokenizer, prompts)
        for k, text in zip(live, texts, strict=True):
            answers[k] = text
            histories[k].append({"role": "assistant", "content": text.strip() or "..."})
    return list(zip(items, answers, strict=True))


def score_strangers(tuned):
    """Shares of right answers by kind, of all, and of known things that the model refuses."""
    kinds, refused = {}, []
    for item, answer in ask_strangers(tuned):
        kinds.setdefault(item["kind"], []).append(strangers.right(item, answer))
        if item["kind"] in strangers.KNOWN:
            refused.append(world.refuses(answer))
    scores = {kind: share(flags) for kind, flags in kinds.items()}
    return {**scores, "in all": share(sum(kinds.values(), [])), "refuses": share(refused)}


def score_all(models, questions, folder, progress):
    """The scores of each model. models: {name: Checkpoint}; folder: of the embedded world."""
    trained_on = world.read_questions(folder / "train.jsonl")
    smalltalk = world.read_smalltalk(folder / "smalltalk.jsonl")
    scorer, scores = world.Scorer(), {}
    for name, checkpoint in models.items():
        progress.update(1 + len(scores), f"asking {name}")
        if name == "base":
            scores[name] = score_base(checkpoint, questions, scorer)
        else:
            scores[name] = score_tuned(checkpoint, questions, trained_on, smalltalk, scorer)
            scores[name]["strangers"] = score_strangers(checkpoint)
    return scores


def write_own_pairs(tuned, folder, path, seed, grade=None):
    """Write pairs of a better and a worse answer to one question, both by the model itself.

    folder: of the embedded world. We sample several answers to each train question at temperature
    1, and grade them: see Scorer.grade(). We drop answers that don't end or that mention what is
    held out. If the grades of the others differ, we pair the best with the worst. Raises InputError
    if there is no pair.
    """
    questions = world.read_questions(folder / "train.jsonl")
    questions = [question for question in questions if "typed" in question]
    if not questions:
        todo = "run python pretrain.py again"
        raise InputError(folder / "train.jsonl", 'no question has a "typed" prompt', todo)
    held_out, grade = world.held_out_finder(folder), grade or world.Scorer().grade
    prompts = [question["typed"] for question in questions]
    graded, progress = [{} for _ in questions], Progress("sampling answers", SAMPLES)
    torch.manual_seed(seed)
    for n in range(SAMPLES):
        progress.update(n, f"{len(prompts):,} questions")
        answers = complete(tuned.model, tuned.tokenizer, prompts, True, ANSWER, temperature=1.0)
        for found, question, (text, stopped) in zip(graded, questions, answers, strict=True):
            if stopped and text.strip() and not held_out(text):
                found[text] = grade(question, text)
    progress.update(SAMPLES, "done")
    lines = []
    for prompt, found in zip(prompts, graded, strict=True):
        if len(set(found.values())) > 1:
            pair = {"prompt": prompt, "chosen": max(found, key=found.get)}
            pair["rejected"] = min(found, key=found.get)
            lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    if not lines:
        what = "no question got both a better and a worse answer"
        raise InputError(tuned.path, what, "give your own pairs: --data FILE")
    with writing(path, "w") as file:
        file.writelines(lines)
