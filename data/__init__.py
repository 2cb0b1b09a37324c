"""Everything between text and token ids: the tokenizer, the chat template, the embedded world. And the housekeeping: machine, run, terminal, report."""

from data.chat import encode_chat
from data.tokenizer import Tokenizer

__all__ = ["Tokenizer", "encode_chat"]
