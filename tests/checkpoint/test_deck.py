"""The Deck: what it shows, that it is safe, small and cheap."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from samples import make_checkpoint

from torchferry import TransferReport
from torchferry.checkpoint import LoadedCheckpoint, PyTorchCheckpoint
from torchferry.checkpoint.content import content_of
from torchferry.checkpoint.deck import MAX_TENSORS, deck_of
from torchferry.checkpoint.summary import remember_summary


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
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f" {data}"


def test_it_shows_totals_tensors_groups_and_hyperparameters() -> None:
    page = Page(deck_of(make_checkpoint()))
    for text in (
        "in tensors",
        "parameters",
        "0.weight",
        "16 \N{MULTIPLICATION SIGN} 16",
        "float32",
        "1.0 kB",
        "2.bias",
        "Optimizer groups",
        "betas",
    ):
        assert text in page.text
    for text in ("(0.9, 0.999)", "Hyperparameters", "epochs", "0.25"):
        assert text in page.text
    assert page.text.index("Hyperparameters") < page.text.index("0.weight")  # what one looks for first


def test_a_small_model_has_no_bars_that_repeat_the_table() -> None:
    assert "Where the bytes are" not in deck_of(make_checkpoint())


def test_uniform_layers_are_one_row_and_one_bar() -> None:
    state = {"embedding.weight": torch.zeros(9, 4)}
    for part in ("attention.query", "attention.key", "attention.out", "mlp.up", "mlp.down", "norm"):
        for kind in ("weight", "bias"):
            state |= {f"layers.{i}.{part}.{kind}": torch.zeros(4, 4 if kind == "weight" else 1) for i in range(32)}
    state |= {f"head.{i}.weight": torch.zeros(i + 1) for i in range(3)}
    page = Page(deck_of(LoadedCheckpoint({"module_state_dict": state})))
    assert "layers.0\N{EN DASH}31.attention.query.weight" in page.text
    assert "head.2.weight" in page.text
    assert len([tag for tag, _ in page.tags if tag == "tr"]) == 1 + 1 + 12 + 3
    assert "Where the bytes are" in page.text
    assert "layers.0\N{EN DASH}31.mlp" in page.text
    assert len([tag for tag, _ in page.tags if tag == "i"]) <= 12


def test_it_says_how_long_the_save_took_and_how_fast() -> None:
    checkpoint = make_checkpoint()
    saved = TransferReport("save", "s3://bucket/x", 2_000_000_000, 0.5)
    remember_summary(checkpoint, content_of(checkpoint), "s3://bucket/x", saved)
    text = Page(deck_of(checkpoint)).text
    assert "0.50 s" in text
    assert "to save, 4.0 GB/s" in text


def test_shares_are_of_all_bytes() -> None:
    page = Page(deck_of(LoadedCheckpoint({"module_state_dict": {"a": torch.zeros(3), "b": torch.zeros(1)}})))
    assert "75.0%" in page.text
    assert "25.0%" in page.text


@pytest.mark.parametrize("prefix", ["", "module._orig_mod.", "a.b.c.d."])
def test_the_chart_shows_the_parts_of_a_model_in_wrappers(prefix: str) -> None:
    content = {f"{prefix}{part}.{name}": torch.ones(3) for part in ("encoder", "decoder") for name in "abcdefgh"}
    html = deck_of(LoadedCheckpoint({"module_state_dict": content}))
    assert html.count("<i ") == 2
    assert f">{prefix}encoder<" in html


def test_a_shared_storage_counts_once() -> None:
    weight = torch.zeros(250)
    page = Page(deck_of(LoadedCheckpoint({"module_state_dict": {"a": weight, "tied": weight, "view": weight[:1]}})))
    assert page.text.split("in tensors")[0].strip().endswith("1.0 kB")


def test_everything_from_the_checkpoint_is_escaped() -> None:
    evil = "</td><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    content = {
        "module_state_dict": {evil: torch.ones(2)},
        "optimizer_state_dict": {"state": {0: {evil: torch.ones(2)}}, "param_groups": [{evil: evil, "params": [0]}]},
        evil: evil,
    }
    page = Page(deck_of(LoadedCheckpoint(content, uri=f"s3://bucket/{evil}")))
    assert {tag for tag, _ in page.tags} <= {*("div", "p", "b", "span", "i", "h3", "table", "tr", "th", "td", "style")}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 5


def test_names_that_are_no_text_do_not_spoil_the_page() -> None:
    deck_of(LoadedCheckpoint({"\ud800": "\udfff", "module_state_dict": {"\ud800": torch.ones(1)}})).encode()


def test_styles_apply_to_this_block_only_and_nothing_comes_from_the_network() -> None:
    html = deck_of(make_checkpoint())
    [style] = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    for selectors in re.findall(r"([^{}]+)\{", style):
        assert all(selector.strip().startswith(".torchferry-deck") for selector in selectors.split(","))
    assert not re.findall(r"https?:|url\(|@import|<link|<script|src=", html)


def test_ten_thousand_tensors_take_less_than_200_kb() -> None:
    name = "model.transformer.layer_{}.self_attention.query_key_value.projection.weight"
    state = {name.format(i): torch.zeros(i % 7 + 1, 3) for i in range(10_000)}
    optimizer = {
        "state": {i: {"exp_avg": torch.zeros(2)} for i in range(10_000)},
        "param_groups": [{"params": []}] * 500,
    }
    hyperparameters = {f"name_{i}" * 20: "x" * 10_000 for i in range(1_000)}
    html = deck_of(LoadedCheckpoint({"module_state_dict": state, "optimizer_state_dict": optimizer, **hyperparameters}))
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
    Page(deck_of(LoadedCheckpoint(content)))


class Nasty:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize("value", [LoadedCheckpoint({"a": Nasty()}), PyTorchCheckpoint(module=3), None, 5])  # type: ignore[arg-type]
def test_it_never_raises(value: Any) -> None:
    assert deck_of(value).startswith('<div class="torchferry-deck">')
