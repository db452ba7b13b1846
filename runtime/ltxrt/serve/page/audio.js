// SPDX-License-Identifier: Apache-2.0
// The audio field: chosen, dropped, recorded, or the sample of the package; heard and seen before it is sent.

import { call } from "./api.js";
import { byId, bytes, held, onDrop, seconds, setIcon, show } from "./dom.js";
import { barsIn, draw, peaks } from "./drawing.js";
import { Recorder, canRecord } from "./recorder.js";

export const SAMPLE = { name: "speech.flac", path: "page/speech.flac" };

export class AudioPicker {
  file = null;
  duration = null;
  #player = new Audio();
  #bars = null;
  #recorder = null;

  /** `changed` is called with null, or with what went wrong. */
  constructor(changed) {
    this.changed = changed;
    const chosen = byId("input_audio");
    chosen.addEventListener("change", () => chosen.files[0] && this.#hold(chosen.files[0]));
    onDrop(byId("audio-drop"), (file) => this.#hold(file));
    byId("sample").addEventListener("click", () => this.#sample());
    byId("record").addEventListener("click", () => this.#record());
    byId("record").disabled = !canRecord;
    if (!canRecord) byId("record").title = "Browsers record over https and on this machine only";
    byId("audio-remove").addEventListener("click", () => this.#remove());
    const player = this.#player;
    byId("audio-play").addEventListener("click", () => (player.paused ? player.play() : player.pause()));
    for (const name of ["play", "pause", "ended"]) player.addEventListener(name, () => this.#sounded());
    player.addEventListener("timeupdate", () => this.#draw());
    addEventListener("resize", () => this.#draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  /** Take a file, or null for none. */
  async take(file) {
    this.#player.pause();
    URL.revokeObjectURL(this.#player.src);
    Object.assign(this, { file, duration: null });
    this.#bars = null;
    show(byId("audio-pick"), !file);
    show(byId("audio-taken"), Boolean(file));
    byId("input_audio").value = "";
    if (file) {
      byId("audio-name").textContent = file.name;
      byId("audio-length").textContent = bytes(file.size);
      this.#player.src = URL.createObjectURL(file);
      const shape = await peaks(file, barsIn(byId("wave")));
      if (this.file !== file) return;
      this.#bars = shape?.bars ?? null;
      this.duration = shape?.duration ?? (await this.#lengthByPlayer());
      if (this.duration) byId("audio-length").textContent = `${seconds(this.duration)} · ${bytes(file.size)}`;
      this.#draw();
    }
    this.changed(null);
  }

  async #hold(file) {
    try {
      await this.take(await held(file));
    } catch (error) {
      this.changed(error.message);
    }
  }

  #remove() {
    this.take(null);
    byId("input_audio").focus();
  }

  async #sample() {
    try {
      const blob = await (await call(SAMPLE.path)).blob();
      await this.take(new File([blob], SAMPLE.name, { type: "audio/flac" }));
      byId("audio-play").focus();
    } catch (error) {
      this.changed(error.message);
    }
  }

  async #record() {
    if (this.#recorder) {
      const recorder = this.#recorder;
      this.#recorder = null;
      this.#recording(false);
      await this.take(await recorder.stop());
      byId("audio-play").focus();
      return;
    }
    try {
      this.#recorder = await Recorder.start((loudness, time) => {
        byId("level-bar").style.width = `${100 * loudness}%`;
        byId("level-time").textContent = seconds(time);
      });
      this.#recording(true);
    } catch (error) {
      const refused = error.name === "NotAllowedError";
      this.changed(refused ? "The browser keeps the microphone from this page." : `No recording: ${error.message}`);
    }
  }

  #recording(on) {
    byId("record-text").textContent = on ? "Stop" : "Record";
    byId("record").classList.toggle("recording", on);
    show(byId("level"), on);
    byId("input_audio").disabled = on;
    byId("sample").disabled = on;
  }

  #lengthByPlayer() {
    const player = this.#player;
    const known = () => (Number.isFinite(player.duration) && player.duration > 0 ? player.duration : null);
    if (player.readyState > 0) return known();
    return new Promise((resolve) => {
      player.addEventListener("loadedmetadata", () => resolve(known()), { once: true });
      player.addEventListener("error", () => resolve(null), { once: true });
    });
  }

  #sounded() {
    const playing = !this.#player.paused;
    setIcon(byId("audio-play"), playing ? "pause" : "play");
    byId("audio-play").setAttribute("aria-label", playing ? "Pause the audio" : "Play the audio");
    this.#draw();
  }

  #draw() {
    const wave = byId("wave");
    show(wave, Boolean(this.#bars));
    if (this.#bars) draw(wave, this.#bars, this.duration ? this.#player.currentTime / this.duration : 0);
  }
}
