"""Whether the distributions hold what they should: ``python tests/distributions.py dist/*``; needs no package."""

from __future__ import annotations

import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORBIDDEN = ("benchmarks/results", "package-lock.json", "node_modules", ".nox", ".github", "__pycache__", ".pyc")
SOURCES = {
    path.relative_to(ROOT / folder).as_posix()
    for folder in ("src", "storage_backends")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
}


def check_wheel(path: Path) -> list[str]:
    """What is wrong with a wheel."""
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
    found = {name for name in names if not name.startswith(info)}
    wrong = [f"is missing in the wheel: {name}" for name in sorted(SOURCES - found)]
    wrong += [f"is too much in the wheel: {name}" for name in sorted(found - SOURCES)]
    wrong += [
        f"is missing in the wheel: {name}"
        for name in ("METADATA", "entry_points.txt", "licenses/LICENSE")
        if f"{info}/{name}" not in names
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if metadata["Version"] != project["version"] or project["version"] not in path.name:
        wrong.append(f"is the version of the wheel: {metadata['Version']}")
    for line in str(metadata.get_payload()).splitlines():
        wrong += [
            f"is a link that PyPI cannot follow: {target}"
            for target in (part.split(")")[0] for part in line.split("](")[1:])
            if not target.startswith(("http://", "https://", "#"))
        ]
    return wrong


def check_sdist(path: Path) -> list[str]:
    """What is wrong with a source distribution."""
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wrong = [f"is in the source distribution: {name}" for name in sorted(names) if any(f in name for f in FORBIDDEN)]
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "noxfile.py", "src/torchferry/py.typed"}
    return wrong + [f"is missing in the source distribution: {name}" for name in sorted(wanted - names)]


def main() -> int:
    """Prints what is wrong."""
    wrong = []
    for path in map(Path, sys.argv[1:]):
        wrong += check_wheel(path) if path.suffix == ".whl" else check_sdist(path)
    for line in wrong:
        print(line)
    print("The distributions hold what they should." if not wrong else f"{len(wrong)} things are wrong.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
