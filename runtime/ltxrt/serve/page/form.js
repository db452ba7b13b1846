// SPDX-License-Identifier: Apache-2.0
// The form: limits from the schema put on the controls of the page, values read and written, faults beside fields.

import { byId, make, show } from "./dom.js";
import { fault, fieldsOf, limits } from "./schema.js";

const FREE = "free";
const AREAS = { landscape: "Landscape", portrait: "Portrait", square: "Square" };

/** `landscape_16_9` as "Landscape 16:9". */
function title(name) {
  const [head, ...rest] = name.split("_");
  const word = AREAS[head] ?? head[0].toUpperCase() + head.slice(1);
  const ratio = rest.every((part) => /^\d+$/.test(part));
  return `${word} ${ratio ? rest.join(":") : rest.join(" ").toUpperCase()}`.trim();
}

export class Form {
  /** `media` holds the pickers of the fields that are files. */
  constructor(schema, media, changed) {
    this.fields = fieldsOf(schema);
    this.media = media;
    this.free = schema.$defs;
    for (const field of this.fields.values()) this.#prepare(field);
    this.#prepareFreeSize();
    this.#prepareStrength();
    byId("form").addEventListener("input", (event) => {
      this.clear(event.target.closest("[data-field]")?.dataset.field);
      this.#refresh();
      changed();
    });
    byId("defaults").addEventListener("click", () => {
      const further = [...this.fields.values()].filter(({ name }) => !schema.basic.includes(name));
      this.set(Object.fromEntries(further.map((field) => [field.name, field.default])));
      this.clearAll();
      changed();
    });
    this.set(Object.fromEntries([...this.fields].map(([name, field]) => [name, field.default])));
  }

  #block(name) {
    return document.querySelector(`[data-field="${name}"]`);
  }

  #prepare(field) {
    const block = this.#block(field.name);
    const control = byId(field.name);
    const range = limits(field);
    const hint = this.#named(field.description) + (range && ` ${range}.`);
    block.append(
      make("p", { className: "hint", id: `${field.name}-hint`, textContent: hint }),
      make("p", { className: "error", id: `${field.name}-error`, hidden: true }),
    );
    control.setAttribute("aria-describedby", `${field.name}-hint ${field.name}-error`);
    if (field.required) control.setAttribute("aria-required", "true");
    if (control.type === "number") Object.assign(control, { min: field.minimum, max: field.maximum });
    if (field.enum) {
      control.append(...field.enum.map((name) => make("option", { value: name, textContent: title(name) })));
    }
    if (field.free) control.append(make("option", { value: FREE, textContent: "Free size…" }));
  }

  /** A description in the words of this page: fields by their labels. */
  #named(description) {
    const long = [...this.fields.keys()].filter((name) => name.includes("_") && !this.fields.get(name).media);
    return long.reduce((text, name) => text.replaceAll(name, byId(name).labels[0].textContent.trim()), description);
  }

  #prepareFreeSize() {
    const size = this.free[this.fields.get("resolution").free];
    for (const [name, side] of Object.entries(size.properties)) {
      Object.assign(byId(name), { min: side.minimum, max: side.maximum, step: side.multipleOf });
      byId(name).setAttribute("aria-describedby", "free-size-hint resolution-error");
    }
    byId("free-size-hint").textContent = size.description;
    this.sides = Object.entries(size.properties).map(([name, side]) => ({ ...side, name, required: true }));
  }

  #prepareStrength() {
    const [number, slider] = [byId("image_strength"), byId("image_strength-slider")];
    Object.assign(slider, { min: number.min, max: number.max });
    slider.addEventListener("input", () => (number.value = slider.value));
    number.addEventListener("input", () => (slider.value = number.value));
  }

  /** The value of a field that is no file; null for an empty one. */
  value(name) {
    const [field, control] = [this.fields.get(name), byId(name)];
    if (field.type === "boolean") return control.checked;
    if (field.free && control.value === FREE) return this.sides.map((side) => byId(side.name).value).join("x");
    const text = control.value;
    if (field.type === "string") return text;
    if (text.trim() === "") return null;
    if (field.type === "integer" && field.maximum > Number.MAX_SAFE_INTEGER) return text.trim();
    return Number(text);
  }

  /** All fields but files, without those that are left to the server. */
  values() {
    const plain = [...this.fields.values()].filter((field) => !field.media);
    return Object.fromEntries(plain.map(({ name }) => [name, this.value(name)]).filter(([, value]) => value !== null));
  }

  set(values) {
    for (const [name, value] of Object.entries(values)) {
      const [field, control] = [this.fields.get(name), byId(name)];
      if (!field || field.media) continue;
      if (field.type === "boolean") control.checked = value;
      else if (field.free && /^\d+x\d+$/.test(value)) this.#setSize(control, value);
      else control.value = value ?? "";
    }
    byId("image_strength-slider").value = byId("image_strength").value;
    this.#refresh();
  }

  #setSize(control, value) {
    control.value = FREE;
    value.split("x").forEach((side, index) => (byId(this.sides[index].name).value = side));
  }

  /** Fields that differ from their defaults. */
  changed() {
    return [...this.fields.values()]
      .filter((field) => !field.media && !field.required && String(this.value(field.name)) !== String(field.default))
      .map(({ name }) => name);
  }

  #refresh() {
    for (const name of ["prompt", "negative_prompt"]) {
      byId(`${name}-count`).textContent = `${byId(name).value.length} / ${this.fields.get(name).maxLength}`;
    }
    show(byId("free-size"), byId("resolution").value === FREE);
    byId("num_frames").disabled = byId("match_audio_length").checked;
    show(byId("strength-field"), Boolean(this.media.input_image.file));
    const folded = this.changed().filter((name) => byId("more").contains(byId(name))).length;
    byId("more-count").textContent = `${folded} changed`;
    show(byId("more-count"), folded > 0);
  }

  refresh() {
    this.#refresh();
  }

  // --- faults ---

  /** Show what is wrong with a field, beside it; false where there is no such field. */
  refuse(name, message) {
    if (!this.fields.has(name)) return false;
    const line = byId(`${name}-error`);
    line.textContent = message;
    show(line);
    this.#block(name).classList.add("wrong");
    const control = byId(name);
    control.setAttribute("aria-invalid", "true");
    const folded = control.closest("details");
    if (folded) folded.open = true;
    return true;
  }

  clear(name) {
    if (!this.fields.has(name)) return;
    show(byId(`${name}-error`), false);
    this.#block(name).classList.remove("wrong");
    byId(name).removeAttribute("aria-invalid");
  }

  clearAll() {
    for (const name of this.fields.keys()) this.clear(name);
  }

  /** Put the eye and the keyboard on the first field that is refused. */
  focusFault() {
    const first = document.querySelector('#form [aria-invalid="true"]');
    if (!first) return;
    const block = first.closest("[data-field]");
    const there = first.checkVisibility() ? first : block.querySelector(".taken:not([hidden]) button:last-child");
    (there ?? first).focus();
    block.scrollIntoView({ block: "center" });
  }

  /** Check everything that the schema tells; whether it passed. */
  check() {
    this.clearAll();
    for (const field of this.fields.values()) {
      if (field.media) {
        if (field.required && !this.media[field.name].file) this.refuse(field.name, "Choose, record or drop audio.");
      } else if (!(field.name === "num_frames" && this.value("match_audio_length"))) {
        const message = this.#fault(field);
        if (message) this.refuse(field.name, message);
      }
    }
    const sound = !document.querySelector('#form [aria-invalid="true"]');
    if (!sound) this.focusFault();
    return sound;
  }

  #fault(field) {
    if (byId(field.name).validity.badInput) return `A number from ${limits(field)}.`;
    if (field.free && byId(field.name).value === FREE) {
      const wrong = this.sides.find((side) => fault(side, byId(side.name).value));
      return wrong ? `${wrong.title}: ${limits(wrong)}.` : "";
    }
    return field.enum ? "" : fault(field, this.value(field.name));
  }

  // --- length ---

  /** Frames and rate that the request asks for; frames are an estimate where they follow the audio, or null. */
  length() {
    const rate = this.value("frames_per_second") || null;
    const sound = this.media.input_audio.duration;
    if (!this.value("match_audio_length")) return { frames: this.value("num_frames"), rate, exact: true };
    return { frames: sound && rate ? Math.ceil(sound * rate - 1e-6) : null, rate, exact: false };
  }
}
