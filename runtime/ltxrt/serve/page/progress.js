// SPDX-License-Identifier: Apache-2.0
// How far a clip is, in words, as a bar and as stages; told aloud when a stage begins, not at every step.

import { announce, byId, make, show } from "./dom.js";

const STAGES = {
  load: "Load",
  encode: "Encode",
  denoise_1: "Denoise, half size",
  upsample: "Upsample",
  denoise_2: "Denoise, full size",
  decode: "Decode",
};

export class ProgressView {
  #told = "";

  constructor() {
    byId("stages").append(...Object.values(STAGES).map((textContent) => make("li", { textContent })));
  }

  hide() {
    show(byId("progress"), false);
    this.#told = "";
  }

  /** Show a run that is not over. */
  render(run) {
    show(byId("progress"));
    const { record } = run;
    const { stage, text, left } = words(run);
    byId("progress-text").textContent = run.lost ? "Connection lost; trying again" : text;
    byId("progress-left").textContent = left;
    const bar = byId("bar");
    if (record.state === "sending") bar.value = 0;
    else if (record.progress) bar.value = record.progress.progress;
    else bar.value = 0;
    const at = Object.keys(STAGES).indexOf(stage);
    [...byId("stages").children].forEach((item, index) => {
      item.className = index < at ? "past" : index === at ? "now" : "";
    });
    const news = stage ? STAGES[stage] ?? stage : text;
    if (news !== this.#told) announce((this.#told = news));
  }
}

function words({ record, sendingPart }) {
  if (record.state === "sending") {
    return { text: `Sending files${sendingPart ? `, ${Math.round(100 * sendingPart)} %` : ""}`, left: "" };
  }
  if (record.state === "queued") return { text: waiting(record.position), left: "" };
  const { progress } = record;
  if (!progress) return { text: record.state === "succeeded" ? "Fetching the clip" : "Starting", left: "" };
  const title = STAGES[progress.stage] ?? progress.stage;
  const unit = progress.stage === "decode" ? "frame" : "step";
  const step = progress.steps > 1 ? ` · ${unit} ${progress.step} of ${progress.steps}` : "";
  const left = progress.seconds_left === null ? "" : `about ${Math.max(1, Math.round(progress.seconds_left))} s left`;
  return { stage: progress.stage, text: `${title}${step}`, left };
}

function waiting(ahead) {
  if (ahead === null) return "Queued";
  return ahead === 0 ? "Queued, next in line" : `Queued, ${ahead} ahead`;
}
