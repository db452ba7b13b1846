// SPDX-License-Identifier: Apache-2.0
// A request as curl, as Python and as JSON, each to be run as it stands. Keys are never written out.

import { address } from "./api.js";
import { SAMPLE } from "./audio.js";
import { write } from "./json.js";

const PATH = "v1/videos/sync";
const VARIABLE = "LTXRT_API_KEY";
// A larger file does not belong on a clipboard; it is uploaded, and named by the upload's address.
export const MOST_INLINE = 3e6;

/** The fields that a request of an extent holds, and its files by field. */
export function chosen({ form, values, media }, extent) {
  const keep = (name) => {
    const field = form.fields.get(name);
    if (extent === "minimal") return field.required;
    return extent === "complete" || field.required || String(values[name]) !== String(field.default);
  };
  const fields = Object.fromEntries(Object.entries(values).filter(([name]) => keep(name)));
  const sent = (name) => extent !== "minimal" || form.fields.get(name).required;
  const files = Object.entries(media).filter(([name, file]) => file && sent(name));
  return { fields, files: Object.fromEntries(files) };
}

const shell = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
const inForm = (text) => text.replaceAll("\\", "\\\\").replaceAll('"', '\\"');

const text = (value) => JSON.stringify(value);

export function curl({ fields, files }, keyed) {
  const lines = [`curl --fail-with-body -sS ${shell(address(PATH))}`];
  if (keyed) lines.push(`-H "Authorization: Bearer $${VARIABLE}"`);
  for (const [name, value] of Object.entries(fields)) lines.push(`--form-string ${shell(`${name}=${value}`)}`);
  for (const [name, file] of Object.entries(files)) lines.push(`-F ${shell(`${name}=@"${inForm(file.name)}"`)}`);
  lines.push("-o clip.mp4");
  const sample = files.input_audio?.name === SAMPLE.name ? `curl -sSO ${shell(address(SAMPLE.path))}\n` : "";
  return sample + lines.join(" \\\n  ");
}

function literal(name, value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  return name === "seed" || typeof value === "number" ? String(value) : text(value);
}

export function python({ fields, files }, keyed) {
  const sample = files.input_audio?.name === SAMPLE.name;
  const request = [
    ...Object.entries(fields).map(([name, value]) => `    ${text(name)}: ${literal(name, value)},`),
    ...Object.entries(files).map(([name, file]) => `    ${text(name)}: data_uri(${text(file.name)}),`),
  ];
  const modules = ["base64", "json", ...(keyed ? ["os"] : []), "urllib.request"];
  const parts = ['"Content-Type": "application/json"'];
  if (keyed) parts.push(`"Authorization": f"Bearer {os.environ['${VARIABLE}']}"`);
  return [
    ...modules.map((name) => `import ${name}`),
    "from pathlib import Path",
    "",
    "",
    "def data_uri(path):",
    '    return "data:application/octet-stream;base64," + base64.b64encode(Path(path).read_bytes()).decode()',
    "",
    "",
    ...(sample ? [`urllib.request.urlretrieve(${text(address(SAMPLE.path))}, ${text(SAMPLE.name)})`] : []),
    "request = {",
    ...request,
    "}",
    `headers = {${parts.join(", ")}}`,
    `call = urllib.request.Request(${text(address(PATH))}, json.dumps(request).encode(), headers)`,
    "with urllib.request.urlopen(call) as answer:",
    '    Path("clip.mp4").write_bytes(answer.read())',
  ].join("\n");
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.replace(/^data:[^,]*,/, "data:application/octet-stream;base64,"));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** The body, with every file in it; `sent` puts a file that is too large on the server and gives its address. */
export async function json({ fields, files }, sent) {
  const body = { ...fields };
  for (const [name, file] of Object.entries(files)) {
    body[name] = file.size > MOST_INLINE ? await sent(file) : await dataUri(file);
  }
  return write(body, 2);
}

export const jsonNote = `Body of POST ${PATH}`;
export const codeNote = (keyed) =>
  keyed ? `Writes clip.mp4. Your key is read from ${VARIABLE} in the environment.` : "Writes clip.mp4.";
