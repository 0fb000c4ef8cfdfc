"""Native start-up talk is held back; what matters gets through, and an error does not lose it."""

from __future__ import annotations

import os

import pytest

from state.process.quiet_stderr import own_stderr, quiet_stderr, quiet_tensorflow


def test_talk_is_held_back_and_the_rest_gets_through(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_stderr():
        os.write(2, b"I0000 00:00:1795578140.261666    6784 port.cc:153] oneDNN custom operations are on.\n")
        os.write(2, b"something is wrong\n")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "something is wrong\nafterwards\n"


def test_an_error_loses_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), quiet_stderr():
        os.write(2, b"why\n")
        raise ValueError("x")
    assert capfd.readouterr().err == "why\n"


def test_the_processs_own_log_is_not_held_back(capfd: pytest.CaptureFixture[str]) -> None:
    with own_stderr() as stream, quiet_stderr():
        stream.write("progress\n")
        stream.flush()
        assert capfd.readouterr().err == "progress\n"


def test_what_the_operator_set_stays() -> None:
    environment = {"TF_CPP_MIN_LOG_LEVEL": "0", "CUDA_VISIBLE_DEVICES": "1"}
    quiet_tensorflow(environment)
    assert environment == {"TF_CPP_MIN_LOG_LEVEL": "0", "CUDA_VISIBLE_DEVICES": "1"}
