# SPDX-License-Identifier: Apache-2.0
"""How a server is set up: flags, then ``LTXRT_*`` in the environment, then a TOML file, then defaults."""

import tomllib
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..errors import RequestError
from .addresses import Network

__all__ = ["ENVIRONMENT_PREFIX", "Settings", "load_settings"]

ENVIRONMENT_PREFIX = "LTXRT_"
# An address of Redis may hold its password.
_SECRET = ("api_keys", "redis")


def _split(value: Any) -> Any:
    """``"a, b"`` as a list; everything else as it came."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _network(value: Any) -> Any:
    return ip_network(value) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_split)]
Networks = Annotated[tuple[Annotated[Network, BeforeValidator(_network)], ...], BeforeValidator(_split)]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Everything that an operator may set. The names are those of the flags, the environment and the TOML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: Annotated[str | None, Field(description="Folder of a bundle; the tiny one of the package otherwise.")] = (
        None
    )
    data: Annotated[str, Field(description="Folder for jobs and results.")] = "ltxrt-data"
    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 8000
    public_url: Annotated[str | None, Field(description="Where callers reach the server, for result addresses.")] = None
    api_keys: Annotated[Words, Field(description="Keys that callers may use.")] = ()
    api_key_file: Annotated[str | None, Field(description="File with one key a line.")] = None
    no_auth: Annotated[bool, Field(description="Take callers without a key; on a loopback address only.")] = False
    open_metrics: Annotated[bool, Field(description="Show /metrics without a key.")] = False
    slots: Annotated[Count, Field(description="Worker processes, each with the model.")] = 1
    devices: Annotated[Words, Field(description="GPUs: one worker each, in place of slots.")] = ()
    threads: Annotated[int, Field(ge=0, description="CPU threads of an operator; 0 uses every core.")] = 0
    prompt_cache: Annotated[str, Field(description="Where encoded prompts are kept: memory, off, or a folder.")] = (
        "memory"
    )
    warm_up: Annotated[Words, Field(description="Presets that are run once before the server is ready.")] = ("high",)
    redis: Annotated[
        str | None,
        Field(
            pattern=r"^(redis|rediss|unix)://",
            description="Redis with the jobs of several front ends: redis://, rediss:// or unix://.",
        ),
    ] = None
    lease_seconds: Annotated[Seconds, Field(description="With redis: how long a silent worker counts as alive.")] = 30.0
    ray: Annotated[bool, Field(description="Run the workers on a Ray cluster; needs redis.")] = False
    ray_address: Annotated[str | None, Field(description="The cluster to join; none starts one here.")] = None
    ray_gpus: Annotated[int | None, Field(ge=0, description="GPUs of a replica; 1 where the cluster has any.")] = None
    ray_min_replicas: Annotated[int, Field(ge=0, description="Replicas that always run.")] = 1
    ray_max_replicas: Annotated[Count, Field(description="Replicas that run at most.")] = 1
    ray_target_ongoing: Annotated[float, Field(gt=0, description="Unfinished jobs for each replica.")] = 1.0
    ray_idle_seconds: Annotated[Seconds, Field(description="How long replicas are kept for nothing.")] = 300.0
    max_queued: Annotated[Count, Field(description="Jobs that may wait.")] = 100
    max_jobs_per_key: Annotated[Count, Field(description="Unfinished jobs of one key.")] = 20
    max_frames_times_pixels: Annotated[Count, Field(description="Largest clip: frames times width times height.")] = (
        481 * 2048 * 2048
    )
    job_timeout_seconds: Annotated[Seconds, Field(description="Longest run of one job.")] = 3600.0
    retention_seconds: Annotated[Seconds, Field(description="How long finished jobs are kept.")] = 86_400.0
    drain_seconds: Annotated[Seconds, Field(description="How long SIGTERM waits for running jobs.")] = 300.0
    max_body_bytes: Annotated[Count, Field(description="Largest request body.")] = 180_000_000
    max_body_seconds: Annotated[Seconds, Field(description="Longest that a request body may take to come.")] = 600.0
    max_header_seconds: Annotated[Seconds, Field(description="Longest that a request's headers may take.")] = 30.0
    max_stall_seconds: Annotated[Seconds, Field(description="Longest that a caller may take nothing of an answer.")] = (
        120.0
    )
    max_audio_bytes: Annotated[Count, Field(description="Largest audio file.")] = 100_000_000
    max_image_bytes: Annotated[Count, Field(description="Largest image file.")] = 32_000_000
    max_audio_seconds: Annotated[Count, Field(description="Longest audio.")] = 600
    max_uploads: Annotated[Count, Field(description="Uploaded files that may lie ready.")] = 100
    fetch_seconds: Annotated[Seconds, Field(description="Longest fetch of an address.")] = 30.0
    fetch_http: Annotated[bool, Field(description="Fetch http addresses too.")] = False
    fetch_domains: Annotated[Words, Field(description="The only hosts to fetch from; all where empty.")] = ()
    fetch_networks: Annotated[Networks, Field(description="Private networks that may be fetched from.")] = ()
    otel: Annotated[bool, Field(description="Send spans to where OTEL_EXPORTER_OTLP_ENDPOINT says.")] = False
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$", description="debug to error.")] = "info"

    @model_validator(mode="after")
    def _keys_or_loopback(self) -> Self:
        if self.no_auth and not _is_loopback(self.host):
            raise ValueError("no_auth: allowed on a loopback address only")
        if not (self.no_auth or self.api_keys or self.api_key_file):
            raise ValueError("api_keys: none; give api_key_file or api_keys, or no_auth on a loopback address")
        return self

    @model_validator(mode="after")
    def _ray_and_redis(self) -> Self:
        if self.ray and self.redis is None:
            raise ValueError("redis: needed with ray: the job store that replicas on other machines reach")
        if self.ray_min_replicas > self.ray_max_replicas:
            raise ValueError(f"ray_min_replicas: at most ray_max_replicas, {self.ray_max_replicas}")
        return self

    def keys(self) -> tuple[str, ...]:
        """Every key.

        Raises:
            RequestError: The key file cannot be read or holds none.
        """
        if self.api_key_file is None:
            return self.api_keys
        try:
            lines = Path(self.api_key_file).read_text("utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError("api_key_file", self.api_key_file, "a text file with one key a line") from error
        if not lines:
            raise RequestError("api_key_file", self.api_key_file, "a file that holds a key")
        return (*self.api_keys, *lines)


def load_settings(flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None) -> Settings:
    """Settings from their four sources; a flag that is None was not given.

    Raises:
        RequestError: A setting is unknown or not allowed.
    """
    merged: dict[str, Any] = {}
    if file is not None:
        try:
            merged |= tomllib.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError("config", str(file), "a readable TOML file") from error
    for name in Settings.model_fields:
        text = environment.get(f"{ENVIRONMENT_PREFIX}{name.upper()}")
        if text is not None:
            merged[name] = text
    merged |= {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise _refusal(error, merged) from None


def _refusal(error: ValidationError, merged: Mapping[str, Any]) -> RequestError:
    found = error.errors(include_url=False)[0]
    if not found["loc"]:
        field, _, allowed = str(found["msg"]).removeprefix("Value error, ").partition(": ")
        return RequestError(field, merged.get(field), allowed)
    field = str(found["loc"][0])
    if field not in Settings.model_fields:
        return RequestError(field, merged.get(field), f"only the settings {', '.join(Settings.model_fields)}")
    shown = "(hidden)" if field in _SECRET else merged.get(field)
    return RequestError(field, shown, f"{Settings.model_fields[field].description} ({found['msg']})")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
