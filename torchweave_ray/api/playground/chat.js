// A conversation: sends it whole, shows the answer as it comes, stops it at the server.

import { call } from "./http.js";
import { json, render } from "./markdown.js";
import { BadSetting, fields, system } from "./settings.js";
import { inWords, stream } from "./sse.js";

const $ = (id) => document.getElementById(id);
const METERS = ["ttft", "speed", "tokens", "cached"];
const EXAMPLES = ["What is gravity?", "Write a haiku about the sea.", "List three uses of a paperclip."];
let conversation = [];
let running = null; // {controller, id} of the answer that is coming

export function start() {
  for (const text of EXAMPLES) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => send(text));
    $("examples").append(button);
  }
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send($("prompt").value);
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send($("prompt").value);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
  $("stop").addEventListener("click", stop);
  $("reset").addEventListener("click", reset);
}

function reset() {
  stop();
  conversation = [];
  for (const node of document.querySelectorAll(".message")) node.remove();
  $("empty").hidden = false;
  fail("");
  for (const name of METERS) meter(name, "–");
  $("prompt").focus();
}

function stop() {
  if (!running) return;
  const { controller, id } = running;
  // The request ends at once by its id; closing the connection would do it a moment later.
  if (id) call(`v1/requests/${encodeURIComponent(id)}`, { method: "DELETE", keepalive: true }).catch(() => {});
  controller.abort();
}

async function send(text) {
  if (running || !text.trim()) return;
  fail("");
  let body;
  try {
    const head = system() ? [{ role: "system", content: system() }] : [];
    body = { ...fields(), messages: [...head, ...conversation, { role: "user", content: text }] };
  } catch (error) {
    if (!(error instanceof BadSetting)) throw error;
    fail(error.message);
    return;
  }
  $("empty").hidden = true;
  $("prompt").value = "";
  const question = bubble("user", text);
  const own = { controller: new AbortController(), id: "" };
  running = own;
  busy(true);
  const answer = await receive(body, own);
  running = null;
  busy(false);
  // A question without an answer leaves the conversation as it was, and may be mended.
  if (answer === null) {
    question.remove();
    $("empty").hidden = conversation.length > 0;
    $("prompt").value = text;
  } else {
    conversation.push({ role: "user", content: text }, { role: "assistant", content: answer });
  }
  $("prompt").focus();
}

/** The answer's text, or null when there was none. */
async function receive(body, own) {
  const node = bubble("assistant", "");
  node.setAttribute("aria-busy", "true");
  const pace = new Pace();
  let text = "", reason = "", isDrawn = true, usage = null;
  const draw = () => {
    isDrawn = true;
    show(node, text, Boolean(body.response_format));
    pace.show();
  };
  try {
    const options = {
      signal: own.controller.signal,
      isLast: (event) => event.data === "[DONE]",
      onLost: () => meter("state", "reconnecting"),
    };
    const wanted = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    for await (const event of stream("v1/chat/completions", { ...body, ...wanted }, options)) {
      if (!event.data || event.data === "[DONE]") continue;
      const chunk = JSON.parse(event.data);
      if (chunk.error) throw new Error(`The answer broke off: ${chunk.error.message}`);
      own.id ||= chunk.id;
      usage = chunk.usage || usage;
      const choice = chunk.choices?.[0];
      reason = choice?.finish_reason || reason;
      if (choice) pace.note(usage?.completion_tokens ?? 0);
      text += choice?.delta?.content ?? "";
      if (isDrawn) {
        isDrawn = false;
        requestAnimationFrame(draw);
      }
    }
    draw();
    meter("cached", `${usage?.prompt_tokens_details?.cached_tokens ?? 0} of ${usage?.prompt_tokens ?? 0}`);
    if (reason === "length") note(node, "Cut at the most tokens allowed.");
    if (!text) note(node, "The model ended its answer without a word.");
    say(text ? `Answer: ${text}` : "The model ended its answer without a word.");
    return text;
  } catch (error) {
    const isStopped = own.controller.signal.aborted;
    if (!isStopped) fail(inWords(error));
    if (!text) {
      node.remove();
      return null;
    }
    draw();
    note(node, isStopped ? "Stopped." : "Incomplete.");
    if (isStopped) say("The answer was stopped.");
    return text;
  } finally {
    node.removeAttribute("aria-busy");
    for (const name of METERS) if ($(`m-${name}`).textContent === "…") meter(name, "–");
  }
}

/** When tokens came, with text or without: TTFT, and the speed from the first arrival on. */
class Pace {
  asked = performance.now();
  firstAt = 0;
  lastAt = 0;
  firstTokens = 0;
  tokens = 0;

  note(tokens) {
    if (tokens <= this.tokens) return;
    this.lastAt = performance.now();
    if (!this.firstAt) {
      this.firstAt = this.lastAt;
      this.firstTokens = tokens;
      meter("state", "answering");
      meter("ttft", `${((this.firstAt - this.asked) / 1000).toFixed(2)} s`);
    }
    this.tokens = tokens;
  }

  show() {
    meter("tokens", String(this.tokens));
    const seconds = (this.lastAt - this.firstAt) / 1000;
    if (seconds > 0) meter("speed", `${((this.tokens - this.firstTokens) / seconds).toFixed(1)} tok/s`);
  }
}

/** The answer so far. What is JSON by its schema is no Markdown. */
function show(node, text, isJson) {
  const log = $("messages");
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  node.querySelector(".body").replaceChildren(isJson ? json(text) : render(text));
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function bubble(role, text) {
  const node = document.createElement("article");
  node.className = `message ${role}`;
  const who = document.createElement("h3");
  who.textContent = role === "user" ? "You" : "Model";
  if (role === "user") who.className = "unseen";
  const box = document.createElement("div");
  box.className = "body";
  box.textContent = text;
  node.append(who, box);
  $("messages").append(node);
  $("messages").scrollTop = $("messages").scrollHeight;
  return node;
}

function note(node, text) {
  const line = document.createElement("p");
  line.className = "note";
  line.textContent = text;
  node.append(line);
}

function busy(is) {
  $("send").disabled = is;
  $("stop").hidden = !is;
  $("reset").hidden = is;
  meter("state", is ? "waiting" : "idle");
  if (is) for (const name of METERS) meter(name, "…");
}

const meter = (name, text) => { $(`m-${name}`).textContent = text; };
const say = (text) => { $("announce").textContent = text; };

function fail(text) {
  $("failure").textContent = text;
  $("failure").hidden = !text;
}
