# SPDX-License-Identifier: Apache-2.0
"""Phase 1: the video VAE learns a latent that is laid down in advance, ``world.code_of``.

Left to find a code of its own it needs tens of thousands of steps until the mouth moves: the mouth is a few dozen
pixels, and the mean mouth is a good guess. Given the code, encoder and decoder are two regressions, and the denoiser
can be trained at the same time. The code is the same at every place of the picture, so the denoiser need not know
where a token lies (rotary positions alone do not tell it); the decoder does, from its zero padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ltxrt.image import first_frame
from ltxrt_export.tiny.mouth import Floats, MouthTrack, frame_times
from ltxrt_export.tiny.train.fused import fast_norms, plain_norms
from ltxrt_export.tiny.train.model import TinyModel
from ltxrt_export.tiny.train.optimiser import Average, Optimiser
from ltxrt_export.tiny.world import COLOURS, MOUTH_BOX, PARTS, Scene, code_of, render

__all__ = ["IMAGE_CRF", "SIZES", "VideoVaePhase", "pixels_to_unit", "psnr", "random_scene"]

_FRAMES = 17
#: Canvases in the pool and how often; the first stage sees each at half size.
SIZES: Mapping[tuple[int, int], float] = {
    (128, 128): 5,
    (192, 192): 7,
    (128, 256): 3,
    (256, 128): 2,
    (256, 256): 3,
}
#: Pixels of a batch.
_PIXELS = 3 * 9 * 128 * 128
_MUON_RATE, _ADAM_RATE = 0.006, 5e-4
#: Standard deviation of the noise on the code that the decoder is to forgive.
_NOISE = 0.1
#: Weight of pixels that move, and of the mouth's, beside 1.
_MOVING, _MOUTH = 6, 8
#: Share of clips whose mouth is shut or jumps.
_JUMPING = 0.5
#: Of the encoder's square error beside the decoder's loss.
_ENCODING_WEIGHT = 0.5
#: Of the first frame's compression, as published.
IMAGE_CRF = 33
#: Single pictures that the encoder sees for each clip of a batch, besides its first frame.
_STILLS = 2
#: One step in so many decodes what the encoder makes of the first frame, and one in so many encodes whole clips.
_OWN_EVERY, _CLIPS_EVERY = 2, 24


@dataclass(frozen=True, slots=True)
class _Drawn:
    pictures: NDArray[np.uint8]
    scene: Scene
    mouth: MouthTrack
    times: Floats

    def code(self, frames: slice) -> Floats:
        mouth = MouthTrack(self.mouth.opening[frames], self.mouth.width[frames])
        return code_of(self.scene, mouth, self.times[frames])


class VideoVaePhase:
    """Trains the video VAE's encoder and decoder, each for itself; its latent statistics become 0 and 1.

    Args:
        model: Its ``video_vae`` is trained.
        seed: Of the clips.
        pool: Clips kept in memory; one is redrawn every few steps.
        sizes: Canvases, height and width, and how often each is trained.
    """

    name = "video_vae"

    def __init__(
        self, model: TinyModel, seed: int, pool: int = 120, sizes: Mapping[tuple[int, int], float] = SIZES
    ) -> None:
        self._vae = model.video_vae.requires_grad_(True).to(memory_format=torch.channels_last_3d)
        fast_norms(self._vae)
        self._random = np.random.default_rng([seed, 1])
        weights = np.array(list(sizes.values()))
        self._sizes, self._weights = list(sizes), weights / weights.sum()
        self._pool = {
            size: [self._clip(size) for _ in range(max(2, int(pool * weight)))]
            for size, weight in zip(self._sizes, self._weights, strict=True)
        }
        held_out = np.random.default_rng([seed, 2])
        self._test = {size: [_draw(held_out, size, named=True) for _ in range(3)] for size in self._sizes}
        parameters = list(self._vae.named_parameters())
        self._optimiser = Optimiser(parameters, _MUON_RATE, _ADAM_RATE)
        self._average = Average((parameter for _, parameter in parameters), 0.995)
        self._steps = 0

    def step(self, progress: float) -> float:
        """One update; the decoder's loss."""
        size = self._sizes[int(self._random.choice(len(self._sizes), p=self._weights))]
        if self._steps % 3 == 0:
            pool = self._pool[size]
            pool[int(self._random.integers(len(pool)))] = self._clip(size)
        clips, codes, weight = self._batch(size)
        noisy = codes + _NOISE * (torch.randn_like(codes) + torch.randn_like(codes[..., :1, :1]))
        encoding = torch.zeros(())
        if self._steps % _OWN_EVERY == 0:
            stills, still_codes = self._stills(size, len(clips))
            # Together, since the bf16 weight gradient of one picture alone is NaN at 256x256 (torch 2.13, oneDNN).
            together = torch.cat([clips[:, :, :1], stills]), torch.cat([codes[:, :, :1], still_codes])
            encoded, encoding = self._encoded(*map(_channels_last, together))
            first = encoded[: len(clips)]
            noisy = _channels_last(torch.cat([first, noisy[:, :, 1:]], dim=2))
        if self._steps % _CLIPS_EVERY == 0:
            encoding = encoding + self._encoded(clips, codes)[1]
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            decoded = self._vae.decoder(noisy).float()
        error = torch.sqrt(torch.square(decoded - clips) + 1e-4)
        loss = (error * weight).mean() / weight.mean()
        (loss + _ENCODING_WEIGHT * encoding).backward()
        self._optimiser.step(progress)
        self._average.update()
        self._steps += 1
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Of held-out clips by size: PSNR in dB, frame 0 from the encoder, and its code's error; averaged weights."""
        self._average.swap()
        result: dict[str, float] = {}
        for size, drawn in self._test.items():
            pixels = pixels_to_unit(np.stack([one.pictures for one in drawn]))
            codes = _spread([one.code(slice(None)) for one in drawn], size)
            first = self._encode(pixels[:, :, :1])
            mouth = torch.as_tensor(mouth_mask(size)) > 0
            with torch.autocast(torch.get_default_device().type, torch.bfloat16):
                decoded = self._vae.decoder(torch.cat([first, codes[:, :, 1:]], dim=2)).float()
            name = f"{size[0]}x{size[1]}"
            result[f"later_{name}"] = psnr(decoded[:, :, 1:], pixels[:, :, 1:])
            result[f"mouth_{name}"] = psnr(decoded[:, :, 1:, mouth], pixels[:, :, 1:, mouth])
            result[f"first_{name}"] = psnr(decoded[:, :, :1], pixels[:, :, :1])
            result[f"encoder_{name}"] = float((first - codes[:, :, :1]).square().mean())
        self._average.swap()
        return result

    @torch.no_grad()
    def finish(self) -> None:
        """Keep the averaged weights; the code has about mean 0 and variance 1 already."""
        self._average.swap()
        plain_norms(self._vae)
        self._vae.latents_mean.zero_()
        self._vae.latents_std.fill_(1)
        self._vae.requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes; the weights themselves are saved with the model."""
        return {"optimiser": self._optimiser.state(), "average": self._average.values, "steps": self._steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._optimiser.restore(state["optimiser"])
        self._average.restore(state["average"])
        self._steps = int(state["steps"])

    def _encode(self, clips: Tensor) -> Tensor:
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            return self._vae.encoder(clips)[:, : self._vae.latents_mean.shape[0]].float()

    def _encoded(self, clips: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder makes of clips, and how far that and its view of their halves are from the codes."""
        full, half = self._encode(clips), self._encode(halved(clips))
        error = (full - codes).square().mean()
        return full, error + (half - codes[..., : half.shape[3], : half.shape[4]]).square().mean()

    def _clip(self, size: tuple[int, int]) -> _Drawn:
        return _draw(self._random, size, named=bool(self._random.random() < 0.75))

    def _batch(self, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Clips [B, 3, T, H, W] in [-1, 1], codes [B, 32, f, h, w] and the weight of the pixels."""
        random, pool = self._random, self._pool[size]
        frames = 9 if random.random() < 0.8 else _FRAMES
        count = max(1, _PIXELS // (frames * size[0] * size[1]))
        pictures: list[NDArray[np.uint8]] = []
        codes: list[Floats] = []
        for index in random.integers(len(pool), size=count):
            start = int(random.integers(_FRAMES - frames + 1))
            part = slice(start, start + frames)
            pictures.append(pool[int(index)].pictures[part])
            codes.append(pool[int(index)].code(part))
        pixels = pixels_to_unit(np.stack(pictures))
        moving = (pixels - pixels.mean(dim=2, keepdim=True)).abs().amax(dim=1, keepdim=True)
        return pixels, _spread(codes, size), 1 + _MOVING * moving + _MOUTH * torch.as_tensor(mouth_mask(size))

    def _stills(self, size: tuple[int, int], clips: int) -> tuple[Tensor, Tensor]:
        """First frames as the runtime compresses them, [B, 3, 1, H, W], and their codes [B, 32, 1, h, w]."""
        random, pool = self._random, self._pool[size]
        pictures: list[NDArray[np.float32]] = []
        codes: list[Floats] = []
        for index in random.integers(len(pool), size=_STILLS * clips):
            drawn, start = pool[int(index)], int(random.integers(_FRAMES))
            pictures.append(first_frame(drawn.pictures[start], size[1], size[0], IMAGE_CRF))
            codes.append(drawn.code(slice(start, start + 1)))
        return _channels_last(torch.as_tensor(np.concatenate(pictures))), _spread(codes, size)


def _channels_last(clips: Tensor) -> Tensor:
    return clips.contiguous(memory_format=torch.channels_last_3d)


def random_scene(random: np.random.Generator) -> Scene:
    """A scene with three different named colours."""
    names = random.permutation(list(COLOURS))[: len(PARTS)]
    return Scene.draw(random, dict(zip(PARTS, map(str, names), strict=True)))


def pixels_to_unit(pictures: NDArray[np.uint8]) -> Tensor:
    """[B, T, H, W, 3] uint8 to [B, 3, T, H, W] in [-1, 1], channels last in memory."""
    return torch.as_tensor(pictures).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def halved(clips: Tensor) -> Tensor:
    """Clips at half size: the mean of two by two pixels."""
    return _channels_last(F.avg_pool3d(clips, (1, 2, 2)))


def psnr(first: Tensor, second: Tensor) -> float:
    """Peak signal to noise ratio in dB of values in [-1, 1]; the first is clamped to that range."""
    return float(-10 * torch.log10((first.clamp(-1, 1) - second).square().mean() / 4))


def mouth_mask(size: tuple[int, int]) -> NDArray[np.float32]:
    """1 where the mouth can be, [height, width]."""
    height, width = size
    left, top, right, bottom = (edge * min(size) for edge in MOUTH_BOX)
    mask = np.zeros(size, np.float32)
    rows = slice(int(height / 2 + top), int(height / 2 + bottom) + 1)
    mask[rows, int(width / 2 + left) : int(width / 2 + right) + 1] = 1
    return mask


def _spread(codes: list[Floats], size: tuple[int, int]) -> Tensor:
    """Codes [f, 32] to a latent that is the same everywhere, [B, 32, f, h, w]."""
    stacked = torch.as_tensor(np.stack(codes)).transpose(1, 2)[..., None, None]
    return stacked.expand(-1, -1, -1, size[0] // 32, size[1] // 32).contiguous(memory_format=torch.channels_last_3d)


def _draw(random: np.random.Generator, size: tuple[int, int], *, named: bool) -> _Drawn:
    """A clip of ``_FRAMES`` frames with a mouth that moves at random."""
    scene = random_scene(random)
    if not named:
        colours = random.integers(0, 256, (3, 3))
        background, skin, shirt = ((int(r), int(g), int(b)) for r, g, b in colours)
        scene = Scene(background, skin, shirt, scene.place, scene.sway, scene.blinks)
    rate = float(random.choice([12.5, 24.0, 25.0, 30.0, 60.0]))
    times = frame_times(_FRAMES, rate) + np.float32(random.uniform(0, 10))
    mouth = _wandering(random, rate)
    return _Drawn(render(scene, mouth, times, *size), scene, mouth, times)


def _wandering(random: np.random.Generator, rate: float) -> MouthTrack:
    """A mouth that stays shut, that is another one in every frame, or that opens and closes some times a second."""
    kind = random.random()
    if kind < 0.1:
        return MouthTrack(np.zeros(_FRAMES, np.float32), np.full(_FRAMES, 0.5, np.float32))
    if kind < _JUMPING:
        # From these the decoder learns which number of the code is which frame: smooth ones blur into each other.
        jumping = np.clip(random.uniform(-0.2, 1.1, (2, _FRAMES)), 0, 1).astype(np.float32)
        return MouthTrack(jumping[0], jumping[1])
    tracks: list[NDArray[np.float32]] = []
    for _ in range(2):
        knots = random.uniform(-0.3, 1.1, 24) * random.uniform(0.5, 1.0)
        places = np.arange(_FRAMES) / rate * random.uniform(5, 14) + random.random() * 2
        tracks.append(np.clip(np.interp(places, np.arange(24), knots), 0, 1).astype(np.float32))
    return MouthTrack(*tracks)
