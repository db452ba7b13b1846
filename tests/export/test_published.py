# SPDX-License-Identifier: Apache-2.0
"""The published facts against each other and against the modules."""

from fnmatch import fnmatch

import pytest

from ltxrt_export import published


def test_every_source_names_its_terms_and_a_page() -> None:
    assert [repository.terms for repository in published.SOURCES] == ["LTX-2 Community License", "Gemma Terms of Use"]
    for repository in published.SOURCES:
        assert repository.terms_page.startswith("https://")
        assert repository.page == f"https://huggingface.co/{repository.name}"


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("ltx-2.3-22b-distilled-1.1.safetensors", True),
        ("ltx-2.3-spatial-upscaler-x2-1.1.safetensors", True),
        ("ltx-2.3-22b-distilled.safetensors", False),
        ("ltx-2.3-22b-dev.safetensors", False),
        ("ltx-2.3-22b-distilled-lora-384-1.1.safetensors", False),
        ("ltx-2.3-spatial-upscaler-x1.5-1.0.safetensors", False),
        ("ltx-2.3-temporal-upscaler-x2-1.0.safetensors", False),
        ("README.md", False),
    ],
)
def test_files_of_the_checkpoint_repository(name: str, needed: bool) -> None:
    assert any(fnmatch(name, pattern) for pattern in published.LTX.patterns) == needed


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("config.json", True),
        ("model-00001-of-00005.safetensors", True),
        ("model.safetensors.index.json", True),
        ("tokenizer.json", True),
        ("tokenizer_config.json", True),
        ("generation_config.json", False),
        ("preprocessor_config.json", False),
        ("tokenizer.model", False),
        ("model.gguf", False),
    ],
)
def test_files_of_the_text_encoder_repository(name: str, needed: bool) -> None:
    assert any(fnmatch(name, pattern) for pattern in published.GEMMA.patterns) == needed


def test_counts() -> None:
    assert published.SINGLE_FILE_TENSORS == 5947
    # "22B": the DiT and the text projections.
    assert 22e9 < published.PARAMETERS["transformer"] + published.PARAMETERS["connectors"] < 22.5e9


def test_configs_are_fresh_copies() -> None:
    published.checkpoint_config()["transformer"]["num_layers"] = 1
    assert published.checkpoint_config()["transformer"]["num_layers"] == 48
    assert published.gemma_config()["text_config"]["num_hidden_layers"] == 48
    assert published.upsampler_config()["mid_channels"] == 1024
