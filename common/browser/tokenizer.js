"use strict";
/*
 * data/tokenizer.py, data/chat.py and fit() of common/completion.py once more: text to token ids
 * and back, and the chat template.
 *
 * Here, a token is a string in which each character is one byte, from 0 to 255. (Python cuts words
 * of more than 4,096 characters. We don't.)
 */

const SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"];

// tiktoken's \s is White_Space. JavaScript's \s differs a little.
const WORDS = new RegExp(
  "[\\x0e\\x0f]|'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+" +
    "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
  "gu",
);
const SHIFT = "\x0e"; // before a capital letter
const CAPS_LOCK = "\x0f"; // before a word in capitals
const CAPITALS = /( ?[A-Z]{2,}(?![A-Za-z]))| ?[A-Z]|[\x0e\x0f]/g;
const MARKED = /\x0e( ?[a-z]|[\x0e\x0f])?|\x0f( ?[a-z]+)?/g;

function toBytes(text) {
  return Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join("");
}

function fromBytes(bytes) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // invalid UTF-8 becomes U+FFFD
  return decoder.decode(Uint8Array.from(bytes, (character) => character.charCodeAt(0)));
}

class Tokenizer {
  /** merges: the tokens in order of rank, as strings of bytes. */
  constructor(merges) {
    this.merges = merges;
    this.rank = new Map(merges.map((token, rank) => [token, rank]));
    const ids = SPECIAL.map((_, i) => merges.length + i);
    [this.endoftext, this.user, this.assistant, this.end, this.pad] = ids;
  }

  /** Text to a list of ids, never special ones. */
  encode(text) {
    const marked = text.replace(CAPITALS, (letters, word) => {
      return (word ? CAPS_LOCK : SHIFT) + letters.toLowerCase();
    });
    return (marked.match(WORDS) ?? []).flatMap((word) => this.encodeWord(toBytes(word)));
  }

  /** Byte-pair encoding: merge the two neighbors that were learned first, until none are left. */
  encodeWord(word) {
    if (this.rank.has(word)) return [this.rank.get(word)];
    const parts = [...word];
    while (true) {
      let [first, at] = [Infinity, -1];
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.rank.get(parts[i] + parts[i + 1]);
        if (rank < first) [first, at] = [rank, i]; // false for undefined
      }
      if (at < 0) return parts.map((part) => this.rank.get(part));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  /** The bytes of one token, or the name of a special one. */
  bytes(id) {
    return this.merges[id] ?? SPECIAL[id - this.merges.length];
  }

  /** Ids to text. */
  decode(ids) {
    const bytes = ids.map((id) => this.bytes(id)).join("");
    const upper = (_, letter, word) => (letter ?? word ?? "").toUpperCase();
    return fromBytes(bytes.replace(MARKED, upper));
  }
}

/** Turn a conversation into ids. messages: [{role, content}, ...], none empty.
 * Returns {ids, supervised, turns}, lists of equal length: supervised is true on the assistant's
 * words and on the <|end|> that closes them, and turns holds the number of each id's turn. If the
 * user spoke last, <|assistant|> is added. A system message joins the first user turn. */
function encodeChat(messages, tokenizer) {
  if (messages[0].role === "system") {
    const content = `${messages[0].content}\n\n${messages[1].content}`;
    messages = [{ role: "user", content }, ...messages.slice(2)];
  }
  const [ids, supervised, turns] = [[], [], []];
  messages.forEach((message, turn) => {
    const byAssistant = message.role === "assistant";
    const said = [...tokenizer.encode(message.content), tokenizer.end];
    ids.push(byAssistant ? tokenizer.assistant : tokenizer.user, ...said);
    supervised.push(false, ...said.map(() => byAssistant));
    turns.push(turn, ...said.map(() => turn));
  });
  if (messages.at(-1).role === "user") { // the model's cue to answer
    ids.push(tokenizer.assistant);
    supervised.push(false);
    turns.push(messages.length);
  }
  return { ids, supervised, turns };
}

/** Drop the oldest turns of a conversation until the rest takes at most `room` tokens. A system
 * message and the last message stay. Returns the messages. */
function fit(messages, tokenizer, room) {
  const system = messages.filter((message) => message.role === "system");
  let turns = messages.slice(system.length);
  while (turns.length > 2 && encodeChat([...system, ...turns], tokenizer).ids.length > room) {
    turns = turns.slice(2);
  }
  return [...system, ...turns];
}
