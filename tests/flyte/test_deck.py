"""The Deck of a task: made once, and shown by a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Progress, make_checkpoint
from flytekit import FlyteContext, task, workflow
from flytekit.extras.pytorch import PyTorchCheckpoint as Declared

from torchferry.flyte import PyTorchCheckpoint, PyTorchCheckpointTransformer


def test_it_is_what_the_transformer_says_of_a_checkpoint() -> None:
    made = PyTorchCheckpointTransformer().to_html(FlyteContext.current_context(), make_checkpoint(), PyTorchCheckpoint)
    assert made.startswith('<div class="torchferry-deck">')
    assert "0.weight" in made


def test_it_asks_the_module_for_its_state_only_when_it_is_saved(s3_context: FlyteContext) -> None:
    asked = []

    class Expensive(torch.nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            asked.append(1)
            return super().state_dict(*args, **kwargs)

    @task(enable_deck=True)
    def make() -> Declared:
        return PyTorchCheckpoint(module=Expensive(2, 2))

    make()
    assert s3_context
    assert asked == [1]


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="session")
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "The Deck is looked at in Chromium: install it (apt-get install chromium)."
    return found


def look(browser: str, page: Path, *arguments: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        result = subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--window-size=640,1400"),
                *(*arguments, page.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return result.stdout


MEASURE = """
<script>
addEventListener("load", () => {
  const block = document.querySelectorAll(".torchferry-deck")[INDEX];
  const box = element => element.getBoundingClientRect();
  const result = {
    visible: box(block).height > 300 && box(block).width > 300,
    rows: block.querySelectorAll("tr").length,
    bars: [...block.querySelectorAll(".bars i")].map(bar => box(bar).width),
    overflow: [...block.querySelectorAll("*")].filter(part => box(part).right > box(block).right + 1).length,
    smallest: Math.min(...[...block.querySelectorAll("span, td, th")].map(
      part => parseFloat(getComputedStyle(part).fontSize))),
    heading: getComputedStyle(block.querySelector("h3")).fontSize,
    outside: getComputedStyle(document.querySelector("nav")).maxWidth,
  };
  const output = document.createElement("pre");
  output.id = "measured";
  output.textContent = JSON.stringify(result);
  document.body.append(output);
});
</script>
"""


def test_a_browser_shows_the_deck_of_a_task(browser: str, s3_context: FlyteContext, tmp_path: Path) -> None:
    @task(enable_deck=True)
    def make() -> Declared:
        module = torch.nn.Sequential(*(torch.nn.Linear(64 + i, 65 + i) for i in range(8)))
        optimizer = torch.optim.Adam(module.parameters())
        module(torch.randn(2, 64)).sum().backward()
        optimizer.step()
        return PyTorchCheckpoint(module=module, hyperparameters=Progress(), optimizer=optimizer)

    @task(enable_deck=True)
    def receive(checkpoint: Declared) -> int:
        return len(checkpoint)  # type: ignore[arg-type]  # a dict, too

    @workflow
    def wf() -> int:
        return receive(checkpoint=make())

    assert wf() == 4
    decks = sorted(
        Path(s3_context.file_access.local_sandbox_dir).rglob("deck.html"), key=lambda path: path.stat().st_mtime
    )
    assert len(decks) == 2
    for index, (deck, tab) in enumerate(zip(decks, ("Output", "Input"), strict=True)):
        html = deck.read_text()
        tabs = re.findall(r"<li onclick[^>]*>([^<]+)</li>", html)
        page = tmp_path / f"{index}.html"
        show = f"<script>handleLinkClick(document.querySelectorAll('#flyte-frame-tabs li')[{tabs.index(tab)}])</script>"
        page.write_text(html.replace("</html>", show + MEASURE.replace("INDEX", "0") + "</html>"))
        dom = look(browser, page, "--dump-dom")
        match = re.search(r'<pre id="measured">(.*?)</pre>', dom)
        assert match, dom[-2000:]
        measured = json.loads(match[1])
        assert measured["visible"], tab
        assert measured["rows"] > 15
        assert len(measured["bars"]) > 4
        assert max(measured["bars"]) > 100
        assert measured["smallest"] >= 12
        assert measured["overflow"] == 0
        assert measured["heading"] == "15px"
        assert measured["outside"] == "none"
        screenshot = tmp_path / f"{index}.png"
        look(browser, page, f"--screenshot={screenshot}")
        assert screenshot.stat().st_size > 20_000
