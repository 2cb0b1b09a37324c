"""
One conversation: print it as the model speaks, and score each token.
"""

import importlib
import sys
from contextlib import suppress

import torch

from common.messages import InputError, readable
from data import encode_chat
from model import cross_entropy


def prepare_input():
    """Get ready to read what the user types. Raises InputError if that is impossible."""
    if sys.stdin is None or sys.stdout is None:  # as when a service starts the program
        raise InputError("--chat", "there is no input or no output to talk through", "use --ask")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that aren't text must not stop the chat
    with suppress(ImportError):  # Windows has no readline
        importlib.import_module("readline")  # gives input() arrow keys and a history


def read_line():
    """The next line that the user types. A line that comes from a file or a pipe is shown, too."""
    is_typed = sys.stdin.isatty()
    line = input("\n> " if is_typed else "").strip()
    if line and not is_typed:
        print(f"\n> {readable(line)}")
    return line


def stream(model, tokenizer, input_ids, **sampling):
    """Print the completion of input_ids token by token, until the model stops or you press Ctrl-C.

    Returns the text, without the stop token. A letter may take several tokens, and a capital
    follows its mark. We print each letter when its last token arrives.
    """
    said, shown = [], ""

    def show_token(row, token):
        nonlocal shown
        said.append(token)
        if token != tokenizer.end:
            text = tokenizer.decode(said).rstrip("\ufffd")
            print(readable(text[len(shown) :]), end="", flush=True)
            shown = text

    why = ""
    try:
        model.generate([input_ids], stop=tokenizer.end, on_token=show_token, **sampling)
    except KeyboardInterrupt:
        why = " (stopped)"
    if said[-1:] == [tokenizer.end]:
        said.pop()
    elif not why:
        why = " (cut off: raise --length)"
    text = tokenizer.decode(said)
    print(readable(text[len(shown) :]) + why)
    return text


@torch.inference_mode()
def token_by_token(models, talks):
    """How surprised each model is by each token of one conversation.

    models: {name: Checkpoint}. talks: [(prompt, response)]. We take the first talk whose response
    begins within the block. Returns [{"text", "supervised", name: loss, ...}], losses in nats, or
    [] if no talk fits. If a token is only part of a character, its text shows the bytes: "\\xea".
    """
    tokenizer = models["base"].tokenizer
    block_size = min(checkpoint.model.config.block_size for checkpoint in models.values())
    for prompt, response in talks:
        messages = [{"role": "user", "content": prompt}]
        if response.strip():  # an empty message isn't allowed
            messages.append({"role": "assistant", "content": response})
        input_ids, supervised = encode_chat(messages, tokenizer)
        if any(supervised[:block_size]):
            break
    else:
        return []
    input_ids, supervised = input_ids[:block_size], supervised[:block_size]
    pieces = tokenizer.encoding.decode_tokens_bytes(input_ids)
    tokens = [
        {"text": piece.decode("utf-8", "backslashreplace"), "supervised": is_supervised}
        for piece, is_supervised in zip(pieces, supervised, strict=True)
    ]
    for name, checkpoint in models.items():
        model = checkpoint.model
        ids = torch.tensor([input_ids], device=model.embed.weight.device)  # (1, T)
        logits, _ = model(ids, labels=ids)  # (T - 1, V)
        losses = cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
        for token, loss in zip(tokens, [None, *losses], strict=True):  # nothing predicts the first
            token[name] = loss
    return tokens
