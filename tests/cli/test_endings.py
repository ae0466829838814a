"""How a command ends that is interrupted, is read no further, or meets a file that is not what it has to be."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from dsv4_jax import cli
from dsv4_jax.cli import main, train


@pytest.fixture
def command(monkeypatch):
    """`dsv4 fake`, which raises the error that it is given."""

    def register(error):
        def fail(_):
            raise error

        monkeypatch.setitem(sys.modules, "dsv4_jax.cli.fake", SimpleNamespace(main=fail))
        monkeypatch.setitem(cli.COMMANDS, "fake", ("dsv4_jax.cli.fake", "fails"))

    return register


@pytest.mark.parametrize(
    ("error", "words"),
    [(KeyboardInterrupt(), "interrupted"), (KeyboardInterrupt("Step 3 is kept"), "interrupted. Step 3 is kept")],
)
def test_an_interrupted_command_says_so_in_a_line(command, capsys, error, words):
    command(error)
    assert main(["fake"]) == 130
    assert capsys.readouterr().err == f"dsv4 fake: {words}\n"


def test_an_interrupted_run_says_whether_anything_was_saved(tmp_path):
    assert train.left_in(str(tmp_path)) == "Nothing was saved yet"
    for step in (2, 10):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").touch()
    assert train.left_in(str(tmp_path)) == f"The same command goes on from step 10 in {tmp_path}"


def test_an_error_of_the_system_is_for_people_only_if_it_names_a_file(command, capsys):
    command(NotADirectoryError(20, "Not a directory", "README.md/x"))
    assert main(["fake"]) == 2
    assert capsys.readouterr().err == "dsv4 fake: Not a directory: README.md/x\n"
    command(OSError(9, "Bad file descriptor"))
    with pytest.raises(OSError, match="Bad file descriptor"):
        main(["fake"])


def test_output_that_nobody_reads_any_more_ends_the_command_in_silence():
    """`dsv4 convert --dry-run v4-flash | head -1`: the pipe is smaller than the list."""
    listing = [sys.executable, "-m", "dsv4_jax.cli", "convert", "--dry-run", "v4-flash"]
    with subprocess.Popen(listing, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 141)
