# SPDX-License-Identifier: Apache-2.0
"""Log-mel against a NumPy FFT, tokens against the diffusers class, both out of ONNX Runtime."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKLLTX2Audio
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers.audio_utils import mel_filter_bank

from ltxrt.errors import ExportError
from ltxrt_export.networks import audio_encoder
from ltxrt_export.networks.audio_encoder import LogMel, MelSettings, mel_filters
from ltxrt_export.onnx_export import export_model
from ltxrt_export.weights import TensorFile

CONFIG: dict[str, Any] = {
    "audio_vae": {
        "model": {"params": {"sampling_rate": 16000}},
        "preprocessing": {
            "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
            "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
        },
    }
}


def library_filters(settings: MelSettings) -> NDArray[np.float64]:
    """The same filters by transformers."""
    return mel_filter_bank(
        num_frequency_bins=settings.filter_length // 2 + 1,
        num_mel_filters=settings.n_mel_channels,
        min_frequency=settings.mel_fmin,
        max_frequency=settings.mel_fmax,
        sampling_rate=settings.sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )


def log_mel_by_fft(waveform: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-mel [1, 2, T, 64] of a waveform [1, 2, samples] in fp64, frame by frame."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    padded = np.pad(waveform[0].astype(np.float64), ((0, 0), (512, 512)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 1024, axis=1)[:, ::160]
    magnitude = np.abs(np.fft.rfft(frames * window, axis=-1))
    return np.log(np.maximum(magnitude @ library_filters(MelSettings()), 1e-5))[None]


def sound(samples: int, seed: int = 0) -> NDArray[np.float32]:
    """Two channels: a gliding tone over faint noise, and noise that falls silent half-way."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    time = np.arange(samples) / 16_000
    tone = 0.5 * np.sin(2 * np.pi * (200 + 900 * time) * time) + 1e-3 * generator.standard_normal(samples)
    noise = 0.2 * generator.standard_normal(samples) * (np.arange(samples) < samples / 2)
    return np.stack([tone, noise])[None].astype(np.float32)


def relative_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def random_vae() -> AutoencoderKLLTX2Audio:
    """As in LTX-2.3, but a single residual block a level and one width."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLLTX2Audio(
            base_channels=128,
            output_channels=2,
            ch_mult=(1, 1, 1),
            num_res_blocks=1,
            attn_resolutions=None,
            in_channels=2,
            resolution=256,
            latent_channels=8,
            norm_type="pixel",
            causality_axis="height",
            mid_block_add_attention=False,
            sample_rate=16000,
            mel_hop_length=160,
            is_causal=True,
            mel_bins=64,
            double_z=True,
        )
        vae.eval().requires_grad_(False)
        vae.latents_mean.normal_()
        vae.latents_std.uniform_(0.5, 1.5)
    return vae


class Exported:
    """An audio encoder as an ONNX file beside its weights; its log-mel is a second output of the session."""

    def __init__(self, folder: Path) -> None:
        self.vae = random_vae()
        weights = folder / "vae.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in self.vae.state_dict().items()}, weights)
        self.spec = audio_encoder.spec(self.vae, TensorFile.open(weights).tensors, CONFIG)
        self.path = folder / "audio_encoder.onnx"
        self.optimized = folder / "optimized.onnx"
        model = export_model(self.spec)
        onnx.save_model(model, self.path)
        onnx.checker.check_model(self.path, full_check=True)
        (spectrogram,) = (node.output[0] for node in model.graph.node if node.op_type == "Log")
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(spectrogram))
        onnx.save_model(model, folder / "with_spectrogram.onnx")
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(self.optimized)
        options.log_severity_level = 3
        self._session = ort.InferenceSession(
            folder / "with_spectrogram.onnx", options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, waveform: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Tokens and log-mel spectrogram."""
        tokens, spectrogram = self._session.run(None, {"waveform": waveform})
        return tokens, spectrogram.reshape(1, 2, -1, 64)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("audio"))


@pytest.mark.parametrize("samples", [640, 2400, 20_481, 80_000])
def test_spectrogram_equals_the_fft(exported: Exported, samples: int) -> None:
    waveform = sound(samples)
    _, actual = exported(waveform)
    expected = log_mel_by_fft(waveform)
    assert actual.shape[2] == 1 + samples // 160
    assert relative_error(actual, expected) < 1e-5
    assert np.abs(actual - expected).max() < 1e-3


def test_silence_lies_on_the_floor(exported: Exported) -> None:
    _, actual = exported(np.zeros((1, 2, 4000), np.float32))
    assert np.allclose(actual, np.log(1e-5), atol=1e-5)


# The trace is at 16000 samples. 513 is the least that can be reflected; it is below the declared range.
@pytest.mark.parametrize(("samples", "tokens"), [(513, 1), (640, 2), (1279, 2), (2400, 4), (31_337, 49)])
def test_tokens_equal_the_diffusers_class(exported: Exported, samples: int, tokens: int) -> None:
    waveform = sound(samples, seed=samples)
    actual, _ = exported(waveform)
    spectrogram = torch.from_numpy(log_mel_by_fft(waveform).astype(np.float32))
    vae = exported.vae
    mode = vae.encode(spectrogram).latent_dist.mode()
    expected = (mode.permute(0, 2, 1, 3).reshape(1, -1, 128) - vae.latents_mean) / vae.latents_std
    assert actual.shape == (1, tokens, 128)
    assert relative_error(actual, expected.numpy()) < 1e-4


def test_declared_range_starts_where_the_trace_holds(exported: Exported) -> None:
    assert exported.spec.axes["samples"].minimum == 640
    assert exported.spec.axes["samples"].maximum == 481 * 16_000


def test_dft_basis_is_built_at_load_and_not_stored(exported: Exported) -> None:
    assert exported.path.stat().st_size < 300_000
    stored = Counter(node.op_type for node in onnx.load(exported.path, load_external_data=False).graph.node)
    loaded = onnx.load(exported.optimized)
    folded = Counter(node.op_type for node in loaded.graph.node)
    assert stored["Mod"] == 2
    assert stored["Gather"] == 1
    assert folded["Mod"] == folded["Gather"] == folded["GatherND"] == 0
    assert (1026, 1, 1024) in {tuple(tensor.dims) for tensor in loaded.graph.initializer}
    assert not [name for name in stored if name.startswith(("Sequence", "Split", "Scatter", "NonZero"))]


def test_spec_takes_the_encoder_and_the_statistics(exported: Exported) -> None:
    names = set(exported.spec.weights)
    assert names == set(exported.spec.module.state_dict())
    assert names == {name for name in exported.vae.state_dict() if name.startswith(("encoder.", "latents_"))}
    assert set(exported.spec.constants) == {"log_mel.cosine", "log_mel.window", "log_mel.filters"}


@pytest.mark.parametrize(
    "settings",
    [
        MelSettings(),
        MelSettings(sampling_rate=24_000, mel_fmin=40.0, mel_fmax=11_000.0, n_mel_channels=80),
        MelSettings(filter_length=512, win_length=400, n_mel_channels=20, mel_fmin=1200.0),
    ],
)
def test_other_settings(settings: MelSettings) -> None:
    assert np.allclose(mel_filters(settings), library_filters(settings), atol=1e-9)
    waveform = torch.from_numpy(sound(3000))
    spectrum = torch.stft(
        waveform[0],
        settings.filter_length,
        settings.hop_length,
        settings.win_length,
        torch.hann_window(settings.win_length),
        return_complex=True,
    )
    filters = torch.from_numpy(library_filters(settings)).float()
    expected = torch.log(torch.clamp(spectrum.abs().transpose(1, 2) @ filters, min=1e-5))[None]
    assert relative_error(LogMel(settings)(waveform).numpy(), expected.numpy()) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter_length": 1022}, "filter_length 1022; allowed: multiples of 4"),
        ({"win_length": 2048}, r"win_length 2048; allowed: 1 to filter_length \(1024\)"),
        ({"mel_fmax": 9000.0}, "mel_fmax 9000; allowed: .* <= 8000"),
        ({"mel_fmin": 8000.0}, "mel_fmin 8000"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=f"^audio config: .*{message}"):
        MelSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_rate": 24_000, "mel_fmax": 8000.0}, "sampling_rate 24000; allowed: 16000"),
        ({"hop_length": 128}, "hop_length 128; allowed: 160"),
        ({"n_mel_channels": 80}, "n_mel_channels 80; allowed: 64"),
    ],
)
def test_settings_that_do_not_fit_the_encoder_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        audio_encoder.AudioEncoder(random_vae(), MelSettings(**changes))
