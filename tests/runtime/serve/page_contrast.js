// SPDX-License-Identifier: Apache-2.0
// Contrast of every text on a page with the colours behind it, as WCAG counts it: [[ratio, name], ...].

() => {
  const parse = text => { const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = ([r, g, b, a], [x, y, z]) => [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a)];
  const ground = node => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    const shown = node.checkVisibility() && node.getBoundingClientRect().width > 2;
    if (!(own || node.matches("input, select, textarea")) || !shown || node.closest(":disabled, option, video, [type=checkbox]")) continue;
    const below = ground(node), ink = over(parse(getComputedStyle(node).color), below);
    const [one, two] = [light(ink), light(below)].sort((a, b) => b - a);
    found.push([(one + 0.05) / (two + 0.05), node.id || node.className || node.textContent.trim().slice(0, 30)]);
  }
  return found;
}
