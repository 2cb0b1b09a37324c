"use strict";
/*
 * The other half of common/weights.py: the models out of the page's 16-bit numbers.
 */

/** Undo base64 and zlib. Returns a promise of bytes. */
async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** All models of the page, as [{name, model}]. about: what pack() wrote. bytes: its numbers.
 *
 * The low bytes of all numbers come first, then the high bytes. A stage's numbers are what it
 * added to those of the stage before, in steps. A table that didn't change isn't in its list. The
 * sign is in the lowest bit, so that small numbers have an empty high byte. */
function unpack(about, bytes) {
  const half = bytes.length / 2;
  const counts = {}; // name of a table -> its numbers, in steps
  const weights = {};
  let at = 0;
  return about.models.map(({ name, tables, alias }) => {
    for (const { key, rows, columns, step } of tables) {
      const before = counts[key] ?? new Int16Array(rows * columns);
      const data = new Float32Array(rows * columns);
      counts[key] = before.map((count, i) => {
        const packed = bytes[at + i] | (bytes[half + at + i] << 8);
        return count + ((packed >> 1) ^ -(packed & 1));
      });
      for (let i = 0; i < data.length; i++) data[i] = counts[key][i] * step;
      weights[key] = { rows, columns, data };
      at += data.length;
    }
    const aliases = Array.from({ length: about.config.vocab_size }, (_, id) => alias[id] ?? id);
    return { name, model: new GPT(about.config, { ...weights }, aliases) };
  });
}
