// SPDX-License-Identifier: Apache-2.0
// The request's JSON schema, as the form needs it. Every limit on this page comes from here.

/** One field: type, limits, default, description; `empty` where it may be left out as null. */
export function fieldOf(schema, name) {
  const property = schema.properties[name];
  const kinds = property.anyOf ?? [property];
  const main = kinds.find((kind) => kind.type !== "null");
  return {
    name,
    ...main,
    default: property.default,
    description: property.description,
    empty: kinds.some((kind) => kind.type === "null"),
    required: schema.required.includes(name),
    media: property.renderType !== undefined,
    free: kinds.map((kind) => kind.$ref).find(Boolean)?.split("/").pop(),
  };
}

export const fieldsOf = (schema) =>
  new Map((schema["x-order"] ?? Object.keys(schema.properties)).map((name) => [name, fieldOf(schema, name)]));

/** A bound in words: those next to a power of two are said as such. */
export function bound(value) {
  const text = String(value);
  if (text.length < 16) return text;
  const bits = (BigInt(text) + 1n).toString(2);
  return /^10+$/.test(bits) ? `2^${bits.length - 1} − 1` : text;
}

/** What a field takes, in one line, or "". */
export function limits(field) {
  if (field.minimum !== undefined && field.maximum !== undefined) {
    const multiple = field.multipleOf ? `, a multiple of ${field.multipleOf}` : "";
    return `${bound(field.minimum)} to ${bound(field.maximum)}${multiple}`;
  }
  return "";
}

/** What is wrong with a value, or "". Seeds and other whole numbers may come as digits. */
export function fault(field, value) {
  const missing = value === null || value === undefined || value === "";
  if (missing && field.type !== "string") return field.empty ? "" : `Needed: ${limits(field)}.`;
  if (field.type === "string") {
    if (field.required && missing) return "This is needed.";
    if (field.maxLength && value.length > field.maxLength) return `At most ${field.maxLength} characters.`;
    return field.pattern && !new RegExp(field.pattern, "u").test(value) ? "This is needed." : "";
  }
  if (field.type === "integer" && !/^-?\d+$/.test(String(value))) return `A whole number from ${limits(field)}.`;
  if (field.type === "number" && !Number.isFinite(value)) return `A number from ${limits(field)}.`;
  return field.type === "boolean" || within(field, value) ? "" : `Takes ${limits(field)}.`;
}

function within(field, value) {
  if (field.type === "integer") {
    const number = BigInt(value);
    const step = BigInt(field.multipleOf ?? 1);
    return number >= BigInt(field.minimum) && number <= BigInt(field.maximum) && number % step === 0n;
  }
  return value >= field.minimum && value <= field.maximum;
}
