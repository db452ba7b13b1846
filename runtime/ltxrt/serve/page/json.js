// SPDX-License-Identifier: Apache-2.0
// JSON whose seeds are exact: they have up to 63 bits, a number here holds 53, so they are digits in a string.
//
// Within JSON's own strings every quotation mark has a backslash before it, so the patterns match names only.

const READ = /"(seed|maximum)":(\s*)(\d{16,})/g;
const WRITTEN = /"seed":(\s*)"(\d+)"/g;

export function parse(text) {
  return JSON.parse(text.replace(READ, '"$1":$2"$3"'));
}

export function write(value, indent = undefined) {
  return JSON.stringify(value, null, indent).replace(WRITTEN, '"seed":$1$2');
}
