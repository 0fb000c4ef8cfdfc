"""The two distributions: `springtide` with every file that a process reads, and `springtide-client`."""

from __future__ import annotations

import email.message
import email.parser
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from deploy.watch import scrape
from springtide_client import Client, ClientError, __version__
from state.process.network import free_port
from tests.e2e.running import SHORT, Loop, until
from tests.laws.sources import PACKAGES, ROOT

NOT_INSTALLED = (
    "deploy/container/",
    "deploy/kubernetes/",
    "springtide_client/README.md",
    "springtide_client/pyproject.toml",
)
"""What is used from a clone only."""
MOST_BYTES = 3_000_000
FIRST_START_S = 480.0
"""Of a first start, which compiles all kernels."""
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels by the name of their distribution, built from a copy of the sources."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built)
    subprocess.run([sys.executable, *PIP, *options, source / "springtide_client", source], check=True)
    return {path.name.partition("-")[0]: path for path in built.iterdir()}


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.BytesParser().parsebytes(files.read(name))


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as files:
        return {name for name in files.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_file_of_the_packages(wheels: dict[str, Path]) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert contents(wheels["springtide"]) == {name for name in files if not name.startswith(NOT_INSTALLED)}
    assert metadata(wheels["springtide"])["Version"] == __version__
    assert wheels["springtide"].stat().st_size < MOST_BYTES


def test_the_client_is_a_distribution_of_its_own_that_needs_httpx_and_msgspec_alone(wheels: dict[str, Path]) -> None:
    wheel = wheels["springtide_client"]
    files = (ROOT / "springtide_client").glob("*.py")
    assert contents(wheel) == {f"springtide_client/{name}" for name in (*(path.name for path in files), "py.typed")}
    about = metadata(wheel)
    assert (about["Name"], about["Version"]) == ("springtide-client", __version__)
    assert {re.split(r"\W", needed)[0] for needed in about.get_all("Requires-Dist", [])} == {"httpx", "msgspec"}
    assert about["Requires-Python"] == "<3.14,>=3.10"


@pytest.mark.nightly
@pytest.mark.parametrize("python", ["python3.10", "python3.11", "python3.12", "python3.13"])
def test_the_client_runs_with_each_python_that_it_supports(
    wheels: dict[str, Path], tmp_path: Path, python: str
) -> None:
    own = tmp_path / "own" / "bin" / "python"
    if subprocess.run([python, "-m", "venv", own.parents[1]], capture_output=True).returncode:
        pytest.skip(f"{python} is not installed")
    if subprocess.run([own, *PIP, "install", wheels["springtide_client"]]).returncode:
        pytest.skip("httpx and msgspec cannot be downloaded")
    program = f"{ASKS}\nprint(springtide_client.__version__)"
    done = subprocess.run(
        [own, "-P" if python > "python3.10" else "-s", "-W", "error", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["TimedOut", "Unreachable", __version__]), done.stderr


ASKS = """
import socket, springtide_client
from springtide_client import Client, ClientError
with socket.create_server(("127.0.0.1", 0)) as silent:
    url = f"http://127.0.0.1:{silent.getsockname()[1]}"
    with Client(url, timeout_s=0.2) as client:
        try:
            client.profile("ann")
        except ClientError as error:
            print(type(error).__name__)
with Client(url, timeout_s=0.2) as client:
    try:
        client.segments()
    except ClientError as error:
        print(type(error).__name__)
"""


@pytest.mark.nightly
def test_the_installed_wheel_runs_in_a_directory_with_packages_of_the_same_names(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    """Kafka, stream, trainer, serving, console and metrics, from an environment without the clone."""
    # 1. An environment with the locked packages, as hard links, and the wheel.
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "own"], check=True)
    packages = tmp_path / "own" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    shutil.rmtree(packages)
    shutil.copytree(
        sysconfig.get_path("purelib"),
        packages,
        symlinks=True,
        copy_function=os.link,
        ignore=shutil.ignore_patterns("*springtide*", "__pycache__"),
    )
    python = tmp_path / "own" / "bin" / "python"
    subprocess.run([python, *PIP, "install", "--no-deps", wheels["springtide"]], check=True)
    # 2. A directory with packages that have our names and cannot be imported.
    here = tmp_path / "here"
    for name in PACKAGES:
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text("raise ImportError('this is another package')")
    # 3. `springtide up` there, in the default state directory.
    loop = Loop(here, {**SHORT, "paths.state": here / ".springtide", "console.port": free_port()})
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SPRINGTIDE_", "PYTHON"))}
    with loop.output.open("wb") as output:
        up = subprocess.Popen(
            [python.with_name("springtide"), "up", *loop.flags], cwd=here, env=environment, stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{loop.settings.serving.port}"
        with Client(url, timeout_s=5.0) as client:

            def answer() -> bool:
                assert up.poll() is None, loop.said()
                try:
                    return client.profile("shopper-1").known
                except ClientError:
                    return False

            until(answer, lambda: f"{loop.said()}\n{loop.logs()}", FIRST_START_S)
        build = loop.get("/metrics")[1]
        assert f'version="{__version__}"' in build
        page = f"http://127.0.0.1:{loop.settings.console.port}/"
        until(lambda: scrape.fetch(page)[0] == 200, lambda: f"no page at {page}: {loop.logs()}")
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(240) == 0, loop.said()
    assert sorted(path.name for path in here.iterdir() if not path.name.startswith(".")) == sorted(
        [*PACKAGES, "up.log"]
    )
