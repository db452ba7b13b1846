# SPDX-License-Identifier: Apache-2.0
"""The prompt cache: what it gives is what was put, bounded, on disk by choice, and never a reason to fail."""

import logging
import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxrt.encoders import encode_text
from ltxrt.engine import TensorSpec
from ltxrt.errors import OutputError
from ltxrt.media import bundled_speech
from ltxrt.pipeline import Pipeline
from ltxrt.prompt_cache import PromptCache, prompt_key, text_model
from ltxrt.request import Request
from ltxrt.result import Fragment
from ltxrt.testing import fake_pipeline
from ltxrt.tokenizer import TokenizedPrompt

SPECS = (TensorSpec("video_context", "float32", (1, 4, 3)), TensorSpec("audio_context", "float32", (1, 4, "w")))
ENTRY_BYTES = 4 * 3 * 4 + 4 * 2 * 4


def tensors(value=0.0):
    return {
        "video_context": np.full((1, 4, 3), value, np.float32),
        "audio_context": np.full((1, 4, 2), -value, np.float32),
    }


def key(index=0):
    return prompt_key("model", np.array([[index]], np.int64))


def same(found, expected):
    return found is not None and all(np.array_equal(found[name], value) for name, value in expected.items())


# --- keys ---


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=5), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_two_prompts_share_a_key_only_if_they_are_the_same(first, second):
    keys = [prompt_key("model", np.array([ids], np.int64)) for ids in (first, second)]
    assert (keys[0] == keys[1]) == (first == second)


def test_key_depends_on_the_model_but_not_on_memory_layout():
    ids = np.array([[1, 2, 3, 4]], np.int64)
    spread = np.repeat(ids, 2, axis=1)[:, ::2]
    assert prompt_key("a", ids) == prompt_key("a", spread)
    assert prompt_key("a", ids) != prompt_key("b", ids)


def test_model_is_graph_weights_and_backend():
    bundle = Pipeline.open().bundle
    model = text_model(bundle, "high", "onnxruntime-cpu")
    assert model == text_model(bundle, "low", "onnxruntime-cpu")  # the same network
    assert model != text_model(bundle, "high", "tensorrt")
    entry = bundle.network("high", "text_encoder")
    for changed in (entry.file, *entry.weights):
        files = dict(bundle.manifest.files)
        files[changed] = files[changed].model_copy(update={"sha256": "0" * 64})
        other = replace(bundle, manifest=bundle.manifest.model_copy(update={"files": files}))
        assert text_model(other, "high", "onnxruntime-cpu") != model


# --- in memory ---


def test_what_was_put_comes_back_as_it_was_then():
    cache, given_tensors = PromptCache(), tensors(1)
    assert cache.get(key(), SPECS) is None
    cache.put(key(), given_tensors)
    given_tensors["video_context"][...] = 9
    found = cache.get(key(), SPECS)
    assert same(found, tensors(1))
    with pytest.raises(ValueError, match="read-only"):
        found["video_context"][...] = 9


def test_the_least_recently_used_goes_first():
    cache = PromptCache(memory_bytes=2 * ENTRY_BYTES)
    cache.put(key(0), tensors(0))
    cache.put(key(1), tensors(1))
    assert cache.get(key(0), SPECS) is not None
    cache.put(key(2), tensors(2))
    assert [cache.get(key(index), SPECS) is not None for index in range(3)] == [True, False, True]


def test_an_entry_larger_than_the_bound_is_not_kept():
    cache = PromptCache(memory_bytes=ENTRY_BYTES - 1)
    cache.put(key(), tensors())
    assert cache.get(key(), SPECS) is None


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=40), st.integers(1, 4))
def test_memory_behaves_like_a_bounded_table(operations, room):
    cache, model = PromptCache(memory_bytes=room * ENTRY_BYTES), OrderedDict()
    for putting, index in operations:
        if putting:
            cache.put(key(index), tensors(index))
            model[index] = True
        assert (cache.get(key(index), SPECS) is not None) == (index in model)
        if index in model:
            model.move_to_end(index)
        while len(model) > room:
            model.popitem(last=False)


def test_threads_may_share_it():
    cache = PromptCache(memory_bytes=3 * ENTRY_BYTES)

    def work(seed):
        for index in np.random.default_rng(seed).integers(0, 6, 200):
            found = cache.get(key(int(index)), SPECS)
            assert found is None or same(found, tensors(int(index)))
            cache.put(key(int(index)), tensors(int(index)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


# --- in a folder ---


def test_another_process_finds_what_was_put(tmp_path):
    folder = tmp_path / "a" / "cache"
    PromptCache(folder).put(key(), tensors(3))
    assert same(PromptCache(folder).get(key(), SPECS), tensors(3))
    assert len(list(folder.iterdir())) == 1  # nothing half-written beside it


def damaged(data, kind):
    half = len(data) // 2
    return {
        "empty": b"",
        "cut": data[:half],
        "flipped": data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :],
        "longer": data + b"x",
        "foreign": b"a file of something else",
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "cut", "flipped", "longer", "foreign"])
def test_a_damaged_file_is_ignored_with_a_log_line_and_made_anew(tmp_path, caplog, kind):
    PromptCache(tmp_path).put(key(), tensors(3))
    (path,) = tmp_path.iterdir()
    path.write_bytes(damaged(path.read_bytes(), kind))
    cache = PromptCache(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert cache.get(key(), SPECS) is None
    (line,) = caplog.messages
    assert str(path) in line
    assert "damaged" in line
    cache.put(key(), tensors(4))
    assert same(PromptCache(tmp_path).get(key(), SPECS), tensors(4))


@pytest.mark.parametrize(
    "specs",
    [
        SPECS[:1],
        (SPECS[0], TensorSpec("audio_context", "float32", (1, 4, 5))),
        (SPECS[0], TensorSpec("audio_context", "float32", (1, 4))),
        (SPECS[0], TensorSpec("audio_context", "float16", (1, 4, 2))),
    ],
)
def test_an_entry_of_other_tensors_is_ignored(tmp_path, caplog, specs):
    PromptCache(tmp_path).put(key(), tensors(3))
    assert PromptCache(tmp_path).get(key(), specs) is None
    assert "damaged" in caplog.text


def test_the_folder_is_bounded_and_keeps_what_was_used_last(tmp_path):
    PromptCache(tmp_path).put(key(0), tensors())
    (path,) = tmp_path.iterdir()
    cache = PromptCache(tmp_path, memory_bytes=0, disk_bytes=2 * path.stat().st_size)
    cache.put(key(1), tensors())
    for number, file in enumerate(sorted(tmp_path.iterdir(), key=lambda file: file == path)):
        os.utime(file, (number, number))  # entry 0 is the younger one
    assert cache.get(key(1), SPECS) is not None  # and now the older one
    cache.put(key(2), tensors())
    assert [cache.get(key(index), SPECS) is not None for index in range(3)] == [False, True, True]


def test_what_killed_writers_left_is_removed(tmp_path):
    old, new = tmp_path / "x.partial", tmp_path / "y.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    PromptCache(tmp_path)
    assert not old.exists()
    assert new.exists()  # perhaps somebody is writing it


def test_a_folder_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot hold the prompt cache"):
        PromptCache(tmp_path / "file")


def test_a_folder_that_disappears_costs_a_log_line(tmp_path, caplog):
    folder = tmp_path / "cache"
    cache = PromptCache(folder)
    folder.rmdir()
    cache.put(key(), tensors(1))
    assert "cannot be written" in caplog.text
    assert same(cache.get(key(), SPECS), tensors(1))


def test_writers_at_once_leave_whole_files(tmp_path):
    def write(value):
        PromptCache(tmp_path).put(key(), tensors(value))

    threads = [threading.Thread(target=write, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = PromptCache(tmp_path).get(key(), SPECS)
    assert found is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_the_option(tmp_path):
    assert PromptCache.open("off") is None
    memory, folder = PromptCache.open("memory"), PromptCache.open(tmp_path / "x")
    assert memory is not None
    assert folder is not None
    assert (tmp_path / "x").is_dir()


# --- in use ---


class Encoder:
    name = "text_encoder"
    outputs = SPECS

    def __init__(self):
        self.runs = 0

    def run(self, feeds):
        self.runs += 1
        return tensors(float(feeds["input_ids"].sum()))


def test_the_text_encoder_runs_once_a_prompt():
    engine, cache = Encoder(), PromptCache()
    prompts = [TokenizedPrompt(np.array([[1, 2]], np.int64), 0), TokenizedPrompt(np.array([[2, 2]], np.int64), 0)]
    first, second, again = (encode_text(engine, prompts[index], cache, "m") for index in (0, 1, 0))
    assert engine.runs == 2
    assert again.video is first.video or np.array_equal(again.video, first.video)
    assert first.video[0, 0, 0] == 3
    assert second.video[0, 0, 0] == 4
    encode_text(engine, prompts[0], cache, "another model")
    assert engine.runs == 3
    encode_text(engine, prompts[0])
    assert engine.runs == 4


def clip(pipeline):
    request = Request(
        prompt="a face",
        input_audio=bundled_speech(),
        match_audio_length=False,
        num_frames=9,
        resolution="128x128",
        seed=1,
    )
    return b"".join(event.data for event in pipeline.events(request) if isinstance(event, Fragment))


def test_clips_are_the_same_bytes_with_the_cache_and_without(tmp_path):
    expected = clip(Pipeline.open(prompt_cache="off"))
    for _ in range(2):  # the first fills the folder, the second reads it
        pipeline = Pipeline.open(prompt_cache=tmp_path)
        assert clip(pipeline) == expected
        assert clip(pipeline) == expected  # and from memory
    assert len(list(tmp_path.iterdir())) == 1


def test_a_pipeline_of_fakes_takes_a_cache():
    pipeline = replace(fake_pipeline(), prompts=PromptCache())
    assert clip(pipeline) == clip(pipeline)
