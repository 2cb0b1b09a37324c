"""
Stage 2: from a parrot to an assistant. Reads conversations and fine-tunes the base model on what the assistant says in them.

    python sft.py                       # the embedded world's conversations
    python sft.py --data mine.jsonl     # your own: {"prompt", "response"}, {"messages"} or {"instruction", "input", "output"}
    python sft.py --random_weights      # the control: the same from random weights, to out/random.pt

Writes out/sft.pt and out/sft.jsonl, then compares (compare.py). The network, the loss and the loop are those of
pretraining. What is new is what a batch holds, in encode() and sft_data_collator(): labels are the input_ids, with -100
on everything that is not the assistant's own words.
"""

from pretrain import STARTED, TrainConfig, train  # first: its clock starts before torch is imported

import argparse
import functools
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import compare
from data import encode_chat
from data.machine import leave, precision, processes, start
from data.run import Run
from data.terminal import InputError, Parser, clock, command, not_empty, parse_options, refuse_overwriting, setting
from data.text import read_json
from model import GPT, IGNORE_INDEX


@dataclass
class SFTConfig(TrainConfig):
    base: str = setting("", "the checkpoint to start from (default: base.pt in the output folder)")
    random_weights: bool = setting(False, "start from random weights instead, as a control; writes random.pt")
    batch_size: int = setting(32, "conversations of one optimizer step, over all processes")
    max_steps: int = setting(150, "optimizer steps")
    # Small steps: at larger rates the model learns its conversations by heart and forgets what it could have said of others.
    lr: float = setting(0.001, "learning rate of the matrices inside the blocks (Muon)")
    embed_lr: float = setting(0.01, "learning rate of the special tokens' rows of the embedding (AdamW)")
    cooldown: float = setting(0.8, "share of the steps, the last ones, in which the learning rates fall to zero")
    eval_every: int = setting(50, "steps between measurements of the validation loss (rounded up to tens)")


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def as_messages(example):
    """A conversation in one of the three forms, as [{"role", "content"}, ...]. Raises ValueError for anything else."""
    if not isinstance(example, dict):
        raise ValueError(f"a conversation must be an object, not {type(example).__name__}")
    if "messages" in example:
        return example["messages"]
    if "instruction" in example and "output" in example:
        parts = [example["instruction"], example.get("input") or "", example["output"]]
    elif "prompt" in example and "response" in example:
        parts = [example["prompt"], "", example["response"]]
    else:
        raise ValueError('needs "prompt" and "response", or "messages", or "instruction" and "output"')
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("its texts must be strings")
    question = parts[0] + "\n\n" + parts[1] if parts[1].strip() else parts[0]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": parts[2]}]


def encode(example, tokenizer, block_size=None):
    """One conversation as (input_ids, labels), lists of one length, or None if nothing would be left to learn from.

    Longer than block_size, it loses its oldest turns, a question and its answer at a time (a system message stays).
    Raises ValueError if it is malformed or the assistant says nothing in it.
    """
    messages = as_messages(example)
    input_ids, supervised = encode_chat(messages, tokenizer)
    if not any(supervised):
        raise ValueError("the assistant says nothing in it, so there is nothing to learn")
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = messages[len(system) :]
    while block_size is not None and len(input_ids) > block_size:
        turns = turns[2:]
        if not turns:
            return None
        input_ids, supervised = encode_chat(system + turns, tokenizer)
    if not any(supervised):
        return None
    # The line that makes an assistant: only its own words are looked at by the loss.
    labels = [token if is_supervised else IGNORE_INDEX for token, is_supervised in zip(input_ids, supervised)]
    return input_ids, labels


def sft_data_collator(batch, tokenizer, block_size=None):
    """Conversations to one batch of the form that pretraining has too.

    batch: a list of {"prompt", "response"}, {"messages": [...]} or {"instruction", "input", "output"}.
    Returns {"input_ids": (B, T) int64, "labels": (B, T) int64}: labels are input_ids with -100 on everything but the
    assistant's words and the <|end|> that closes them. Rows are padded at the right with <|pad|>, which is an id of its
    own, labelled -100. Conversations of which block_size leaves nothing to learn are dropped. Raises ValueError for a
    malformed conversation, one in which the assistant says nothing, and when nothing remains.
    """
    rows = [row for row in (encode(example, tokenizer, block_size) for example in batch) if row]
    if not rows:
        raise ValueError(f"no conversation fits a block_size of {block_size}")
    T = max(len(input_ids) for input_ids, _ in rows)
    input_ids = torch.tensor([ids + [tokenizer.pad] * (T - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORE_INDEX] * (T - len(labels)) for _, labels in rows])
    return {"input_ids": input_ids, "labels": labels}


def keep_what_fits(examples, tokenizer, block_size, path, say=print):
    """Check every conversation, once, before training. examples: [(where, example)], read from path.

    Returns (kept, lengths): the conversations of which something is left to learn from, and their lengths in tokens. Says how many
    were cut or dropped. Raises InputError for a malformed one, and if none is kept.
    """
    kept, lengths, cut = [], [], 0
    for where, example in examples:
        try:
            row, whole = encode(example, tokenizer, block_size), encode(example, tokenizer)
        except ValueError as error:
            raise InputError(where, str(error), 'see "Your own text and conversations" in README.md') from None
        if row:
            kept.append(example)
            lengths.append(len(row[0]))
            cut += len(row[0]) < len(whole[0])
    dropped = len(examples) - len(kept)
    if cut or dropped:
        say(f"Of {len(examples)} conversations, {cut} lost their oldest turns and {dropped} were dropped: longer than {block_size} tokens.")
    if not kept:
        raise InputError(path, f"no conversation fits a block of {block_size} tokens", "give shorter ones")
    return kept, lengths


def batches_of_similar_length(lengths, batch_size, seed):
    """Which of the conversations make up the batch of each step, a function of its number: every one once an epoch.

    Padding costs as much as text. So the shuffled conversations are sorted by length within stretches of 32 batches,
    cut into batches, and the batches are shuffled.
    """
    lengths = np.array(lengths)
    per_epoch = -(-len(lengths) // batch_size)

    @functools.lru_cache(maxsize=2)
    def plan(epoch):
        rng = np.random.default_rng([seed, epoch])
        order, stretch = rng.permutation(len(lengths)), 32 * batch_size
        order = np.concatenate([s[np.argsort(lengths[s], kind="stable")] for s in np.split(order, range(stretch, len(order), stretch))])
        batches = np.split(order, range(batch_size, len(order), batch_size))
        return [batches[i] for i in rng.permutation(per_epoch)]

    return lambda step: plan(step // per_epoch)[step % per_epoch]


# ---------------------------------------------------------------------------------------------------------------------
# What is shown, and the stage itself


def prepare_special_tokens(model, tokenizer):
    """Let the tokens of the template begin as line breaks, and let no row of the embedding but those of special tokens be changed by fine-tuning.

    Pretraining never met them; it only learned never to predict them, so their rows are all alike and far from everything. A line
    break is what stands between speakers in a text: from there they learn fast what sets them apart. The
    words' rows stay: were those moved that the conversations mention, they would part from those they don't mention, and what is
    known of these would be lost.
    """
    rows = model.embed.weight
    with torch.no_grad():
        rows[[tokenizer.user, tokenizer.assistant, tokenizer.end]] = rows[tokenizer.encode("\n")[0]].clone()
    special = torch.zeros(tokenizer.n_vocab, 1, device=rows.device)
    special[tokenizer.endoftext :] = 1.0
    rows.register_hook(lambda grad: grad * special)


def show_mask(example, tokenizer):
    """One conversation, token by token: its id, its label, and whether the loss looks at it."""
    print(f"{'token':>16}  {'input_id':>8}  {'label':>6}  counted")
    for token, label in zip(*encode(example, tokenizer)):
        print(f"{tokenizer.decode([token])!r:>16}  {token:>8}  {label:>6}  {'yes' if label != IGNORE_INDEX else 'no'}")


@torch.inference_mode()
def dialogue_loss(model, examples, tokenizer):
    """The mean loss over all supervised tokens of some conversations, in nats. Dropout is off."""
    total, count, device, was_training = 0.0, 0, model.embed.weight.device, model.training
    model.eval()
    size = max(1, 8192 // model.config.block_size)  # rows at a time
    for i in range(0, len(examples), size):
        batch = sft_data_collator(examples[i : i + size], tokenizer, model.config.block_size)
        logits, loss = model(batch["input_ids"].to(device), batch["labels"].to(device))
        total, count = total + loss.item() * len(logits), count + len(logits)
    model.train(was_training)
    return total / count


@command
def main(argv=None):
    parser = Parser("sft.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=not_empty, metavar="FILE", help="conversations, as JSON Lines or a JSON array (default: the embedded world's)")
    config, args = parse_options(parser, SFTConfig, argv)
    device = start(config)
    rank, _ = processes()
    say = print if rank == 0 else lambda *args: None
    out = Path(config.out)
    base_path = Path(config.base or out / "base.pt")

    about = compare.read_checkpoint(base_path)
    if about.get("stage") != "base":
        raise InputError(base_path, f"this is a checkpoint of stage {about.get('stage')!r}", "name a base model, made by pretrain.py")
    model, tokenizer = compare.load(base_path, device)
    if config.random_weights:
        model = GPT(model.config).to(device)
    else:
        prepare_special_tokens(model, tokenizer)
    block_size = model.config.block_size
    folder = compare.world_of(base_path)
    if not args.data and not folder:
        raise InputError("command line", "there is no embedded world beside the base model", "name conversations with --data")
    path = Path(args.data or folder / "sft.jsonl")
    examples, lengths = keep_what_fits(read_json(path), tokenizer, block_size, path, say)
    if args.data:  # a tenth of a seeded shuffle is held out, but for what is also in the rest
        order = np.random.default_rng(config.seed).permutation(len(examples))
        aside, rest = order[: len(order) // 10], sorted(order[len(order) // 10 :])
        seen = {json.dumps(examples[i], sort_keys=True) for i in rest}
        held_out = [examples[i] for i in aside if json.dumps(examples[i], sort_keys=True) not in seen]
        examples, lengths = [examples[i] for i in rest], [lengths[i] for i in rest]
    else:  # questions about entities that fine-tuning never mentions
        path_of_dev = path.with_name("dev.jsonl")
        held_out, _ = keep_what_fits(read_json(path_of_dev), tokenizer, block_size, path_of_dev, say)

    name, base_hash = "random" if config.random_weights else "sft", compare.sha256(base_path)
    data_hash = hashlib.sha256(json.dumps([examples, held_out]).encode()).hexdigest()
    run = Run(config, name, {"data_sha256": data_hash, "base_sha256": base_hash})
    refuse_overwriting([path, base_path], [run.log, run.unfinished, *(out / file for file in (f"{name}.pt", "comparison.json", "report.html"))])
    say(f"Fine-tuning {'random weights' if config.random_weights else base_path} on {len(examples):,} conversations of {path}. One of them:\n")
    if rank == 0:
        show_mask(examples[int(np.argsort(lengths[:51])[len(lengths[:51]) // 2])], tokenizer)  # neither short nor long
    say(
        f"\nOn {device} in {str(precision(device)).removeprefix('torch.')}: {sum(p.numel() for p in model.parameters()):,} parameters, {sum(lengths):,} tokens of "
        f"conversation, {config.max_steps} steps of {config.batch_size} conversations, each read about {config.max_steps * config.batch_size / len(examples):.1f} times."
    )
    chosen = batches_of_similar_length(lengths, config.batch_size, config.seed)
    batches = lambda step: sft_data_collator([examples[i] for i in chosen(step)], tokenizer, block_size)
    evaluate = (lambda model: {"val_loss": dialogue_loss(model, held_out, tokenizer)}) if held_out else None
    last = train(model, batches, config, run, evaluate)
    if rank > 0:
        return
    trained_on = {"base": about["trained_on"], "conversations": str(path)}
    prompt = lambda example: next(m["content"] for m in as_messages(example) if m["role"] == "user")
    shown = [prompt(example) for example in (held_out or examples)[:9]] if args.data else []  # by compare.py
    compare.save(
        out / f"{name}.pt", model, tokenizer,
        stage="sft", trained_on=trained_on, seed=config.seed, base_sha256=base_hash, examples=shown,
    )  # fmt: skip
    run.forget()
    loss = f", {last['val_loss']:.3f} nats per token on held-out conversations" if held_out else ""
    say(f"\nThe model is in {out / name}.pt ({clock(time.perf_counter() - STARTED)}{loss}).")
    if config.random_weights:
        say("python compare.py will show it beside the others.")
    else:
        say()
        compare.main([f"--out={out}", f"--base={base_path}", f"--device={device}"])


if __name__ == "__main__":
    main()
    leave()
