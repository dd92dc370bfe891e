// What the server says of itself and its replicas, asked again every few seconds while somebody looks.

import { call } from "./http.js";

const EVERY_MS = 5000;
const health = document.getElementById("health");
const select = document.getElementById("model");
const table = document.getElementById("replicas");
const GAUGE = /^torchweave_(requests_running|requests_waiting|kv_usage_ratio)\{(.*)\} (\S+)$/;

export async function start() {
  await refresh();
  setInterval(() => { if (!document.hidden) refresh(); }, EVERY_MS);
  select.addEventListener("change", describe);
  document.getElementById("key").addEventListener("change", refresh);
}

async function refresh() {
  try {
    const answer = await fetch("health", { cache: "no-store" });
    const body = await answer.json().catch(() => ({}));
    show(answer.ok, answer.ok ? "ready" : body.reason || "not ready");
    if (answer.ok) {
      if (!select.options.length) await list();
      await describe();
    }
  } catch {
    show(false, "the server cannot be reached");
  }
}

function show(isGood, text) {
  health.dataset.state = isGood ? "ok" : "bad";
  const words = document.getElementById("health-text");
  if (words.textContent !== text) words.textContent = text; // a status region speaks when it changes
}

async function list() {
  const answer = await call("v1/models");
  if (!answer.ok) return;
  const { data } = await answer.json();
  select.replaceChildren(...data.map(({ id }) => new Option(id, id)));
}

async function describe() {
  const answer = select.value && await call(`model?model=${encodeURIComponent(select.value)}`);
  if (!answer || !answer.ok) return;
  const model = await answer.json();
  const quantised = [...new Set(Object.values(model.quantization))].join(", ");
  const rows = {
    Model: model.model,
    Architecture: model.architecture,
    "Runs on": `${model.device}, ${model.executor} executor`,
    Numbers: `${model.dtype}${quantised ? `, weights ${quantised}` : ""}; KV ${model.kv_dtype || model.dtype}`,
    Context: `${model.context_length.toLocaleString("en")} tokens`,
    "Batch at most": `${model.max_batch_size} sequences`,
    Vocabulary: model.vocab_size.toLocaleString("en"),
    Artifact: (model.artifact_id || "–").slice(0, 12),
  };
  document.getElementById("about").replaceChildren(...Object.entries(rows).map(([name, value]) => {
    const [row, dt, dd] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
    dt.textContent = name;
    dd.textContent = value;
    row.append(dt, dd);
    return row;
  }));
  await replicas(model.model);
}

/** Of the model, from the gauges that Prometheus reads too. */
async function replicas(model) {
  if (table.hidden) return;
  const answer = await call("metrics");
  // A key that may not read them will not be asked for them again.
  table.hidden = document.getElementById("replicas-title").hidden = answer.status === 403;
  if (!answer.ok) return;
  const found = new Map();
  for (const line of (await answer.text()).split("\n")) {
    const [, gauge, labels, value] = GAUGE.exec(line) || [];
    const label = (name) => new RegExp(`(?:^|,)${name}="([^"]*)"`).exec(labels)?.[1];
    if (!gauge || label("model_name") !== model) continue;
    const id = label("replica") || "in this process";
    found.set(id, { ...found.get(id), [gauge]: Number(value) });
  }
  const rows = [...found].map(([id, { requests_running, requests_waiting, kv_usage_ratio }]) => {
    const row = document.createElement("tr");
    const texts = [id, requests_running, requests_waiting, `${(100 * kv_usage_ratio).toFixed(0)} %`];
    row.append(...texts.map((text, i) => {
      const cell = document.createElement(i ? "td" : "th");
      if (!i) cell.scope = "row";
      cell.textContent = text;
      return cell;
    }));
    return row;
  });
  table.tBodies[0].replaceChildren(...rows);
}
