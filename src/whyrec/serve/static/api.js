/* Calls of the server: JSON, server-sent events, the API key, and errors as one sentence. */

const KEY = "whyrec-api-key";

/** What the server, or the way to it, had against a request; `message` is a whole sentence. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(sentence(message));
    this.status = status;
    this.param = param;
  }
}

let askForKey = async () => null;

/** Names what asks a person for the key: it gets whether one was refused; null is no answer. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const about = () => json("v1/about");
export const knownUser = (id) => json(`v1/users/${encodeURIComponent(id)}`);
export const item = (id, signal) => json(`v1/items/${encodeURIComponent(id)}`, { signal });

/** Items whose titles hold some words. */
export async function searchItems(words, { limit, signal }) {
  const query = new URLSearchParams({ title: words, limit });
  return (await json(`v1/items?${query}`, { signal })).items;
}

/** Streams a recommendation: `onWords({sample, text})` as they come; the answer at the end. */
export async function recommend(body, { signal, onWords }) {
  const response = await call("v1/recommendations", { body: { ...body, stream: true }, signal });
  let answer = null;
  try {
    for await (const { event, data } of events(response.body)) {
      if (event === "error") throw await refused(data.status, data);
      if (event === "thought") onWords(data);
      if (event === "recommendations") answer = data;
    }
  } catch (error) {
    throw reachable(error);
  }
  if (answer === null) throw new ApiError("the server ended its answer too early; try again");
  return answer;
}

async function json(path, options) {
  return (await call(path, options)).json();
}

/** A response that is fine; one that wants a key is asked for again with it. */
async function call(path, { body, signal } = {}) {
  for (;;) {
    const key = kept();
    const headers = { accept: body ? "text/event-stream" : "application/json" };
    if (key) headers.authorization = `Bearer ${key}`;
    if (body) headers["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), {
        method: body ? "POST" : "GET",
        body: body && JSON.stringify(body),
        headers,
        signal,
      });
    } catch (error) {
      throw reachable(error);
    }
    if (response.ok) return response;
    const error = await refused(response.status, await response.json().catch(() => null));
    if (response.status !== 401) throw error;
    if (kept() !== key) continue; // somebody has given another one meanwhile
    const given = await askForKey(key !== "");
    if (given === null) throw error;
    keep(given);
  }
}

async function refused(status, body) {
  const { message, param } = body?.error ?? {};
  return new ApiError(message ?? `the server answered ${status} and did not say why`, {
    status,
    param,
  });
}

/** A failure to reach the server in words; everything else as it is. */
function reachable(error) {
  if (!(error instanceof TypeError)) return error;
  return new ApiError("the server cannot be reached; check that it still runs");
}

/** Server-sent events of a body: `{event, data}`, up to `[DONE]`. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const fields = Object.fromEntries(
          block.split("\n").map((line) => [line.split(":", 1)[0], line.replace(/^\w+: ?/, "")]),
        );
        if (fields.data !== "[DONE]") yield { event: fields.event, data: JSON.parse(fields.data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // an aborted one is cancelled already
  }
}

function sentence(text) {
  const whole = text.trim();
  return whole[0].toUpperCase() + whole.slice(1) + (/[.!?…]$/.test(whole) ? "" : ".");
}

/* The key lives as long as the tab; where the browser keeps nothing, as long as the page. */
let inMemory = "";

function kept() {
  try {
    return sessionStorage.getItem(KEY) ?? inMemory;
  } catch {
    return inMemory;
  }
}

function keep(key) {
  inMemory = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // in memory it is
  }
}
