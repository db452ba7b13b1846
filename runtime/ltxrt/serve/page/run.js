// SPDX-License-Identifier: Apache-2.0
// One generation from the form to its clip: files sent, job queued, followed, streamed, fetched. The job lives on the
// server and its idempotency key in the record, so a page that is loaded again takes it up where it was.

import { Refusal, call, follow, key, post, upload } from "./api.js";

const END = new Set(["succeeded", "failed", "cancelled"]);
// The server keeps uploads for an hour.
const UPLOAD_LASTS = 45 * 60 * 1000;
const uploads = new WeakMap();

const hex = (byte) => byte.toString(16).padStart(2, "0");
const random = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), hex).join("");

/** A new record: what the history keeps of a run. `media` holds files by field, `fields` all the rest. */
export const newRecord = (fields, media, length) => ({
  id: null,
  key: random(),
  created: Date.now(),
  fields,
  media,
  length,
  sent: null,
  state: "sending",
  progress: null,
  position: null,
  result: null,
  seed: null,
  error: null,
  clip: null,
  poster: null,
});

/** Carries out a record. Listeners: `changed()`, `piece(bytes)` of the live stream, `streamed(whole)` at its end. */
export class Run {
  #abort = new AbortController();
  #sending = true;
  #unwanted = false;
  #listener;
  sendingPart = 0;
  lost = false;
  /** The live stream so far. */
  pieces = [];
  streamEnded = false;

  constructor(record, listener) {
    this.record = record;
    this.#listener = listener;
  }

  get over() {
    return END.has(this.record.state);
  }

  /** Send, queue and follow to the end. Throws a `Refusal` where nothing was queued. */
  async start() {
    const { record } = this;
    try {
      record.sent = { ...record.fields };
      for (const [field, file] of Object.entries(record.media)) {
        if (file) record.sent[field] = await this.#address(file);
      }
      this.#sending = false;
      await this.#queue();
    } catch (error) {
      this.#set({ state: error.name === "AbortError" ? "cancelled" : "failed", error: error.message });
      if (error.name !== "AbortError") throw error;
      return;
    }
    await this.resume();
  }

  async #queue() {
    this.#abort.signal.throwIfAborted();
    // Not to be broken off: it would leave a job of which nobody knows.
    const { id } = await (await post("v1/videos", this.record.sent, { idempotency: this.record.key })).json();
    this.#set({ id, state: "queued" });
    if (this.#unwanted) await this.cancel();
  }

  async #address(file) {
    const known = uploads.get(file);
    if (known && known.key === key() && Date.now() - known.time < UPLOAD_LASTS) return known.address;
    const report = (part) => {
      this.sendingPart = part;
      this.#listener.changed();
    };
    const address = await upload(file, { signal: this.#abort.signal, report });
    uploads.set(file, { address, key: key(), time: Date.now() });
    return address;
  }

  /** Follow a job that is queued or runs. */
  async resume() {
    const { id } = this.record;
    const streaming = this.#stream();
    try {
      await follow(id, {
        signal: this.#abort.signal,
        take: (name, data) => this.#take(name, data),
        lost: () => this.#lose(),
      });
      if (this.record.state === "succeeded" && !this.record.clip) await this.#fetchClip();
    } catch (error) {
      if (error.name === "AbortError") return;
      const gone = error instanceof Refusal && error.status === 404;
      this.#set({ state: "failed", error: gone ? "The server no longer has this job." : error.message });
    } finally {
      if (this.record.state !== "succeeded") this.#abort.abort();
      await streaming;
      this.#listener.changed();
    }
  }

  #lose() {
    this.lost = true;
    this.#listener.changed();
  }

  #take(name, data) {
    this.lost = false;
    if (name === "position") this.#set({ position: data.queue_position });
    else if (name === "queued") this.#set({ state: "queued", progress: null });
    else if (name === "processing") this.#set({ state: "processing", started: this.record.started ?? Date.now() });
    else if (name === "progress") this.#set({ progress: data });
    else if (END.has(name)) {
      const error = data.error ? data.error.message : null;
      this.ending = { result: data.result, seed: String(data.seed), error, code: data.error?.code };
      Object.assign(this.record, this.ending, { state: name });
      return true;
    }
    return false;
  }

  async #fetchClip() {
    const clip = await (await call(`v1/videos/${this.record.id}/content`, { signal: this.#abort.signal })).blob();
    this.#set({ clip });
  }

  /** The same call again, by its key: the server answers with the clip as it grows. */
  async #stream() {
    const { sent, key: idempotency } = this.record;
    try {
      const answer = await post("v1/videos/stream", sent, { idempotency, signal: this.#abort.signal });
      const reader = answer.body.getReader();
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        this.pieces.push(value);
        this.#listener.piece(value);
      }
      this.streamEnded = true;
      this.#listener.streamed(true);
    } catch {
      this.pieces = [];
      this.#listener.streamed(false); // the events say why, and the finished file is played where there is one
    }
  }

  async cancel() {
    const { id } = this.record;
    this.#unwanted = true;
    if (id) await call(`v1/videos/${id}/cancel`, { method: "POST" });
    else if (this.#sending) this.#abort.abort();
  }

  #set(change) {
    Object.assign(this.record, change);
    this.#listener.changed();
  }
}
