"""The Deck: what it shows, that it is safe, small and cheap, and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Progress, make_checkpoint
from flytekit import FlyteContext, task, workflow
from flytekit.extras.pytorch import PyTorchCheckpoint as Declared

from torchferry.flyte import LoadedCheckpoint, PyTorchCheckpoint, PyTorchCheckpointTransformer
from torchferry.flyte.deck import MAX_TENSORS

transformer = PyTorchCheckpointTransformer()


def html_of(value: Any, context: FlyteContext | None = None) -> str:
    return transformer.to_html(context or FlyteContext.current_context(), value, PyTorchCheckpoint)


class Page(HTMLParser):
    """The tags and texts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"rect", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f" {data}"


def test_it_shows_totals_tensors_groups_and_hyperparameters() -> None:
    page = Page(html_of(make_checkpoint()))
    for text in (
        "in tensors",
        "0.weight",
        "16 \N{MULTIPLICATION SIGN} 16",
        "float32",
        "1.0 kB",
        "2.bias",
        "Optimizer groups",
        "betas",
    ):
        assert text in page.text
    for text in ("(0.9, 0.999)", "Hyperparameters", "epochs", "0.25", "Where the bytes are", "optimizer: exp_avg"):
        assert text in page.text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 1


def test_shares_are_of_all_bytes() -> None:
    page = Page(html_of(LoadedCheckpoint({"module_state_dict": {"a": torch.zeros(3), "b": torch.zeros(1)}})))
    assert "75.0%" in page.text
    assert "25.0%" in page.text


@pytest.mark.parametrize("prefix", ["", "module._orig_mod.", "a.b.c.d."])
def test_the_chart_shows_the_parts_of_a_model_in_wrappers(prefix: str) -> None:
    content = {f"{prefix}{part}.weight": torch.ones(3) for part in ("encoder", "decoder")}
    html = html_of(LoadedCheckpoint({"module_state_dict": content}))
    assert html.count("<rect") == 2
    assert f">{prefix}encoder<" in html


def test_a_shared_storage_counts_once() -> None:
    weight = torch.zeros(250)
    page = Page(html_of(LoadedCheckpoint({"module_state_dict": {"a": weight, "tied": weight, "view": weight[:1]}})))
    assert page.text.split("in tensors")[0].strip().endswith("1.0 kB")


def test_everything_from_the_checkpoint_is_escaped() -> None:
    evil = "</td><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    content = {
        "module_state_dict": {evil: torch.ones(2)},
        "optimizer_state_dict": {"state": {0: {evil: torch.ones(2)}}, "param_groups": [{evil: evil, "params": [0]}]},
        evil: evil,
    }
    page = Page(html_of(LoadedCheckpoint(content, uri=f"s3://bucket/{evil}")))
    assert {tag for tag, _ in page.tags} <= {
        *("div", "p", "b", "span", "h3", "table", "tr", "th", "td", "svg", "rect", "text", "style")
    }
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 5


def test_names_that_are_no_text_do_not_spoil_the_page() -> None:
    html_of(LoadedCheckpoint({"\ud800": "\udfff", "module_state_dict": {"\ud800": torch.ones(1)}})).encode()


def test_styles_apply_to_this_block_only_and_nothing_comes_from_the_network() -> None:
    html = html_of(make_checkpoint())
    [style] = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    for selectors in re.findall(r"([^{}]+)\{", style):
        assert all(selector.strip().startswith(".torchferry-deck") for selector in selectors.split(","))
    assert not re.findall(r"https?:|url\(|@import|<link|<script|src=", html)


def test_ten_thousand_tensors_take_less_than_200_kb() -> None:
    name = "model.transformer.layers.{}.self_attention.query_key_value.projection.weight"
    state = {name.format(i): torch.zeros(i % 7 + 1, 3) for i in range(10_000)}
    optimizer = {
        "state": {i: {"exp_avg": torch.zeros(2)} for i in range(10_000)},
        "param_groups": [{"params": []}] * 500,
    }
    hyperparameters = {f"name_{i}" * 20: "x" * 10_000 for i in range(1_000)}
    html = html_of(LoadedCheckpoint({"module_state_dict": state, "optimizer_state_dict": optimizer, **hyperparameters}))
    assert len(html.encode()) < 200_000
    assert f"The {MAX_TENSORS} largest of 10,000" in html


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"epochs": 1},
        {"module_state_dict": None},
        {"module_state_dict": 3, "optimizer_state_dict": "odd"},
        {"optimizer_state_dict": {"param_groups": [None, {"params": 3}]}},
        {
            "module_state_dict": {
                "meta": torch.ones(2, device="meta"),
                "empty": torch.ones(0),
                "scalar": torch.tensor(1),
            }
        },
        {"module_state_dict": {"sparse": torch.eye(3).to_sparse(), "complex": torch.ones(2, dtype=torch.complex64)}},
        {"a": {"nested": [torch.ones(2), (torch.ones(3),)]}, 5: "key"},
    ],
)
def test_checkpoints_of_every_shape_have_a_page(content: Any) -> None:
    Page(html_of(LoadedCheckpoint(content)))


class Nasty:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize("value", [LoadedCheckpoint({"a": Nasty()}), PyTorchCheckpoint(module=3), None, 5])  # type: ignore[arg-type]
def test_it_never_raises(value: Any) -> None:
    assert html_of(value).startswith('<div class="torchferry-deck">')


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
                *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--window-size=1100,1400"),
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
    bars: [...block.querySelectorAll("rect")].map(rect => box(rect).width),
    overflow: [...block.querySelectorAll("svg text")].filter(text => box(text).left < box(block).left).length,
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
        made = make_checkpoint(width=64)
        return PyTorchCheckpoint(module=made.module, hyperparameters=Progress(), optimizer=made.optimizer)

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
        assert measured["overflow"] == 0
        assert measured["heading"] == "15px"
        assert measured["outside"] == "none"
        screenshot = tmp_path / f"{index}.png"
        look(browser, page, f"--screenshot={screenshot}")
        assert screenshot.stat().st_size > 20_000
