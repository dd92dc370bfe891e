// Every call to the server. Carries the API key where the server asks for one; this tab alone keeps it.

const KEPT_KEY = "torchweave-key";
const box = document.getElementById("key-box");
const input = document.getElementById("key");

export function start() {
  try {
    input.value = sessionStorage.getItem(KEPT_KEY) || "";
  } catch { /* storage is off */ }
  box.hidden = !input.value;
  input.addEventListener("input", () => {
    try {
      sessionStorage.setItem(KEPT_KEY, input.value);
    } catch { /* storage is off */ }
  });
}

/** fetch with the key. A 401 brings the key's field. */
export async function call(path, options = {}) {
  const key = input.value.trim();
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    box.hidden = false;
    document.getElementById("side").open = true;
  }
  return answer;
}
