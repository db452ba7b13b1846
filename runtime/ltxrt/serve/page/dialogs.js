// SPDX-License-Identifier: Apache-2.0
// The two dialogs: a request as code, and the key.

import { getJson, keepKey, key, upload } from "./api.js";
import { byId, make, show } from "./dom.js";
import { chosen, codeNote, curl, json, jsonNote, python } from "./snippets.js";

const LONG = 160;

/** Put text on the clipboard; also where the page came over plain http, which has no clipboard of its own. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", { value: text, className: "away" });
  byId("request-dialog").append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("the browser refused");
}

const picked = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

export class RequestDialog {
  #request = null;
  #code = "";

  constructor() {
    for (const group of ["languages", "extents"]) byId(group).addEventListener("change", () => this.#draw());
    byId("request-close").addEventListener("click", () => byId("request-dialog").close());
    byId("code-copy").addEventListener("click", () => this.#copy());
  }

  /** `request` holds the form (for what is a default), values and media. */
  open(request) {
    this.#request = request;
    byId("request-dialog").showModal();
    this.#draw();
  }

  async #draw() {
    const keyed = Boolean(key());
    const parts = chosen(this.#request, picked("extent"));
    const language = picked("language");
    byId("code-copied").textContent = "";
    if (language === "json") {
      byId("code-copy").disabled = true;
      byId("code-note").textContent = "Reading the files";
      try {
        this.#code = await json(parts, (file) => upload(file));
        byId("code-note").textContent = jsonNote;
      } catch (error) {
        this.#code = "";
        byId("code-note").textContent = error.message;
      }
      byId("code-copy").disabled = !this.#code;
    } else {
      this.#code = (language === "curl" ? curl : python)(parts, keyed);
      byId("code-note").textContent = codeNote(keyed);
    }
    byId("code").textContent = this.#code.replace(/(data:[^"]{40})[^"]+/g, (whole, start) =>
      whole.length > LONG ? `${start}… ${whole.length - start.length} more characters` : whole,
    );
  }

  async #copy() {
    try {
      await copy(this.#code);
      byId("code-copied").textContent = "Copied";
    } catch (error) {
      byId("code-copied").textContent = `Not copied: ${error.message}`;
    }
  }
}

export class KeyDialog {
  /** `entered` is called once the server has taken a key. */
  constructor(entered) {
    this.entered = entered;
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#use();
    });
    byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
    byId("key-open").addEventListener("click", () => this.open());
  }

  open(fault = "") {
    show(byId("key-open"));
    this.#fault(fault);
    byId("key").value = "";
    if (!byId("key-dialog").open) byId("key-dialog").showModal();
  }

  #fault(text) {
    byId("key-error").textContent = text;
    show(byId("key-error"), Boolean(text));
    if (text) byId("key").setAttribute("aria-invalid", "true");
    else byId("key").removeAttribute("aria-invalid");
  }

  async #use() {
    const before = key();
    try {
      keepKey(byId("key").value.trim());
      const models = await getJson("v1/models");
      byId("key-dialog").close();
      this.entered(models);
    } catch (error) {
      keepKey(before);
      this.#fault(error.status === 401 ? "The server does not know this key." : error.message);
      byId("key").focus();
    }
  }
}
