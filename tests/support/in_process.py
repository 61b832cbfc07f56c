"""The command, run in the process of the tests."""

from portable_gpt2.cli import main


def runner(capsys):
    """Return a function that runs the command with arguments, and returns its exit status, stdout and stderr."""

    def run(*args):
        capsys.readouterr()
        try:
            status = main(list(args))
        except SystemExit as exit_:
            status = exit_.code
        return status, *capsys.readouterr()

    return run
