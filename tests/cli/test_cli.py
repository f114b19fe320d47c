"""What the command line makes of errors that nothing else has caught."""

from __future__ import annotations

import errno

import pytest

from alignprop_cli import cli


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (MemoryError("no room"), 4, "out of memory: no room"),
        (OSError(errno.ENOSPC, "No space left", "r/x"), 4, "the disk is full while writing r/x"),
        (PermissionError(errno.EACCES, "no", "r/x"), 4, "error: cannot read or write r/x: no\n"),
        (OSError(errno.EDQUOT, "quota", "r/x"), 4, "cannot write r/x: quota"),
        (ZeroDivisionError("oops"), 1, "unexpected ZeroDivisionError: oops"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_nobody_caught_has_its_exit_code_and_no_traceback(
    capsys, monkeypatch, error, code, part
) -> None:
    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    printed = capsys.readouterr()
    assert ended.value.code == code
    assert part in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
