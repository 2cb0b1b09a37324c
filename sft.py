"""
Stage 2: from a parrot to an assistant. We fine-tune the base model on conversations, and only on
what the assistant says in them.

    python sft.py                       # the embedded world's conversations
    python sft.py --data mine.jsonl     # your own (README.md shows the three formats)
    python sft.py --random_weights      # the control: from random weights, to out/random.pt

Writes out/sft.pt and out/sft.jsonl, then compares the two models. The network, the loss and the
loop are the same as in pretraining. The batch is new: its labels are the input_ids where the
assistant speaks, <|end|> included, and -100 elsewhere. prepare_special_tokens() gives the special
tokens a head start. The learning rates are lower, 6 times lower inside the blocks.
"""

import common  # noqa: F401  # isort: skip  (before torch)

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import compare
from common.checkpoint import world_of
from common.device import leave, processes, say, start
from common.evaluation import mean_loss
from common.files import read_json
from common.messages import InputError, clock, command
from common.options import Parser, not_empty, parse_options, setting
from common.report import show_mask
from common.run import Run
from common.stages import read_stage
from data import encode_chat
from data.order import hold_out, similar_lengths
from model import GPT, IGNORE_INDEX
from pretrain import TrainConfig, train


@dataclass
class SFTConfig(TrainConfig):
    base: str = setting("", "checkpoint to start from (default: OUT/base.pt)", metavar="FILE")
    random_weights: bool = setting(False, "a control: start from random weights; makes random.pt")
    batch_size: int = setting(32, "conversations in one optimizer step", 1, 10**6)
    max_steps: int = setting(1000, "optimizer steps")
    lr: float = setting(0.005, "learning rate of the matrices inside the blocks (Muon)")
    embed_lr: float = setting(0.01, "learning rate of the table rows that we train (AdamW)")
    cooldown: float = setting(0.8, "fraction of steps for cooldown: at the end, rates fall", 0, 1)
    eval_every: int = setting(500, "steps between validations; they fall on multiples of 10")


def as_messages(example):
    """A conversation in any of three forms, as [{"role", "content"}, ...].

    {"messages": [...]}, {"prompt", "response"}, or {"instruction", "input", "output"} where the
    input may be missing. Raises ValueError for anything else.
    """
    if not isinstance(example, dict):
        raise ValueError(f"a conversation must be an object, not {type(example).__name__}")
    if "messages" in example:
        return example["messages"]
    if "instruction" in example and "output" in example:
        parts = [example["instruction"], example.get("input") or "", example["output"]]
    elif "prompt" in example and "response" in example:
        parts = [example["prompt"], "", example["response"]]
    else:
        raise ValueError('needs "messages", "prompt" + "response", or "instruction" + "output"')
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("every text in a conversation must be a string")
    question = parts[0] + "\n\n" + parts[1] if parts[1].strip() else parts[0]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": parts[2]}]


def encode(example, tokenizer, block_size=None):
    """A conversation as {"input_ids", "labels"}, two lists, or None if nothing is left to learn.

    If the conversation is longer than block_size, we drop its oldest questions and answers until it
    fits. A system message stays. Raises ValueError if malformed, or without any answer to learn.
    """
    messages = as_messages(example)
    input_ids, supervised = encode_chat(messages, tokenizer)
    if not any(supervised):
        raise ValueError("there is no answer to learn from")
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    if block_size:  # a message takes at least three tokens, so we know how many can't fit
        turns = turns[max(0, len(turns) - block_size // 3 - 2) // 2 * 2 :]
    while (block_size and len(input_ids) > block_size) or not any(supervised):
        turns = turns[2:]
        if not turns:
            return None
        input_ids, supervised = encode_chat(system + turns, tokenizer)
    # The mask: the loss looks only at what the assistant says.
    labels = [i if said else IGNORE_INDEX for i, said in zip(input_ids, supervised, strict=True)]
    return {"input_ids": input_ids, "labels": labels}


def sft_data_collator(batch, tokenizer, block_size=None):
    """Turn conversations into a batch with the same two keys as in pretraining.

    batch: conversations in any form that as_messages() takes, or already encoded by encode().
    Returns {"input_ids", "labels"}, (B, T) int64 each, padded on the right with <|pad|>, label
    -100. Drops a conversation with no answer left within block_size. Raises ValueError for a
    malformed conversation, and if none is left.
    """
    rows = [row if "labels" in row else encode(row, tokenizer, block_size) for row in batch]
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError(f"no conversation fits a block_size of {block_size}")
    T = max(len(row["input_ids"]) for row in rows)

    def pad(key, value):
        return torch.tensor([row[key] + [value] * (T - len(row[key])) for row in rows])

    return {"input_ids": pad("input_ids", tokenizer.pad), "labels": pad("labels", IGNORE_INDEX)}


def encode_all(examples, tokenizer, block_size, path):
    """Encode every conversation, once. examples: [(where, example)], as read_json(path) gives them.

    Returns the rows, and prints how many we cut or dropped because they were too long. Raises
    InputError for a malformed conversation, and if none is left.
    """
    rows, n_cut = [], 0
    for where, example in examples:
        try:
            row = encode(example, tokenizer, block_size)
        except ValueError as error:
            todo = 'see "Your own text and conversations" in README.md'
            raise InputError(where, str(error), todo) from None
        if row:
            rows.append(row)
            n_turns = sum(message["role"] == "user" for message in as_messages(example))
            n_cut += row["input_ids"].count(tokenizer.user) < n_turns
    n_dropped = len(examples) - len(rows)
    if n_cut or n_dropped:
        what = f"we cut the oldest turns of {n_cut} and dropped {n_dropped}"
        say(f"Of {len(examples)} conversations, {what}, to fit {block_size} tokens.")
    if not rows:
        raise InputError(path, f"no conversation fits {block_size} tokens", "give shorter ones")
    return rows


def read_conversations(path, base, seed):
    """Returns (rows to train on, held-out rows, path of the training file).

    base: the base model's Checkpoint. From your own file, we hold out a tenth. The world comes with
    held-out questions, about entities that fine-tuning never mentions.
    """
    folder = world_of(base)
    if not path and not folder:
        what = "there is no embedded world beside the base model"
        raise InputError("command line", what, "give your own conversations: --data FILE")

    def encode_file(file):
        return encode_all(read_json(file), base.tokenizer, base.model.config.block_size, file)

    if not path:
        path = folder / "sft.jsonl"
        return encode_file(path), encode_file(folder / "dev.jsonl"), path
    return *hold_out(encode_file(path), seed), path


def prepare_special_tokens(model, tokenizer):
    """Start the chat template's tokens as line breaks, and train only the special tokens' rows.

    In pretraining these tokens never came next, so the model learned not to predict them. A
    line break separates speakers in a text, so the tokens learn quickly from there. The other rows
    stay fixed: if we moved the words of these conversations, they would drift away from all others.
    """
    chat, line_break = [tokenizer.user, tokenizer.assistant, tokenizer.end], tokenizer.encode("\n")
    special = torch.zeros(tokenizer.n_vocab, 1, device=model.embed.weight.device)
    special[tokenizer.endoftext :] = 1.0
    with torch.no_grad():
        for table in (model.embed, model.values):
            table.weight[chat] = table.weight[line_break]
            table.weight.register_hook(lambda grad: grad * special)
        model.alias[chat] = line_break[0]
    model.pair_values.requires_grad_(False)


@command
def main(argv=None):
    parser = Parser("sft.py", __doc__)
    what = "conversations, as JSON Lines or a JSON array (default: the embedded world's)"
    parser.add_argument("--data", type=not_empty, metavar="FILE", help=what)
    config, args = parse_options(parser, SFTConfig, argv)
    device = start(config.device, config.seed)
    out = Path(config.out)

    base = read_stage("base", config.base or out / "base.pt", device)
    rows, held_out, path = read_conversations(args.data, base, config.seed)
    name = "random" if config.random_weights else "sft"
    data_sha256 = hashlib.sha256(json.dumps([rows, held_out]).encode()).hexdigest()
    run = Run(config, name, f"{name}.pt", dict(data_sha256=data_sha256, base_sha256=base.sha256))
    run.claim_files([path, base.path], ["comparison.json", "report.html"])
    tokenizer = base.tokenizer
    if config.random_weights:
        model, origin = GPT(base.model.config).to(device), "random weights"
    else:
        model, origin = copy.deepcopy(base.model), base.path
        prepare_special_tokens(model, tokenizer)
    lengths = [len(row["input_ids"]) for row in rows]
    say(f"Fine-tuning {origin} on {len(rows):,} conversations of {path}. One of them:\n")
    by_length = sorted(rows[:51], key=lambda row: len(row["input_ids"]))
    show_mask(by_length[len(by_length) // 2], tokenizer)  # neither short nor long
    n = min(config.batch_size, len(rows))
    plan, times = f"{config.max_steps} steps of {n} conversations", config.max_steps * n / len(rows)
    say(f"\nOn {device}: {plan}, each read about {times:.1f} times.")
    indices = similar_lengths(lengths, config.batch_size, config.seed)

    def batches(step):
        return sft_data_collator([rows[i] for i in indices(step)], tokenizer)

    def evaluate(model):
        n = max(1, 8192 // model.config.block_size)  # rows at a time
        parts = (held_out[i : i + n] for i in range(0, len(held_out), n))
        return {"val_loss": mean_loss(model, (sft_data_collator(p, tokenizer) for p in parts))}

    last = train(model, batches, config, run, evaluate if held_out else None)
    if processes()[0] > 0:
        return
    trained_on = {"base": base.about["trained_on"], "conversations": str(path)}
    about = {"stage": "sft", "base": str(base.path), "trained_on": trained_on}
    if args.data:  # compare.py will show what becomes of these prompts
        starts = [row["input_ids"] for row in (held_out or rows)[:9]]
        about["examples"] = [tokenizer.decode(ids[1 : ids.index(tokenizer.end)]) for ids in starts]
    tuned = run.finish(tokenizer, **about)
    loss = f"; held-out loss {last['val_loss']:.3f} nats per token" if held_out else ""
    say(f"\nSaved as {run.path} ({clock(run.elapsed())}{loss}).")
    if config.random_weights:
        return say(f"Next: python compare.py --out {out}  (the control gets a column of its own)")
    if last["loss"] > 0.5:  # then the model hardly answers, not even what it was trained on
        todo = f"Try --lr {5 * config.lr:g}" if times > 5 else "Pretrain longer, or try more steps"
        say(f"The training loss is still {last['loss']:.2f} nats per token. {todo}.")
    say()
    compare.show({"base": base, "tuned": tuned}, out)


if __name__ == "__main__":
    main()
    leave()
