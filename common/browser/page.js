"use strict";
/*
 * What both parts of the live page need, and its beginning.
 *
 * Whatever a person or a model says becomes a text node. No string is ever read as HTML.
 */

const SLICE = 12; // milliseconds of work at a time; in between, the page reacts to the reader

const find = (id) => document.getElementById(id);

/** A new element. attributes: {name: value}. children: elements, or strings that become text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function pause(milliseconds = 0) {
  return new Promise((resume) => setTimeout(resume, milliseconds));
}

/** Let generators take turns until each is done. jobs: a Map of generators, which may change. */
async function takeTurns(jobs) {
  while (jobs.size) {
    const started = performance.now();
    do {
      for (const [key, job] of jobs) {
        if (job.next().done) jobs.delete(key);
      }
    } while (jobs.size && performance.now() - started < SLICE);
    await pause();
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

/** Move the focus along a row with the arrow keys. Only one element of the row is a tab stop. */
function arrowKeys(row, selector) {
  const all = () => [...row.querySelectorAll(selector)];
  row.addEventListener("focusin", ({ target }) => {
    if (!target.matches(selector)) return;
    for (const element of all()) element.tabIndex = element === target ? 0 : -1;
  });
  row.addEventListener("keydown", (event) => {
    const stops = all();
    const at = stops.indexOf(event.target);
    const move = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: stops.length - 1 };
    const next = at < 0 ? undefined : stops[move[event.key]];
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
}

/** Unpack the models, and give the page to the reader. A copy that somebody saved begins, too. */
async function begin() {
  find("live").hidden = false;
  if (!("DecompressionStream" in globalThis)) {
    find("status").textContent =
      "This browser is too old to run the models. Open the page in a newer one.";
    return;
  }
  try {
    const about = JSON.parse(find("about").textContent);
    const models = unpack(about, await inflate(find("weights").textContent));
    const tokenizer = new Tokenizer(about.merges);
    for (const id of ["status", "prompts", "columns", "who", "layer"]) find(id).replaceChildren();
    find("ask").hidden = find("inside").hidden = false;
    const columns = typeAndWatch(models, tokenizer, about.prompts);
    const inside = new Inside(models, tokenizer, columns);
    Object.assign(globalThis, { models, tokenizer, columns, inside }); // for the console, and tests
    await inside.show(about.talk);
    find("conversation").hidden = inside.row !== null; // the one to touch is in its place
  } catch (error) {
    find("status").textContent =
      "The models didn't start. Reload the page, or see the browser's console (F12) for the error.";
    throw error;
  }
}

addEventListener("load", begin); // when all scripts are there
