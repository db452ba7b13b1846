// SPDX-License-Identifier: Apache-2.0
// Playback of one clip, or of two as one: play, pause, seek and steps reach both, and drift is taken back.

import { byId, setIcon } from "./dom.js";

// Two frames at 24 frames a second is what an eye tells apart.
const DRIFT = 0.06;
const CONTROLS = ["play", "step-back", "step-forward", "seek", "loop", "mute", "full"];
const NEWS = ["play", "pause", "seeking", "seeked", "timeupdate", "progress", "durationchange", "emptied"];

export class Transport {
  #main = byId("video-a");
  #other = null;
  #rate = 24;
  #expected = 0;
  #muted = false;
  #looping = false;

  constructor() {
    for (const video of [byId("video-a"), byId("video-b")]) {
      const led = (names, act) => {
        for (const name of names) video.addEventListener(name, () => video === this.#main && act());
      };
      led(NEWS, () => this.#show());
      led(["seeking", "pause"], () => this.#align(0));
      led(["play"], () => this.#other?.play().catch(() => {}));
      led(["ended"], () => this.#ended());
      video.addEventListener("loadedmetadata", () => this.#lead());
      video.addEventListener("click", () => this.toggle());
    }
    byId("play").addEventListener("click", () => this.toggle());
    byId("step-back").addEventListener("click", () => this.step(-1));
    byId("step-forward").addEventListener("click", () => this.step(1));
    byId("seek").addEventListener("input", (event) => this.seek(Number(event.target.value)));
    byId("loop").addEventListener("click", () => this.#loop());
    byId("mute").addEventListener("click", () => this.#mute());
    byId("full").addEventListener("click", () => this.#full());
    document.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Play A alone, or with B; `rate` in frames a second, `expected` the length in seconds of what is still made. */
  use({ pair, rate, expected = 0 }) {
    this.#main = byId("video-a");
    this.#other = pair ? byId("video-b") : null;
    this.#rate = rate || 24;
    this.#expected = expected;
    for (const name of CONTROLS) byId(name).disabled = false;
    this.#lead();
  }

  off() {
    for (const name of CONTROLS) byId(name).disabled = true;
    this.#other = null;
    this.#show();
  }

  get #length() {
    const real = this.#main.duration;
    const { buffered } = this.#main;
    const there = buffered.length ? buffered.end(buffered.length - 1) : 0;
    return Number.isFinite(real) && real > 0 ? Math.max(real, there) : Math.max(this.#expected, there);
  }

  /** Of two clips the longer one leads. */
  #lead() {
    const [a, b] = [byId("video-a"), byId("video-b")];
    if (this.#other) [this.#main, this.#other] = b.duration > a.duration ? [b, a] : [a, b];
    a.muted = this.#muted;
    b.muted = true;
    this.#show();
  }

  async play() {
    const main = this.#main;
    if (main.ended) this.seek(0);
    try {
      await main.play();
    } catch (error) {
      if (error.name !== "NotAllowedError") return;
      this.#muted = main.muted = true; // without a touch first, browsers play silent clips only
      await main.play().catch(() => {});
      this.#show();
    }
  }

  toggle() {
    if (byId("play").disabled) return;
    if (this.#main.paused) this.play();
    else this.#main.pause();
  }

  seek(time) {
    this.#main.currentTime = Math.min(Math.max(0, time), this.#length || 0);
  }

  step(frames) {
    this.#main.pause();
    // To the middle of a frame: its first instant may still show the one before.
    const frame = Math.floor(this.#main.currentTime * this.#rate + 1e-3) + frames;
    this.seek((Math.max(0, frame) + 0.5) / this.#rate);
  }

  #align(most) {
    if (!this.#other) return;
    if (most && this.#other.seeking) return; // it is on its way
    const wanted = Math.min(this.#main.currentTime, this.#other.duration || 0);
    if (Math.abs(this.#other.currentTime - wanted) > most) this.#other.currentTime = wanted;
    if (this.#main.paused) this.#other.pause();
  }

  #ended() {
    this.#other?.pause();
    if (this.#looping && this.#length) this.play();
    this.#show();
  }

  #loop() {
    this.#looping = !this.#looping;
    byId("loop").setAttribute("aria-pressed", String(this.#looping));
  }

  #mute() {
    this.#muted = !this.#muted;
    this.#lead();
  }

  #full() {
    if (document.fullscreenElement) document.exitFullscreen();
    else if (byId("stage").requestFullscreen) byId("stage").requestFullscreen();
    else byId("video-a").webkitEnterFullscreen?.(); // phones that know no other
  }

  #key(event) {
    const { target } = event;
    const ours = target === document.body || byId("stage").contains(target);
    if (!ours || target.closest("button, input, a, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
    const actions = {
      " ": () => this.toggle(),
      k: () => this.toggle(),
      ArrowLeft: () => this.step(-1),
      ArrowRight: () => this.step(1),
      m: () => this.#mute(),
      l: () => this.#loop(),
    };
    if (!(event.key in actions) || byId("play").disabled) return;
    event.preventDefault();
    actions[event.key]();
  }

  #show() {
    const [main, length] = [this.#main, this.#length];
    const playing = !main.paused && !main.ended;
    setIcon(byId("play"), playing ? "pause" : "play");
    byId("play").setAttribute("aria-label", playing ? "Pause" : "Play");
    setIcon(byId("mute"), byId("video-a").muted ? "muted" : "sound");
    byId("mute").setAttribute("aria-pressed", String(byId("video-a").muted));
    const seek = byId("seek");
    seek.max = length || 1;
    seek.value = main.currentTime;
    seek.setAttribute("aria-valuetext", `${main.currentTime.toFixed(2)} of ${length.toFixed(2)} seconds`);
    byId("scrub-ready").style.width = `${length ? (100 * this.#buffered()) / length : 0}%`;
    byId("time").textContent = `${main.currentTime.toFixed(2)} / ${length.toFixed(2)} s`;
    if (playing) {
      this.#align(DRIFT);
      if (!this.ticking) this.#tick();
    }
  }

  #buffered() {
    const { buffered } = this.#main;
    return buffered.length ? buffered.end(buffered.length - 1) : 0;
  }

  #tick() {
    this.ticking = true;
    requestAnimationFrame(() => {
      this.ticking = false;
      this.#show();
    });
  }
}
