// SPDX-License-Identifier: Apache-2.0
// The server: requests with the key, refusals as errors that name their field, uploads, events.

import { parse, write } from "./json.js";

const STORED_KEY = "ltxrt-key";
const FIRST_PAUSE = 500;
const LONGEST_PAUSE = 8000;

/** A refusal; `field` where it is about one, `status` 0 where the server was not reached. */
export class Refusal extends Error {
  constructor(message, { status = 0, kind = "unreachable", field = null, wait = null } = {}) {
    super(message);
    Object.assign(this, { status, kind, field, wait });
  }
}

export const address = (path) => new URL(path, document.baseURI).href;

export function key() {
  return sessionStorage.getItem(STORED_KEY) ?? "";
}

export function keepKey(text) {
  if (text) sessionStorage.setItem(STORED_KEY, text);
  else sessionStorage.removeItem(STORED_KEY);
}

const headers = (more = {}) => (key() ? { Authorization: `Bearer ${key()}`, ...more } : more);

function refusal(status, text, wait) {
  let body = {};
  try {
    body = parse(text);
  } catch {
    // A proxy's error page, say.
  }
  const error = body.error ?? {};
  const field = error.param ?? body.errors?.[0]?.pointer?.slice(1) ?? null;
  const message = error.message ?? body.detail ?? `The server answered ${status}`;
  return new Refusal(message, { status, kind: error.type ?? "unknown", field, wait: Number(wait) || null });
}

const unreachable = (error) =>
  error.name === "AbortError" ? error : new Refusal("The server cannot be reached. Is it running?");

/** An answer that is there; everything else is thrown as a `Refusal`. */
export async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(address(path), { ...options, headers: headers(options.headers) });
  } catch (error) {
    throw unreachable(error);
  }
  if (!answer.ok) throw refusal(answer.status, await answer.text(), answer.headers.get("Retry-After"));
  return answer;
}

export async function getJson(path, options) {
  return parse(await (await call(path, options)).text());
}

export function post(path, body, { idempotency, signal } = {}) {
  const more = { "Content-Type": "application/json", ...(idempotency ? { "Idempotency-Key": idempotency } : {}) };
  return call(path, { method: "POST", body: write(body), headers: more, signal });
}

/** Send a file ahead of its request. `report` hears the part that is sent; `fetch` could not tell it. */
export function upload(blob, { signal = null, report = () => {} } = {}) {
  return new Promise((resolve, reject) => {
    const http = new XMLHttpRequest();
    http.open("POST", address("v1/uploads"));
    for (const [name, value] of Object.entries(headers({ "Content-Type": "application/octet-stream" }))) {
      http.setRequestHeader(name, value);
    }
    http.upload.onprogress = (event) => event.lengthComputable && report(event.loaded / event.total);
    http.onload = () => {
      if (http.status === 201) resolve(parse(http.responseText).url);
      else reject(refusal(http.status, http.responseText, http.getResponseHeader("Retry-After")));
    };
    http.onerror = () => reject(unreachable(new Error("network")));
    http.onabort = () => reject(new DOMException("aborted", "AbortError"));
    signal?.addEventListener("abort", () => http.abort());
    http.send(blob);
  });
}

/** Events of one job until `take(name, data)` says that it was the last; lost connections are taken up again. */
export async function follow(id, { signal, take, lost }) {
  const state = { last: null, pause: FIRST_PAUSE, done: false };
  while (!state.done) {
    try {
      const more = state.last === null ? {} : { "Last-Event-ID": state.last };
      const answer = await call(`v1/videos/${id}/events`, { headers: more, signal });
      await read(answer.body.getReader(), state, take);
    } catch (error) {
      if (error.name === "AbortError" || (error.status >= 400 && error.status < 500)) throw error;
    }
    if (state.done) return;
    lost();
    await new Promise((resolve) => setTimeout(resolve, state.pause));
    state.pause = Math.min(2 * state.pause, LONGEST_PAUSE);
  }
}

async function read(reader, state, take) {
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").map((line) => /^(id|event|data): (.*)$/.exec(line));
      const event = Object.fromEntries(lines.filter(Boolean).map(([, name, content]) => [name, content]));
      if (!event.event) continue;
      state.last = event.id ?? state.last;
      state.pause = FIRST_PAUSE;
      state.done = take(event.event, parse(event.data)) || state.done;
    }
  }
}
