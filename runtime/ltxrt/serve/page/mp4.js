// SPDX-License-Identifier: Apache-2.0
// What MediaSource wants to know of a fragmented MP4 before its first byte: the codecs, read from the file's header.

// Boxes that hold boxes, and how many bytes of their own come first.
const CONTAINERS = { moov: 0, trak: 0, mdia: 0, minf: 0, stbl: 0, stsd: 8 };
// The fields of a sample entry before the boxes in it.
const PICTURE_ENTRY = 78;
const SOUND_ENTRY = 28;
const DECODER_CONFIG = 4;
const DECODER_SPECIFIC = 5;

const hex = (value) => value.toString(16).padStart(2, "0");

function* boxes(view, start, end) {
  for (let at = start; at + 8 <= end; ) {
    let size = view.getUint32(at);
    let body = at + 8;
    if (size === 1) {
      size = Number(view.getBigUint64(at + 8));
      body = at + 16;
    } else if (size === 0) size = end - at;
    if (size < body - at) return;
    const kind = String.fromCharCode(...new Uint8Array(view.buffer, view.byteOffset + at + 4, 4));
    yield { kind, body, end: at + size, whole: at + size <= end };
    at += size;
  }
}

function* entries(view, start, end) {
  for (const box of boxes(view, start, end)) {
    if (box.kind in CONTAINERS) yield* entries(view, box.body + CONTAINERS[box.kind], box.end);
    else yield box;
  }
}

function avc(view, entry) {
  for (const box of boxes(view, entry.body + PICTURE_ENTRY, entry.end)) {
    if (box.kind === "avcC") return `avc1.${[1, 2, 3].map((index) => hex(view.getUint8(box.body + index))).join("")}`;
  }
  return null;
}

function aac(view, entry) {
  for (const box of boxes(view, entry.body + SOUND_ENTRY, entry.end)) {
    if (box.kind === "esds") return `mp4a${descriptors(view, box.body + 4, box.end)}`;
  }
  return null;
}

/** Object type of the stream, then that of the audio, from the nested descriptors of an `esds`. */
function descriptors(view, start, end) {
  let [at, found] = [start, ""];
  while (at < end) {
    const tag = view.getUint8(at++);
    let size = 0;
    let part;
    do {
      part = view.getUint8(at++);
      size = (size << 7) | (part & 0x7f);
    } while (part & 0x80);
    if (tag === DECODER_CONFIG) {
      found += `.${hex(view.getUint8(at))}`;
      at += 13;
    } else if (tag === DECODER_SPECIFIC) {
      return `${found}.${view.getUint8(at) >> 3}`;
    } else if (tag === 3) {
      at += 3;
    } else at += size;
  }
  return found;
}

/**
 * The type of a stream, as MediaSource takes it.
 * @param {Uint8Array} data The first bytes.
 * @returns {string|null} Null while the header is not whole; "" for one that holds something unknown.
 */
export function streamType(data) {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  for (const top of boxes(view, 0, data.byteLength)) {
    if (top.kind !== "moov") continue;
    if (!top.whole) return null;
    const codecs = [];
    for (const entry of entries(view, top.body, top.end)) {
      if (entry.kind === "avc1" || entry.kind === "avc3") codecs.push(avc(view, entry));
      else if (entry.kind === "mp4a") codecs.push(aac(view, entry));
    }
    return codecs.length && codecs.every(Boolean) ? `video/mp4; codecs="${codecs.join(",")}"` : "";
  }
  return null;
}
