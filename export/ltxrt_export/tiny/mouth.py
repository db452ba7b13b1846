# SPDX-License-Identifier: Apache-2.0
"""How the drawn mouth follows sound: the one definition that drawing, training and measuring share.

Opening is a power law of the short-time RMS, width follows the spectral centroid. Both come from Hann windows of
80 ms, centred, and depend on nothing but the waveform, so a clip's mouth is determined by its sound.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["SAMPLE_RATE", "MouthTrack", "frame_times", "mouth_track"]

#: Hertz of the waveforms taken here, the rate that the audio encoder hears.
SAMPLE_RATE = 16_000

_HOP, _WINDOW = 160, 1280
#: RMS at which the mouth is fully open, and the exponent below it: speech then uses most of the range.
_FULL_RMS, _EXPONENT = 0.25, 0.7
#: Centroids in hertz of the narrowest and the widest mouth.
_NARROW_HERTZ, _WIDE_HERTZ = 350.0, 3000.0
#: RMS below which the width falls back to its middle: noise floors have a centroid too.
_FAINT_RMS = 0.01

Floats = NDArray[np.float32]


class MouthTrack(NamedTuple):
    """Mouth opening and width over time, both [times] fp32 in [0, 1]."""

    opening: Floats
    width: Floats


def frame_times(frames: int, frames_per_second: float) -> Floats:
    """The middles of ``frames`` frames in seconds, [frames]."""
    return ((np.arange(frames) + 0.5) / frames_per_second).astype(np.float32)


def mouth_track(waveform: Floats, times: Floats) -> MouthTrack:
    """The mouth that goes with a sound.

    Args:
        waveform: Mono, [samples] at 16 kHz; outside of it is silence.
        times: Seconds, [times].
    """
    count = int(np.ceil(max(len(waveform), 1) / _HOP)) + 1
    padded = np.zeros((count - 1) * _HOP + _WINDOW, np.float32)
    padded[_WINDOW // 2 : _WINDOW // 2 + len(waveform)] = waveform
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    hann = np.hanning(_WINDOW + 1)[:-1].astype(np.float32)
    rms = np.sqrt(np.square(windows) @ (hann / hann.sum()))
    power = np.square(np.abs(np.fft.rfft(windows * hann, axis=1)))
    hertz = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)
    centroid = (power @ hertz + 1e-9) / (power.sum(axis=1) + 1e-9)
    wide = np.log(np.maximum(centroid, 1.0) / _NARROW_HERTZ) / np.log(_WIDE_HERTZ / _NARROW_HERTZ)
    heard = rms / (rms + _FAINT_RMS)
    width = 0.5 + (np.clip(wide, 0, 1) - 0.5) * heard
    opening = np.minimum(1.0, (rms / _FULL_RMS) ** _EXPONENT)
    grid = np.arange(count) * (_HOP / SAMPLE_RATE)
    return MouthTrack(
        np.interp(times, grid, opening).astype(np.float32), np.interp(times, grid, width).astype(np.float32)
    )
