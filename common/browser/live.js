"use strict";
/*
 * What the reader does with the models: type and watch, and look inside.
 *
 * Whatever a person or a model says becomes a text node. No string is ever read as HTML.
 */

const MAX_NEW_TOKENS = 64;
const SLICE = 12; // milliseconds of work at a time; in between, the page reacts to the reader
const TITLES = { base: "base: the parrot", tuned: "tuned: the assistant", dpo: "dpo: preferences" };

const find = (id) => document.getElementById(id);

/** A new element. attributes: {name: value}. children: elements, or strings that become text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const breathe = () => new Promise((resume) => setTimeout(resume));

/** Take turns between generators until all are done, or until stop() is true. */
async function takeTurns(jobs, stop) {
  while (jobs.length && !stop()) {
    const started = performance.now();
    do {
      jobs = jobs.filter((job) => !job.next().done);
    } while (jobs.length && performance.now() - started < SLICE);
    await breathe();
  }
}

/** A token as a box shows it. If it is only a part of a character, its bytes: \xea. */
function shown(bytes) {
  let text = fromBytes(bytes);
  if (text.includes("\ufffd")) {
    const code = (c) => c.charCodeAt(0).toString(16).padStart(2, "0");
    text = bytes.replace(/[^\x20-\x7e]/g, (c) => `\\x${code(c)}`);
  }
  const signs = { "\n": "↵", "\t": "⇥", " ": "·", [SHIFT]: "⇧", [CAPS_LOCK]: "⇪" };
  const escaped = (c) => signs[c] ?? `\\u{${c.codePointAt(0).toString(16)}}`;
  return text.replace(/[\p{C}\p{Z}]/gu, escaped);
}

function percent(share) {
  return share < 0.0001 ? "<0.01%" : `${Number((100 * share).toPrecision(2))}%`;
}

/** Move the focus among the elements of a row with the arrow keys. Only one is a tab stop. */
function arrowKeys(row, selector) {
  row.addEventListener("keydown", (event) => {
    const stops = [...row.querySelectorAll(selector)];
    const at = stops.indexOf(event.target);
    const move = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: stops.length - 1 };
    const next = at < 0 ? undefined : stops[move[event.key]];
    if (!next) return;
    event.preventDefault();
    for (const stop of stops) stop.tabIndex = stop === next ? 0 : -1;
    next.focus();
  });
}

// ------------------------------------------------------------------------------------------------
// Type and watch

/** One model's column: the conversation so far, and the answer that is being written. */
class Column {
  constructor(name, model, tokenizer) {
    Object.assign(this, { name, model, tokenizer, history: [], prompt: null, tokens: [] });
    this.chats = name !== "base"; // the base model has never seen the chat template
    this.earlier = make("div", { class: "earlier" });
    this.question = make("p", { class: "question", dir: "auto" });
    this.text = make("p", { class: "answer", dir: "auto", "aria-live": "polite" });
    this.boxes = make("div", { class: "boxes", role: "group", "aria-label": "tokens" });
    this.note = make("p", { class: "note" });
    this.menu = make("span", { class: "menu", role: "group", "aria-label": "likeliest tokens" });
    const parts = [this.earlier, this.question, this.text, this.boxes, this.note];
    const label = TITLES[name] ?? name;
    this.element = make("section", { class: `said ${name}`, "aria-label": label });
    this.element.append(make("b", {}, label), ...parts);
    // A pointer on its way to the menu crosses other boxes. So a menu stays until it rests there.
    let rest;
    const after = (wait, action) => {
      clearTimeout(rest);
      rest = setTimeout(action, wait);
    };
    this.boxes.addEventListener("pointerover", ({ target }) => {
      after(150, () => this.showMenu(target));
    });
    this.boxes.addEventListener("pointerleave", () => after(400, () => this.hideMenu()));
    for (const type of ["focusin", "click"]) {
      this.boxes.addEventListener(type, ({ target }) => this.showMenu(target));
    }
    this.boxes.addEventListener("focusout", () => after(0, () => this.hideMenu()));
    this.boxes.addEventListener("keydown", (event) => this.moveInMenu(event));
    arrowKeys(this.boxes, ".box");
  }

  /** What the model would read: {ids, history, prompt, settings}. Throws an Error that says what
   * the reader can do, if it is too long. */
  prepare(prompt, settings) {
    const { tokenizer } = this;
    const { block_size } = this.model.config;
    const room = block_size - Math.min(MAX_NEW_TOKENS, block_size >> 2); // most answers are short
    const system = settings.system.trim();
    let [ids, history] = [null, []];
    if (settings.mode === "continue") {
      ids = [tokenizer.endoftext, ...tokenizer.encode(prompt)];
    } else if (!this.chats) { // a system message is just its first line
      const text = system ? `${system}\n\n${prompt}` : prompt;
      ids = [tokenizer.endoftext, ...tokenizer.encode(text)];
    } else {
      const messages = system ? [{ role: "system", content: system }] : [];
      messages.push(...this.history, ...this.turn(), { role: "user", content: prompt });
      const fitted = fit(messages, tokenizer, room);
      history = fitted.slice(system ? 1 : 0, -1);
      ids = encodeChat(fitted, tokenizer).ids;
    }
    if (ids.length > room) {
      throw new Error(`That takes ${ids.length} tokens, but only ${room} fit. Shorten it.`);
    }
    return { ids, history, prompt, settings };
  }

  /** Begin an answer. start: what prepare() returned. Returns a generator. */
  start(start) {
    Object.assign(this, start);
    const lines = this.history.map(({ role, content }) => {
      return make("p", { class: role, dir: "auto" }, content);
    });
    this.earlier.replaceChildren(...lines);
    this.question.textContent = this.prompt;
    return this.write([]);
  }

  /** The last question and answer, as two messages. None, if the model said nothing. */
  turn() {
    const answer = this.answer().trim();
    if (!this.chats || !answer || this.settings.mode === "continue") return [];
    return [{ role: "user", content: this.prompt }, { role: "assistant", content: answer }];
  }

  answer() {
    const ids = this.tokens.map((token) => token.id);
    return this.tokenizer.decode(ids.at(-1) === this.stop() ? ids.slice(0, -1) : ids);
  }

  stop() {
    const inTemplate = this.chats && this.settings?.mode === "answer";
    return inTemplate ? this.tokenizer.end : this.tokenizer.endoftext;
  }

  /** Write the rest of an answer after these tokens. A generator, to take turns with the others. */
  *write(tokens) {
    this.tokens = tokens;
    this.boxes.replaceChildren(...tokens.map((token, i) => this.box(token, i)));
    this.note.textContent = "…";
    const random = randomFrom(Number(this.settings.seed) + tokens.length);
    const context = [...this.ids, ...tokens.map((token) => token.id)];
    const { temperature } = this.settings;
    const writing = this.model.generate(context, Number(temperature), this.stop(), random);
    let [spent, count] = [0, 0]; // milliseconds, new tokens
    while (this.tokens.length < MAX_NEW_TOKENS && this.tokens.at(-1)?.id !== this.stop()) {
      const started = performance.now();
      const { value } = writing.next();
      if (value) {
        const shares = softmax(value.logits);
        const likeliest = [...shares.keys()].sort((a, b) => shares[b] - shares[a]).slice(0, 5);
        const top = likeliest.map((id) => ({ id, share: shares[id] }));
        this.tokens.push({ id: value.id, share: shares[value.id], top });
        this.boxes.append(this.box(this.tokens.at(-1), this.tokens.length - 1));
        this.text.textContent = this.answer().trim();
        count += 1;
      }
      spent += performance.now() - started;
      yield;
    }
    this.text.textContent = this.answer().trim();
    const ended = this.tokens.at(-1)?.id === this.stop() ? "Stopped by itself" : "Cut off";
    const rate = count ? `, ${Math.round((1000 * count) / spent)} tokens/s` : "";
    this.note.textContent = `${ended} after ${this.tokens.length} tokens${rate}.`;
  }

  box({ id, share }, i) {
    const name = shown(this.tokenizer.bytes(id));
    const label = `${name}, ${percent(share)}`;
    const box = make("button", { class: "box", type: "button", "aria-label": label }, name);
    box.tabIndex = i ? -1 : 0;
    box.style.setProperty("--heat", Math.round(60 * (1 - share)));
    return make("span", { class: "token", "data-at": i }, box);
  }

  /** Put the five likeliest tokens below the box that the reader points at. */
  showMenu(target) {
    const place = target.closest(".token");
    if (!place?.isConnected || this.menu.parentElement === place) return;
    const at = Number(place.dataset.at);
    this.menu.replaceChildren(
      ...this.tokens[at].top.map(({ id, share }) => {
        const option = make("button", { type: "button" }, shown(this.tokenizer.bytes(id)), " ");
        option.append(make("small", {}, percent(share)));
        option.addEventListener("click", () => {
          const chosen = { ...this.tokens[at], id, share };
          run([this], [this.write([...this.tokens.slice(0, at), chosen])]);
          this.boxes.children[at]?.firstChild.focus();
        });
        return option;
      }),
    );
    place.append(this.menu);
  }

  hideMenu() {
    if (!this.boxes.contains(document.activeElement)) this.menu.remove();
  }

  moveInMenu(event) {
    const stops = [event.target.closest(".token")?.firstChild, ...this.menu.children];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") stops[0]?.focus();
    if (!step) return;
    event.preventDefault();
    stops[stops.indexOf(event.target) + step]?.focus();
  }
}

let running = null; // a new run replaces the one in progress

/** Let columns write. jobs: a generator for each of them. */
async function run(columns, jobs) {
  const mine = {};
  running = mine;
  find("status").textContent = "";
  find("run").textContent = "Stop";
  for (const column of columns) column.text.setAttribute("aria-busy", "true");
  await takeTurns(jobs, () => running !== mine);
  for (const column of columns) column.text.setAttribute("aria-busy", "false");
  if (running === mine) stop();
}

function stop() {
  running = null;
  find("run").textContent = "Run";
}

function typeAndWatch(models, tokenizer, prompts) {
  const columns = models.map(({ name, model }) => new Column(name, model, tokenizer));
  find("columns").append(...columns.map((column) => column.element));

  function ask() {
    const prompt = find("prompt").value.trim();
    if (!prompt) {
      find("status").textContent = "Type something first.";
      return;
    }
    const settings = {};
    for (const name of ["mode", "system", "temperature", "seed"]) settings[name] = find(name).value;
    try {
      const starts = columns.map((column) => column.prepare(prompt, settings));
      run(columns, columns.map((column, i) => column.start(starts[i])));
    } catch (error) {
      find("status").textContent = error.message;
    }
  }

  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) stop();
    else ask();
  });
  find("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  find("fresh").addEventListener("click", () => {
    stop();
    for (const column of columns) {
      Object.assign(column, { history: [], tokens: [] });
      for (const part of ["earlier", "question", "text", "boxes", "note"]) {
        column[part].replaceChildren();
      }
    }
    find("prompt").value = "";
    find("prompt").focus();
  });
  for (const prompt of prompts) {
    const chip = make("button", { type: "button", dir: "auto" }, prompt);
    chip.addEventListener("click", () => {
      find("prompt").value = prompt;
      ask();
    });
    find("prompts").append(chip);
  }
  return columns;
}

// ------------------------------------------------------------------------------------------------
// Look inside

/** A text with blank lines between its turns, as messages. */
function toMessages(text) {
  const turns = text.split(/\n\s*\n/).filter((turn) => turn.trim());
  return turns.map((turn, i) => ({ role: i % 2 ? "assistant" : "user", content: turn.trim() }));
}

/** What fine-tuning would do with a conversation: its labels, from which turns count.
 * on: {turn: whether it counts}, where the reader said so. Returns the ids' labels. */
function labelsOf({ ids, turns, supervised, words }, on) {
  return ids.map((id, i) => {
    const counts = turns[i] in on ? on[turns[i]] && words[i] : supervised[i];
    return counts ? id : IGNORE_INDEX;
  });
}

class Inside {
  constructor(models, tokenizer, columns) {
    Object.assign(this, { models, tokenizer, on: {}, row: null, at: 0, reading: null });
    for (const name of ["kind", "text"]) {
      find(name).addEventListener("input", () => {
        this.on = {};
        this.read();
      });
    }
    for (const { name } of models) find("who").append(make("option", { value: name }, name));
    find("who").value = models.at(-1).name;
    for (let i = 0; i < models[0].model.config.n_layer; i++) {
      find("layer").append(make("option", { value: i }, `${i + 1}`));
    }
    for (const name of ["who", "layer"]) find(name).addEventListener("input", () => this.heads());
    find("take").addEventListener("click", () => {
      const column = columns.at(-1);
      const messages = [...column.history, ...column.turn()];
      if (!messages.length) return;
      find("kind").value = "chat";
      const texts = messages.map(({ content }) => content.replace(/\n\s*\n/g, "\n"));
      find("text").value = texts.join("\n\n");
      this.on = {};
      this.read();
    });
    for (const type of ["pointerover", "focusin", "click"]) {
      find("heads").addEventListener(type, ({ target }) => {
        if (target.dataset.at) this.lookFrom(Number(target.dataset.at));
      });
    }
    arrowKeys(find("heads"), "[data-at]");
  }

  /** The reader's text as a row: {ids, supervised, turns, words, note}, or null if nothing fits.
   * words: what may count. note: what we left out. */
  encode() {
    const { block_size } = this.models[0].model.config;
    const text = find("text").value;
    if (find("kind").value === "text") {
      const all = [this.tokenizer.endoftext, ...this.tokenizer.encode(text)];
      const ids = all.slice(0, block_size);
      const note = all.length > block_size ? ` We show the first ${block_size} tokens.` : "";
      const yes = ids.map(() => true); // nothing is masked
      return { ids, turns: ids.map(() => 0), supervised: yes, words: yes, note };
    }
    let messages = toMessages(text);
    let note = "";
    while (messages.length) {
      const row = encodeChat(messages, this.tokenizer);
      const { user, assistant } = this.tokenizer;
      const words = row.ids.map((id) => id !== user && id !== assistant);
      if (row.ids.length <= block_size) return { ...row, words, note };
      messages = messages.slice(2);
      note = " The oldest turns went: they didn't fit.";
    }
    return null;
  }

  /** Read the text with every model, and draw it. A newer call replaces this one. */
  async read() {
    const reading = (this.reading = {});
    await new Promise((resume) => setTimeout(resume, 200)); // the reader may still be typing
    if (this.reading !== reading) return;
    const row = this.encode();
    const { ids } = row ?? { ids: [] };
    const losses = {};
    const caches = {};
    const jobs = this.models.map(({ name, model }) => {
      losses[name] = [null]; // nothing predicts the first token
      caches[name] = new Cache(model.config);
      return (function* () {
        for (const logits of model.forward(ids, caches[name])) {
          const target = ids[losses[name].length];
          if (target !== undefined) losses[name].push(crossEntropy(logits, target));
          yield;
        }
      })();
    });
    find("loss").textContent = "Reading …";
    await takeTurns(jobs, () => this.reading !== reading);
    if (this.reading !== reading) return;
    Object.assign(this, { row, losses, caches, at: ids.length - 1 });
    this.strip();
    this.heads();
  }

  /** Each token with its label and its losses, turn by turn, and the mean over those that count. */
  strip() {
    const { row, losses } = this;
    find("strip").replaceChildren();
    find("loss").textContent = row ? "" : "Write something, and shorter than the models' block.";
    if (!row) return;
    const labels = labelsOf(row, this.on);
    const names = this.models.map(({ name }) => name);
    const legend = make("li", { class: "supervised" }, make("span", { class: "token" }, "token"));
    for (const name of ["label", ...names]) legend.append(make("span", {}, name));
    find("strip").append(make("ul", { class: "tokens", "aria-hidden": "true" }, legend));
    const lists = {};
    row.ids.forEach((id, i) => {
      const turn = row.turns[i];
      if (!lists[turn]) {
        lists[turn] = make("ul", { class: "tokens" });
        const cue = !row.words.some((word, j) => word && row.turns[j] === turn);
        if (!cue) find("strip").append(this.toggle(turn, labels));
        find("strip").append(lists[turn]);
      }
      const counts = labels[i] !== IGNORE_INDEX;
      const box = make("li", counts ? { class: "supervised" } : {});
      box.append(make("span", { class: "token" }, shown(this.tokenizer.bytes(id))));
      box.append(make("span", {}, counts ? `${labels[i]}` : "−100"));
      for (const name of names) {
        const loss = losses[name][i];
        const figure = make("span", {}, loss === null ? "–" : loss.toFixed(2));
        figure.style.setProperty("--heat", Math.min(45, 8 * loss).toFixed(0));
        box.append(figure);
      }
      lists[turn].append(box);
    });
    const targets = row.ids.map((_, i) => i).filter((i) => i && labels[i] !== IGNORE_INDEX);
    const means = names.map((name) => {
      const sum = targets.reduce((total, i) => total + losses[name][i], 0);
      return `${targets.length ? (sum / targets.length).toFixed(3) : "0.000"} (${name})`;
    });
    const over = `Over the ${targets.length} tokens that count, the mean loss in nats is `;
    find("loss").textContent = over + means.join(", ") + "." + row.note;
  }

  /** A button that switches a turn between supervised and not. */
  toggle(turn, labels) {
    const { row } = this;
    const counts = labels.some((label, i) => row.turns[i] === turn && label !== IGNORE_INDEX);
    const isText = find("kind").value === "text";
    const who = isText ? "text" : turn % 2 ? "assistant" : "user";
    const state = counts ? "supervised" : "not supervised";
    const options = { type: "button", class: "toggle", "aria-pressed": counts };
    const button = make("button", options, `${who}: ${state}`);
    button.addEventListener("click", () => {
      this.on[turn] = !counts;
      this.strip();
      find("strip").querySelectorAll(".toggle")[turn]?.focus();
    });
    return button;
  }

  /** The text once for each head of the chosen layer. */
  heads() {
    find("heads").replaceChildren();
    if (!this.row) return;
    const { n_head } = this.models[0].model.config;
    for (let head = 0; head < n_head; head++) {
      const boxes = this.row.ids.map((id, i) => {
        const name = shown(this.tokenizer.bytes(id));
        return make("button", { type: "button", class: "look", "data-at": i }, name);
      });
      const row = make("div", { class: "boxes", role: "group", "aria-label": `head ${head + 1}` });
      row.append(...boxes);
      find("heads").append(make("p", { class: "note" }, `head ${head + 1}`), row);
    }
    this.lookFrom(this.at);
  }

  /** Color every token by how much the one at this position looks at it. */
  lookFrom(at) {
    this.at = at;
    const layer = this.caches[find("who").value].layers[Number(find("layer").value)];
    find("heads").querySelectorAll(".boxes").forEach((row, head) => {
      const weights = layer.looks[at][head];
      [...row.children].forEach((box, i) => {
        const weight = weights[i] ?? 0;
        box.style.setProperty("--look", Math.round(100 * weight));
        box.classList.toggle("at", i === at);
        box.classList.toggle("later", i > at);
        box.tabIndex = i === at ? 0 : -1;
        box.title = i > at ? "later" : percent(weight);
      });
    });
  }
}

// ------------------------------------------------------------------------------------------------
// Begin, when the models are there

async function begin() {
  const about = JSON.parse(find("about").textContent);
  find("live").hidden = false;
  if (!("DecompressionStream" in globalThis)) {
    find("status").textContent = "This browser is too old to run the models. A newer one can.";
    return;
  }
  const models = unpack(about, await inflate(find("weights").textContent));
  find("weights").remove(); // many megabytes of text
  const tokenizer = new Tokenizer(about.merges);
  const columns = typeAndWatch(models, tokenizer, about.prompts);
  find("prompt").value = about.prompts[0];
  find("text").value = about.talk.join("\n\n");
  find("status").textContent = "";
  find("inside").hidden = false;
  find("conversation").hidden = true; // the one to touch is in its place
  const inside = new Inside(models, tokenizer, columns);
  Object.assign(globalThis, { models, tokenizer, columns, inside }); // for a console, and for tests
  await inside.read();
}

begin();
