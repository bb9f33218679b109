"""README and documentation: their code runs, their links lead somewhere, and one address is the same everywhere."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch
from fsspec.config import conf

import torchferry
from torchferry.testing.servers import S3Server

from .pages import Page

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BUCKET = "bucket"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def _own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a reader's: an empty directory, and nothing configured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where cores are few, threads that wait for each other took most of the CPU
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def _own_store(s3_server: S3Server) -> Iterator[None]:
    """Credentials and an endpoint in the environment. Once for all pages: a client of s3fs takes a second to make."""
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (
            ("AWS_ENDPOINT_URL", s3_server.endpoint),
            ("AWS_ACCESS_KEY_ID", s3_server.key),
            ("AWS_SECRET_ACCESS_KEY", s3_server.secret),
            ("AWS_DEFAULT_REGION", s3_server.region),
        ):
            environment.setenv(name, value)
        yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def _own_bucket(_own_store: None, s3_client: Any) -> Iterator[None]:
    """An empty S3 bucket that is called "bucket"."""
    configured = dict(conf)
    s3_client.create_bucket(Bucket=BUCKET)
    yield
    s3_client.delete_bucket(Bucket=BUCKET)  # with what is in it: no page finds what another has saved
    conf.clear()
    conf.update(configured)


# What flyte 2.12 warns of, or leaves behind
@pytest.mark.filterwarnings("ignore:Support for class-based `config` is deprecated")
@pytest.mark.filterwarnings("ignore:unclosed file .*_template.html:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
@pytest.mark.usefixtures("_own_machine", "_own_bucket")
@pytest.mark.parametrize("path", [path for path in PAGES if Page.read(path).blocks], ids=name_of)
def test_the_code_of_a_page_runs(path: Path) -> None:
    page = Page.read(path)
    if page.missing:
        pytest.skip(f"needs {', '.join(page.missing)}")
    page.run()


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(path: Path) -> None:
    """Those within the repository; mkdocs --strict checks the anchors."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in LINK.findall(text):
        file, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        found = (path.parent / file) if file else path
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", found.read_text(), flags=re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


def test_every_error_is_explained() -> None:
    text = (ROOT / "docs" / "when-it-fails.md").read_text()
    assert {name for name in torchferry.__all__ if name.endswith("Error") and f"| `{name}` |" not in text} == {
        "TorchferryError"
    }


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert "::: torchferry.errors\n" in text
    names = {
        name for name in torchferry.__all__ if not name.endswith("Error") and f"{name}_async" not in torchferry.__all__
    }
    assert {name for name in names if not re.search(rf"^::: torchferry\..*\.{name}$", text, re.MULTILINE)} == set()


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_the_projects_address_is_the_same_everywhere() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    urls = tomllib.loads(pyproject)["project"]["urls"]
    name = urls["Source"].removeprefix("https://github.com/")
    assert f"https://raw.githubusercontent.com/{name}/" in pyproject
    mkdocs = (ROOT / "mkdocs.yml").read_text()
    assert f"site_url: {urls['Documentation']}\n" in mkdocs
    assert f"repo_url: {urls['Source']}\n" in mkdocs
    assert f"{urls['Source']}/security/advisories/new" in (ROOT / "SECURITY.md").read_text()


def test_the_workflows_run_sessions_that_exist() -> None:
    noxfile = (ROOT / "noxfile.py").read_text()
    sessions = set(re.findall(r'name="([\w-]+)"|^def (\w+)\(session: ', noxfile, re.MULTILINE))
    sessions = {name for names in sessions for name in names if name}
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = workflow.read_text()
        for listed in re.findall(r"session: \[(.+)\]", text):
            assert set(listed.split(", ")) <= sessions
        for called in re.findall(r"nox -s ([\w\- ]+)$", text, re.MULTILINE):
            assert set(called.split()) <= sessions
