// SPDX-License-Identifier: Apache-2.0
// Where clips are seen: one that is made and plays as it comes, a finished one, or two beside each other.

import { byId, show } from "./dom.js";
import { hideFacts, showFacts, showPair } from "./facts.js";
import { LiveFeed, canPlayLive } from "./live.js";
import { ProgressView } from "./progress.js";
import { Transport } from "./transport.js";

const INVITATION = byId("empty-text").textContent;
const ENDINGS = { failed: "No clip was made.", cancelled: "Cancelled. No clip was made." };

function rateOf(record) {
  const [above, below = "1"] = (record.result?.frames_per_second ?? String(record.fields.frames_per_second)).split("/");
  return Number(above) / Number(below);
}

export class Stage {
  record = null;
  rival = null;
  #run = null;
  #feed = null;
  #urls = new Map();
  #progress = new ProgressView();
  #transport = new Transport();

  /** Show a record; `run` carries it out where it is not over. */
  show(record, run = null) {
    this.#leave();
    Object.assign(this, { record, rival: null });
    this.#run = run;
    if (run && !record.clip && canPlayLive && !(run.over && record.state !== "succeeded")) this.#attach();
    else if (record.clip) this.#play(byId("video-a"), record.clip);
    this.render();
  }

  /** Play a second finished clip beside the first. */
  compare(record) {
    if (this.#feed) {
      this.#leave();
      this.#play(byId("video-a"), this.record.clip);
    }
    this.rival = record;
    this.#play(byId("video-b"), record.clip);
    this.render();
    this.#transport.seek(0);
    this.#transport.play();
  }

  endComparison() {
    this.rival = null;
    this.#empty(byId("video-b"));
    this.render();
  }

  /** Nothing to show. */
  clear() {
    this.#leave();
    Object.assign(this, { record: null, rival: null });
    this.#run = null;
    this.render();
  }

  /** Bytes of the run at hand. */
  feed(piece) {
    this.#feed?.feed(piece);
    this.render();
  }

  streamed(whole) {
    if (whole) this.#feed?.end();
    else this.#loseFeed();
  }

  /** Bring everything but the pictures to what the record says now. */
  render() {
    const { record, rival } = this;
    const running = Boolean(this.#run) && !record.clip && !["failed", "cancelled"].includes(record.state);
    const seen = Boolean(record?.clip || this.#run?.pieces.length);
    if (running) this.#progress.render(this.#run);
    else this.#progress.hide();
    show(byId("empty"), !seen);
    byId("empty-text").textContent = record ? ENDINGS[record.state] ?? "The first frames come here." : INVITATION;
    byId("empty").classList.toggle("busy", running);
    show(byId("live"), running && seen);
    show(byId("screen-b"), Boolean(rival));
    show(byId("letter-a"), Boolean(rival));
    show(byId("uncompare"), Boolean(rival));
    byId("screens").classList.toggle("two", Boolean(rival));
    show(byId("result"), Boolean(record?.clip));
    const failed = record?.state === "failed" && Boolean(record.error);
    show(byId("run-error"), failed);
    const said = failed ? record.error : "";
    if (byId("run-error").textContent !== said) byId("run-error").textContent = said; // it is read out at every change
    if (seen) this.#transport.use({ pair: Boolean(rival), rate: rateOf(record), expected: expected(record) });
    else this.#transport.off();
    if (rival) showPair(record, rival);
    else if (record?.clip) showFacts(record);
    else hideFacts();
  }

  /** The finished clip is there: played where the live stream was not, kept for the download. */
  finished() {
    const video = byId("video-a");
    if (this.record.clip && !this.#feed && !video.src) {
      this.#play(video, this.record.clip);
      this.#transport.play();
    }
    this.render();
  }

  #attach() {
    this.#feed = new LiveFeed(byId("video-a"), () => this.#loseFeed());
    for (const piece of this.#run.pieces) this.#feed.feed(piece);
    if (this.#run.streamEnded) this.#feed.end();
    this.#transport.play();
  }

  #loseFeed() {
    if (!this.#feed) return;
    this.#feed.close();
    this.#feed = null;
    this.#empty(byId("video-a"));
    if (this.record.clip) this.finished();
  }

  #play(video, blob) {
    this.#empty(video);
    const url = URL.createObjectURL(blob);
    this.#urls.set(video, url);
    video.src = url;
  }

  #empty(video) {
    URL.revokeObjectURL(this.#urls.get(video));
    this.#urls.delete(video);
    video.pause();
    video.removeAttribute("src");
    video.load();
  }

  #leave() {
    this.#feed?.close();
    this.#feed = null;
    this.#empty(byId("video-a"));
    this.#empty(byId("video-b"));
  }
}

/** Seconds that the clip will have, as far as is known. */
function expected({ result, length }) {
  if (result) return result.duration_seconds;
  return length?.frames && length.rate ? length.frames / length.rate : 0;
}
