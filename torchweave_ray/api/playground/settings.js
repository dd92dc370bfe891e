// The settings form as fields of a request; kept in this browser.

const KEY = "torchweave-settings";
const form = document.getElementById("settings");
const schemaError = document.getElementById("schema-error");
const EXAMPLE = {
  type: "object",
  properties: { name: { type: "string", maxLength: 40 }, age: { type: "integer", minimum: 0, maximum: 130 } },
  required: ["name", "age"],
  additionalProperties: false,
};
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const KEPT = [...NUMBERS, "stop", "system", "schema"];

export class BadSetting extends Error {}

export function start() {
  form.schema.value = JSON.stringify(EXAMPLE, null, 2);
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(KEY)) || {};
  } catch { /* storage is off, or not ours */ }
  for (const name of KEPT) if (typeof kept[name] === "string") form[name].value = kept[name];
  form.addEventListener("input", () => {
    try {
      localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(KEPT.map((n) => [n, form[n].value]))));
    } catch { /* storage is off */ }
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  const box = document.getElementById("schema-box");
  form.use_schema.addEventListener("change", () => { box.hidden = !form.use_schema.checked; });
}

export const model = () => form.model.value;
export const system = () => form.system.value.trim();

/** Fields of a chat's body beside its messages. Raises BadSetting. */
export function fields() {
  const body = {};
  for (const name of NUMBERS) {
    const input = form[name];
    input.setAttribute("aria-invalid", String(!input.validity.valid));
    if (!input.validity.valid) {
      document.getElementById("side").open = true;
      input.focus();
      throw new BadSetting(`${input.labels[0].textContent.trim()}: ${input.validationMessage}`);
    }
    if (input.value !== "") body[name] = Number(input.value);
  }
  if (form.stop.value) body.stop = [form.stop.value];
  if (model()) body.model = model();
  if (form.use_schema.checked) {
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: schema() } };
  }
  return body;
}

function schema() {
  schemaError.textContent = "";
  form.schema.removeAttribute("aria-invalid");
  try {
    return JSON.parse(form.schema.value);
  } catch (error) {
    schemaError.textContent = `Not JSON: ${error.message}`;
    form.schema.setAttribute("aria-invalid", "true");
    document.getElementById("side").open = true;
    form.schema.focus();
    throw new BadSetting("The JSON schema cannot be read; see the settings.");
  }
}
