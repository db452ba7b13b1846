// SPDX-License-Identifier: Apache-2.0
// What was made, in this browser: IndexedDB, bounded in number and bytes; memory alone where there is none.

const NAME = "ltxrt";
const STORE = "runs";
const MOST_RUNS = 24;
const MOST_BYTES = 400e6;

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const size = (record) =>
  [record.clip, record.poster, ...Object.values(record.media)].reduce((sum, blob) => sum + (blob?.size ?? 0), 0);

export class History {
  records = [];
  kept = true;
  #database = null;

  static async open() {
    const history = new History();
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "key" });
      history.#database = await done(request);
      history.records = await done(history.#store("readonly").getAll());
    } catch {
      history.kept = false; // a private window, or no room
    }
    history.records.sort((one, other) => other.created - one.created);
    return history;
  }

  #store(mode) {
    return this.#database.transaction(STORE, mode).objectStore(STORE);
  }

  /** Keep a record, or what it has become; the oldest make room. */
  async put(record) {
    this.records = [record, ...this.records.filter(({ key }) => key !== record.key)];
    this.records.sort((one, other) => other.created - one.created);
    await this.#write((store) => store.put(record));
    let total = 0;
    const kept = this.records.filter((one, index) => (total += size(one)) <= MOST_BYTES && index < MOST_RUNS);
    for (const old of this.records.filter((one) => one !== record && !kept.includes(one))) await this.remove(old);
  }

  async remove(record) {
    this.records = this.records.filter(({ key }) => key !== record.key);
    await this.#write((store) => store.delete(record.key));
  }

  async clear() {
    this.records = [];
    await this.#write((store) => store.clear());
  }

  async #write(change) {
    if (!this.kept) return;
    try {
      await done(change(this.#store("readwrite")));
    } catch {
      this.kept = false;
    }
  }
}

/** A small picture of a clip, from the frame that a video shows; null where it shows none. */
export async function posterOf(video) {
  if (!video.videoWidth) return null;
  const canvas = document.createElement("canvas");
  canvas.width = 320;
  canvas.height = Math.round((320 * video.videoHeight) / video.videoWidth);
  canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/webp", 0.8));
}
