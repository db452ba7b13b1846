# SPDX-License-Identifier: Apache-2.0
"""``ltxrt``: the command line.

stdout carries only the result (a path, a table, or JSON), stderr everything else. Names, defaults and help of the
request's flags come from ``Request``, and ``Request`` checks them, so that every way in gives the same refusals.
Heavy modules are imported inside the commands, so that ``--help`` and usage errors are instant.
"""

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .cli_process import emit, main_app, run_app
from .errors import OutputError
from .request import Request

__all__ = ["app", "main", "run"]

_DEMO_PROMPT = (
    "Close-up of a friendly young woman in a sunlit room who looks into the camera and speaks, soft light, 35 mm"
)
_DEMO_SIZE = "192x192"
_DEMO_OUTPUT = Path("ltxrt-demo.mp4")

_EPILOG = """\b
Exit codes:
    0  done
    1  internal error, or something that doctor finds broken
    2  the command line does not parse
    3  a field of the request is refused
    4  the audio, the image or the file to verify is refused
    5  the bundle is missing, damaged or of another version
    6  a network cannot be loaded or run on this machine
    7  the result cannot be written
    8  a clip is not what it should be
  130  interrupted with Ctrl-C (143 by SIGTERM, 129 by SIGHUP)
"""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _field(name: str, *flags: str, **options: Any) -> Any:
    """An option for a field of the request."""
    return typer.Option(*flags, help=Request.model_fields[name].description, **options)


def _default(name: str) -> Any:
    return Request.model_fields[name].default


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        emit([f"ltxrt {__version__}"])
        raise typer.Exit


BundleFlag = Annotated[
    Path | None,
    typer.Option("--bundle", help="Folder of a bundle; the tiny one of the package otherwise.", show_default=False),
]
OverwriteFlag = Annotated[bool, typer.Option("--overwrite", help="Replace an output file that is there.")]
ThreadsFlag = Annotated[int, typer.Option("--threads", min=0, help="CPU threads of an operator; 0 uses every core.")]
PromptCacheFlag = Annotated[
    str, typer.Option("--prompt-cache", help="Where encoded prompts are kept: memory, off, or a folder.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an internal error.")] = False,
) -> None:
    """Audio to video with LTX-2.3: sound, a prompt and a first frame in, a lip-synced MP4 out."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option("--output", help=f"The clip; ./{_DEMO_OUTPUT}, which is replaced, otherwise.", show_default=False),
    ] = None,
    seed: Annotated[int | None, _field("seed", "--seed")] = 7,
    bundle: BundleFlag = None,
    overwrite: OverwriteFlag = False,
    threads: ThreadsFlag = 0,
    as_json: JsonFlag = False,
) -> None:
    """Make a small clip of the speech that ships with ltxrt."""
    from .media import bundled_speech

    request = Request(prompt=_DEMO_PROMPT, input_audio=bundled_speech(), resolution=_DEMO_SIZE, seed=seed)
    # Nothing but an earlier demo is expected under the name that nobody chose.
    destination = _destination(output or _DEMO_OUTPUT, request, overwrite=overwrite or output is None)
    _make(request, destination, {"bundle": bundle, "threads": threads}, as_json=as_json)


@app.command()
def generate(  # noqa: PLR0913  # one parameter per field of the request
    audio: Annotated[str, _field("input_audio", "--audio", show_default=False)],
    prompt: Annotated[str, _field("prompt", "--prompt", show_default=False)],
    image: Annotated[str | None, _field("input_image", "--image", show_default=False)] = _default("input_image"),
    match_audio_length: Annotated[
        bool, _field("match_audio_length", "--match-audio-length/--no-match-audio-length")
    ] = _default("match_audio_length"),
    num_frames: Annotated[int, _field("num_frames", "--num-frames")] = _default("num_frames"),
    resolution: Annotated[str, _field("resolution", "--resolution")] = _default("resolution"),
    frames_per_second: Annotated[float, _field("frames_per_second", "--frames-per-second")] = _default(
        "frames_per_second"
    ),
    image_strength: Annotated[float, _field("image_strength", "--image-strength")] = _default("image_strength"),
    generate_audio: Annotated[bool, _field("generate_audio", "--generate-audio/--no-generate-audio")] = _default(
        "generate_audio"
    ),
    video_quality: Annotated[str, _field("video_quality", "--video-quality")] = _default("video_quality"),
    negative_prompt: Annotated[str, _field("negative_prompt", "--negative-prompt")] = _default("negative_prompt"),
    seed: Annotated[int | None, _field("seed", "--seed", show_default="random")] = _default("seed"),
    bundle: BundleFlag = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="The clip; ./<name of the audio>.mp4 otherwise.", show_default=False),
    ] = None,
    overwrite: OverwriteFlag = False,
    threads: ThreadsFlag = 0,
    prompt_cache: PromptCacheFlag = "memory",
    as_json: JsonFlag = False,
) -> None:
    """Make a clip whose motion follows the audio."""
    request = Request(
        prompt=prompt,
        input_audio=audio,
        input_image=image,
        match_audio_length=match_audio_length,
        num_frames=num_frames,
        resolution=resolution,
        frames_per_second=frames_per_second,
        image_strength=image_strength,
        generate_audio=generate_audio,
        video_quality=video_quality,
        negative_prompt=negative_prompt,
        seed=seed,
    )
    destination = _destination(output or Path(f"{Path(audio).stem}.mp4"), request, overwrite=overwrite)
    opening = {"bundle": bundle, "threads": threads, "prompt_cache": prompt_cache}
    _make(request, destination, opening, as_json=as_json)


@app.command()
def inspect(
    bundle: Annotated[
        Path | None, typer.Argument(help="Folder of the bundle; the tiny one otherwise.", show_default=False)
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Show what a clip takes of a GPU's memory instead; no hashing.")
    ] = False,
    clip: Annotated[
        str | None, typer.Option("--clip", help="For --memory: WIDTHxHEIGHTxFRAMES.", show_default="automatic size")
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="For --memory.", show_default="high")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what a bundle holds and check every hash."""
    from .bundle import Bundle
    from .cli_progress import reporter
    from .inspection import bundle_json, bundle_lines, hash_large_files, memory_json, memory_lines, planned_memory

    opened = Bundle.open(bundle)
    if memory:
        planned = planned_memory(opened, preset, clip)
        emit(memory_json(planned) if as_json else memory_lines(planned))
        return
    with reporter() as progress:
        for step in hash_large_files(opened):
            progress.show(step)
    emit(bundle_json(opened) if as_json else bundle_lines(opened))


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="An MP4 file.", show_default=False)], as_json: JsonFlag = False
) -> None:
    """Read a clip back and check it.

    Every frame decodes; times are exact; sound and picture end together; index first; colour and AI-generated tags.
    """
    from .cli_report import report_json, report_lines
    from .errors import VerificationError
    from .readback import check_clip

    report = check_clip(file)
    emit({"file": str(file), **report_json(report)} if as_json else report_lines(report))
    if not report.ok:
        raise typer.Exit(VerificationError.exit_code)


@app.command()
def bench(  # noqa: PLR0913  # one parameter per choice
    bundle: BundleFlag = None,
    frames: Annotated[int, typer.Option("--frames", help="Frames of the clip, at 24 a second.")] = 121,
    resolution: Annotated[str, _field("resolution", "--resolution")] = "256x256",
    video_quality: Annotated[str, _field("video_quality", "--video-quality")] = _default("video_quality"),
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Recorded runs, after one that is not.")] = 5,
    threads: ThreadsFlag = 0,
    prompt_cache: PromptCacheFlag = "off",
    as_json: JsonFlag = False,
) -> None:
    """Measure how long clips take: stages, first fragment, memory, time to ready."""
    from .cli_bench import BenchOptions, run_bench

    options = BenchOptions(
        bundle=bundle,
        frames=frames,
        resolution=resolution,
        video_quality=video_quality,
        repeats=repeats,
        threads=threads,
        prompt_cache=prompt_cache,
    )
    report = run_bench(options)
    emit(report.as_json() if as_json else report.lines())


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Say what this machine can run, and why not more."""
    from .cli_report import columns
    from .doctor import examine, works

    findings = tuple(examine())
    if as_json:
        emit({"ok": works(findings), "findings": [finding._asdict() for finding in findings]})
    else:
        emit(columns((finding.status, finding.name, finding.detail) for finding in findings))
    if not works(findings):
        raise typer.Exit(1)


@app.command()
def presets(as_json: JsonFlag = False) -> None:
    """List the quality presets."""
    from .cli_report import preset_json, preset_lines
    from .preset import load_presets

    loaded = load_presets()
    emit({"presets": [preset_json(preset) for preset in loaded]} if as_json else preset_lines(loaded))


@app.command()
def serve(  # noqa: PLR0913  # the flags that most servers need; --set gives the rest
    bundle: BundleFlag = None,
    data: Annotated[str | None, typer.Option("--data", help="Folder for jobs and results; ./ltxrt-data.")] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port; 8000, and 0 takes a free one.")] = None,
    api_key_file: Annotated[str | None, typer.Option("--api-key-file", help="File with one key a line.")] = None,
    no_auth: Annotated[bool | None, typer.Option("--no-auth", help="No keys; on a loopback address only.")] = None,
    ray: Annotated[bool | None, typer.Option("--ray", help="Workers on a Ray cluster; needs --redis.")] = None,
    redis: Annotated[str | None, typer.Option("--redis", help="Redis with the jobs of several front ends.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting, as NAME=VALUE.")] = None,
) -> None:
    """Serve clips over HTTP. Settings: these flags, then LTXRT_* in the environment, then the TOML file."""
    from .serve.settings import load_settings

    flags: dict[str, Any] = {"bundle": None if bundle is None else str(bundle), "data": data, "host": host}
    flags |= {"port": port, "api_key_file": api_key_file, "no_auth": no_auth, "ray": ray, "redis": redis}
    for item in settings or ():
        name, _, value = item.partition("=")
        flags[name] = value
    loaded = load_settings(flags, os.environ, config)
    try:
        from .serve.command import serve as run_server
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error.name} is missing; install ltxrt[server]") from error
    run_server(loaded)


def _destination(output: Path, request: Request, *, overwrite: bool) -> Path:
    """Where the clip goes, refused now where it cannot or must not."""
    from .clip_file import check_destination

    check_destination(output)
    if output.exists():
        sources = (request.input_audio, request.input_image)
        if any(source is not None and _same_file(output, Path(source)) for source in sources):
            raise OutputError(f"{output}: is an input of the clip; choose another --output")
        if not overwrite:
            raise OutputError(f"{output}: exists; choose another --output, or --overwrite to replace it")
    return output


def _same_file(output: Path, source: Path) -> bool:
    try:
        return output.samefile(source)
    except OSError:  # a source that is not there is refused, in better words, by whoever reads it
        return False


def _make(request: Request, output: Path, opening: dict[str, Any], *, as_json: bool) -> None:
    """Make the clip, with progress and a summary on stderr; its path, or the result as JSON, on stdout.

    ``opening`` goes to ``Pipeline.open``.
    """
    from .cli_progress import reporter
    from .cli_report import engine_line, result_lines
    from .engine_store import backends
    from .pipeline import Pipeline
    from .result import STAGES, Progress, Result

    pipeline = Pipeline.open(**opening)
    typer.echo(engine_line(pipeline.store.backend, backends(pipeline.bundle)), err=True)
    result: Result | None = None
    # Closing cleans up, also where an interruption comes between two events.
    with closing(pipeline.render_events(request, output)) as events, reporter(STAGES) as progress:
        for event in events:
            if isinstance(event, Progress):
                progress.show(event)
            else:
                result = event
    assert result is not None  # events end with it
    for line in result_lines(result, output.stat().st_size):
        typer.echo(line, err=True)
    emit({"output": str(output), **result.as_json()} if as_json else [str(output)])


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors of ltxrt's own become one line on stderr."""
    return run_app(app, "ltxrt", arguments)


def main() -> NoReturn:
    """Entry point of ``ltxrt``."""
    main_app(app, "ltxrt")
