// SPDX-License-Identifier: Apache-2.0
// The history as cards: shown, compared, used again, removed.

import { byId, make, seconds, show } from "./dom.js";

const STATES = { queued: "Queued", processing: "Running", failed: "Failed", cancelled: "Cancelled" };
const posters = new WeakMap();

function poster(record) {
  if (!record.poster) return make("span", { className: "no-poster", "aria-hidden": "true" });
  if (!posters.has(record.poster)) posters.set(record.poster, URL.createObjectURL(record.poster));
  return make("img", { src: posters.get(record.poster), alt: "", loading: "lazy" });
}

function line(record) {
  const when = new Date(record.created).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const { result, state } = record;
  const what = result ? `${seconds(result.duration_seconds)} · ${result.video_quality}` : STATES[state] ?? state;
  return `${when} · ${what}`;
}

/** Draw the cards. `acts` holds `show`, `compare`, `reuse` and `remove`, each called with a record. */
export function drawShelf(history, stage, acts) {
  const cards = history.records.map((record) => card(record, stage, acts));
  const { key, act } = document.activeElement.dataset;
  byId("shelf").replaceChildren(...cards);
  if (act) byId("shelf").querySelector(`[data-key="${key}"][data-act="${act}"]`)?.focus();
  show(byId("shelf-empty"), !cards.length);
  show(byId("clear"), cards.length > 0);
  byId("history-note").textContent = history.kept ? "" : "This browser keeps nothing; it ends with this page.";
}

function card(record, stage, acts) {
  const shown = record.key === stage.record?.key;
  const rival = record.key === stage.rival?.key;
  const prompt = record.fields.prompt;
  const open = make(
    "button",
    {
      type: "button",
      className: "card-open",
      "data-key": record.key,
      "data-act": "show",
      "aria-pressed": String(shown),
      onclick: () => acts.show(record),
    },
    poster(record),
    make("span", { className: "card-prompt", textContent: prompt }),
    make("span", { className: "card-line figure", textContent: line(record) }),
  );
  const act = (name, textContent, ready = true) =>
    make("button", {
      type: "button",
      className: "quiet",
      "data-key": record.key,
      "data-act": name,
      textContent,
      disabled: !ready,
      onclick: () => acts[name](record),
      "aria-label": `${textContent}: ${prompt.slice(0, 60)}`,
    });
  const comparable = Boolean(record.clip && stage.record?.clip) && !shown && !rival;
  const rest = [act("compare", "Compare", comparable), act("reuse", "Reuse"), act("remove", "Remove")];
  const item = make("li", { className: "card" }, open, make("div", { className: "card-acts" }, ...rest));
  item.classList.toggle("shown", shown || rival);
  if (stage.rival && (shown || rival)) item.append(make("b", { className: "letter", textContent: shown ? "A" : "B" }));
  return item;
}
