// SPDX-License-Identifier: Apache-2.0
// Elements: found by id, made without markup (the page's policy allows none from scripts), hidden and shown.

export const byId = (id) => document.getElementById(id);

/** An element with properties (`on…` as listeners, `aria-…` and `data-…` as attributes) and children. */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

export function show(node, visible = true) {
  node.hidden = !visible;
}

export function setIcon(button, name) {
  button.querySelector("use").setAttribute("href", `#i-${name}`);
}

/** Say something to those who do not see the page. */
export function announce(text) {
  byId("announce").textContent = text;
}

export const seconds = (value) => `${value.toFixed(2)} s`;

/** A file size as people read it. */
export function bytes(count) {
  if (count < 1e3) return `${count} B`;
  return count < 1e6 ? `${Math.round(count / 1e3)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

/** A file as it is now, in memory: what changes on disk after it was picked can be read no more. */
export async function held(file) {
  try {
    return new File([await file.arrayBuffer()], file.name, { type: file.type });
  } catch {
    throw new Error(`${file.name} cannot be read.`);
  }
}

/** Files that are dropped on a zone. */
export function onDrop(zone, take) {
  const over = (on) => (event) => {
    event.preventDefault();
    zone.classList.toggle("over", on);
  };
  zone.addEventListener("dragover", over(true));
  zone.addEventListener("dragleave", over(false));
  zone.addEventListener("drop", (event) => {
    over(false)(event);
    const file = event.dataTransfer.files[0];
    if (file) take(file);
  });
}
