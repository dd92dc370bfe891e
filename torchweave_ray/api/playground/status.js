// What the server says of itself, asked again every few seconds while somebody looks.

const EVERY_MS = 5000;
const health = document.getElementById("health");
const select = document.getElementById("model");

export async function start() {
  await refresh();
  setInterval(() => { if (!document.hidden) refresh(); }, EVERY_MS);
  select.addEventListener("change", describe);
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
  const { data } = await (await fetch("v1/models")).json();
  select.replaceChildren(...data.map(({ id }) => new Option(id, id)));
}

async function describe() {
  const answer = await fetch(`model?model=${encodeURIComponent(select.value)}`);
  if (!answer.ok) return;
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
}
