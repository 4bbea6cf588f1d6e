"""How commands end: a pipe that nobody reads, streams that are closed."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


def program(main: str) -> list[str]:
    """A program of `run_cli`."""
    code = f"import sys, os; from pipeline.errors import UserError, run_cli\ndef main():\n    {main}\nrun_cli(main)"
    return [sys.executable, "-c", code]


def run(main: str, redirect: str) -> subprocess.CompletedProcess[str]:
    """It in bash, which shows the exit statuses of both ends of a pipe."""
    script = f'"$@" {redirect}; echo "${{PIPESTATUS[0]}}" >&2'
    command = ["bash", "-c", script, "bash", *program(main)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("text", ["'x' * 10", "'x' * 1000000"])  # one that only the end flushes, and one before
def test_a_reader_that_is_gone_is_no_error(text):
    pipe = subprocess.PIPE
    command = program(f"sys.stdin.read(); sys.stdout.write({text})")
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        process.stdin.close()  # from now on it writes
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_another_broken_pipe_is_one():
    done = run("r, w = os.pipe(); os.close(r); os.write(w, b'x')", "| cat")
    assert "BrokenPipeError" in done.stderr
    assert done.stderr.endswith("\n1\n")


def test_closed_streams_and_names_that_are_no_text():
    assert run("sys.stdout.write('x')", ">&-").stderr == "0\n"
    assert run("raise UserError('x')", "2>&-").stderr == "2\n"
    done = run("sys.stdout.write(os.fsdecode(b'caf\\xe9'))", "")
    assert (done.stdout, done.stderr) == ("caf\\udce9", "0\n")
