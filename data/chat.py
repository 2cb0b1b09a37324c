"""
The chat template: how a conversation becomes one row of token ids, and which of them the loss looks at.

    <|user|>What is the capital of Kenya?<|end|><|assistant|>The capital of Kenya is Nairobi.<|end|>
    .       .   .  .   .       .  .     ..      .            *  *       *  *     *  *       **

A dot is context; a star is supervised. The mask is made here, where the text is laid out, in the same pass, so the two
cannot drift apart.
"""

ROLES = ("system", "user", "assistant")


def check_messages(messages):
    """Raise ValueError unless messages are [system,] user, assistant, user, assistant ..., each with some text."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'message {i + 1} must be an object with "role" and "content"')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"message {i + 1} has the unknown role {role!r}; the roles are {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {i + 1} ({role}) must have a text that is not empty")
    roles = [message["role"] for message in messages]
    has_system = roles[0] == "system"
    if "system" in roles[1:]:
        raise ValueError("a system message can only be the first")
    if has_system and len(roles) == 1:
        raise ValueError("a system message needs a user message after it")
    for i, role in enumerate(roles[has_system:]):
        if role != ("user", "assistant")[i % 2]:
            raise ValueError("user and assistant must take turns, the user first")


def encode_chat(messages, tokenizer):
    """Lay a conversation out as ids. messages: [{"role": "user", "content": "..."}, ...], the last from either role.

    Returns (input_ids, supervised), two lists of one length: ids, and True on the assistant's own words and on the <|end|>
    that closes them, in every turn. After a last message from the user, <|assistant|> is added: the model's cue to answer.
    A system message joins the first user turn. Each text is encoded on its own, so no merge reaches from a prompt into a
    response. Raises ValueError for anything but well-formed conversations.
    """
    check_messages(messages)
    if messages[0]["role"] == "system":
        system, first, *rest = messages
        messages = [{"role": "user", "content": system["content"] + "\n\n" + first["content"]}, *rest]
    input_ids, supervised = [], []

    def add(ids, is_supervised):
        input_ids.extend(ids)
        supervised.extend([is_supervised] * len(ids))

    for message in messages:
        by_assistant = message["role"] == "assistant"
        add([tokenizer.assistant if by_assistant else tokenizer.user], False)
        add(tokenizer.encode(message["content"]), by_assistant)
        add([tokenizer.end], by_assistant)
    if messages[-1]["role"] == "user":
        add([tokenizer.assistant], False)
    return input_ids, supervised
