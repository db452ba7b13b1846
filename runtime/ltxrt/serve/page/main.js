// SPDX-License-Identifier: Apache-2.0
// The workbench: wiring only.

import { call, getJson, key } from "./api.js";
import { AudioPicker } from "./audio.js";
import { KeyDialog, RequestDialog } from "./dialogs.js";
import { announce, byId, seconds, show } from "./dom.js";
import { Form } from "./form.js";
import { History, posterOf } from "./history.js";
import { ImagePicker } from "./image.js";
import { Run, newRecord } from "./run.js";
import { drawShelf } from "./shelf.js";
import { Stage } from "./stage.js";

const READY_PAUSE = 3000;
const ENDINGS = { succeeded: "The clip is ready.", failed: "No clip was made.", cancelled: "Cancelled." };

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

class Workbench {
  form = null;
  run = null;
  stage = new Stage();
  requests = new RequestDialog();
  keys = new KeyDialog((models) => this.begin(models));
  acts = {
    show: (record) => this.show(record),
    compare: (record) => this.compare(record),
    reuse: (record) => this.reuse(record),
    remove: (record) => this.remove(record),
  };

  async open() {
    this.history = await History.open();
    this.listen();
    this.draw();
    await this.meet();
  }

  /** Ask the server what it serves, until it answers. */
  async meet() {
    try {
      this.begin(await getJson("v1/models"));
    } catch (error) {
      this.refused(error);
      if (error.status !== 401) setTimeout(() => this.meet(), READY_PAUSE);
    }
  }

  listen() {
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.generate();
    });
    byId("cancel").addEventListener("click", () => this.run?.cancel().catch((error) => this.refused(error)));
    byId("copy-form").addEventListener("click", () => this.form && this.requests.open(this.asked()));
    byId("copy-run").addEventListener("click", () => this.requests.open(this.asked(this.stage.record)));
    byId("reuse").addEventListener("click", () => this.reuse(this.stage.record));
    byId("uncompare").addEventListener("click", () => {
      this.stage.endComparison();
      this.draw();
    });
    byId("clear").addEventListener("click", () => this.clear());
  }

  /** The server is there and takes our key. */
  begin(models) {
    const [model] = models.data;
    byId("model").textContent = `${model.display_name} · ${model.source_model}`;
    show(byId("key-open"), Boolean(key()));
    this.fail("");
    if (!this.form) {
      const media = { input_audio: null, input_image: null };
      for (const [name, Picker] of [["input_audio", AudioPicker], ["input_image", ImagePicker]]) {
        media[name] = new Picker((fault) => this.picked(name, fault));
      }
      this.form = new Form(model.json_request_schema, media, () => this.estimate());
      this.estimate();
      document.body.dataset.state = "open";
    }
    this.watchReady();
    const unfinished = this.history.records.find(({ id, state }) => id && ["queued", "processing"].includes(state));
    if (unfinished && !this.run) this.carry(unfinished, (run) => run.resume());
  }

  async watchReady() {
    for (;;) {
      const ready = await call("ready").then(() => true, (error) => error.status && error.kind);
      byId("ready").className = `ready ${ready === true ? "yes" : "no"}`;
      const words = { not_ready: "Warming up", draining: "Shutting down" };
      byId("ready-text").textContent = ready === true ? "Ready" : words[ready] ?? "Not reachable";
      if (ready === true) return;
      await pause(READY_PAUSE);
    }
  }

  // --- the form ---

  picked(name, fault) {
    this.form?.clear(name);
    if (fault) this.form?.refuse(name, fault);
    this.form?.refresh();
    this.estimate();
  }

  estimate() {
    if (!this.form) return;
    const { frames, rate, exact } = this.form.length();
    const known = frames && rate;
    byId("estimate").textContent = known ? `${exact ? "" : "About "}${frames} frames, ${seconds(frames / rate)}` : "";
  }

  /** What the dialog needs to write a request as code: of a record, or of the form as it stands. */
  asked(record = null) {
    const media = this.form.media;
    if (!record) {
      const files = Object.fromEntries(Object.entries(media).map(([name, { file }]) => [name, file]));
      return { form: this.form, values: this.form.values(), media: files };
    }
    return { form: this.form, values: { ...record.fields, seed: record.seed }, media: record.media };
  }

  tooLong() {
    const { frames, rate, exact } = this.form.length();
    const most = this.form.fields.get("num_frames").maximum;
    if (exact || !frames || frames <= most) return false;
    const way = "Take shorter audio or a lower frame rate, or turn Match audio length off.";
    this.form.refuse("input_audio", `Takes ${frames} frames at ${rate} frames/s; at most ${most}. ${way}`);
    this.form.focusFault();
    return true;
  }

  async generate() {
    if (!this.form || (this.run && !this.run.over)) return;
    this.fail("");
    if (!this.form.check() || this.tooLong()) return;
    const { input_audio: sound, input_image: image } = this.form.media;
    const media = { input_audio: sound.file, input_image: image.file };
    await this.carry(newRecord(this.form.values(), media, this.form.length()), (run) => run.start());
  }

  // --- a run ---

  async carry(record, begin) {
    const run = new Run(record, {
      changed: () => this.changed(run),
      piece: (piece) => this.shows(run) && this.stage.feed(piece),
      streamed: (whole) => this.shows(run) && this.stage.streamed(whole),
    });
    this.run = run;
    this.busy(true);
    this.stage.show(record, run);
    this.draw();
    toStage();
    try {
      await begin(run);
    } catch (error) {
      this.stage.clear();
      this.refused(error);
    }
    await this.ended(run);
  }

  shows(run) {
    return this.stage.record?.key === run.record.key;
  }

  changed(run) {
    const { record } = run;
    if (this.shows(run)) this.stage.render();
    if (record.id && record.state !== run.kept) {
      run.kept = record.state;
      this.keep(record);
    }
  }

  async ended(run) {
    const { record } = run;
    this.busy(false);
    if (this.shows(run)) this.stage.finished();
    if (record.id) {
      if (record.state === "failed") this.explain(record);
      announce(ENDINGS[record.state] ?? "");
      if (record.clip && this.shows(run)) record.poster = await this.poster();
      await this.keep(record);
    }
    this.links();
    this.draw();
  }

  async poster() {
    const video = byId("video-a");
    for (let tries = 0; tries < 20 && video.readyState < 2; tries++) await pause(50);
    return posterOf(video);
  }

  async keep(record) {
    await this.history.put(record);
    this.draw();
  }

  busy(on) {
    const held = [byId("generate"), byId("cancel")].includes(document.activeElement);
    show(byId("generate"), !on);
    show(byId("cancel"), on);
    byId("form").classList.toggle("busy", on);
    if (held) byId(on ? "cancel" : "generate").focus({ preventScroll: true });
  }

  // --- refusals ---

  /** Beside the field that a refusal names; else below the form. A missing key is asked for. */
  refused(error) {
    if (error.status === 401) {
      this.keys.open(key() ? "The server does not take this key any more." : "");
      return;
    }
    const wait = error.wait ? ` Try again in ${error.wait} s.` : "";
    const message = `${plain(error.message, error.field)}${wait}`;
    if (error.field && this.form?.refuse(error.field, message)) this.form.focusFault();
    else this.fail(message);
  }

  /** A job that failed names its field, if any, at the start of its message. */
  explain(record) {
    const field = /^\w+/.exec(record.error ?? "")?.[0];
    if (this.form.fields.has(field)) this.form.refuse(field, plain(record.error, field));
  }

  fail(text) {
    byId("form-error").textContent = text;
    show(byId("form-error"), Boolean(text));
  }

  // --- the history ---

  show(record) {
    const run = this.run?.record.key === record.key ? this.run : null;
    this.stage.show(record, run);
    this.links();
    this.draw();
    toStage();
  }

  compare(record) {
    this.stage.compare(record);
    this.draw();
    toStage();
    announce("Two clips, side by side.");
  }

  async reuse(record) {
    this.form.clearAll();
    this.form.set({ ...record.fields, seed: record.seed ?? record.fields.seed ?? null });
    for (const [name, picker] of Object.entries(this.form.media)) await picker.take(record.media[name] ?? null);
    byId("prompt").focus();
  }

  async remove(record) {
    if (this.run?.record.key === record.key && !this.run.over) await this.run.cancel().catch(() => {});
    if ([this.stage.record?.key, this.stage.rival?.key].includes(record.key)) this.stage.clear();
    await this.history.remove(record);
    this.draw();
    byId("history").querySelector("button")?.focus();
  }

  async clear() {
    if (this.run && !this.run.over) return;
    this.stage.clear();
    await this.history.clear();
    this.draw();
  }

  links() {
    const { record } = this.stage;
    const save = byId("save");
    if (save.href) URL.revokeObjectURL(save.href);
    save.removeAttribute("href");
    if (!record?.clip) return;
    save.href = URL.createObjectURL(record.clip);
    save.download = `ltxrt-${record.seed}.mp4`;
  }

  draw() {
    drawShelf(this.history, this.stage, this.acts);
  }
}

/** A clip that is asked for comes into view where it is not: on a phone the form stands above it. */
function toStage() {
  const { top } = byId("screens").getBoundingClientRect();
  if (top < byId("top").offsetHeight || top > innerHeight / 2) byId("stage").scrollIntoView({ block: "start" });
}

/** A message without the field's name, which stands above it. */
function plain(message, field) {
  const text = field && message.startsWith(field) ? message.slice(field.length).replace(/^[:\s]+/, "") : message;
  return text[0].toUpperCase() + text.slice(1);
}

new Workbench().open();
