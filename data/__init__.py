"""What the models learn from: text, the tokenizer, the chat template and the embedded world."""

from data.chat import encode_chat
from data.tokenizer import Tokenizer

__all__ = ["Tokenizer", "encode_chat"]
