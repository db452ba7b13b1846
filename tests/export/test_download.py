# SPDX-License-Identifier: Apache-2.0
"""Downloads from a server that imitates the hub, faults included; the real hub is never asked."""

import hashlib
import json
import os
import pty
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from ltxrt.errors import ExportError, OutputError
from ltxrt_export import download as module
from ltxrt_export import published
from ltxrt_export.download import DownloadPlan, download, plan_download, source_paths
from ltxrt_export.hub import Hub
from ltxrt_export.testing import COMMIT, FakeHub, serving

LTX, GEMMA = published.LTX.name, published.GEMMA.name
SHARDS = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]


def content(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token and no waiting, whatever this machine has."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.0, 0.0))


@pytest.fixture
def fake() -> Generator[FakeHub]:
    ltx = {
        name: content(name, size)
        for name, size in ((published.DISTILLED.name, 3_000_000), (published.UPSAMPLER.name, 1000))
    }
    gemma = {name: content(name, 500) for name in ("config.json", "tokenizer.json", "tokenizer_config.json")}
    gemma |= {"model.safetensors.index.json": b"{}", **{name: content(name, 2000) for name in SHARDS}}
    others = {"ltx-2.3-22b-dev.safetensors": b"no", "README.md": b"no", "tokenizer.model": b"no"}
    small = {"config.json", "tokenizer_config.json", "model.safetensors.index.json", "README.md"}
    with serving(FakeHub({LTX: ltx | others, GEMMA: gemma | others}, small=small)) as hub:
        yield hub


def hub_of(fake: FakeHub, token: str | None = None) -> Hub:
    return Hub(token, fake.endpoint)


def fetch(fake: FakeHub, folder: Path, token: str | None = None) -> DownloadPlan:
    hub = hub_of(fake, token)
    plan = plan_download(folder, hub)
    for _ in download(plan, hub):
        pass
    return plan


def refused(fake: FakeHub, folder: Path, token: str | None = None) -> str:
    with pytest.raises(ExportError) as caught:
        fetch(fake, folder, token)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_needed_as_real_files(fake: FakeHub, tmp_path: Path) -> None:
    plan = fetch(fake, tmp_path / "models")
    folder = published.GEMMA.folder
    needed = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", *SHARDS]
    assert names(tmp_path / "models") == {
        published.DISTILLED.name,
        published.UPSAMPLER.name,
        *(f"{folder}/{name}" for name in needed),
    }
    for file in plan.files:
        assert plan.path(file).read_bytes() == fake.repositories[file.repository.name][file.name]
        assert not plan.path(file).is_symlink()
        assert file.revision == COMMIT
    assert plan.missing_bytes == 0
    assert all(path.exists() for path in source_paths(plan))


def test_plan_fetches_nothing(fake: FakeHub, tmp_path: Path) -> None:
    plan = plan_download(tmp_path / "models", hub_of(fake))
    assert plan.total_bytes == plan.missing_bytes == 3_000_000 + 1000 + 1500 + 2 + 4000
    assert [repository.name for repository in plan.repositories] == [LTX, GEMMA]
    assert fake.fetched == []
    assert not (tmp_path / "models").exists()


def test_second_run_checks_and_fetches_nothing(fake: FakeHub, tmp_path: Path) -> None:
    fetch(fake, tmp_path)
    before = len(fake.fetched)
    fetch(fake, tmp_path)
    assert len(fake.fetched) == before


def test_token_goes_to_the_hub_and_not_to_the_second_host(fake: FakeHub, tmp_path: Path) -> None:
    fake.token = "hf_secret"
    fetch(fake, tmp_path, "hf_secret")
    assert fake.authorized
    assert not any(fake.authorized)


def test_interrupted_run_goes_on_where_it_stopped(fake: FakeHub, tmp_path: Path) -> None:
    hub = hub_of(fake)
    plan = plan_download(tmp_path, hub)
    steps = download(plan, hub)
    step = next(steps)
    steps.close()  # as Ctrl-C does
    assert 0 < step.done < 3_000_000
    assert names(tmp_path) == {plan.partial(step.file).name}
    assert plan.missing_bytes == plan.total_bytes - step.done
    fetch(fake, tmp_path)
    assert [entry for entry in fake.fetched if entry[0] == published.DISTILLED.name] == [
        (published.DISTILLED.name, 0),
        (published.DISTILLED.name, step.done),
    ]
    assert not list(tmp_path.rglob("*.partial"))


def test_broken_connections_go_on_by_themselves(fake: FakeHub, tmp_path: Path) -> None:
    fake.break_after = [1_000_000, 1, 500_000]
    plan = fetch(fake, tmp_path)
    assert plan.missing_bytes == 0
    assert [begin for _, begin in fake.fetched][:4] == [0, 1_000_000, 1_000_001, 1_500_001]


def test_a_hub_that_is_busy_is_asked_again(fake: FakeHub, tmp_path: Path) -> None:
    fake.statuses = [503, 429]
    assert fetch(fake, tmp_path).missing_bytes == 0


def test_a_hub_that_stays_busy(fake: FakeHub, tmp_path: Path) -> None:
    fake.break_after = [2_000_000]
    hub = hub_of(fake)
    steps = download(plan_download(tmp_path, hub), hub)
    begun = next(steps).done
    fake.statuses = [503] * 9
    with pytest.raises(ExportError, match=r"the hub answers 503; 2\.0 MB of 3\.0 MB are kept, run the command again"):
        list(steps)
    fake.statuses = []
    fetch(fake, tmp_path)
    assert begun > 0
    assert (published.DISTILLED.name, 2_000_000) in fake.fetched


def test_a_server_that_cannot_seek(fake: FakeHub, tmp_path: Path) -> None:
    fake.seeks = False
    fake.break_after = [1_000_000]
    assert fetch(fake, tmp_path).missing_bytes == 0
    assert [begin for _, begin in fake.fetched][:2] == [0, 0]


def test_a_partial_that_was_damaged(fake: FakeHub, tmp_path: Path) -> None:
    hub = hub_of(fake)
    plan = plan_download(tmp_path, hub)
    plan.partial(plan.files[0]).write_bytes(bytes(1000))
    assert "what arrived (3000000 bytes) is not what" in refused(fake, tmp_path)
    assert plan.partial(plan.files[0]).stat().st_size == 0
    assert fetch(fake, tmp_path).missing_bytes == 0


@pytest.mark.parametrize("name", [published.DISTILLED.name, "config.json", "model.safetensors.index.json"])
def test_wrong_content_is_not_kept(fake: FakeHub, tmp_path: Path, name: str) -> None:
    fake.corrupt = {name}
    message = refused(fake, tmp_path)
    assert message.startswith(f"{name}: what arrived")
    assert "run the command again to fetch it anew" in message
    assert name not in {Path(path).name for path in names(tmp_path)}
    fake.corrupt = set()
    assert fetch(fake, tmp_path).missing_bytes == 0


def test_another_file_of_that_name_is_left_alone(fake: FakeHub, tmp_path: Path) -> None:
    mine = tmp_path / published.UPSAMPLER.name
    mine.write_bytes(bytes(1000))
    with pytest.raises(OutputError, match=r"x2-1\.1\.safetensors: is there and is not the published file; move it"):
        fetch(fake, tmp_path)
    assert mine.read_bytes() == bytes(1000)


def test_a_new_revision_does_not_go_on_with_the_old_one(fake: FakeHub, tmp_path: Path) -> None:
    hub = hub_of(fake)
    steps = download(plan_download(tmp_path, hub), hub)
    next(steps)
    steps.close()
    fake.repositories[LTX][published.DISTILLED.name] = content("new", 3_000_000)
    fake.fetched.clear()
    fetch(fake, tmp_path)
    assert fake.fetched[0] == (published.DISTILLED.name, 0)
    assert (tmp_path / published.DISTILLED.name).read_bytes() == content("new", 3_000_000)


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_mine", 403)])
def test_terms_that_were_not_accepted(fake: FakeHub, tmp_path: Path, token: str | None, status: int) -> None:
    fake.token = token
    fake.gated = {GEMMA}
    assert refused(fake, tmp_path, token) == (
        f"{GEMMA}: access is refused ({status}); accept the Gemma Terms of Use on"
        f" https://huggingface.co/{GEMMA} with your Hugging Face account, then give a read token of that account in"
        " HF_TOKEN or with --token"
    )
    # Before 46 GB of the other repository.
    assert fake.fetched == []


def test_token_that_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    fake.token = "hf_mine"
    assert "the token is refused (401); make a read token on" in refused(fake, tmp_path, "hf_other")


def test_repository_that_is_not_there(fake: FakeHub, tmp_path: Path) -> None:
    del fake.repositories[LTX]
    message = refused(fake, tmp_path)
    assert f"{LTX}: access is refused (401)" in message
    assert f"https://huggingface.co/{LTX}" in message


def test_file_that_is_not_listed(fake: FakeHub, tmp_path: Path) -> None:
    del fake.repositories[LTX][published.UPSAMPLER.name]
    assert refused(fake, tmp_path) == (
        f"{LTX}: has no {published.UPSAMPLER.name} any more; see https://huggingface.co/{LTX}"
    )


def test_file_that_is_listed_and_gone(fake: FakeHub, tmp_path: Path) -> None:
    fake.gone = {published.UPSAMPLER.name}
    assert f"{LTX}: a file is not there any more (404); see" in refused(fake, tmp_path)


def test_status_that_is_not_foreseen(fake: FakeHub, tmp_path: Path) -> None:
    fake.statuses = [418]
    assert f"{LTX}: the hub answers 418; see" in refused(fake, tmp_path)


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(ExportError, match=rf"^{LTX}: the hub cannot be reached \(.*\); check the network"):
        plan_download(tmp_path, Hub(endpoint=endpoint))


def test_offline_switch_of_the_library(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    def offline(*arguments: object, **options: object) -> None:
        raise OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    with pytest.raises(ExportError, match=r"the hub cannot be reached \(offline mode is enabled\)"):
        plan_download(tmp_path, hub_of(fake))


def test_disk_that_is_too_small(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**7, 0, 3_000_000))
    with pytest.raises(OutputError, match=r"models: 3\.0 MB are needed and 3\.0 MB are free, for 3\.0 MB of model"):
        fetch(fake, tmp_path / "models")
    assert fake.fetched == []
    # What is there already needs no room.
    hub = hub_of(fake)
    plan = plan_download(tmp_path / "models", hub)
    plan.partial(plan.files[0]).parent.mkdir()
    plan.partial(plan.files[0]).write_bytes(content(published.DISTILLED.name, 3_000_000)[:100_000])
    fetch(fake, tmp_path / "models")


def test_folder_that_cannot_be_written(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(OutputError, match=r"models/ltx-2\.3-22b\S+: cannot be written \(Not a directory\)|File exists"):
        fetch(fake, tmp_path / "models")


def test_two_downloads_at_once(fake: FakeHub, tmp_path: Path) -> None:
    hub = hub_of(fake)
    first = download(plan_download(tmp_path, hub), hub)
    next(first)
    with pytest.raises(OutputError, match="another download is writing it"):
        fetch(fake, tmp_path)
    for _ in first:
        pass
    assert fetch(fake, tmp_path).missing_bytes == 0


def test_hashes_of_git_and_of_the_content(fake: FakeHub, tmp_path: Path) -> None:
    plan = plan_download(tmp_path, hub_of(fake))
    by_name = {file.name: file for file in plan.files}
    assert by_name["tokenizer.json"].sha256 == hashlib.sha256(content("tokenizer.json", 500)).hexdigest()
    assert by_name["config.json"].sha256 is None
    # printf '{}' | git hash-object --stdin
    assert by_name["model.safetensors.index.json"].git_sha1 == "9e26dfeeb6e641a33dae4961196235bdb965b21b"


def command(fake: FakeHub, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command of a process of its own, as the address of the hub is read when the library is imported."""
    code = (
        "import typer; from ltxrt.errors import LtxrtError; from ltxrt_export.cli_download import download\n"
        "app = typer.Typer(); app.command()(download)\n"
        "try: app(standalone_mode=False)\n"
        "except LtxrtError as error: raise SystemExit(f'error: {error}')"
    )
    environment = {**os.environ, "HF_ENDPOINT": fake.endpoint, "HF_HOME": str(options.pop("home"))}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **{"stdin": subprocess.DEVNULL, **options},
    )


def test_command_dry_run(fake: FakeHub, tmp_path: Path) -> None:
    done = command(fake, "--out", tmp_path / "models", "--dry-run", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"3.0 MB to fetch into {tmp_path / 'models'}\n")
    assert re.search(rf"^{published.DISTILLED.name} +3\.0 MB$", done.stderr, re.MULTILINE)
    assert "to fetch: 3.0 MB of 3.0 MB; free in" in done.stderr
    assert not (tmp_path / "models").exists()


def test_command_with_json(fake: FakeHub, tmp_path: Path) -> None:
    done = command(fake, "--out", tmp_path / "models", "--yes", "--json", home=tmp_path)
    result = json.loads(done.stdout)
    assert (result["missing_bytes"], result["dry_run"], len(result["files"])) == (0, False, 8)
    assert Path(result["checkpoint"]).stat().st_size == 3_000_000
    assert Path(result["text_encoder"], "config.json").is_file()
    for line in (f"{LTX}: LTX-2 Community License, https://", f"{GEMMA}: Gemma Terms of Use, https://ai.google.dev/"):
        assert line in done.stderr
    # There is nothing left to agree to.
    again = command(fake, "--out", tmp_path / "models", home=tmp_path)
    assert (again.returncode, again.stdout) == (0, f"{tmp_path / 'models'}\n")


def test_command_without_consent(fake: FakeHub, tmp_path: Path) -> None:
    done = command(fake, "--out", tmp_path / "models", home=tmp_path)
    assert done.returncode == 1
    assert "error: the terms above have to be accepted first: read them, then pass --yes\n" in done.stderr
    assert fake.fetched == []


@pytest.mark.parametrize(("answer", "code"), [(b"y\n", 0), (b"n\n", 1)])
def test_command_asks_on_a_terminal(fake: FakeHub, tmp_path: Path, answer: bytes, code: int) -> None:
    terminal, theirs = pty.openpty()
    try:
        os.write(terminal, answer)
        done = command(fake, "--out", tmp_path / "models", home=tmp_path, stdin=theirs)
    finally:
        os.close(terminal)
        os.close(theirs)
    assert done.returncode == code, done.stderr
    assert "Do you accept these terms?" in done.stderr
    assert bool(fake.fetched) == (code == 0)
