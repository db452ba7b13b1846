// SPDX-License-Identifier: Apache-2.0
// The shape of a sound on a canvas.

const BAR = 3;
const LARGEST = 40e6;

/** Peaks of a sound, 0 to 1, one a bar; null where the browser cannot read it. */
export async function peaks(blob, count) {
  if (blob.size > LARGEST) return null;
  try {
    const sound = await new OfflineAudioContext(1, 1, 22050).decodeAudioData(await blob.arrayBuffer());
    const samples = sound.getChannelData(0);
    const span = Math.max(1, Math.floor(samples.length / count));
    const found = Array.from({ length: count }, (_, bar) => {
      let most = 0;
      for (let at = bar * span; at < Math.min((bar + 1) * span, samples.length); at++) {
        most = Math.max(most, Math.abs(samples[at]));
      }
      return most;
    });
    const loudest = Math.max(...found, 0.01);
    return { bars: found.map((value) => value / loudest), duration: sound.duration };
  } catch {
    return null;
  }
}

export const barsIn = (canvas) => Math.max(16, Math.floor(canvas.clientWidth / BAR));

/** Draw bars; those before `played` (0 to 1) in the accent's colour. */
export function draw(canvas, bars, played) {
  const scale = devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, 40];
  canvas.width = width * scale;
  canvas.height = height * scale;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const style = getComputedStyle(canvas);
  const step = width / bars.length;
  bars.forEach((value, index) => {
    context.fillStyle = style.getPropertyValue(index / bars.length < played ? "--accent" : "--wave");
    const tall = Math.max(2, value * (height - 4));
    context.fillRect(index * step, (height - tall) / 2, Math.max(1, step - 1), tall);
  });
}
