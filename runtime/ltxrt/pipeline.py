# SPDX-License-Identifier: Apache-2.0
"""From a request to MP4 bytes: wiring only, in the order in which the data flows."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .clip_file import ClipFile, check_destination
from .clip_memory import ClipSize
from .decode import FrameChunk, VideoDecoder
from .denoise import DenoiseStage
from .encoders import Conditioning, encode_audio, encode_image, encode_text
from .engine import Tensor
from .engine_store import Engines, EngineStore, check_fits
from .latent import grid_of
from .mux import FragmentMuxer, MuxOptions
from .plan import Plan, plan_clip
from .prompt_cache import PromptCache, text_model
from .request import Request
from .result import Fragment, Progress, Result, summarise
from .shapes import TEMPORAL_COMPRESSION
from .timing import Timings
from .tokenizer import PromptTokenizer
from .upsample import upsample

__all__ = ["Event", "Pipeline"]

#: What ``Pipeline.events`` yields: progress, bytes of the clip, and last of all the result.
Event = Progress | Fragment | Result


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Everything that is loaded once and serves any number of requests.

    Requests may run from several threads; each has its own buffers.
    """

    bundle: Bundle
    store: EngineStore
    tokenizer: PromptTokenizer
    prompts: PromptCache | None = None

    @classmethod
    def open(
        cls, bundle: str | Path | None = None, *, threads: int = 0, prompt_cache: str | Path = "memory"
    ) -> "Pipeline":
        """Open a bundle; None is the tiny one that comes with the package.

        Args:
            bundle: Folder of the bundle.
            threads: CPU threads within one operator; 0 uses every core.
            prompt_cache: Where contexts of prompts are kept: ``memory``, ``off``, or a folder.

        Raises:
            BundleError: The bundle is missing, damaged or of another version.
            OutputError: The folder of the cache cannot be used.
        """
        opened = Bundle.open(bundle)
        tokenizer = PromptTokenizer.open(opened.file("tokenizer.json"), opened.manifest.model.context_tokens)
        return cls(opened, EngineStore(opened, threads=threads), tokenizer, PromptCache.open(prompt_cache))

    def generate(self, request: Request) -> Generator[bytes]:
        """A playable fragmented MP4, in pieces, while later frames are still being decoded.

        The request is checked and its media read before this returns; nothing else runs until the iterator is consumed.
        Closing the iterator cancels the clip.

        Raises:
            LtxrtError: As ``events``.
        """
        return _fragments(self.events(request))

    def render(self, request: Request, output: str | Path) -> Result:
        """Write a faststart MP4, read it back and check it before it gets its name.

        Raises:
            OutputError: ``output`` cannot be written; nothing is left there.
            VerificationError: The file is not what it should be; nothing is left there.
            LtxrtError: As ``events``.
        """
        result: Result | None = None
        with closing(self.render_events(request, output)) as events:
            for event in events:
                result = event if isinstance(event, Result) else result
        assert result is not None  # events end with it
        return result

    def render_events(self, request: Request, output: str | Path) -> Generator[Progress | Result]:
        """``render`` for callers who show progress: the events but for the bytes, which go to the file.

        Destination and request are checked before this returns; nothing is written until the iterator is consumed.
        Closing the iterator cancels the clip and leaves nothing.
        """
        destination = Path(output)
        check_destination(destination)
        return _rendered(self.events(request), destination)

    def events(self, request: Request) -> Generator[Event]:
        """Progress, fragments and the result of one clip, as they come.

        The request is checked and its media read before this returns. Closing the iterator cancels the clip.

        Raises:
            RequestError: A field is refused (here, or when an engine's limits are met).
            MediaError: The audio or image is refused.
            EngineError: A network fails.
        """
        timings = Timings()
        with timings.stage("plan"):
            plan = plan_clip(request, self.bundle)
            check_fits(self.store, plan.preset.name, ClipSize(plan.canvas, plan.rate))
        return self._events(plan, timings)

    def _events(self, plan: Plan, timings: Timings) -> Generator[Event]:
        yield Progress("load", 0, 1)
        with timings.stage("load"):
            engines = self.store.engines(plan.preset.name).timed(timings)
        yield Progress("load", 1, 1)
        with timings.stage("encode"):
            conditioning, notes = self._condition(plan, engines)
        yield Progress("encode", 1, 1)
        with self._muxer(plan) as muxer:
            muxer.encode_audio_ahead()
            latent = yield from self._denoise(plan, conditioning, engines, timings)
            timings.mark("last_denoise_step")
            stream, length = self.bundle.manifest.model.stream, plan.preset.decode_chunk_latents
            decoder = VideoDecoder(engines.video_decoder, stream, length)
            yield from _deliver(plan, decoder.chunks(latent, plan.frames, plan.rate), muxer, timings)
        yield summarise(plan, notes, timings, self.bundle, self.store.backend.name)

    def _denoise(
        self, plan: Plan, conditioning: Conditioning, engines: Engines, timings: Timings
    ) -> Generator[Progress, None, Tensor]:
        """Both stages; the clip's latent, [1, channels, frames, height, width]."""
        latent: Tensor | None = None
        initial: NDArray[np.float32] | None = None
        half, full = plan.canvas.halved().to_latent(), plan.canvas.to_latent()
        for number, shape, sigmas in (
            (1, half, plan.preset.stage_1_sigmas),
            (2, full, plan.preset.stage_2_sigmas),
        ):
            if latent is not None:
                with timings.stage("upsample"):
                    # Noise is drawn and added on the host.
                    initial = np.asarray(upsample(engines.upsampler, latent, half), np.float32)
                yield Progress("upsample", 1, 1)
            stage = DenoiseStage(
                number=number,
                engine=engines.denoiser,
                rope=self.bundle.rope,
                shape=shape,
                channels=self.bundle.manifest.model.latent_channels,
                rate=plan.rate,
                sigmas=sigmas,
            )
            name = f"denoise_{number}"
            steps = stage.run(conditioning, initial, plan.seed)
            while True:
                with timings.stage(name):
                    step = next(steps, None)
                if step is None:
                    break
                latent = step.latent
                yield Progress(name, step.step, step.steps)
        assert latent is not None  # both stages ran
        return grid_of(latent, full)

    def _condition(self, plan: Plan, engines: Engines) -> tuple[Conditioning, tuple[str, ...]]:
        """Run the encoders; notes say what did not fit."""
        prompt = self.tokenizer.encode(plan.request.prompt)
        crf = self.bundle.manifest.model.image_crf
        model = text_model(self.bundle, plan.preset.name, self.store.backend.name) if self.prompts is not None else ""
        conditioning = Conditioning(
            text=encode_text(engines.text_encoder, prompt, self.prompts, model),
            audio_tokens=encode_audio(engines.audio_encoder, plan.source, plan.canvas.frames, plan.rate),
            first_frames=None
            if plan.image is None
            else encode_image(engines.image_encoder, plan.image, plan.canvas, crf),
            image_strength=plan.request.image_strength,
        )
        if prompt.dropped_tokens:
            return conditioning, (f"prompt cut by {prompt.dropped_tokens} tokens to the model's context",)
        return conditioning, ()

    def _muxer(self, plan: Plan) -> FragmentMuxer:
        options = MuxOptions(
            width=plan.canvas.width,
            height=plan.canvas.height,
            frame_rate=plan.rate,
            crf=plan.preset.crf,
            x264_preset=plan.preset.x264_preset,
            audio_bitrate=plan.preset.audio_bitrate,
            tags={"model": self.bundle.manifest.model.name},
        )
        return FragmentMuxer(options, plan.output_audio)


def _deliver(
    plan: Plan, chunks: Iterator[FrameChunk], muxer: FragmentMuxer, timings: Timings
) -> Iterator[Progress | Fragment]:
    """Decode, encode and mux, chunk by chunk."""
    most = TEMPORAL_COMPRESSION * plan.preset.decode_chunk_latents
    while True:
        with timings.stage("decode"):
            chunk = next(chunks, None)
        if chunk is None:
            break
        timings.note("last_chunk_decoded")
        # The last chunk holds all that was held back for the look-ahead; a short clip is one such chunk.
        for start in range(0, len(chunk.frames), most):
            with timings.stage("mux"):
                data = muxer.write(chunk.frames[start : start + most])
            if data:
                timings.mark("first_fragment")
                yield Fragment(data)
            yield Progress("decode", muxer.frames_written, plan.frames)
    with timings.stage("mux"):
        data = muxer.finish()
    timings.add_backend("media_encoders", muxer.seconds_encoding)
    if data:
        yield Fragment(data)


def _fragments(events: Generator[Event]) -> Generator[bytes]:
    with closing(events):
        for event in events:
            if isinstance(event, Fragment):
                yield event.data


def _rendered(events: Generator[Event], destination: Path) -> Generator[Progress | Result]:
    with closing(events), ClipFile(destination) as file:
        for event in events:
            if isinstance(event, Fragment):
                file.append(event.data)
                continue
            if isinstance(event, Result):
                file.commit(event.expectation)
            yield event
