from __future__ import annotations

import asyncio
import collections
import gc
import io
import os
import pathlib
import pickle
import random
import subprocess
import tarfile
import textwrap
import time
import uuid
import warnings
import weakref
import zipfile
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
from fsspec.callbacks import Callback

import torchferry
import torchferry.objects.torch_files
from torchferry.errors import (
    CheckpointChangedError,
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointKeyError,
    CheckpointNotFoundError,
    StorageError,
    TorchferryError,
    UnsafeCheckpointError,
)
from torchferry.formats.layout import Layout
from torchferry.formats.load_buffer import LoadBuffer
from torchferry.loading import load_async
from torchferry.testing.forkserver import python

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import CountingStore  # type: ignore[attr-defined]


# torch says so when it loads quantized tensors, and pickles of another protocol
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:.*quantize", "ignore:.*protocol 4")


def saved(obj: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, **options)
    return file.getvalue()


def reference(data: bytes, **options: Any) -> Any:
    return torch.load(io.BytesIO(data), **options)


def repacked(
    data: bytes, *, change: Callable[[str, bytes], bytes] = lambda _, content: content, reverse: bool = False
) -> bytes:
    """The same records through torch's own writer, changed, or with the storages in reverse order."""
    source = zipfile.ZipFile(io.BytesIO(data))
    names = [name.partition("/")[2] for name in source.namelist()]
    names = [name for name in names if name not in {"version", ".data/serialization_id"}]  # the writer adds its own
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    for name in reversed(names) if reverse else names:
        content = change(name, source.read(f"archive/{name}"))
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return file.getvalue()


class Opaque:
    """A class that torch does not know, with a tensor in it."""

    def __init__(self) -> None:
        self.tensor = torch.arange(4.0)


class Marked(torch.Tensor):
    """A tensor subclass."""


def adam_checkpoint(width: int = 256) -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, width))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(width)).sum().backward()
    optimizer.step()
    return {"module_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "lr": 1e-3}


def _quantized() -> list[torch.Tensor]:
    with warnings.catch_warnings(action="ignore"):  # deprecated, but in files
        return [
            torch.quantize_per_tensor(torch.arange(5.0), 0.5, 1, torch.quint8),
            torch.quantize_per_channel(torch.ones(2, 3), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        ]


def every_kind() -> dict[str, Any]:
    base = torch.arange(100.0).reshape(10, 10)
    return {
        "view": base[3],
        "transposed": base.t(),
        "base": base,
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5),
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "complex": torch.ones(3, dtype=torch.complex64),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "bool": torch.tensor([True, False]),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "quantized": _quantized(),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, 4, device="meta"),
        "nested": [({"a": (torch.ones(1), None)}, {1, 2}, b"bytes", 1j, torch.float32, torch.Size([1, 2]))],
        "counter": collections.Counter("abca"),
        "storage": torch.arange(4, dtype=torch.uint8).untyped_storage(),
        3: torch.zeros(3),
    }


STORES = ["counting", "local", "memory"]


@pytest.fixture(params=STORES)
def stored(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Callable[[bytes], str]:
    """Puts bytes into a store, and gives their URL."""

    def put(data: bytes) -> str:
        if request.param == "counting":
            url: str = request.getfixturevalue("counting_store").put(data)
            return url
        if request.param == "memory":
            url = f"memory://{uuid.uuid4().hex}/x.pt"
            fsspec.filesystem("memory").pipe_file(url, data)
            return url
        path = tmp_path / f"{uuid.uuid4().hex}.pt"
        path.write_bytes(data)
        return str(path)

    return put


@pytest.fixture
def turn(request: pytest.FixtureRequest) -> int:
    """Which of three samples goes to this store: where there are hundreds, each goes to one."""
    return STORES.index(request.node.callspec.params["stored"])


# What is loaded is what torch.load loads


@pytest.mark.parametrize("name", list(every_kind()))
async def test_every_kind_of_value_is_loaded_as_torch_loads_it(stored: Callable[[bytes], str], name: Any) -> None:
    data = saved({name: every_kind()[name]})
    assert saved(await load_async(stored(data))) == saved(reference(data))


async def test_all_kinds_together_share_what_they_shared(stored: Callable[[bytes], str]) -> None:
    data = saved(every_kind())
    loaded = await load_async(stored(data))
    assert saved(loaded) == saved(reference(data))
    assert loaded["view"].untyped_storage().data_ptr() == loaded["base"].untyped_storage().data_ptr()


@pytest.mark.parametrize("obj", [torch.ones(3), [torch.ones(3)], "text", None, {}, {"lr": 0.1}])
async def test_any_object_can_be_the_checkpoint(stored: Callable[[bytes], str], obj: Any) -> None:
    data = saved(obj)
    assert saved(await load_async(stored(data))) == saved(reference(data))


async def test_a_checkpoint_of_many_ranges(stored: Callable[[bytes], str]) -> None:
    data = saved({"a": torch.arange(1 << 20), "b": [torch.full((1000,), float(i)) for i in range(500)]})
    assert saved(await load_async(stored(data))) == saved(reference(data))


async def test_loaded_tensors_can_be_trained(stored: Callable[[bytes], str]) -> None:
    data = saved(adam_checkpoint())
    url = stored(data)
    loaded = await load_async(url)
    for tensor in loaded["module_state_dict"].values():
        tensor.mul_(2)
    again = await load_async(url)
    assert saved(again) == saved(reference(data))


async def test_storages_in_any_order(stored: Callable[[bytes], str]) -> None:
    original = adam_checkpoint()
    data = repacked(saved(original), reverse=True)
    assert saved(await load_async(stored(data))) == saved(reference(data))
    part = await load_async(stored(data), keys=("module_state_dict",))
    assert saved(part["module_state_dict"]) == saved(reference(data)["module_state_dict"])


async def test_a_file_as_torch_1_6_wrote_it(stored: Callable[[bytes], str]) -> None:
    """Storage keys are addresses, records are in the order of their names, and there are no format records."""
    tensors = {"a": torch.arange(6.0), "b": torch.arange(4.0) + 7}
    keys = {tensors["a"].data_ptr(): "94032894720", "b": "83420"}
    contents: dict[str, bytes] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, torch.storage.TypedStorage):
                return None
            untyped = obj._untyped_storage
            key = keys.get(untyped.data_ptr(), keys["b"])
            contents[f"data/{key}"] = bytes(untyped.tolist())
            return "storage", torch.FloatStorage, key, "cpu", len(untyped) // 4

    file = io.BytesIO()
    Pickler(file, protocol=2).dump(tensors)
    contents["data.pkl"] = file.getvalue()
    archive = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(archive)
    for name, content in sorted(contents.items()):
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    data = archive.getvalue()
    for keys_asked in (None, ("b",), ("b", "a")):
        loaded = await load_async(stored(data), keys=keys_asked)
        assert set(loaded) == set(keys_asked or tensors)
        assert all(torch.equal(loaded[key], tensors[key]) for key in loaded)


async def test_a_file_of_a_big_endian_machine(stored: Callable[[bytes], str]) -> None:
    original = {"a": torch.arange(6.0), "b": torch.arange(4, dtype=torch.int16), "c": torch.ones(3, dtype=torch.uint8)}
    sizes = {"data/0": 4, "data/1": 2}

    def swap(name: str, content: bytes) -> bytes:
        if name == "byteorder":
            return b"big"
        size = sizes.get(name, 0)
        return b"".join(content[i : i + size][::-1] for i in range(0, len(content), size)) if size else content

    data = repacked(saved(original), change=swap)
    for keys in (None, ("a", "b", "c"), ("b",)):
        loaded = await load_async(stored(data), keys=keys)
        assert all(torch.equal(loaded[key], original[key]) for key in keys or original)


async def test_a_file_that_another_zip_tool_packed(stored: Callable[[bytes], str]) -> None:
    original = saved(adam_checkpoint())
    source = zipfile.ZipFile(io.BytesIO(original))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in source.namelist():
            info = zipfile.ZipInfo(name)
            info.extra = b"UT\x05\x00\x01\x00\x00\x00\x00"
            archive.writestr(info, source.read(name))
    for keys in (None, ("module_state_dict",)):
        loaded = await load_async(stored(file.getvalue()), keys=keys)
        assert saved(loaded["module_state_dict"]) == saved(reference(original)["module_state_dict"])


@pytest.mark.parametrize("protocol", [2, 4])
async def test_the_legacy_format_is_loaded(stored: Callable[[bytes], str], protocol: int) -> None:
    original = adam_checkpoint()
    data = saved(original, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    weights_only = protocol == 2
    loaded = await load_async(stored(data), weights_only=weights_only)
    assert saved(loaded) == saved(reference(data, weights_only=weights_only))
    part = await load_async(stored(data), keys=("lr",), weights_only=weights_only)
    assert part == {"lr": 1e-3}


async def test_a_file_without_checksums_is_loaded(stored: Callable[[bytes], str]) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(adam_checkpoint())
    finally:
        torch.serialization.set_crc32_options(True)
    assert saved(await load_async(stored(data))) == saved(reference(data))


async def test_a_file_with_another_alignment(stored: Callable[[bytes], str]) -> None:
    from torch.utils.serialization import config

    config.save.storage_alignment = 96
    try:
        data = saved(adam_checkpoint())
    finally:
        config.save.storage_alignment = 64
    assert saved(await load_async(stored(data))) == saved(reference(data))


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*torch.jit:FutureWarning",
    "ignore:.*TorchScript archive:UserWarning",
)
async def test_torchscript_is_named_or_loaded(stored: Callable[[bytes], str]) -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), file)
    url = stored(file.getvalue())
    with pytest.raises(CheckpointFormatError, match="TorchScript"):
        await load_async(url)
    with pytest.raises(CheckpointFormatError, match="TorchScript"):
        await load_async(url, keys=("weight",), weights_only=False)
    module = await load_async(url, weights_only=False)
    assert module(torch.ones(2)).shape == (3,)


@pytest.mark.parametrize(
    "map_location",
    [
        "meta",
        torch.device("meta"),
        {"cpu": "meta"},
        lambda _storage, _location: None,
        lambda storage, _location: storage,
        "cpu",
    ],
)
@pytest.mark.parametrize("keys", [None, ("module_state_dict",)])
async def test_map_location_is_torchs(stored: Callable[[bytes], str], map_location: Any, keys: Any) -> None:
    data = saved(adam_checkpoint())
    expected = reference(data, map_location=map_location)
    loaded = await load_async(stored(data), map_location=map_location, keys=keys)
    assert saved(loaded if keys is None else loaded["module_state_dict"]) == saved(
        expected if keys is None else expected["module_state_dict"]
    )


async def test_the_callers_error_in_map_location_is_left_as_it_is(stored: Callable[[bytes], str]) -> None:
    def fail(_storage: Any, _location: str) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as raised:
        await load_async(stored(saved(torch.ones(1))), map_location=fail)
    assert raised.value.__notes__[0].startswith("This happened while loading ")


async def test_custom_classes_load_when_the_caller_allows_it(stored: Callable[[bytes], str]) -> None:
    url = stored(saved({"a": Opaque(), "b": torch.ones(3)}))
    loaded = await load_async(url, weights_only=False)
    assert torch.equal(loaded["a"].tensor, torch.arange(4.0))
    part = await load_async(url, weights_only=False, keys=("b",))
    assert list(part) == ["b"]
    with torch.serialization.safe_globals([Opaque]):
        assert torch.equal((await load_async(url))["a"].tensor, torch.arange(4.0))


async def test_tensor_subclasses_load(stored: Callable[[bytes], str]) -> None:
    tensor = torch.arange(4.0).as_subclass(Marked)
    tensor.note = "kept"  # type: ignore[attr-defined]
    url = stored(saved({"a": tensor}))
    with torch.serialization.safe_globals([Marked]):
        loaded = await load_async(url, keys=("a",))
    assert type(loaded["a"]) is Marked
    assert loaded["a"].note == "kept"
    assert loaded["a"].tolist() == [0, 1, 2, 3]


async def test_storages_are_copied_by_nobody(counting_store: CountingStore) -> None:
    """The tensors of a load share one mapping, at the distances that they have in the file."""
    url = counting_store.put({"a": torch.ones(100), "b": torch.ones(100)})
    loaded = await load_async(url)
    a, b = (record for record in (await torchferry.inspect_async(url)).records if record.name in {"data/0", "data/1"})
    assert loaded["b"].data_ptr() - loaded["a"].data_ptr() == b.offset - a.offset


# keys


async def test_keys_read_only_what_they_need(counting_store: CountingStore) -> None:
    original = adam_checkpoint(width=1024)
    url = counting_store.put(original)
    counting_store.range_size = 1 << 20
    size = len(counting_store.objects["x"])
    loaded = await load_async(url, keys=("module_state_dict",))
    assert list(loaded) == ["module_state_dict"]
    assert saved(loaded["module_state_dict"]) == saved(reference(saved(original))["module_state_dict"])
    assert counting_store.nbytes < 0.36 * size


async def test_keys_of_plain_values_read_no_storage(counting_store: CountingStore) -> None:
    url = counting_store.put(adam_checkpoint(width=1024))
    assert await load_async(url, keys=["lr"]) == {"lr": 1e-3}
    assert counting_store.nbytes < 0.05 * len(counting_store.objects["x"])
    assert await load_async(url, keys=()) == {}


async def test_keys_bring_shared_storages_whole(stored: Callable[[bytes], str]) -> None:
    base = torch.arange(1000.0)
    url = stored(saved({"a": base[:10], "b": {"c": [base[990:]]}, "d": torch.ones(10)}))
    loaded = await load_async(url, keys=("b",))
    assert loaded["b"]["c"][0].tolist() == base[990:].tolist()


async def test_keys_do_not_move_the_other_storages(counting_store: CountingStore) -> None:
    seen: list[int] = []

    def count(storage: torch.UntypedStorage, _location: str) -> torch.UntypedStorage:
        seen.append(storage.nbytes())
        return storage

    url = counting_store.put({"none": torch.empty(0), "a": torch.ones(1000), "b": torch.ones(3), "c": torch.ones(5000)})
    loaded = await load_async(url, keys=("b",), map_location=count)
    assert loaded["b"].tolist() == [1, 1, 1]
    assert sorted(set(seen) - {0}) == [12]


async def test_an_unknown_key_lists_those_that_are(stored: Callable[[bytes], str]) -> None:
    url = stored(saved(adam_checkpoint()))
    with pytest.raises(CheckpointKeyError, match="'module_state_dict', 'optimizer_state_dict', 'lr'") as raised:
        await load_async(url, keys=("module_state_dict", "model"))
    assert "'model'" in str(raised.value)
    with pytest.raises(KeyError):
        await load_async(url, keys=("model",))


async def test_an_unknown_key_of_very_many_lists_some(stored: Callable[[bytes], str]) -> None:
    url = stored(saved({f"layer.{i}": i for i in range(1000)}))
    with pytest.raises(CheckpointKeyError, match=r"'layer.49' and 950 more\. Did you mean 'layer.9"):
        await load_async(url, keys=("layr.9",))


async def test_keys_of_what_is_no_dict(stored: Callable[[bytes], str]) -> None:
    with pytest.raises(CheckpointFormatError, match="no dict"):
        await load_async(stored(saved(torch.ones(1))), keys=("a",))


async def test_keys_of_a_dict_of_another_kind(stored: Callable[[bytes], str]) -> None:
    url = stored(saved(collections.Counter(a=2, b=3)))
    assert await load_async(url, keys=("b",)) == {"b": 3}


# Bad input


@pytest.mark.parametrize(
    ("data", "looks"),
    [
        (b"", "empty"),
        (b"<html><body>502 Bad Gateway</body></html>", "HTML"),
        (pickle.dumps({"a": 1}), "plain pickle"),
        (b"hello", "b'hello'"),
        (b"\x00" * 3_000_000, "starts with"),
    ],
)
async def test_what_is_no_checkpoint_says_what_it_looks_like(
    stored: Callable[[bytes], str], data: bytes, looks: str
) -> None:
    with pytest.raises(CheckpointFormatError, match=looks) as raised:
        await load_async(stored(data))
    assert not isinstance(raised.value, CheckpointCorruptError)


async def test_a_tar_and_a_foreign_zip_are_no_checkpoints(stored: Callable[[bytes], str]) -> None:
    tar, foreign = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    with zipfile.ZipFile(foreign, "w") as zipped:
        zipped.writestr("word/document.xml", "text")
    with pytest.raises(CheckpointFormatError, match="tar archive"):
        await load_async(stored(tar.getvalue()))
    with pytest.raises(CheckpointFormatError, match=r"word/document\.xml"):
        await load_async(stored(foreign.getvalue()))


async def test_a_missing_checkpoint(tmp_path: pathlib.Path) -> None:
    for url in (str(tmp_path / "none.pt"), "memory://none/none.pt"):
        with pytest.raises(CheckpointNotFoundError, match=r"none\.pt"):
            await load_async(url)


@pytest.mark.parametrize("legacy", [False, True])
async def test_a_truncated_checkpoint_is_corrupt(stored: Callable[[bytes], str], legacy: bool) -> None:
    data = saved(adam_checkpoint(64), _use_new_zipfile_serialization=not legacy)
    for length in (len(data) - 1, len(data) // 2, 600):
        with pytest.raises(CheckpointCorruptError):
            await load_async(stored(data[:length]))


async def test_an_unsafe_checkpoint_names_its_globals_before_it_is_fetched(counting_store: CountingStore) -> None:
    url = counting_store.put({"a": pathlib.PurePosixPath("x"), "b": Opaque(), "c": torch.ones(1 << 20)})
    with pytest.raises(UnsafeCheckpointError, match="add_safe_globals") as raised:
        await load_async(url)
    assert f"{pathlib.PurePosixPath.__module__}.PurePosixPath" in str(raised.value)
    assert "Opaque" in str(raised.value)
    assert "weights_only=False" in str(raised.value)
    assert counting_store.nbytes < 200_000
    assert isinstance(raised.value, pickle.UnpicklingError)


async def test_an_unsafe_legacy_checkpoint_names_its_globals(stored: Callable[[bytes], str]) -> None:
    data = saved({"a": Opaque()}, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeCheckpointError, match="Opaque"):
        await load_async(stored(data))


async def test_a_pickle_that_weights_only_cannot_read(stored: Callable[[bytes], str]) -> None:
    data = saved({"a": torch.ones(3)}, pickle_protocol=4)
    url = stored(data)
    with pytest.raises(UnsafeCheckpointError, match="Unsupported operand"):
        await load_async(url)
    assert (await load_async(url, weights_only=False))["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("checked", [True, False])
def test_sparse_tensors_are_checked_when_torch_checks_them(
    stored: Callable[[bytes], str], weights_only: bool, checked: bool
) -> None:
    """From torch 2.14 always with weights_only, since indices out of bounds read other memory; before, on request."""
    beyond = torch.sparse_coo_tensor(torch.tensor([[9]]), torch.ones(1), (3,), check_invariants=False)
    data = saved({"beyond": beyond})

    def outcome(load: Callable[[], Any]) -> str:
        try:
            return str(list(load()))
        except RuntimeError as error:
            return str(error)

    with torch.sparse.check_sparse_tensor_invariants(checked):
        expected = outcome(lambda: reference(data, weights_only=weights_only))
        assert outcome(lambda: torchferry.load(stored(data), weights_only=weights_only)) == expected
    assert ("inconsistent with indices" in expected) >= checked


async def test_loading_runs_no_code_of_the_checkpoint(stored: Callable[[bytes], str], tmp_path: pathlib.Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (pathlib.Path.touch, (pathlib.Path(marker),))

    url = stored(saved({"a": Evil(), "b": torch.ones(1)}))
    with pytest.raises(UnsafeCheckpointError):
        await load_async(url)
    with pytest.raises(UnsafeCheckpointError):
        await load_async(url, keys=("a",))
    assert (await load_async(url, keys=("b",)))["b"].tolist() == [1]
    await torchferry.inspect_async(url)
    assert not marker.exists()


async def test_a_flipped_bit_is_found_unless_the_caller_does_not_want_to_know(stored: Callable[[bytes], str]) -> None:
    tensor = torch.arange(100_000)
    data = bytearray(saved({"a": tensor, "b": torch.ones(3)}))
    data[len(data) // 2] ^= 1
    url = stored(bytes(data))
    with pytest.raises(CheckpointCorruptError, match="record data/0"):
        await load_async(url)
    assert (await load_async(url, verify=False))["a"].ne(tensor).sum() == 1
    assert (await load_async(url, keys=("b",)))["b"].tolist() == [1, 1, 1]


SMALL = {"m": {"w": torch.arange(5.0), "none": torch.empty(0), "b": torch.ones(40, dtype=torch.int8)}, "lr": 0.1}


async def outcome(url: str, **options: Any) -> None:
    """Loads; the right object and an error of ours are both right, anything else is not."""
    try:
        loaded = await load_async(url, **options)
    except TorchferryError as error:
        assert url.rpartition("/")[2] in str(error)  # noqa: PT017 - any of ours will do
    else:
        assert saved(loaded["m"]) == saved(reference(saved(SMALL))["m"])


async def test_no_flipped_byte_gives_wrong_tensors(stored: Callable[[bytes], str], turn: int) -> None:
    data = saved(SMALL)
    for at in range(5 * turn, len(data), 5 * len(STORES)):
        for mask in (0x01, 0x20, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= mask
            await outcome(stored(bytes(damaged)), keys=("m",) if at % 2 else None)


async def test_no_overwritten_bytes_give_wrong_tensors(stored: Callable[[bytes], str], turn: int) -> None:
    data = saved(SMALL)
    generator = random.Random(turn)
    for _ in range(400 // len(STORES)):
        damaged = bytearray(data)
        at = generator.randrange(len(data) - 8)
        damaged[at : at + 8] = generator.choice([bytes(8), b"\xff" * 8, generator.randbytes(8)])
        await outcome(stored(bytes(damaged)))


async def test_no_truncation_gives_wrong_tensors(stored: Callable[[bytes], str]) -> None:
    data = saved(SMALL)
    for length in range(0, len(data), 13):
        with pytest.raises(CheckpointFormatError):
            await load_async(stored(data[:length]))


async def test_a_damaged_legacy_checkpoint_is_an_error_of_ours(stored: Callable[[bytes], str]) -> None:
    data = saved(SMALL, _use_new_zipfile_serialization=False)
    for length in range(40, len(data), 7):
        with pytest.raises(TorchferryError):
            await load_async(stored(data[:length]))


# Reading


async def test_ranges_are_read_side_by_side_within_the_stores_limits(counting_store: CountingStore) -> None:
    url = counting_store.put({"a": torch.arange(1 << 18), "b": torch.ones(5)})
    size = len(counting_store.objects["x"])
    await load_async(url)
    assert counting_store.nbytes == size  # nothing twice
    assert all(stop - start <= counting_store.range_size for start, stop in counting_store.reads)
    assert 1 < counting_store.most_under_way <= counting_store.range_concurrency


async def test_the_callback_hears_of_every_byte(stored: Callable[[bytes], str]) -> None:
    data = saved({"a": torch.arange(1 << 18)})
    callback = Callback()
    await load_async(stored(data), callback=callback)
    assert callback.size == callback.value
    assert callback.size == len(data)


async def test_an_object_replaced_meanwhile_is_no_mixture(counting_store: CountingStore) -> None:
    url = counting_store.put({"a": torch.arange(1 << 18)})

    def replace() -> None:
        if len(counting_store.reads) == 6:
            counting_store.put({"a": torch.arange(1 << 18) + 1})

    counting_store.on_read = replace
    with pytest.raises(CheckpointChangedError, match="count://x"):
        await load_async(url)


async def test_a_failing_read_ends_the_load_with_its_own_error(counting_store: CountingStore) -> None:
    url = counting_store.put({"a": torch.arange(1 << 18)})

    def fail() -> None:
        if len(counting_store.reads) > 5:
            raise StorageError("count://x: out of order")

    counting_store.on_read = fail
    before = open_files()
    with pytest.raises(StorageError, match="out of order"):
        await load_async(url)
    assert open_files() == before


async def test_a_cancelled_load_leaves_nothing_open(counting_store: CountingStore) -> None:
    url = counting_store.put({"a": torch.arange(1 << 20)})
    before = open_files()
    for reads in (1, 3, 6, 20):
        counting_store.reads.clear()
        task = asyncio.ensure_future(load_async(url))

        def cancel(task: asyncio.Future[Any] = task, reads: int = reads) -> None:
            if len(counting_store.reads) == reads:
                task.cancel()

        counting_store.on_read = cancel
        with pytest.raises(asyncio.CancelledError):
            await task
        assert open_files() == before


def open_files() -> int:
    return len(list(pathlib.Path("/proc/self/fd").iterdir()))


# Local files


async def test_a_local_file_is_never_written(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.pt"
    data = saved(adam_checkpoint())
    path.write_bytes(data)
    loaded = await load_async(path)
    loaded["module_state_dict"]["0.weight"].zero_()
    assert path.read_bytes() == data


async def test_what_was_loaded_stays_when_its_file_is_written_over(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(1 << 20), "step": 1}, path)
    loaded = await load_async(path)
    torch.save({"w": torch.zeros(1 << 20), "step": 2}, path)  # into the same file
    assert torch.equal(loaded["w"], torch.ones(1 << 20))
    torch.save(loaded, path)  # truncates it first
    assert torch.equal(torch.load(path)["w"], torch.ones(1 << 20))


async def test_a_damaged_local_header_shifts_no_tensor(tmp_path: pathlib.Path) -> None:
    data = bytearray(saved({"a": torch.arange(100.0), "b": torch.ones(3)}))
    manifest = await torchferry.inspect_async(_file(tmp_path, bytes(data)))
    record = next(record for record in manifest.records if record.name == "data/1")
    at = data.rindex(b"PK\x03\x04", 0, record.offset)
    data[at + 28] ^= 0x08
    for verify in (True, False):
        assert (await load_async(_file(tmp_path, bytes(data)), verify=verify))["b"].tolist() == [1, 1, 1]


def test_keys_take_no_memory_for_the_rest(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"step": torch.ones(3), "rest": [torch.ones(1 << 19) for _ in range(75)]}, path)  # 150 MiB
    program = """
        import pathlib, sys, torch, torchferry
        def peak():
            status = pathlib.Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) << 10
        torchferry.load(sys.argv[2], keys=["step"])  # imports and threads are there
        before = peak()
        torchferry.load(sys.argv[1], keys=["step"])
        print(peak() - before)
    """
    torch.save({"step": 1}, tmp_path / "small.pt")
    assert int(run(program, path, tmp_path / "small.pt")) < 32 << 20


def test_a_checkpoint_without_memory_for_it_is_an_error_that_says_so(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.empty(100 << 20)}, path)  # 400 MiB
    torch.save({"step": 1}, tmp_path / "small.pt")
    program = """
        import pathlib, resource, sys, torchferry
        torchferry.load(sys.argv[2])  # imports and threads are there
        taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (300 << 20), -1))
        try:
            torchferry.load(sys.argv[1])
        except torchferry.NotEnoughMemoryError as error:
            print(error)
    """
    assert "x.pt: this machine has no memory for its" in run(program, path, tmp_path / "small.pt")


def run(program: str, *arguments: object) -> str:
    command = [*python(), "-W", "ignore", "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=100).stdout


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12; the child only exits
async def test_a_child_forked_during_a_load_has_its_collector(tmp_path: pathlib.Path) -> None:
    states: list[int] = []

    def fork(storage: torch.UntypedStorage, _: str) -> torch.UntypedStorage:
        assert not gc.isenabled()
        child = os.fork()
        if not child:
            os._exit(0 if gc.isenabled() else 1)
        states.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return storage

    await load_async(_file(tmp_path, saved({"a": torch.ones(3)})), map_location=fork)
    assert states == [0]
    assert gc.isenabled()


def _file(directory: pathlib.Path, data: bytes) -> pathlib.Path:
    path = directory / "x.pt"
    path.write_bytes(data)
    return path


# A real store


async def test_a_checkpoint_on_s3(s3_url: str, s3_client: Any, s3_storage_options: dict[str, Any]) -> None:
    original = adam_checkpoint(width=1024)
    data = saved(original)
    bucket, _, key = f"{s3_url}/x.pt".removeprefix("s3://").partition("/")
    s3_client.put_object(Bucket=bucket, Key=key, Body=data)
    options: dict[str, Any] = {"storage_options": s3_storage_options}
    assert saved(await load_async(f"{s3_url}/x.pt", **options)) == saved(reference(data))
    part = await load_async(f"{s3_url}/x.pt", keys=("module_state_dict",), **options)
    assert saved(part["module_state_dict"]) == saved(reference(data)["module_state_dict"])
    damaged = bytearray(data)
    damaged[len(damaged) // 2] ^= 0x10
    s3_client.put_object(Bucket=bucket, Key=f"{key}.damaged", Body=bytes(damaged))
    with pytest.raises(CheckpointCorruptError, match="record data/"):
        await load_async(f"{s3_url}/x.pt.damaged", **options)


def test_the_synchronous_load_is_the_same(counting_store: CountingStore) -> None:
    url = counting_store.put({"a": torch.ones(3)})
    assert torchferry.load(url)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("keys", [None, ["a"]])
def test_memory_is_free_with_the_last_tensor_and_not_when_the_collector_comes(
    monkeypatch: pytest.MonkeyPatch, keys: list[str] | None
) -> None:
    memories: list[weakref.ref[Any]] = []

    class Watched(LoadBuffer):
        def __init__(self, layout: Layout | int, *, sparse: bool = False) -> None:
            super().__init__(layout, sparse=sparse)
            memories.append(weakref.ref(self._memory))

    monkeypatch.setattr(torchferry.objects.torch_files, "LoadBuffer", Watched)
    url = f"memory://{uuid.uuid4().hex}/x.pt"
    torchferry.save({"a": torch.ones(1 << 20), "b": torch.ones(1 << 20)}, url)
    gc.disable()
    try:
        loaded = torchferry.load(url, keys=keys)
        assert [memory() is not None for memory in memories] == [True]
        del loaded
        for _ in range(500):  # threads that worked on it let go of it a moment later
            if memories[0]() is None:
                break
            time.sleep(0.01)
        assert memories[0]() is None
    finally:
        gc.enable()


def test_a_location_that_is_no_text_is_damage(tmp_path: pathlib.Path) -> None:
    torch.save([torch.ones(3)], tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as whole, zipfile.ZipFile(tmp_path / "y.pt", "w") as changed:
        for name in whole.namelist():
            data = whole.read(name)
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"K\x05")
            changed.writestr(name, data)
    for weights_only in (True, False):
        with pytest.raises(CheckpointCorruptError, match="is damaged"):
            torchferry.load(tmp_path / "y.pt", weights_only=weights_only)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*torch.jit:FutureWarning",
    "ignore:.*TorchScript archive:UserWarning",
)
def test_torchscript_of_an_unknown_device_says_so(tmp_path: pathlib.Path) -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(tmp_path / "x.pt", "w") as changed:
        for name in whole.namelist():
            changed.writestr(name, whole.read(name).replace(b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00cxu"))
    with pytest.raises(CheckpointFormatError, match="a device that is not known here, 'cxu'"):
        torchferry.load(tmp_path / "x.pt", weights_only=False)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16], ids=str)
def test_a_legacy_file_that_torch_cannot_load_is_not_called_damaged(
    tmp_path: pathlib.Path, dtype: torch.dtype, weights_only: bool
) -> None:
    torch.save({"w": torch.ones(3).to(dtype)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(torchferry.CheckpointFormatError, match="legacy format stores and does not load") as caught:
        torchferry.load(tmp_path / "x.pt", weights_only=weights_only)
    assert not isinstance(caught.value, torchferry.CheckpointCorruptError)
