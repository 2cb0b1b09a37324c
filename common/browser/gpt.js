"use strict";
/*
 * The GPT of model.py once more, in plain JavaScript: the same parts in the same order.
 *
 * model.py works on batches, because that is fast. Here we read one token at a time: slower, but
 * simpler. A vector is a Float32Array. A cache keeps the keys and values of the earlier positions.
 * Letters: C = n_embd, H heads of D = C / H numbers each, V = vocab_size.
 */

const PAIR_ROWS = 32768; // rows in the table for pairs; there are more pairs, so they share rows

function max(x) {
  return x.reduce((a, b) => Math.max(a, b));
}

/** Turn numbers into probabilities: exp(x) / sum of all exp(x). We subtract the largest first, so
 * exp() can't overflow. */
function softmax(x) {
  const largest = max(x);
  const shares = x.map((number) => Math.exp(number - largest));
  const sum = shares.reduce((a, b) => a + b);
  return shares.map((share) => share / sum);
}

/** How surprised the model was by the target, in nats: -ln of the probability it gave, which is
 * -ln(exp(logit) / sum) = ln(sum) - logit. logits: V numbers. target: an id. */
function crossEntropy(logits, target) {
  const largest = max(logits);
  const sum = logits.reduce((total, logit) => total + Math.exp(logit - largest), 0);
  return Math.log(sum) + largest - logits[target];
}

function add(a, b) {
  return a.map((number, i) => number + b[i]);
}

/** Multiply a matrix by a vector. weight: {rows, columns, data}. x: one number per column.
 * Returns one number per row. */
function linear(weight, x) {
  const { rows, columns, data } = weight;
  const y = new Float32Array(rows);
  for (let row = 0, i = 0; row < rows; row++) {
    let sum = 0;
    for (let column = 0; column < columns; column++, i++) sum += data[i] * x[column];
    y[row] = sum;
  }
  return y;
}

/** One row of a table: the vector of a token, or of a pair of tokens. */
function lookUp(table, row) {
  return table.data.subarray(row * table.columns, (row + 1) * table.columns);
}

/** Shift and scale a vector to mean 0 and variance 1. */
function norm(x) {
  const mean = x.reduce((a, b) => a + b) / x.length;
  const variance = x.reduce((sum, number) => sum + (number - mean) ** 2, 0) / x.length;
  return x.map((number) => (number - mean) / Math.sqrt(variance + 1e-5));
}

/** Rotary positions: turn each pair (x[i], x[i + D/2]) by an angle of position * frequency.
 * Afterwards, the dot product of a query and a key depends only on their distance. */
function rotate(x, position) {
  const y = new Float32Array(x.length);
  const half = x.length / 2;
  for (let i = 0; i < half; i++) {
    const frequency = 10000 ** (-i / half); // radians per position
    const [cos, sin] = [Math.cos(position * frequency), Math.sin(position * frequency)];
    y[i] = x[i] * cos - x[i + half] * sin;
    y[i + half] = x[i] * sin + x[i + half] * cos;
  }
  return y;
}

/** A query takes an average of the values, weighted by how well their keys match.
 * q: D numbers. keys, values: for each position so far, D numbers. There are no later positions,
 * so nothing needs a causal mask. Returns the average, D numbers, and each position's share. */
function attend(q, keys, values) {
  const scores = Float32Array.from(keys, (k) => q.reduce((sum, x, i) => sum + x * k[i], 0));
  const shares = softmax(scores.map((score) => score / Math.sqrt(q.length)));
  const y = new Float32Array(q.length);
  for (let s = 0; s < values.length; s++) {
    for (let i = 0; i < y.length; i++) y[i] += shares[s] * values[s][i];
  }
  return { y, shares };
}

/** Causal self-attention: the only place where positions exchange information. */
class Attention {
  constructor(weights, prefix, config) {
    this.n_head = config.n_head;
    this.query = weights[`${prefix}.query.weight`];
    this.key = weights[`${prefix}.key.weight`];
    this.value = weights[`${prefix}.value.weight`];
    this.proj = weights[`${prefix}.proj.weight`];
  }

  /** x: C numbers. extra: what we add to the values, C numbers. cache: this layer's. */
  forward(x, extra, position, cache) {
    const D = x.length / this.n_head;
    const q = linear(this.query, x); // what this position looks for
    const k = linear(this.key, x); // what it offers
    const v = add(linear(this.value, x), extra); // what it passes on
    const out = new Float32Array(x.length);
    const looks = []; // for each head, the share of each position
    for (let head = 0; head < this.n_head; head++) {
      const part = (vector) => vector.subarray(head * D, (head + 1) * D);
      const turned = (vector) => rotate(norm(part(vector)), position); // norm: scores stay small
      cache.keys[head].push(turned(k));
      cache.values[head].push(part(v));
      const { y, shares } = attend(turned(q), cache.keys[head], cache.values[head]);
      out.set(y, head * D);
      looks.push(shares);
    }
    cache.looks?.push(looks);
    return linear(this.proj, out);
  }
}

/** Two matrices with a squared ReLU between them. */
class MLP {
  constructor(weights, prefix) {
    this.up = weights[`${prefix}.up.weight`];
    this.down = weights[`${prefix}.down.weight`];
  }

  forward(x) {
    const up = linear(this.up, x);
    return linear(this.down, up.map((number) => Math.max(number, 0) ** 2));
  }
}

/** One layer. Attention, then the MLP, each adding to the residual stream. */
class Block {
  constructor(weights, i, config) {
    this.attention = new Attention(weights, `blocks.${i}.attention`, config);
    this.mlp = new MLP(weights, `blocks.${i}.mlp`);
  }

  forward(x, extra, position, cache) {
    x = add(x, this.attention.forward(norm(x), extra, position, cache));
    return add(x, this.mlp.forward(norm(x)));
  }
}

class GPT {
  /** config: block_size, n_layer, n_head. weights: {name: {rows, columns, data}}, with model.py's
   * names. alias: in a pair, alias[id] stands in for id. */
  constructor(config, weights, alias) {
    this.config = config;
    this.embed = weights["embed.weight"];
    this.values = weights["values.weight"];
    this.pair_values = weights["pair_values.weight"];
    this.alias = alias;
    this.blocks = [];
    for (let i = 0; i < config.n_layer; i++) this.blocks.push(new Block(weights, i, config));
  }

  /** Read one more token. Returns the residual stream after the last block, C numbers. */
  hidden(id, cache) {
    const position = cache.length;
    let x = norm(lookUp(this.embed, id));
    // Every layer adds two rows to its values: one for this token, one for its pair with the last.
    const pair = (36313 * this.alias[id] + 27191 * this.alias[cache.last]) % PAIR_ROWS; // a hash
    const extra = add(lookUp(this.values, id), lookUp(this.pair_values, pair));
    this.blocks.forEach((block, i) => {
      x = block.forward(x, extra, position, cache.layers[i]);
    });
    cache.length += 1;
    cache.last = id;
    return norm(x);
  }

  /** Turn a vector into V logits. The table that reads tokens writes them, too. */
  head(x) {
    return linear(this.embed, x);
  }

  /** Read a text and predict each next token. Yields the logits after each id, one at a time, so
   * the page can react in between. ids: at most block_size. cache: an empty one, to keep. */
  *forward(ids, cache = new Cache(this.config)) {
    for (const id of ids) yield this.head(this.hidden(id, cache));
  }

  /** Continue a prompt. Yields {id, logits} for each new token, and null while it still reads.
   * prompt: ids, at least one. stop: the id that ends the text; we yield it, too. Without it, this
   * never ends: take as many tokens as you want. temperature, random: see sample(). A text that
   * outgrows block_size continues from its last half block. */
  *generate(prompt, temperature, stop, random) {
    const { block_size } = this.config;
    let context = [...prompt];
    let cache = null;
    let id = null;
    while (id !== stop) {
      let x;
      if (cache === null || cache.length === block_size) { // read all of the context
        if (context.length > block_size) context = context.slice(-Math.max(1, block_size >> 1));
        cache = new Cache(this.config);
        for (const earlier of context) {
          x = this.hidden(earlier, cache);
          yield null;
        }
      } else { // read the newest token; the cache knows the rest
        x = this.hidden(context.at(-1), cache);
      }
      const logits = this.head(x);
      id = sample(logits, temperature, random);
      context.push(id);
      yield { id, logits };
    }
  }
}

/** All layers' keys and values so far, so that we compute each of them only once.
 * draws: whether to keep the attention weights, so the page can draw them. */
class Cache {
  constructor(config, draws = false) {
    this.length = 0;
    this.last = 0; // the id before the next one; nothing comes before the first
    const lists = () => Array.from({ length: config.n_head }, () => []);
    this.layers = Array.from({ length: config.n_layer }, () => {
      return { keys: lists(), values: lists(), looks: draws ? [] : null };
    });
  }
}

/** Choose a token. temperature: divides the logits; 0 always takes the likeliest token.
 * random: a function that returns a number from 0 to 1. */
function sample(logits, temperature, random) {
  const likeliest = logits.indexOf(max(logits));
  if (temperature < 1e-6) return likeliest;
  const shares = softmax(logits.map((logit) => logit / temperature));
  let left = random();
  for (let id = 0; id < shares.length; id++) {
    left -= shares[id];
    if (left < 0) return id;
  }
  return likeliest; // the shares add up to a little less than 1
}

/** A function that returns random numbers from 0 to 1, the same ones for the same seed
 * (Mulberry32, in the public domain). */
function randomFrom(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}
