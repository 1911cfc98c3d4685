import sys

from moe_bench.launch.runner import NOT_INSTALLED, run_captured, run_live


def test_what_a_command_prints_is_kept_with_its_exit_code() -> None:
    done = run_captured((sys.executable, "-c", "import sys; print('out'); sys.exit('err')"))
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 1)


def test_a_command_that_does_not_exist_is_reported_as_a_shell_does() -> None:
    done = run_captured(("no-such-program-here",))
    assert (done.returncode, done.stderr) == (NOT_INSTALLED, "no-such-program-here: not installed here")


def test_a_live_command_gives_its_exit_code() -> None:
    assert run_live((sys.executable, "-c", "raise SystemExit(3)")) == 3
