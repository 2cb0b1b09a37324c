"""
Stage 3: beyond imitation. Fine-tuning copies every answer it is shown, good or bad. Here the model
learns which of two answers is the better one.

    python dpo.py                       # pairs of the tuned model's own answers
    python dpo.py --data pairs.jsonl    # your own pairs (README.md shows the formats)

Writes out/dpo.pt, out/dpo.jsonl and, without --data, the pairs: out/world/pairs.jsonl. The network
and the loop are the same as before. The batch is new: each example is a pair of conversations. The
loss is new, too: direct preference optimization (DPO; Rafailov et al. 2023, arXiv 2305.18290).

    margin = beta * [(log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))]
    loss = -log sigmoid(margin)

p is the model we train, and q is the model it started from. The log-probability of an answer is the
sum over its tokens, <|end|> included.
"""

import common  # noqa: F401  # isort: skip  (before torch)

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.device import leave, processes, say, start
from common.files import lock, read_json
from common.messages import InputError, clock, command
from common.options import Parser, not_empty, parse_options, setting
from common.report import show_pairs, show_preference
from common.run import Run
from common.scores import write_own_pairs
from common.stages import read_stage, world_behind
from data.order import hold_out, similar_lengths
from model import GPT, IGNORE_INDEX, cross_entropy
from pretrain import TrainConfig, train
from sft import encode


@dataclass
class DPOConfig(TrainConfig):
    sft: str = setting("", "checkpoint to start from (default: OUT/sft.pt)", metavar="FILE")
    beta: float = setting(1.0, "higher stays closer to the tuned model", 1e-6)
    likelihood: float = setting(0.0, "weight of -log p(chosen), added to the loss")
    batch_size: int = setting(32, "pairs in one optimizer step", 1, 10**6)
    max_steps: int = setting(150, "optimizer steps")
    lr: float = setting(0.0005, "learning rate of the matrices inside the blocks (Muon)")
    embed_lr: float = setting(0.0, "learning rate of the tables (AdamW); at 0, they stay fixed")
    eval_every: int = setting(10, "steps between validations; they fall on multiples of 10")


def conversation(example, key):
    """The conversation that ends with the chosen or the rejected answer. key: which of the two.

    example: {"prompt", "chosen", "rejected"}, each a text or a list of messages. A list of several
    messages is the whole conversation, prompt included. Raises ValueError for anything else.
    """
    if not isinstance(example, dict) or not {"chosen", "rejected"} <= example.keys():
        raise ValueError('a pair must be an object with "prompt", "chosen" and "rejected"')
    prompt, answer = (
        [{"role": role, "content": text}] if isinstance(text, str) else text
        for role, text in (("user", example.get("prompt")), ("assistant", example[key]))
    )
    if isinstance(answer, list) and len(answer) > 1:
        return answer
    if not isinstance(prompt, list) or not isinstance(answer, list):
        raise ValueError(f'"prompt" and "{key}" must each be a text or a list of messages')
    return prompt + answer


def encode_pair(example, tokenizer, block_size):
    """A pair as [chosen, rejected], each {"input_ids", "labels"}, or None if either is too long.

    Only the last answer has labels. Raises ValueError if malformed, or if the two are the same.
    """
    rows, prompts = [], []
    for key in ("chosen", "rejected"):
        row = encode({"messages": conversation(example, key)}, tokenizer)
        ids, labels = row["input_ids"], row["labels"]
        start = len(ids) - ids[::-1].index(tokenizer.assistant)  # where the last answer starts
        labels[:start] = [IGNORE_INDEX] * start
        if labels[-1] == IGNORE_INDEX:  # the user's words, or "weight": 0
            raise ValueError(f'"{key}" must end with an answer of the assistant')
        rows.append(row)
        prompts.append(ids[:start])
    if prompts[0] != prompts[1]:
        raise ValueError("the two conversations differ before their last answers")
    if rows[0] == rows[1]:
        raise ValueError("both answers are the same, so there is nothing to prefer")
    return rows if max(len(row["input_ids"]) for row in rows) <= block_size else None


def dpo_data_collator(batch, tokenizer):
    """Turn pairs from encode_pair() into a batch. Along dimension 1, 0 is the chosen one.

    Returns {"input_ids", "labels"}, (B, 2, T) int64 each, padded as in fine-tuning.
    """
    T = max(len(row["input_ids"]) for pair in batch for row in pair)

    def pad(key, value):
        return torch.tensor([[r[key] + [value] * (T - len(r[key])) for r in p] for p in batch])

    return {"input_ids": pad("input_ids", tokenizer.pad), "labels": pad("labels", IGNORE_INDEX)}


class Chooser(GPT):
    """The same network with another objective: of two answers, prefer the chosen one."""

    beta: float
    likelihood: float

    def log_probs(self, input_ids, labels):
        """The log-probability of each answer, (B, 2), in nats. Arguments: (B, 2, T) int64."""
        input_ids, labels = input_ids.flatten(0, 1), labels.flatten(0, 1)  # (2B, T)
        # bfloat16 would round a sum by more than a training step moves it.
        with torch.autocast(input_ids.device.type, enabled=False):
            logits, _ = super().forward(input_ids, labels)  # (N, V)
        rows, places = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)  # of the N targets
        losses = cross_entropy(logits, labels[rows, places + 1], reduction="none")  # (N,)
        sums = losses.new_zeros(len(labels)).index_add(0, rows, losses)  # a sum, not a mean
        return -sums.view(-1, 2)

    def preference(self, log_p, reference):
        """Arguments: log_probs() now and before training. Returns margins, (B,), and mean loss."""
        chosen, rejected = (log_p - reference).unbind(dim=1)  # (B,) each: nats gained since then
        margins = self.beta * (chosen - rejected)
        return margins, (-F.logsigmoid(margins) - self.likelihood * log_p[:, 0]).mean()

    def forward(self, input_ids, labels, reference):
        return self.preference(self.log_probs(input_ids, labels), reference)


def read_pairs(path, tokenizer, block_size):
    """Encode every pair of a file, once. Returns a list of what encode_pair() returns.

    Prints how many we dropped because they were too long. Raises InputError for a malformed pair,
    and if none is left.
    """
    pairs, examples = [], read_json(path)
    for where, example in examples:
        try:
            pair = encode_pair(example, tokenizer, block_size)
        except ValueError as error:
            todo = 'see "Your own text and conversations" in README.md'
            raise InputError(where, str(error), todo) from None
        pairs += [pair] if pair else []
    if n_dropped := len(examples) - len(pairs):
        say(f"Of {len(examples)} pairs, we dropped {n_dropped}: over {block_size} tokens.")
    if not pairs:
        raise InputError(path, f"no pair fits {block_size} tokens", "give shorter ones")
    return pairs


@torch.inference_mode()
def log_probs_of(model, pairs, tokenizer):
    """The log-probabilities of all answers, (len(pairs), 2) float32 on the CPU."""
    found, device = [torch.empty(0, 2)], model.embed.weight.device
    n = max(1, 8192 // model.config.block_size)  # pairs at a time
    for i in range(0, len(pairs), n):
        batch = dpo_data_collator(pairs[i : i + n], tokenizer)
        found.append(model.log_probs(**{k: v.to(device) for k, v in batch.items()}).cpu())
    return torch.cat(found)


@command
def main(argv=None):
    parser = Parser("dpo.py", __doc__)
    what = "pairs of answers, as JSON Lines or a JSON array (default: the model's own answers)"
    parser.add_argument("--data", type=not_empty, metavar="FILE", help=what)
    config, args = parse_options(parser, DPOConfig, argv)
    device = start(config.device, config.seed)
    rank, world_size = processes()
    out = Path(config.out)

    tuned = read_stage("sft", config.sft or out / "sft.pt", device)
    tokenizer, path = tuned.tokenizer, Path(args.data or out / "world" / "pairs.jsonl")
    folder = None if args.data or config.resume else world_behind(tuned)
    found = path.with_name("pairs.new.jsonl") if folder else path  # an earlier run needs its pairs
    if folder and rank == 0:
        lock(out)
        write_own_pairs(tuned, folder, found, config.seed)
    if world_size > 1:
        dist.barrier()  # wait for the file
    model = Chooser(dataclasses.replace(tuned.model.config, dropout=0.0)).to(device)
    model.load_state_dict(tuned.model.state_dict())
    model.beta, model.likelihood = config.beta, config.likelihood
    pairs, held_out = hold_out(read_pairs(found, tokenizer, model.config.block_size), config.seed)
    data_sha256 = hashlib.sha256(json.dumps([pairs, held_out]).encode()).hexdigest()
    run = Run(config, "dpo", "dpo.pt", dict(data_sha256=data_sha256, sft_sha256=tuned.sha256))
    run.claim_files([path, tuned.path], [], {found: path} if folder else {})
    say(f"Tuning {tuned.path} on {len(pairs):,} pairs of {path}. The first ones:")
    show_pairs(pairs[:3], tokenizer)
    times = config.max_steps * min(config.batch_size / len(pairs), 1)
    say(f"\nOn {device}: {config.max_steps} steps, each pair read about {times:.1f} times.")
    reference, before = (log_probs_of(model, p, tokenizer) for p in (pairs, held_out))
    lengths = [max(len(row["input_ids"]) for row in pair) for pair in pairs]
    indices = similar_lengths(lengths, config.batch_size, config.seed)

    def batches(step):
        batch = dpo_data_collator([pairs[i] for i in indices(step)], tokenizer)
        return {**batch, "reference": reference[indices(step)]}

    def evaluate(model):
        now = log_probs_of(model, held_out, tokenizer)
        margins, loss = model.preference(now, before)
        row = dict(val_loss=loss, margin=margins.mean(), told_apart=(margins > 0).float().mean())
        row["chosen"], row["rejected"] = now.mean(dim=0)
        return {key: value.item() for key, value in row.items()}

    last = train(model, batches, config, run, evaluate if held_out else None)
    if rank > 0:
        return
    about = {key: tuned.about.get(key) for key in ("base", "base_sha256", "examples")}
    about["trained_on"] = {**tuned.about["trained_on"], "pairs": str(path)}
    run.finish(tokenizer, stage="dpo", sft=str(tuned.path), **about)
    say(f"\nSaved as {run.path} ({clock(run.elapsed())}).")
    if held_out:
        show_preference(last, *before.mean(dim=0).tolist())
    more = f" --out {out}" if config.out != "out" else ""
    say(f"Next: python compare.py{more}, or talk to it: python compare.py --chat{more}")


if __name__ == "__main__":
    main()
    leave()
