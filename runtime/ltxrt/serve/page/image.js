// SPDX-License-Identifier: Apache-2.0
// The first frame: chosen or dropped, and seen before it is sent.

import { byId, bytes, held, onDrop, show } from "./dom.js";

export class ImagePicker {
  file = null;

  constructor(changed) {
    this.changed = changed;
    const chosen = byId("input_image");
    chosen.addEventListener("change", () => chosen.files[0] && this.#hold(chosen.files[0]));
    onDrop(byId("image-drop"), (file) => this.#hold(file));
    byId("image-remove").addEventListener("click", () => {
      this.take(null);
      chosen.focus();
    });
    const preview = byId("image-preview");
    preview.addEventListener("load", () => this.#size(`${preview.naturalWidth} × ${preview.naturalHeight} px`));
    preview.addEventListener("error", () => this.#size("no preview"));
  }

  async #hold(file) {
    try {
      this.take(await held(file));
    } catch (error) {
      this.changed(error.message);
    }
  }

  #size(text) {
    if (this.file) byId("image-size").textContent = `${text} · ${bytes(this.file.size)}`;
  }

  /** Take a file, or null for none. */
  take(file) {
    const preview = byId("image-preview");
    if (this.file) URL.revokeObjectURL(preview.src);
    this.file = file;
    byId("input_image").value = "";
    show(byId("image-pick"), !file);
    show(byId("image-taken"), Boolean(file));
    if (file) {
      byId("image-name").textContent = file.name;
      preview.src = URL.createObjectURL(file);
    } else preview.removeAttribute("src");
    this.changed(null);
  }
}
