"""
The chat template: how a conversation becomes one row of token ids, and which ones the loss sees.

    <|user|>What is the capital of Kenya?<|end|><|assistant|>The capital of Kenya is Nairobi.<|end|>
    .       .   .  .   .       .  .     ..      .            *  *       *  *     *  *       **

A dot is context, a star is supervised (drawn as if each word were one token). We make the
template and the mask in one pass, so the two can't drift apart.
"""


def encode_chat(messages, tokenizer):
    """Turn a conversation into ids. messages: [{"role": "user", "content": "..."}, ...]

    Returns (input_ids, supervised), lists of equal length. supervised is True on the assistant's
    words and on the <|end|> that closes them, in every turn without "weight": 0. If the user spoke
    last, <|assistant|> is added: the model's cue to answer. A system message joins the first user
    turn. Each text is encoded by itself, so no token spans two. Raises ValueError if malformed.
    """
    check_messages(messages)
    if messages[0]["role"] == "system":
        system, first, *rest = messages
        both = system["content"] + "\n\n" + first["content"]
        messages = [{"role": "user", "content": both}, *rest]
    input_ids, supervised = [], []
    for message in messages:
        by_assistant = message["role"] == "assistant"
        said = [*tokenizer.encode(message["content"]), tokenizer.end]
        input_ids += [tokenizer.assistant if by_assistant else tokenizer.user, *said]
        supervised += [False] + [by_assistant and message.get("weight", 1) != 0] * len(said)
    if messages[-1]["role"] == "user":  # the model's cue to answer
        input_ids.append(tokenizer.assistant)
        supervised.append(False)
    return input_ids, supervised


def check_messages(messages):
    """Raise ValueError unless messages are [system,] user, assistant, user, assistant, ..."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation must be a list of at least one message")
    for i, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'message {i} must be an object with "role" and "content"')
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(
                f"message {i} has the unknown role {role!r}; use system, user or assistant"
            )
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {i} ({role}) must have text in it, not {content!r:.20}")
        if message.get("weight", 1) not in (0, 1):  # OpenAI's format: 0 means don't learn this
            raise ValueError(f"message {i} has a weight other than 0 and 1")
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise ValueError("only the first message can be a system message")
    if roles == ["system"]:
        raise ValueError("a system message needs a user message after it")
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        raise ValueError("user and assistant must take turns, the user first")
