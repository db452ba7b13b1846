# SPDX-License-Identifier: Apache-2.0
"""The published LTX-2.3 files: the single-file checkpoint, the Gemma folder, the upsampler.

Opening reads headers only. A component pairs a module, built from the file's own config, with the stored tensor
behind each of its parameters; the pairing is strict in names, shapes and dtypes, whatever the model's width.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ltxrt.bundle import file_sha256
from ltxrt.errors import ExportError, shown
from ltxrt_export import architecture, keys, vae_blocks
from ltxrt_export.kinds import Kind, is_scale, require_kind
from ltxrt_export.weights import TensorFile, TensorRef, few, folder_tensors, read_json

__all__ = ["SUPPORTED_GENERATION", "Checkpoint", "Component", "Gemma", "Upsampler"]

#: First two numbers of the ``model_version`` that can be exported.
SUPPORTED_GENERATION = (2, 3)

#: Longest text context; the tokenizer of the published text encoder states no limit.
MAX_CONTEXT_TOKENS = 1024

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Component:
    """A network's module and where its weights lie.

    Attributes:
        name: ``transformer``, ``connectors``, ``video_vae``, ``audio_vae``, ``upsampler`` or ``text_model``.
        build: Builds the module without weights, under whatever device or tensor mode is active.
        weights: Stored tensor behind every entry of the module's state dict.
    """

    name: str
    build: Callable[[], nn.Module]
    weights: Mapping[str, TensorRef]

    def load(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module with its weights in ``dtype``, on the CPU, in eval mode, without gradients.

        Raises:
            ExportError: The stored tensors cannot be read.
        """
        with _SkipInit():
            module = self.build()
        module.load_state_dict(self.tensors(self.weights, dtype), strict=True, assign=True)
        return module.eval().requires_grad_(False)

    def tensors(self, names: Iterable[str], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Some of its tensors alone, by module name, in ``dtype``, on the CPU.

        Raises:
            ExportError: They cannot be read.
        """
        # Not through the library, which maps the whole file as writable: more than a small machine grants at 46 GB.
        tensors: dict[str, Tensor] = {}
        with ExitStack() as stack:
            files: dict[Path, BinaryIO] = {}
            for name in names:
                ref = self.weights[name]
                try:
                    if ref.path not in files:
                        files[ref.path] = stack.enter_context(ref.path.open("rb"))
                    tensors[name] = _stored_tensor(ref, files[ref.path]).to(dtype)
                except OSError as error:
                    raise ExportError(f"{ref.path}: {ref.key} cannot be read: {error.strerror}") from error
        return tensors


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published single-file checkpoint: DiT, connectors and VAEs, with the config in its metadata.

    Attributes:
        path: The file.
        version: Its ``model_version``, for example ``2.3.0``.
        config: Its ``config``, by section.
        file: Its header.
        changed: Tensors that stand for stored ones, by key: those of the FP8 files in 16 bits, or with LoRAs fused.
    """

    path: Path
    version: str
    config: Mapping[str, Any]
    file: TensorFile
    changed: Mapping[str, TensorRef] = field(default_factory=dict[str, TensorRef])

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    def sha256(self, sha256: Callable[[Path], str] = file_sha256) -> str:
        """Hash of the file; of the hashes of its files, where there are several.

        Args:
            sha256: Hash of one file; give one that remembers.

        Raises:
            ExportError: A file cannot be read.
        """
        try:
            hashes = [sha256(path) for path in sorted({ref.path for ref in self.file.tensors.values()})]
        except OSError as error:
            raise ExportError(f"{self.path}: cannot be read: {error.strerror}") from error
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def with_changed(self, changed: Mapping[str, TensorRef]) -> "Checkpoint":
        """The same with some tensors in the place of its own."""
        return replace(self, changed={**self.changed, **changed})

    @classmethod
    def open(cls, path: Path, *, allow_dev: bool = False) -> "Checkpoint":
        """Read the header, check the version, that the config is whole and that every tensor is known.

        Args:
            path: The file.
            allow_dev: Take the dev checkpoint too, for a LoRA that makes it a distilled one.

        Raises:
            ExportError: The file is missing, damaged, of another kind or generation, or holds unknown tensors.
        """
        file = TensorFile.open(path)
        require_kind(file, Kind.DISTILLED, *((Kind.DEV,) if allow_dev else ()))
        config = _embedded_config(file)
        version = file.metadata.get("model_version", config.get("model_version"))
        _check_version(path, version)
        architecture.check_widths(config)
        unknown = [
            key for key in file.tensors if keys.component_of(key) is None and not key.startswith(keys.UNREAD_PREFIXES)
        ]
        if unknown:
            raise ExportError(f"{path}: {len(unknown)} tensors of no known component ({few(unknown)})")
        return cls(path, str(version), config, file)

    def component(self, name: str) -> Component:
        """The component ``transformer``, ``connectors``, ``video_vae`` or ``audio_vae``.

        ``audio_vae`` is the encoder and the statistics: audio-to-video never decodes audio.

        Raises:
            ExportError: The config is not supported, or the stored tensors do not fit it.
            ValueError: There is no such component.
        """
        if name not in keys.COMPONENTS:
            raise ValueError(f"{name!r} is not a component; allowed: {', '.join(keys.COMPONENTS)}")
        config = self.config
        builders: Mapping[str, Callable[[], nn.Module]] = {
            "transformer": lambda: architecture.transformer(config),
            "connectors": lambda: architecture.connectors(config, self._text_widths()),
            "video_vae": lambda: architecture.video_vae(config),
            "audio_vae": lambda: architecture.audio_vae(config),
        }
        if name == "video_vae":
            encoder, decoder = vae_blocks.block_chains(config)
            key_map = keys.video_vae_keys(len(encoder.resampling), len(decoder.resampling))
        else:
            key_map = keys.key_map(name)
        stored = {
            key: self.changed.get(key, ref)
            for key, ref in self.file.tensors.items()
            if keys.component_of(key) == name and not is_scale(self.file, key)
        }
        return _paired(self.path, name, builders[name], key_map, stored)

    def check_text_encoder(self, gemma: "Gemma") -> None:
        """Check that the text projections take the hidden states of ``gemma``, and the registers its context.

        Raises:
            ExportError: They do not.
        """
        mine = self._text_widths()["text_config"]
        section = gemma.config["text_config"]
        theirs = {key: section.get(key) for key in mine}
        if mine != theirs:
            raise ExportError(f"{gemma.path}: text_config has {theirs}; {self.path.name} needs {mine}")
        registers = self.config["transformer"]["connector_num_learnable_registers"]
        if gemma.context_length % registers:
            raise ExportError(
                f"{gemma.path}: model_max_length {gemma.context_length} is not a multiple of the"
                f" {registers} registers of {self.path.name}"
            )

    def _text_widths(self) -> dict[str, Any]:
        """Width and depth of the text model that the stored projections were made for, as a Gemma config."""
        key = keys.key_map("connectors").stored("video_text_proj_in.weight")
        ref, width = self.file.tensors.get(key), self.config["transformer"].get("caption_channels")
        if ref is None:
            raise ExportError(f"{self.path}: connectors: 1 tensors missing ({key})")
        if type(width) is not int or width < 1 or len(ref.shape) != 2 or ref.shape[1] % width:
            raise ExportError(
                f"{self.path}: {key} is {list(ref.shape)}; its columns are not whole hidden states of"
                f" transformer.caption_channels = {shown(width)}"
            )
        # One state a layer and the embeddings.
        text = {"hidden_size": width, "num_hidden_layers": ref.shape[1] // width - 1}
        return {"model_type": "gemma3", "text_config": text}


@dataclass(frozen=True, slots=True)
class Gemma:
    """A Gemma 3 folder in the Hugging Face layout: config, weights in one file or shards, tokenizer.

    Attributes:
        path: The folder.
        config: Its ``config.json``.
        tensors: Every stored tensor, of all shards.
        context_length: Tokens of a text context: the tokenizer's ``model_max_length``, at most 1024.
        tokenizer_path: The tokenizer's ``tokenizer.json``.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    context_length: int
    tokenizer_path: Path

    @classmethod
    def open(cls, folder: Path, tokenizer_folder: Path | None = None) -> "Gemma":
        """Read configs and headers.

        Args:
            folder: Config and weights.
            tokenizer_folder: Tokenizer, where it is not in the same folder.

        Raises:
            ExportError: A file is missing or damaged, or the shards are not those of the index.
        """
        if folder.is_file():
            raise ExportError(f"{folder}: this is a file; allowed: the folder of Gemma 3, with its config.json")
        files = folder if tokenizer_folder is None else tokenizer_folder
        config = read_json(folder / "config.json")
        tokenizer, path = read_json(files / "tokenizer_config.json"), files / "tokenizer.json"
        if not path.is_file():
            raise ExportError(f"{path}: cannot be read: No such file")
        limit = tokenizer.get("model_max_length")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
            raise ExportError(
                f"{files / 'tokenizer_config.json'}: model_max_length = {shown(limit)}; allowed: at least 1"
            )
        return cls(folder, config, folder_tensors(folder, "model"), int(min(limit, MAX_CONTEXT_TOKENS)), path)

    def component(self) -> Component:
        """The language model, named ``text_model``; vision tower, projector and lm_head are left unread.

        Raises:
            ExportError: The config is not supported, or the stored tensors do not fit it.
        """
        unread = keys.UNREAD_GEMMA_PREFIXES
        stored = {key: ref for key, ref in self.tensors.items() if not key.startswith(unread)}
        config = self.config
        published, later = keys.GEMMA_PREFIXES
        key_map = keys.gemma_keys(later if any(key.startswith(later) for key in stored) else published)
        return _paired(self.path, "text_model", lambda: architecture.text_model(config), key_map, stored)


@dataclass(frozen=True, slots=True)
class Upsampler:
    """A latent upsampler's own file.

    Attributes:
        path: The file.
        config: The flat ``config`` of its metadata.
        file: Its header.
    """

    path: Path
    config: Mapping[str, Any]
    file: TensorFile

    @classmethod
    def open(cls, path: Path) -> "Upsampler":
        """Read the header.

        Raises:
            ExportError: The file is missing, damaged, of another kind or has no config.
        """
        file = TensorFile.open(path)
        require_kind(file, Kind.UPSAMPLER)
        return cls(path, _embedded_config(file), file)

    def component(self) -> Component:
        """The upsampler.

        Raises:
            ExportError: It is another kind of upsampler, or the stored tensors do not fit its config.
        """
        config = self.config
        return _paired(
            self.path,
            "upsampler",
            lambda: architecture.upsampler(config),
            keys.upsampler_keys(),
            self.file.tensors,
        )


class _SkipInit(TorchFunctionMode):
    """Leaves new parameters uninitialised: they are about to be replaced, and random ones take minutes at 12 B."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _stored_tensor(ref: TensorRef, file: BinaryIO) -> Tensor:
    tensor = torch.empty(ref.shape, dtype=_DTYPES[ref.dtype])
    file.seek(ref.offset)
    if file.readinto(tensor.flatten().view(torch.uint8).numpy()) != ref.nbytes:  # type: ignore[attr-defined]
        raise ExportError(f"{ref.path}: {ref.key} cannot be read: the file became shorter")
    return tensor


def _paired(
    path: Path,
    name: str,
    build: Callable[[], nn.Module],
    key_map: keys.KeyMap,
    stored: Mapping[str, TensorRef],
) -> Component:
    """The component, if exactly its tensors are stored, in their shapes and in a dtype that can be exported."""
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in build().state_dict().items()}
    by_key = {key_map.stored(module_name): module_name for module_name in expected}
    missing = [key for key in by_key if key not in stored]
    unexpected = [key for key in stored if key not in by_key]
    both = [(stored[key], expected[module_name]) for key, module_name in by_key.items() if key in stored]
    shapes = [f"{ref.key} {list(ref.shape)} for {list(shape)}" for ref, shape in both if ref.shape != shape]
    dtypes = [f"{ref.key} {ref.dtype}" for ref, _ in both if ref.dtype not in _DTYPES]
    problems = [
        f"{len(names)} tensors {what} ({few(names)})"
        for names, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (shapes, "of another shape"),
            (dtypes, f"of a dtype other than {', '.join(_DTYPES)}"),
        )
        if names
    ]
    if problems:
        raise ExportError(f"{path}: {name}: {'; '.join(problems)}")
    return Component(name, build, {module_name: stored[key] for key, module_name in by_key.items()})


def _embedded_config(file: TensorFile) -> Mapping[str, Any]:
    if "config" not in file.metadata:
        raise ExportError(f"{file.path}: no config in its metadata; allowed: a file published by Lightricks")
    try:
        config = json.loads(file.metadata["config"])
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{file.path}: the config in its metadata is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ExportError(f"{file.path}: the config in its metadata is {shown(config)}; allowed: an object")
    return config


def _check_version(path: Path, version: object) -> None:
    supported = ".".join(str(number) for number in SUPPORTED_GENERATION)
    if version is None:
        raise ExportError(f"{path}: no model_version in its metadata; supported: {supported}")
    numbers = str(version).replace("-", ".").split(".")[: len(SUPPORTED_GENERATION)]
    if numbers != [str(number) for number in SUPPORTED_GENERATION]:
        raise ExportError(
            f"{path}: model_version {shown(version)} is another generation of the architecture; supported: {supported}"
        )
