"""
Look at what was trained: base beside tuned.

    python compare.py                                   # held-out scores, and prompts with both completions; and out/report.html
    python compare.py --ask "What is the capital of Kenya?"   # both models, once
    python compare.py --chat                            # a conversation with the tuned one

The base model has only read plain text; the tuned one has also learned, from questions about half of the entities, to answer.
Asked about the other half, which fine-tuning never mentioned, the tuned model can only know what pretraining
stored. This file also holds what both stages share around the training: checkpoints and completions.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch is imported, as in pretrain.py

import argparse
import codecs
import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import textwrap
import time
from pathlib import Path

import torch

from data import Tokenizer, encode_chat, world
from data.machine import keep_freed_memory, pick_device
from data.report import page, show_examples, show_scores, table_of
from data.run import read_torch
from data.terminal import InputError, Parser, Progress, command, readable, writing
from data.text import Rows, open_tokens, read_json, read_log
from model import GPT, GPTConfig, cross_entropy

FORMAT = "parrot checkpoint 1"
EXAMPLES = [  # shown side by side; what they ask about is never fine-tuned on (SHOWN in data/world.py)
    world.SEASONS,
    "What is the capital of Kenya?",
    "Who wrote Don Quixote?",
    "What is the chemical symbol of silver?",
    "What does a panda eat?",
    "Why is the sky blue on a clear day?",
    "What is the currency of Japan?",
    "Who discovered penicillin?",
    "Who are you?",
]

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save(path, model, tokenizer, **about):
    """Write everything that is needed to use the model later; about: what it was trained on, and how."""
    weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    weights["head.weight"] = weights["embed.weight"]  # one table, stored once
    state = {"format": FORMAT, "config": dataclasses.asdict(model.config), "weights": weights, "tokenizer": tokenizer.state()}
    with writing(Path(path)) as file:
        torch.save({**state, **about}, file)


def read_checkpoint(path):
    """The dictionary that save() wrote. Raises InputError for anything else."""
    path = Path(path)
    if not path.exists():
        stage = "sft.py" if path.name == "sft.pt" else "pretrain.py"
        out = "" if path.parent == Path("out") else f" --out {path.parent}"
        raise InputError(path, "no such checkpoint", f"make it with python {stage}{out}, or name another folder or file")
    state = read_torch(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT or "stage" not in state or not isinstance(state.get("trained_on"), dict):
        raise InputError(path, f'not a checkpoint of this program ("{FORMAT}")', "train it again")
    return state


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load(path, device="cpu"):
    """A checkpoint of either stage. Returns (model, tokenizer), the model on the device and in eval mode."""
    state = read_checkpoint(path)
    try:
        if not all(type(value) is int for key, value in state["config"].items() if key != "dropout"):
            raise ValueError("sizes must be whole numbers")
        model = GPT(GPTConfig(**state["config"]))
        model.load_state_dict(state["weights"])
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("a weight is no number")
        tokenizer = Tokenizer.from_state(state["tokenizer"])
        if tokenizer.n_vocab != model.config.vocab_size:
            raise ValueError(f"{tokenizer.n_vocab} tokens, but a model of {model.config.vocab_size}")
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(path, f"its parts do not fit together ({why})", "train it again") from None
    return model.to(device).eval(), tokenizer


def load_pair(base_path, tuned_path, device):
    """A base model and what was tuned from it: two times (model, tokenizer). Raises InputError if they don't belong together."""
    base, tuned = load(base_path, device), load(tuned_path, device)
    if read_checkpoint(tuned_path).get("base_sha256") != sha256(base_path):
        raise InputError(tuned_path, f"was not tuned from {base_path} as it is now", "run python sft.py again")
    return base, tuned


def world_of(base_path):
    """The folder with the questions of the embedded world that a base model was trained on; None if it read another text.

    None also if it isn't there; but InputError if it is of another run.
    """
    about, folder = read_checkpoint(base_path), base_path.with_name("world")
    if "world" not in about["trained_on"] or not folder.exists():
        return None
    stamp = folder / "sha256"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != about.get("text_sha256"):
        raise InputError(folder, f"is not of the run that made {base_path}", f"run python pretrain.py --out {folder.parent} --seed {about.get('seed')} again")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Completions


def complete(model, tokenizer, prompts, chat=True, max_new_tokens=64, temperature=0.0, top_k=None):
    """What the model makes of each prompt. Returns [(text, stopped)]: stopped is True if it ended by itself.

    chat=True puts each prompt in the chat template; chat=False continues it as the beginning of a document.
    """
    stop = tokenizer.end if chat else tokenizer.endoftext
    if chat:
        rows = [encode_chat([{"role": "user", "content": prompt}], tokenizer)[0] for prompt in prompts]
    else:
        rows = [[tokenizer.endoftext, *tokenizer.encode(prompt)] for prompt in prompts]
    completions = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # similar lengths together: little padding
    for start in range(0, len(order), 256):
        some = order[start : start + 256]
        new = model.generate([rows[i] for i in some], max_new_tokens, temperature, top_k, stop)
        for i, ids in zip(some, new):
            stopped = bool(ids) and ids[-1] == stop
            completions[i] = (tokenizer.decode(ids[:-1] if stopped else ids), stopped)
    return completions


def respond(model, tokenizer, prompts, chat=True, max_new_tokens=64, temperature=0.0, top_k=None):
    """The completions alone, a list of str, cut at the stop token. See complete()."""
    return [text for text, _ in complete(model, tokenizer, prompts, chat, max_new_tokens, temperature, top_k)]


def first_paragraph(text):
    """What counts, and is shown, of a base model, which would go on and on: its text up to the first blank line."""
    return text.strip("\n").split("\n\n")[0]


# ---------------------------------------------------------------------------------------------------------------------
# A conversation


def stream(model, tokenizer, input_ids, **sampling):
    """Print what the model says after input_ids, as it comes, until it stops or Ctrl-C is pressed. Returns it, without the stop token.

    A token may be a part of a letter: of "é", the first of two bytes, say. What is printed waits until the letter is whole.
    """
    decoder, said = codecs.getincrementaldecoder("utf-8")(errors="replace"), []

    def show(row, token):
        said.append(token)
        if token != tokenizer.end:
            print(readable(decoder.decode(tokenizer.encoding.decode_bytes([token]))), end="", flush=True)

    why = ""
    try:
        model.generate([input_ids], stop=tokenizer.end, on_token=show, **sampling)
    except KeyboardInterrupt:
        why = " (stopped)"
    if said and said[-1] == tokenizer.end:
        said.pop()
    elif not why:
        why = " (cut off: see --length)"
    print(readable(decoder.decode(b"", final=True)) + why)
    return tokenizer.decode(said)


def fit(history, tokenizer, room):
    """The conversation without its oldest turns, so that it takes room tokens at most. Returns (history, input_ids).

    Its last message stays, however long it is.
    """
    input_ids, _ = encode_chat(history, tokenizer)
    while len(input_ids) > room and len(history) > 2:
        history = history[2:]
        input_ids, _ = encode_chat(history, tokenizer)
    return history, input_ids


def talk(base, tuned, **sampling):
    """Talk to the tuned model until the input ends. base, tuned: (model, tokenizer) each."""
    if sys.stdin is None or sys.stdout is None:
        raise InputError("--chat", "there is no input, or no output, to talk through", "use --ask")
    model, tokenizer = tuned
    typed_here, history, question = sys.stdin.isatty(), [], None
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (where there is one, it gives input() its arrow keys and a history)
    print("Ask it something. /base shows what the base model makes of your last question; /reset forgets; /quit leaves.")
    while True:
        try:
            line = input("\n> " if typed_here else "").strip()
            if line and not typed_here:
                print(f"\n> {readable(line)}")
            if line == "/quit":
                return
            if line == "/reset":
                history = []
                print("(It has forgotten what was said.)")
            elif line == "/base" and question:
                print(readable(first_paragraph(respond(*base, [question], chat=False, **sampling)[0])) + " ...")
            elif line == "/base":
                print("(Ask something first.)")
            elif line.startswith("/"):
                print("(There are /base, /reset and /quit.)")
            elif line:
                # What is said in answer should fit behind it. (A very long one pushes out what stands before it.)
                room = model.config.block_size - min(sampling["max_new_tokens"], model.config.block_size // 2)
                turns, input_ids = fit([*history, {"role": "user", "content": line}], tokenizer, room)
                if len(input_ids) > room:
                    print(f"(That is too long: {len(input_ids)} tokens, and {room} have room. Say it in fewer words.)")
                    continue
                if len(turns) <= len(history):
                    print("(What was said first no longer fits, and is forgotten.)")
                question, answer = line, stream(model, tokenizer, input_ids, **sampling)
                if answer.strip():
                    history = [*turns, {"role": "assistant", "content": answer}]
                else:
                    print("(It said nothing. This turn is not kept.)")
        except (EOFError, KeyboardInterrupt):
            print()
            return


# ---------------------------------------------------------------------------------------------------------------------
# Scores on the embedded world


def share(flags):
    """The mean of a list of bool, or None for an empty one."""
    return sum(flags) / len(flags) if flags else None


def by_attribute(items, flags):
    """{"countries capital": [how many right, of how many]}"""
    counts = {}
    for item, flag in zip(items, flags):
        count = counts.setdefault(f"{item.get('table', '')} {item['attribute']}".strip(), [0, 0])
        count[0] += flag
        count[1] += 1
    return counts


def score_base(model, tokenizer, items, scorer):
    """What the base model makes of the questions, put in four ways. Returns a dict of shares, 0 to 1."""
    questions = [item["prompt"] for item in items]
    plain = [first_paragraph(t) for t in respond(model, tokenizer, questions, chat=False, max_new_tokens=40)]
    chat = [first_paragraph(t) for t in respond(model, tokenizer, questions, chat=True, max_new_tokens=40)]
    faq = [t.strip().split("\n")[0] for t in respond(model, tokenizer, [i["faq"] for i in items], chat=False, max_new_tokens=40)]
    cloze = respond(model, tokenizer, [i["cloze"] for i in items], chat=False, max_new_tokens=24)
    return {
        "plain": share([scorer.answered(i, t) for i, t in zip(items, plain)]),
        "goes_on": share([bool(world.OPTIONS.search(t)) or "?" in t for t in plain]),
        "chat": share([scorer.answered(i, t) for i, t in zip(items, chat)]),
        "faq": share([scorer.answered(i, t) for i, t in zip(items, faq)]),
        "knows": share([scorer.knows(i, t) for i, t in zip(items, cloze)]),
    }


def score_tuned(model, tokenizer, items, scorer, key="prompt"):
    """How many questions the tuned model answers, and stops. Returns a dict; "answered" and "stops" are shares."""
    items = [item for item in items if key in item]
    completions = complete(model, tokenizer, [item[key] for item in items], max_new_tokens=40)
    flags = [stopped and scorer.answered(item, text) for item, (text, stopped) in zip(items, completions)]
    wrong = [[item[key], text] for item, (text, _), flag in zip(items, completions, flags) if not flag]
    return {
        "answered": share(flags),
        "stops": share([stopped for _, stopped in completions]),
        "attributes": by_attribute(items, flags),
        "wrong": wrong,
    }


@torch.inference_mode()
def text_loss(model, tokens, tokenizer):
    """How well the model predicts a text, every token of it but the first. tokens: (n,) integers.

    Returns (nats per token, bits per byte of the text). Dropout is off.
    """
    rows = Rows(tokens, model.config.block_size)
    device, was_training = model.embed.weight.device, model.training
    model.eval()
    total, count = 0.0, 0
    size = max(1, 4096 // model.config.block_size)  # rows at a time
    for start in range(0, len(rows), size):
        batch = rows.batch(range(start, min(start + size, len(rows))))
        logits, loss = model(batch["input_ids"].to(device), batch["labels"].to(device))
        total += loss.item() * len(logits)
        count += len(logits)
    model.train(was_training)
    return total / count, total / math.log(2) / tokenizer.count_bytes(tokens[1:])


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def show_parrot(model, tokenizer, prompts):
    """What a base model makes of some prompts, each the beginning of a document."""
    for prompt, text in zip(prompts, respond(model, tokenizer, prompts, chat=False, max_new_tokens=64)):
        print(f"\n> {prompt}")
        print("\n".join("  " + line for paragraph in readable(first_paragraph(text)).split("\n") for line in textwrap.wrap(paragraph, 78)))


@torch.inference_mode()
def token_by_token(models, talks):
    """The first conversation of which a block holds some of the answer, as [{"text", "supervised", "base", "tuned"}], losses in nats.

    models: {name: (model, tokenizer)}; talks: [(prompt, response)]. [] if there is none. Of a token that is only a part of a letter, the
    text is its bytes: "\\xea".
    """
    model, tokenizer = models["base"]
    for prompt, response in talks:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        input_ids, supervised = encode_chat(messages[: 2 if response.strip() else 1], tokenizer)
        input_ids, supervised = input_ids[: model.config.block_size], supervised[: model.config.block_size]
        if any(supervised):
            break
    else:
        return []
    texts = [raw.decode("utf-8", "backslashreplace") for raw in tokenizer.encoding.decode_tokens_bytes(input_ids)]
    tokens = [{"text": text, "supervised": flag} for text, flag in zip(texts, supervised)]
    for name in ("base", "tuned"):
        ids = torch.tensor([input_ids], device=model.embed.weight.device)
        logits, _ = models[name][0](ids, labels=ids)  # (T - 1, V): before the first token there is nothing that could predict it
        for token, loss in zip(tokens, [None, *cross_entropy(logits, ids[0, 1:], reduction="none").tolist()]):
            token[name] = loss
    return tokens


def compare(base_path, tuned_path, side="test", device="cpu"):
    """Everything that is shown and written: scores (on the embedded world), examples, and a conversation token by token. Returns a dict."""
    state, folder, control_path = read_checkpoint(base_path), world_of(base_path), tuned_path.with_name("random.pt")
    models = dict(zip(("base", "tuned"), load_pair(base_path, tuned_path, device)))
    if control_path.exists() and read_checkpoint(control_path).get("base_sha256") == sha256(base_path):
        models["random"] = load(control_path, device)
    base, tokenizer = models["base"]
    progress = Progress("compare", 4 * len(models))
    progress.update(0, "examples")
    prompts = read_checkpoint(tuned_path).get("examples") or EXAMPLES
    if not (isinstance(prompts, list) and all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)):
        raise InputError(tuned_path, "its examples are not a list of prompts", "run python sft.py again")
    examples = [
        {"prompt": prompt, "base": first_paragraph(a), "tuned": b}
        for prompt, a, b in zip(prompts, respond(base, tokenizer, prompts, chat=False), respond(*models["tuned"], prompts))
    ]
    results = {"examples": examples}
    source, talks = "A prompt of those below, with what the tuned model answered.", [(e["prompt"], e["tuned"]) for e in examples]
    tokens_path, stamp = base_path.with_name("val.bin"), base_path.with_name("val.sha256")
    if folder:
        items, own, smalltalk = ([item for _, item in read_json(folder / f"{name}.jsonl")] for name in (side, "train", "smalltalk"))
        if prompts is EXAMPLES:
            source = "A question about what fine-tuning never mentioned, with the answer that it should get."
            talks = sorted(((item["prompt"], item["response"]) for item in items), key=lambda talk: talk[0] != prompts[0])
        scorer = world.Scorer()
        results |= {"side": side, "questions": len(items), "base": score_base(base, tokenizer, items, scorer)}
        for i, name in enumerate(list(models)[1:], start=1):
            progress.update(4 * i, f"{name} on held-out questions")
            results[name] = score_tuned(*models[name], items, scorer)
            progress.update(4 * i + 1, f"{name} on other wordings")
            results[name]["unseen"] = score_tuned(*models[name], items, scorer, "unseen")["answered"]
            progress.update(4 * i + 2, f"{name} on its own half")
            results[name]["train"] = score_tuned(*models[name], own, scorer)["answered"]
            said = respond(*models[name], [talk["prompt"] for talk in smalltalk])
            results[name]["smalltalk"] = share([text == talk["response"] for text, talk in zip(said, smalltalk)])
    if stamp.exists() and tokens_path.exists() and stamp.read_text(encoding="utf-8") == state.get("text_sha256"):
        tokens = open_tokens(tokens_path, tokenizer)
        for name in models:
            nats, bits = text_loss(models[name][0], tokens, tokenizer)
            results.setdefault(name, {}).update(val_loss=nats, val_bpb=bits)
    results |= {"conversation": {"source": source, "tokens": token_by_token(models, talks)}}
    progress.update(progress.total, "done")
    return results


@command
def main(argv=None):
    parser = Parser("compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder with base.pt and sft.pt (default: out)")
    parser.add_argument("--base", type=Path, help="the base model, if it is not in that folder")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--ask", metavar="PROMPT", help="show what both models make of one prompt")
    mode.add_argument("--chat", action="store_true", help="talk to the tuned model")
    parser.add_argument("--temperature", type=float, default=0.0, help="with --ask and --chat: 0 (default) takes the likeliest token; above, it draws")
    parser.add_argument("--top_k", type=int, help="with these: draw from so many of the likeliest tokens alone")
    parser.add_argument("--length", type=int, default=64, help="with these: tokens of an answer at most (default: 64)")
    parser.add_argument("--side", choices=("dev", "test"), default="test", help="which held-out questions to score (default: test)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    args = parser.parse_args(argv)
    keep_freed_memory()
    device = pick_device(args.device)
    base_path, tuned_path = args.base or args.out / "base.pt", args.out / "sft.pt"
    for name, least, most in (("temperature", 0, 100), ("top_k", 1, 10**6), ("length", 1, 10**6)):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name}", f"{value} is out of range", f"give a number from {least} to {most}")
    sampling = dict(temperature=args.temperature, top_k=args.top_k, max_new_tokens=args.length)
    torch.seed()  # what is drawn by chance is to be another thing each time
    if args.ask is not None:
        if not args.ask.strip():
            raise InputError("--ask", "the prompt is empty", "type a question")
        base, tuned = load_pair(base_path, tuned_path, device)
        answer = respond(*tuned, [args.ask], **sampling)[0]
        show_examples([{"prompt": args.ask, "base": first_paragraph(respond(*base, [args.ask], chat=False, **sampling)[0]), "tuned": answer}])
        return
    if args.chat:
        talk(*load_pair(base_path, tuned_path, device), **sampling)
        return
    started = time.perf_counter()
    results = compare(base_path, tuned_path, args.side, device)
    show_examples(results["examples"])
    if "side" in results:
        show_scores(results)
    logs = [("Pretraining", base_path.with_name("pretrain.jsonl")), ("Fine-tuning", tuned_path.with_name("sft.jsonl"))]
    logs = [(title, path, read_log(path)) for title, path in logs]
    html = page((base_path, tuned_path), logs, results["conversation"], results["examples"], table_of(results) if "side" in results else None)
    for path, text in ((args.out / "comparison.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n"), (args.out / "report.html", html)):
        with writing(path, "w") as file:
            file.write(text)
    print(f"\nwrote {args.out / 'comparison.json'} ({time.perf_counter() - started:.0f} s)")
    where = ("" if args.out == Path("out") else f" --out {args.out}") + ("" if base_path == args.out / "base.pt" else f" --base {base_path}")
    print(f"wrote {args.out / 'report.html'}, for a browser. Next, to talk to it: python compare.py --chat{where}")


if __name__ == "__main__":
    main()
