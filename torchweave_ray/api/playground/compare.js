// The same work over /v1/generate and /v1/generate_nobatch, one after the other, drawn as it runs.

import { lines, stems } from "./chart.js";
import { call } from "./http.js";
import { model } from "./settings.js";
import { checked, inWords, stream } from "./sse.js";

const $ = (id) => document.getElementById(id);
const WORDS = "river stone light paper engine summer orange forest music copper winter garden bridge ocean candle".split(" ");
let controller = null;
let shown = [];

export function start() {
  $("race").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!controller) race(new FormData(event.target));
  });
  $("halt").addEventListener("click", () => controller?.abort());
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") controller?.abort(); });
  shown = [blank("batched"), blank("unbatched")];
  // Also when the tab is shown: before that a chart has no width.
  new ResizeObserver(draw).observe($("chart-tokens"));
  draw();
}

const blank = (name) => ({ name, from: 0, seconds: 0, tokens: 0, curve: [[0, 0]], firsts: [], answers: [] });

async function race(form) {
  const [clients, requests, tokens] = ["clients", "requests", "tokens"].map((k) => Number(form.get(k)));
  controller = new AbortController();
  const sides = [blank("batched"), blank("unbatched")];
  shown = sides;
  busy(true);
  fail("");
  try {
    for (const side of sides) {
      $("verdict").textContent = `Running ${side.name}…`;
      const ask = side.name === "batched" ? batched : unbatched;
      // Its own words for each side: nothing is answered from the prefix cache.
      const work = Array.from({ length: requests }, () => prompt());
      side.from = performance.now();
      await Promise.all(Array.from({ length: clients }, async () => {
        for (let text = work.pop(); text; text = work.pop()) await ask(side, text, tokens, draw);
      }));
      side.seconds = seconds(side);
      draw();
    }
    const gain = rate(sides[0]) / rate(sides[1]);
    $("verdict").textContent = `Batching gives ${gain.toFixed(2)}× the tokens per second with ${clients} client${clients > 1 ? "s" : ""}.`;
  } catch (error) {
    const isStopped = controller.signal.aborted;
    $("verdict").textContent = isStopped ? "Stopped." : "";
    if (!isStopped) fail(inWords(error));
    controller.abort(); // the other clients too
  } finally {
    controller = null;
    busy(false);
  }
}

function body(text, tokens) {
  const chosen = model() ? { model: model() } : {};
  return { ...chosen, prompt: text, max_new_tokens: tokens, temperature: 0, ignore_eos: true };
}

async function batched(side, text, tokens, changed) {
  const asked = performance.now();
  let isFirst = true, counted = 0;
  const isLast = (event) => event.event === "done" || event.event === "error";
  for await (const event of stream("v1/generate", body(text, tokens), { signal: controller.signal, isLast })) {
    if (event.event === "error") throw new Error(JSON.parse(event.data).error.message);
    if (event.event === "done") {
      // What the server counted; an arrival may have carried several tokens.
      add(side, JSON.parse(event.data).usage.completion_tokens - counted);
      side.answers.push((performance.now() - asked) / 1000);
    } else if (event.event !== "ttft" && event.data) {
      if (isFirst) side.firsts.push((performance.now() - asked) / 1000);
      isFirst = false;
      counted += 1;
      add(side, 1);
    }
    changed();
  }
}

async function unbatched(side, text, tokens, changed) {
  const asked = performance.now();
  const answer = await checked(await call("v1/generate_nobatch", {
    method: "POST", signal: controller.signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body(text, tokens)),
  }));
  const { usage } = await answer.json();
  add(side, usage.completion_tokens);
  side.firsts.push((performance.now() - asked) / 1000); // it comes in one piece
  side.answers.push((performance.now() - asked) / 1000);
  changed();
}

function add(side, tokens) {
  if (tokens <= 0) return;
  side.tokens += tokens;
  side.curve.push([seconds(side), side.tokens]);
}

const seconds = (side) => (performance.now() - side.from) / 1000;
const rate = (side) => side.tokens / (side.seconds || side.curve.at(-1)[0] || 1);
const prompt = () => Array.from({ length: 40 }, () => WORDS[Math.floor(Math.random() * WORDS.length)]).join(" ");

let isAsked = false;
function draw() {
  if (isAsked) return;
  isAsked = true;
  requestAnimationFrame(() => {
    isAsked = false;
    const sides = shown;
    lines($("chart-tokens"), sides.map(({ name, curve }) => ({ name, points: curve })), "seconds", "tokens");
    const firsts = sides.map(({ name, firsts }) => ({ name, points: firsts.map((s, i) => [i + 1, s]) }));
    stems($("chart-first"), firsts, "request", "seconds");
    $("numbers").tBodies[0].replaceChildren(...sides.map(row));
  });
}

function row(side) {
  const line = document.createElement("tr");
  line.className = side.name;
  const has = side.tokens > 0;
  const path = side.name === "batched" ? "/v1/generate" : "/v1/generate_nobatch";
  const cells = [path, has ? rate(side).toFixed(1) : "–", median(side.firsts),
    median(side.answers), String(side.tokens), has ? (side.seconds || side.curve.at(-1)[0]).toFixed(1) : "–"];
  cells.forEach((text, i) => {
    const cell = document.createElement(i ? "td" : "th");
    if (!i) cell.scope = "row";
    text.split(/(?<=[/_])/).forEach((part) => cell.append(part, document.createElement("wbr")));
    line.append(cell);
  });
  return line;
}

function median(values) {
  if (!values.length) return "–";
  const ordered = [...values].sort((a, b) => a - b);
  return `${ordered[Math.floor(ordered.length / 2)].toFixed(2)} s`;
}

function busy(is) {
  $("start").disabled = is;
  $("halt").hidden = !is;
}

function fail(text) {
  $("race-failure").textContent = text;
  $("race-failure").hidden = !text;
}
