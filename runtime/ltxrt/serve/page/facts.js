// SPDX-License-Identifier: Apache-2.0
// What there is to know of a clip: as a list for one, as a table for two, where lines that differ stand out.

import { byId, bytes, make, seconds, show } from "./dom.js";

// Told of two clips only where they differ.
const LONG = new Set(["Negative prompt", "Image strength", "First frame", "Notes"]);

const UNUSED = "the negative prompt has no effect on this model";

function made(record) {
  const { result, clip } = record;
  const rate = result.frames_per_second.includes("/") ? ratio(result.frames_per_second) : result.frames_per_second;
  return {
    Seed: record.seed,
    Picture: `${result.width} × ${result.height} px`,
    Length: `${seconds(result.duration_seconds)}, ${result.frames} frames`,
    "Frame rate": `${rate} frames/s`,
    Quality: result.video_quality,
    "Made in": `${seconds(result.wall_seconds)}, ${result.real_time_factor.toFixed(2)} × its length`,
    "First frames after": "first_fragment" in result.marks_seconds ? seconds(result.marks_seconds.first_fragment) : "",
    File: clip ? bytes(clip.size) : "",
    Engine: `${result.model}, ${result.engine}`,
    Notes: [...result.notes, ...(result.negative_prompt_used ? [] : [UNUSED])].join("; "),
  };
}

function ratio(text) {
  const [above, below] = text.split("/").map(Number);
  return (above / below).toFixed(3);
}

function asked(record) {
  const { fields, media } = record;
  return {
    Prompt: fields.prompt,
    Audio: media.input_audio?.name ?? "",
    "First frame": media.input_image?.name ?? "none",
    "Image strength": media.input_image ? String(fields.image_strength) : "",
    "Negative prompt": fields.negative_prompt,
  };
}

export function hideFacts() {
  show(byId("facts-one"), false);
  show(byId("facts"), false);
}

/** One clip's facts. */
export function showFacts(record) {
  hideFacts();
  const filled = Object.entries(made(record)).filter(([, value]) => value);
  byId("facts-one").replaceChildren(
    ...filled.map(([name, value]) =>
      make(
        "div",
        { className: name === "Notes" ? "whole" : "" },
        make("dt", { textContent: name }),
        make("dd", { textContent: value }),
      ),
    ),
  );
  show(byId("facts-one"));
}

/** Two clips' facts, beside each other. */
export function showPair(a, b) {
  hideFacts();
  const [left, right] = [a, b].map((record) => ({ ...asked(record), ...made(record) }));
  const cell = (textContent) => make("td", { textContent: textContent || "–" });
  const head = ["", "A", "B"].map((textContent) => make("th", { scope: "col", textContent }));
  byId("facts-head").replaceChildren(make("tr", {}, ...head));
  const rows = Object.keys(left)
    .filter((name) => (left[name] || right[name]) && (left[name] !== right[name] || !LONG.has(name)))
    .map((name) => {
      const title = make("th", { scope: "row", textContent: name });
      const row = make("tr", {}, title, cell(left[name]), cell(right[name]));
      row.classList.toggle("differs", left[name] !== right[name]);
      return row;
    });
  byId("facts-body").replaceChildren(...rows);
  show(byId("facts"));
}
