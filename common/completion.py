"""
Completions: how a model continues prompts.
"""

import re

from data import encode_chat

BATCH_SIZE = 256  # prompts at a time, so that memory stays bounded


def complete(model, tokenizer, prompts, chat=True, max_new_tokens=64, temperature=0.0, top_k=None):
    """Let the model continue each prompt.

    chat: True puts each prompt in the chat template; False makes it the beginning of a document.
    In a chat, a prompt may also be a list of messages. Its oldest turns go if it gets too long.
    Returns [(completion, stopped)]. stopped is True if the model ended by itself.
    """
    if chat:
        stop = tokenizer.end
        room = max(1, model.config.block_size - max_new_tokens)
        rows = [fit(as_history(prompt), tokenizer, room)[1] for prompt in prompts]
    else:
        stop = tokenizer.endoftext
        rows = [[tokenizer.endoftext, *tokenizer.encode(prompt)] for prompt in prompts]
    completions = [None] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
    for start in range(0, len(rows), BATCH_SIZE):
        batch = by_length[start : start + BATCH_SIZE]
        new = model.generate([rows[i] for i in batch], max_new_tokens, temperature, top_k, stop)
        for i, ids in zip(batch, new, strict=True):
            stopped = ids[-1:] == [stop]
            completions[i] = (tokenizer.decode(ids[:-1] if stopped else ids), stopped)
    return completions


def as_history(prompt):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def fit(history, tokenizer, room):
    """Drop the oldest turns of a conversation until the rest takes at most `room` tokens.

    A system message stays, and so does the last message, however long it is. Returns
    (history, input_ids).
    """
    system = [message for message in history[:1] if message["role"] == "system"]
    turns = history[len(system) :]
    turns = turns[max(0, len(turns) - max(3, room // 3)) // 2 * 2 :]  # each takes three or more
    input_ids, _ = encode_chat(system + turns, tokenizer)
    while len(input_ids) > room and len(turns) > 2:
        turns = turns[2:]
        input_ids, _ = encode_chat(system + turns, tokenizer)
    return system + turns, input_ids


def respond(model, tokenizer, prompts, chat=True, max_new_tokens=64, temperature=0.0, top_k=None):
    """Only the completions, a list of str, without the stop token. See complete()."""
    completions = complete(model, tokenizer, prompts, chat, max_new_tokens, temperature, top_k)
    return [text for text, stopped in completions]


def first_reply(text):
    """What a base model's dialogue says first: one line, without the speaker's label ("A: ")."""
    return re.sub(r"^\s*(\w+ ?[:>]\s*)?", "", text).split("\n")[0]


def first_paragraph(text):
    """The text up to its first blank line.

    A base model doesn't know when an answer ends, so we show and score only this much.
    """
    return text.strip("\n").split("\n\n")[0]
