// Server-sent events over fetch, resumed by themselves when the connection is lost.

import { call } from "./http.js";

const PATIENCE_MS = 30000;
const PAUSE_MS = 300;

/** What the server refused, in its own words. */
export class ApiError extends Error {
  constructor(status, error, retryAfter) {
    super(error.message || `the server answered ${status}`);
    this.status = status;
    this.param = error.param || "";
    this.retryAfter = retryAfter;
  }
}

export async function checked(response) {
  if (response.ok) return response;
  let error = {};
  try {
    error = (await response.json()).error || {};
  } catch { /* not ours: a proxy's page */ }
  throw new ApiError(response.status, error, response.headers.get("Retry-After"));
}

/** Yields {id, event, data}. `isLast` tells a whole stream from a cut one; `onLost` is told. */
export async function* stream(path, body, { signal, isLast, onLost }) {
  let lastId = "";
  let lostAt = 0;
  const ask = () => call(path, {
    method: "POST", signal, body: JSON.stringify(body),
    headers: {
      "Content-Type": "application/json", ...(lastId && { "Last-Event-ID": lastId }),
    },
  });
  for (;;) {
    try {
      for await (const event of events(await checked(await ask()))) {
        lastId = event.id || lastId;
        lostAt = 0;
        yield event;
        if (isLast(event)) return;
      }
      throw new TypeError("the stream was cut off");
    } catch (error) {
      const refused = error instanceof ApiError && ![429, 500, 502, 503].includes(error.status);
      if (signal.aborted || refused || !lastId) throw error;
      lostAt ||= performance.now();
      if (performance.now() - lostAt > PATIENCE_MS) throw error;
      onLost?.();
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    }
  }
}

async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) if (!block.startsWith(":")) yield parse(block);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  const event = { id: "", event: "message", data: "" };
  const data = [];
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") data.push(value);
    else if (name === "id" || name === "event") event[name] = value;
  }
  return { ...event, data: data.join("\n") };
}

/** An error as people read it. */
export function inWords(error) {
  if (error instanceof ApiError) {
    if (error.status === 401) return "The server asks for an API key: see the settings.";
    if (error.status === 429) return `The server is full; try again in ${error.retryAfter || "a few"} s.`;
    if (error.status === 503) return `No replica can answer now (${error.message}).`;
    if (error.status === 504) return "The answer would have come too late.";
    const field = error.param && !error.message.includes(error.param) ? ` (${error.param})` : "";
    return `The server did not take the request: ${error.message}${field}`;
  }
  if (error instanceof TypeError) return "The server cannot be reached. Is it running?";
  return error.message || String(error);
}
