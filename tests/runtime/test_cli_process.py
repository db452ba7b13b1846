# SPDX-License-Identifier: Apache-2.0
"""What a process says at its end."""

import typer

from ltxrt.cli_process import Stopped, resumable, run_app


def test_what_a_signal_leaves_is_said(capsys):
    app = typer.Typer()

    @app.command()
    def keeps():
        with resumable("the same command goes on"):
            raise Stopped(130)

    @app.command()
    def clears():
        raise Stopped(143)

    assert run_app(app, "program", ["keeps"]) == 130
    assert capsys.readouterr().err == "error: stopped by SIGINT, the same command goes on\n"
    assert run_app(app, "program", ["clears"]) == 143
    assert capsys.readouterr().err == "error: stopped by SIGTERM, nothing is left behind\n"
