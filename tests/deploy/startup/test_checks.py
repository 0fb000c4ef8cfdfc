"""Each refusal of the start-up checks names what to change."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from deploy.startup.checks import require_directory, require_disk, require_python
from state.errors import PortTaken, SettingsError, StoreFull, UnusableDisk
from state.process.ports import Port, require_ports

HOST = "127.0.0.1"


@pytest.mark.parametrize("version", [(3, 10, 4), (3, 13, 0), (4, 11)])
def test_another_python_is_refused_with_both_versions(version: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match=rf"Python {version[0]}\.{version[1]} is not supported.*3\.11"):
        require_python(version)


def test_a_full_disk_names_the_directory_and_the_setting(tmp_path: Path) -> None:
    with pytest.raises(StoreFull, match=r"deep.*GiB free.*paths\.state"):
        require_disk(tmp_path / "not" / "yet" / "deep", least_bytes=2**60)


def test_a_taken_port_names_its_owner_and_its_setting() -> None:
    with socket.socket() as holder:
        holder.bind((HOST, 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"port {port} is in use.*process {os.getpid()}.*serving\.port"):
            require_ports([Port("serving.port", HOST, port)])


def test_two_settings_with_one_port_are_both_named() -> None:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    with pytest.raises(PortTaken, match=r"serving\.port and by stream\.metrics_port"):
        require_ports([Port("serving.port", HOST, port), Port("stream.metrics_port", HOST, port)])


def test_port_zero_is_refused_since_the_parts_could_not_find_each_other() -> None:
    with pytest.raises(PortTaken, match=r"trainer\.metrics_port is 0"):
        require_ports([Port("trainer.metrics_port", HOST, 0)])


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(PortTaken, match=r"192\.0\.2\.1.*serving\.port"):
        require_ports([Port("serving.port", "192.0.2.1", 8501)])


@pytest.mark.parametrize(
    ("where", "why"),
    [("file", "is a file"), ("file/deep", "cannot be made"), ("/sys/springtide", "cannot be made")],
)
def test_a_state_directory_that_cannot_be_is_refused_with_the_flag(tmp_path: Path, where: str, why: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnusableDisk, match=rf"{where}.* {why}.*choose another directory with --state"):
        require_directory(tmp_path / where)
