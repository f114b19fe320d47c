"""The checks, one session each: `nox` runs the first three, `nox -s lowest` the oldest versions.

`tests` is there once for each Python that pyproject.toml declares: `nox -s tests-3.12`.
"""

import nox
from packaging.requirements import Requirement

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True

PYPROJECT = nox.project.load_toml("pyproject.toml")
PROJECT = PYPROJECT["project"]
TOOLS = {
    Requirement(requirement).name: requirement
    for requirement in PROJECT["optional-dependencies"]["dev"]
}


@nox.session(python=nox.project.python_versions(PYPROJECT))
def tests(session: nox.Session) -> None:
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    session.install(TOOLS["ruff"], TOOLS["codespell"])
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("codespell")


@nox.session
def types(session: nox.Session) -> None:
    session.install(".[dev]")
    session.run("pyright")


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the tests with the oldest version of each dependency that we say we support."""
    oldest = [requirement.replace(">=", "==") for requirement in PROJECT["dependencies"]]
    session.install(*oldest, ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Try random inputs (--count, --seed, --workers), then kill and damage at every point."""
    session.install(".[test]")
    session.run("python", "-m", "tests.fuzz.run", *session.posargs)
    session.run("pytest", "-m", "slow or not slow", "tests/fuzz", "tests/crash")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel from the source archive and check what is in it."""
    session.install(".[test]", TOOLS["build"], TOOLS["hatchling"])
    session.run("pytest", "-m", "slow", "tests/test_packaging.py")
