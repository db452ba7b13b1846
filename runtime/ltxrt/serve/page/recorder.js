// SPDX-License-Identifier: Apache-2.0
// The microphone: a level while it records, a file after.

const TYPES = { "audio/webm;codecs=opus": "webm", "audio/mp4": "m4a", "audio/ogg;codecs=opus": "ogg" };

/** Whether this page may ask for the microphone: browsers allow it over https and on this machine only. */
export const canRecord = Boolean(globalThis.MediaRecorder && navigator.mediaDevices?.getUserMedia);

export class Recorder {
  #media;
  #stream;
  #context;
  #pieces = [];
  #timer;

  /** Start; `level(loudness 0 to 1, seconds)` is called while it runs. Throws where the microphone is refused. */
  static async start(level) {
    const recorder = new Recorder();
    recorder.#stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    const type = Object.keys(TYPES).find((name) => MediaRecorder.isTypeSupported(name));
    recorder.#media = new MediaRecorder(recorder.#stream, type ? { mimeType: type } : {});
    recorder.#media.ondataavailable = (event) => recorder.#pieces.push(event.data);
    recorder.#media.start();
    recorder.#watch(level);
    return recorder;
  }

  #watch(level) {
    this.#context = new AudioContext();
    const analyser = this.#context.createAnalyser();
    this.#context.createMediaStreamSource(this.#stream).connect(analyser);
    const samples = new Float32Array(analyser.fftSize);
    const started = performance.now();
    this.#timer = setInterval(() => {
      analyser.getFloatTimeDomainData(samples);
      const power = samples.reduce((sum, value) => sum + value * value, 0) / samples.length;
      level(Math.min(1, Math.sqrt(power) * 4), (performance.now() - started) / 1000);
    }, 80);
  }

  /** Stop, and give the file. */
  async stop() {
    const ended = new Promise((resolve) => (this.#media.onstop = resolve));
    this.#media.stop();
    await ended;
    clearInterval(this.#timer);
    this.#stream.getTracks().forEach((track) => track.stop());
    await this.#context.close();
    const type = this.#media.mimeType;
    const ending = TYPES[Object.keys(TYPES).find((name) => type.startsWith(name.split(";")[0]))] ?? "webm";
    return new File(this.#pieces, `recording.${ending}`, { type: type.split(";")[0] });
  }
}
