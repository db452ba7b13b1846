// SPDX-License-Identifier: Apache-2.0
// A clip that plays while it comes: the bytes of a fragmented MP4 into a MediaSource.

import { streamType } from "./mp4.js";

const Source = globalThis.ManagedMediaSource ?? globalThis.MediaSource;

export const canPlayLive = Boolean(Source);

/** Feeds one video element; `feed` never waits, `end` is called once after the last bytes. */
export class LiveFeed {
  #video;
  #source = new Source();
  #url;
  #buffer = null;
  #waiting = [];
  #ended = false;
  #failed;

  /** `failed` is called once where the stream cannot be played; the finished file is played instead. */
  constructor(video, failed) {
    this.#video = video;
    this.#failed = failed;
    this.#url = URL.createObjectURL(this.#source);
    this.#source.addEventListener("sourceopen", () => this.#work());
    video.disableRemotePlayback = true; // a managed source opens only then
    video.src = this.#url;
  }

  feed(piece) {
    this.#waiting.push(piece);
    this.#work();
  }

  end() {
    this.#ended = true;
    this.#work();
  }

  close() {
    this.#failed = () => {};
    this.#waiting = [];
    URL.revokeObjectURL(this.#url);
  }

  #work() {
    if (this.#source.readyState !== "open" || this.#buffer?.updating) return;
    try {
      if (!this.#buffer && !this.#open()) return;
      if (this.#waiting.length) this.#buffer.appendBuffer(this.#joined());
      else if (this.#ended) this.#source.endOfStream();
    } catch (error) {
      this.#giveUp(error);
    }
  }

  #open() {
    if (!this.#waiting.length) return false;
    const start = this.#joined();
    const type = streamType(start);
    this.#waiting = [start];
    if (type === null) return false;
    if (!type || !Source.isTypeSupported(type)) throw new Error(`cannot play ${type || "this stream"}`);
    this.#video.dataset.type = type;
    this.#buffer = this.#source.addSourceBuffer(type);
    this.#buffer.addEventListener("updateend", () => this.#work());
    this.#buffer.addEventListener("error", () => this.#giveUp(new Error("the stream does not decode")));
    return true;
  }

  #joined() {
    const whole = new Uint8Array(this.#waiting.reduce((sum, piece) => sum + piece.length, 0));
    let at = 0;
    for (const piece of this.#waiting) {
      whole.set(piece, at);
      at += piece.length;
    }
    this.#waiting = [];
    return whole;
  }

  #giveUp(error) {
    const failed = this.#failed;
    this.close();
    failed(error);
  }
}
