"""
Look at what you trained: the models side by side.

    python compare.py           # held-out scores, prompts with all completions, and an HTML page
    python compare.py --ask "What is the capital of Kenya?"      # ask all models once
    python compare.py --chat    # talk to the latest model: of dpo.py, or else of sft.py
    python compare.py --chat --stage sft                         # talk to the tuned model
    python compare.py --chat --system "Talk like a pirate."      # in another style

The base model has only read plain text. The tuned model has also learned to answer, from questions
about four fifths of the entities. The pairs of dpo.py are about the same ones. Here we ask about
the others. Nothing after pretraining mentioned them, so the models know them from there.
"""

import common  # noqa: F401  # isort: skip  (before torch)

import json
import time
from pathlib import Path

import torch

from common.checkpoint import load, world_of
from common.completion import first_paragraph, fit, respond
from common.conversation import prepare_input, read_line, stream, token_by_token
from common.device import keep_freed_memory, pick_device
from common.evaluation import text_loss
from common.files import read_log, writing
from common.messages import InputError, Progress, command, readable
from common.options import Parser
from common.page import ANSWERS, page, points
from common.report import score_table, show_examples, show_scores
from common.scores import of_kinds, score_all
from common.stages import find_base, load_stages, with_control
from common.weights import pack, why_not
from data import world
from data.text import has_tokens, open_tokens

__all__ = ["compare", "load", "main", "respond", "show"]

EXAMPLES = [  # about things that fine-tuning never mentions, except for the last two
    world.SEASONS,
    "What is the capital of Kenya?",
    "who wrote don quixote",
    "Which element has the symbol Ag?",
    "What does a panda eat?",
    "Is the yen the currency of Japan?",
    "Explain gravity to a 6-year-old.",
    "Summarize the printing press in one sentence.",
    "What is the capital of Atlantis?",
    "Who are you?",
]
GREETINGS = ["Hello!", "Who are you?", "What can you do?"]  # for a model trained on your own text


# -------------------------------------------------------------------------------------------------
# Side by side


def all_complete(models, prompts, **sampling):
    """Every model's completion of each prompt, as [{"prompt", "base", "tuned", ...}].

    models: {name: Checkpoint}. The base model continues the prompt, and the others answer it.
    """
    examples = [{"prompt": prompt} for prompt in prompts]
    for name, checkpoint in models.items():
        model, tokenizer, chat = checkpoint.model, checkpoint.tokenizer, name != "base"
        texts = respond(model, tokenizer, prompts, chat, **sampling)
        for example, text in zip(examples, texts, strict=True):
            example[name] = text if chat else first_paragraph(text)
    return examples


def compare(models, side="test"):
    """Compute everything that show() prints and writes. Returns a dict.

    models: {"base", "tuned"} and perhaps "dpo", all Checkpoints. side: "dev" or "test", the
    held-out questions to ask.
    """
    shown, models = models, with_control(models)
    base, tuned = models["base"], models["tuned"]
    progress = Progress("compare", len(models) + 2)
    progress.update(0, "examples")
    folder = world_of(base)
    questions = world.read_questions(folder / f"{side}.jsonl") if folder else []
    own = tuned.about.get("examples")  # prompts from conversations of your own
    prompts = own or (EXAMPLES if "world" in base.about["trained_on"] else GREETINGS)
    examples = all_complete(shown, prompts)
    source = "One of the prompts below, with what the tuned model answered."
    talks = [(example["prompt"], example["tuned"]) for example in examples]
    results = {"examples": examples}
    if folder:
        results.update(side=side, questions=len(of_kinds(questions, "fact", "free")))
        results.update(score_all(models, questions, folder, progress))
        if not own:
            source = "A held-out question, followed by the right answer."
            talks = [(question["prompt"], question["response"]) for question in questions]
            talks.sort(key=lambda talk: talk[0] != prompts[0])  # the first prompt goes first
    progress.update(len(models) + 1, "plain text")
    val_path = base.path.with_name("val.bin")
    ours = has_tokens(val_path, base.about.get("text_sha256"))
    tokens = open_tokens(val_path, base.tokenizer) if ours else []
    if len(tokens) >= base.model.config.block_size:
        for name, checkpoint in models.items():
            nats, bits = text_loss(checkpoint.model, tokens, checkpoint.tokenizer)
            results.setdefault(name, {}).update(val_loss=nats, val_bpb=bits)
    results["conversation"] = {"source": source, "tokens": token_by_token(shown, talks)}
    progress.update(progress.total, "done")
    return results


def show(models, out, side="test"):
    """Print the comparison, and write it to out/comparison.json and out/report.html."""
    started = time.perf_counter()
    results, table = compare(models, side), None
    show_examples(results["examples"])
    if "side" in results:
        table = score_table(results)
        show_scores(results)
    base, tuned = models["base"], models["tuned"]
    stages = [("Pretraining", base, "pretrain.jsonl"), ("Fine-tuning", tuned, "sft.jsonl")]
    if "dpo" in models:
        stages.append(("Preferences", models["dpo"], "dpo.jsonl"))
    logs = [(title, model.path.with_name(name)) for title, model, name in stages]
    logs = [(title, path, read_log(path)) for title, path in logs]
    if points(logs[-1][2], "chosen"):  # no pair is held out of fewer than ten
        logs.append(("How improbable its answers are", *logs[-1][1:], ANSWERS))
    paths = {name: checkpoint.path for name, checkpoint in models.items()}
    why = why_not(models)
    talk, packed = results["conversation"], None if why else pack(models)
    html = page(paths, logs, talk, results["examples"], table, packed, why)
    with writing(out / "comparison.json", "w") as file:
        file.write(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    with writing(out / "report.html", "w") as file:
        file.write(html)
    if "val_loss" not in results.get("base", {}):
        why = "is missing, or was made from another text"
        print(f"\nWithout losses on plain text: {base.path.with_name('val.bin')} {why}.")
    print(f"\nWrote {out / 'comparison.json'} ({time.perf_counter() - started:.0f} s).")
    print(f"Wrote {out / 'report.html'}: open it in a browser.")
    more = f" --out {out}" if out != Path("out") else ""
    options = f"{more} --base {base.path}" if base.path != find_base(tuned) else more
    print(f"Next, talk to it: python compare.py --chat{options}")
    if "dpo" not in models:
        pairs = "" if table else " --data YOUR_PAIRS"
        print(f"Or teach it which answers are better: python dpo.py{more}{pairs}")


# -------------------------------------------------------------------------------------------------
# Ask, and chat


def talk(base, latest, system, **sampling):
    """Talk to a model until the user leaves. base, latest: Checkpoints; /base asks the base model.

    system: messages that the conversation begins with, at most one system message.
    """
    prepare_input()
    print("Ask a question. /base asks the base model too, /reset starts over, /quit leaves.")
    try:
        converse(base, latest, system, **sampling)
    except (EOFError, KeyboardInterrupt):
        print()


def converse(base, latest, system, **sampling):
    """Read lines and answer them, until one says to leave."""
    block_size = latest.model.config.block_size
    # Most answers fit a quarter of the block. A longer one pushes out the oldest tokens.
    room = block_size - min(sampling["max_new_tokens"], block_size // 4)
    history, question, told = system, None, False
    while (line := read_line()).lower() not in ("/quit", "/exit", "quit", "exit"):
        if line == "/reset":
            history, question = system, None
            print("(It has forgotten everything.)")
        elif line == "/base" and question:
            try:
                (text,) = respond(base.model, base.tokenizer, [question], chat=False, **sampling)
                print(readable(first_paragraph(text)) + " ...")
            except KeyboardInterrupt:
                print("(stopped)")
        elif line == "/base":
            print("(Ask something first.)")
        elif line.startswith("/"):
            print("(The commands are /base, /reset and /quit.)")
        elif line:
            message = {"role": "user", "content": line}
            turns, input_ids = fit([*history, message], latest.tokenizer, room)
            if len(input_ids) > room:
                print(f"(That takes {len(input_ids)} tokens, but only {room} fit. Shorten it.)")
                continue
            if len(turns) <= len(history) and not told:
                print("(The conversation is long now, so the model forgets the oldest turns.)")
                told = True
            question, answer = line, stream(latest.model, latest.tokenizer, input_ids, **sampling)
            if answer.strip():
                history = [*turns, {"role": "assistant", "content": answer}]
            else:
                print("(The model said nothing. This turn is dropped: try other words.)")


# -------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv):
    parser = Parser("compare.py", __doc__)
    option = parser.add_argument
    option("--out", type=Path, default=Path("out"), help="folder that holds sft.pt (default: out)")
    option("--base", type=Path, help="the base model's file, if you moved it after fine-tuning")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--ask", metavar="PROMPT", help="ask all models once")
    mode.add_argument("--chat", action="store_true", help="talk to the latest model")
    what = "the latest stage to look at (default: dpo, if there is one)"
    option("--stage", choices=("sft", "dpo"), help=what)
    what = 'with --ask and --chat: a style, such as "Talk like a robot."'
    option("--system", default="", metavar="TEXT", help=what)
    what = "held-out questions to score (default: test)"
    option("--side", choices=("dev", "test"), default="test", help=what)
    option("--device", default="auto", help="cuda, mps or cpu (default: the first available)")
    option = parser.add_argument_group("with --ask and --chat").add_argument
    what = "at 0 (default), always take the likeliest token; above 0, sample"
    option("--temperature", type=float, default=0.0, metavar="X", help=what)
    option("--top_k", type=int, metavar="N", help="sample from the N likeliest tokens only")
    option(
        "--length", type=int, default=64, metavar="N", help="token limit per answer (default: 64)"
    )
    args = parser.parse_args(argv)
    for name, least, most in (("temperature", 0, 100), ("top_k", 1, 10**6), ("length", 1, 10**6)):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            todo = f"give a number from {least} to {most}"
            raise InputError(f"--{name}", f"{value} is out of range", todo)
    if args.ask is not None and not args.ask.strip():
        raise InputError("--ask", "the prompt is empty", "type a question")
    return args


@command
def main(argv=None):
    args = parse_arguments(argv)
    keep_freed_memory()
    models = load_stages(args.out, args.base, pick_device(args.device), args.stage)
    torch.seed()  # sample something else every time
    sampling = dict(max_new_tokens=args.length, temperature=args.temperature, top_k=args.top_k)
    if args.ask is not None:  # to the base model, a system message is just the first line
        prompt = f"{args.system}\n\n{args.ask}" if args.system.strip() else args.ask
        show_examples(all_complete(models, [prompt], **sampling))
    elif args.chat:
        system = [{"role": "system", "content": args.system}] if args.system.strip() else []
        talk(models["base"], models.get("dpo", models["tuned"]), system, **sampling)
    else:
        show(models, args.out, args.side)


if __name__ == "__main__":
    main()
