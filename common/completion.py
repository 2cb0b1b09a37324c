"""
Completions: how a model continues prompts.
"""

from data import encode_chat

BATCH_SIZE = 256  # prompts at a time, so that memory stays bounded


def complete(model, tokenizer, prompts, chat=True, max_new_tokens=64, temperature=0.0, top_k=None):
    """Let the model continue each prompt.

    chat: True puts each prompt in the chat template; False makes it the beginning of a document.
    Returns [(completion, stopped)]. stopped is True if the model ended by itself.
    """
    if chat:
        stop = tokenizer.end
        messages = [{"role": "user", "content": prompt} for prompt in prompts]
        rows = [encode_chat([message], tokenizer)[0] for message in messages]
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


def respond(model, tokenizer, prompts, chat=True, max_new_tokens=64, temperature=0.0, top_k=None):
    """Only the completions, a list of str, without the stop token. See complete()."""
    completions = complete(model, tokenizer, prompts, chat, max_new_tokens, temperature, top_k)
    return [text for text, stopped in completions]


def first_paragraph(text):
    """The text up to its first blank line.

    A base model doesn't know when an answer ends, so we show and score only this much.
    """
    return text.strip("\n").split("\n\n")[0]
