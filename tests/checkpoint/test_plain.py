"""Small objects among hyperparameters become plain values where that loses nothing, and come back."""

from __future__ import annotations

import enum
import io
import threading
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Annotated, Any, Final, Generic, NamedTuple, NewType, NotRequired, TypedDict, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
import torch

from torchferry.checkpoint import LoadedCheckpoint, PyTorchCheckpoint
from torchferry.checkpoint.content import content_of, loadable, prepared
from torchferry.errors import CheckpointValueError

T = TypeVar("T")


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Kind(enum.StrEnum):
    ADAM = "adam"


class Mode(str, enum.Enum):  # noqa: UP042 - its str() is not its value
    FAST = "fast"


class Bits(enum.Flag):
    A = 1
    B = 2


class Where(enum.Enum):
    HERE = Path("/here")


class Shape(NamedTuple):
    width: int
    name: str = "x"


@dataclass(frozen=True)
class Inner:
    color: Color
    shape: Shape


def accepted(content: dict[str, Any]) -> dict[str, Any]:
    """What of the content is saved; raises where not all of it would be loaded again."""
    prepared = loadable(content)
    if (error := prepared.error("file:///x")) is not None:
        raise error
    return prepared.content


def stored(hyperparameters: Any) -> dict[str, Any]:
    """What is loaded again, with weights_only=True, after torch.save."""
    file = io.BytesIO()
    torch.save(accepted(content_of(PyTorchCheckpoint(hyperparameters=hyperparameters))), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


DAY = date(2026, 1, 2)
WHEN = datetime(2026, 5, 4, 3, 2, 1, 7, tzinfo=timezone(timedelta(hours=2)))


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Color.RED, "red"),
        (Level.HIGH, 2),
        (Kind.ADAM, "adam"),
        (Bits.A | Bits.B, 3),
        (Where.HERE, "/here"),
        (Path("/a/b"), "/a/b"),
        (PurePosixPath("a"), "a"),
        (WHEN, "2026-05-04T03:02:01.000007+02:00"),
        (datetime(2026, 1, 1, tzinfo=UTC), "2026-01-01T00:00:00+00:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (time(1, 2), "01:02:00"),
        (timedelta(hours=1, microseconds=1), 3600.000001),
        (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (Decimal("0.10"), "0.10"),
        (Fraction(1, 3), "1/3"),
        (Namespace(lr=0.1), {"lr": 0.1}),
        (SimpleNamespace(where=Path("a")), {"where": "a"}),
        (frozenset({1, 2}), {1, 2}),
        (deque([1, Path("b")]), [1, "b"]),
        (Shape(3), {"width": 3, "name": "x"}),
        (Inner(Color.BLUE, Shape(4)), {"color": "blue", "shape": {"width": 4, "name": "x"}}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_small_object_becomes_a_plain_value_anywhere(value: Any, plain: Any) -> None:
    given = {"a": value, "nested": [1, (value, {"k": [value]})], "ordered": OrderedDict(x=value)}
    loaded = stored(given)
    assert loaded == {"a": plain, "nested": [1, (plain, {"k": [plain]})], "ordered": OrderedDict(x=plain)}
    assert type(loaded["ordered"]) is OrderedDict
    assert type(loaded["a"]) is type(plain)
    assert given["nested"][1][0] is value  # the user's own containers stay as they are


@dataclass
class Box(Generic[T]):
    path: Path
    content: T


@dataclass
class Labelled(Box[Path], Generic[T]):  # its T is another one than Box's
    label: T | None = None


@dataclass
class Days(Labelled[date]):
    kept: Path = Path()


class Pair(NamedTuple, Generic[T]):
    first: T
    others: list[T] | None = None


@dataclass
class Everything:
    color: Color
    level: Level
    kind: Kind
    bits: Bits
    where: Where
    path: Path
    when: datetime
    day: date
    clock: time
    shape: Shape
    inner: Inner
    maybe: Color | None
    text: str | Path
    noted: Annotated[Path | None, "note"]
    many: list[Path]
    pair: tuple[Color, ...]
    chosen: set[Color]
    named: dict[Color, Shape]
    took: timedelta
    run: UUID
    price: Decimal
    share: Fraction
    options: Namespace
    others: SimpleNamespace
    frozen: frozenset[Color]
    last: deque[Path]
    any_frozen: frozenset  # type: ignore[type-arg]  # as users write it
    sequence: Sequence[Path]
    mapping: Mapping[str, Path]
    either: dict[str, Path] | list[Color]
    generic: Box[Path]
    nested: Box[Box[date] | None]
    inherited: Days
    several: list[Labelled[Color]]
    pairs: dict[str, Pair[Path]]
    derived: Color = field(default=Color.RED, init=False)


def test_a_dataclass_comes_back_whole() -> None:
    everything = Everything(
        Color.RED, Level.LOW, Kind.ADAM, Bits.A | Bits.B, Where.HERE, Path("/p"), WHEN, DAY, time(1, 2),
        Shape(3), Inner(Color.BLUE, Shape(4)), Color.BLUE, "text", Path("n"), [Path("a"), Path("b")],
        (Color.RED, Color.BLUE), {Color.RED}, {Color.RED: Shape(5)}, timedelta(days=1, microseconds=3), UUID(int=3),
        Decimal("0.10"), Fraction(1, 3), Namespace(lr=0.1), SimpleNamespace(lr=0.1), frozenset({Color.RED}),
        deque([Path("a")]), frozenset({1}), [Path("a")], {"a": Path("a")}, [Color.RED], Box(Path("a"), Path("b")),
        Box(Path("a"), Box(Path("b"), DAY)), Days(Path("a"), Path("b"), DAY, Path("c")),
        [Labelled(Path("a"), Path("b"), Color.BLUE)], {"a": Pair(Path("a"), [Path("b")])},
    )  # fmt: skip
    everything.derived = Color.BLUE
    rebuilt = LoadedCheckpoint(stored(everything)).hyperparameters_as(Everything)
    assert rebuilt == everything
    assert [type(getattr(rebuilt, f.name)) for f in fields(rebuilt)] == [
        type(getattr(everything, f.name)) for f in fields(everything)
    ]


def test_a_generic_class_with_its_arguments_can_be_asked_for() -> None:
    given = Labelled(Path("a"), Path("b"), Color.RED)
    rebuilt: Any = LoadedCheckpoint(stored(given)).hyperparameters_as(Labelled[Color])
    assert rebuilt == given
    with pytest.raises(TypeError, match=r"do not fit Labelled"):
        LoadedCheckpoint({"other": 1}).hyperparameters_as(Labelled[Color])


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (datetime | date, date(2026, 1, 2)),
        (date | datetime, WHEN),
        (Fraction | Decimal, Decimal("0.5")),
        (Decimal | Fraction, Fraction(1, 2)),
        (Mode | Path, Mode.FAST),
    ],
)
def test_of_several_types_the_one_comes_back_that_is_saved_as_this_text(hint: Any, value: Any) -> None:
    config = make_dataclass("Config", [("value", hint)])
    rebuilt: Any = LoadedCheckpoint(stored({"value": value})).hyperparameters_as(config)
    assert rebuilt.value == value
    assert type(rebuilt.value) is type(value)


def test_a_dataclass_that_is_a_key_in_a_dataclass_is_refused_by_name() -> None:
    holder = make_dataclass("Holder", [("table", dict)])
    with pytest.raises(CheckpointValueError, match="Inner"):
        stored(holder({Inner(Color.RED, Shape(1)): 1}))


def test_a_value_that_its_enum_or_date_does_not_have_is_a_type_error() -> None:
    @dataclass
    class Config:
        color: Color = Color.RED
        when: date | None = None

    Config.__annotations__ = {"color": Color, "when": date}
    with pytest.raises(TypeError, match="'green' is no value of the enum Color"):
        LoadedCheckpoint({"color": "green"}).hyperparameters_as(Config)
    with pytest.raises(TypeError, match="'soon' is no date in ISO format"):
        LoadedCheckpoint({"when": "soon"}).hyperparameters_as(Config)


def test_a_deque_with_a_bound_and_a_very_long_timedelta_are_left_to_be_refused() -> None:
    for value in (deque([1], maxlen=3), timedelta(days=365 * 900, microseconds=1), timedelta.max):
        assert loadable({"a": value}).refused is not None


def test_torchs_version_is_stored_as_a_text_that_every_torch_reads() -> None:
    assert str(stored({"torch": torch.__version__})["torch"]) == str(torch.__version__)


def make_numpy() -> Any:
    return pytest.importorskip("numpy")


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (lambda np: np.mean([1.0, 2.0]), 1.5),
        (lambda np: np.float32(0.1), 0.10000000149011612),
        (lambda np: np.float16(0.5), 0.5),
        (lambda np: np.int64(3), 3),
        (lambda np: np.uint8(3), 3),
        (lambda np: np.bool_(True), True),
        (lambda np: np.complex64(1j), 1j),
        (lambda np: np.str_("x"), "x"),
        (lambda np: np.bytes_(b"x"), b"x"),
    ],
)
def test_a_numpy_scalar_becomes_pythons_and_comes_back(make: Callable[[Any], Any], plain: Any) -> None:
    value = make(make_numpy())

    @dataclass
    class Config:
        value: Any

    loaded = stored({"value": value, "history": [value] * 3})
    assert loaded == {"value": plain, "history": [plain] * 3}
    assert type(loaded["value"]) is type(plain)
    Config.__annotations__ = {"value": type(value)}
    rebuilt = LoadedCheckpoint({"value": loaded["value"]}).hyperparameters_as(Config)
    assert rebuilt.value == value
    assert type(rebuilt.value) is type(value)


def test_a_numpy_scalar_in_the_optimizers_options_becomes_a_number() -> None:
    np = make_numpy()
    linear = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=np.float64(0.5))
    content = content_of(PyTorchCheckpoint(module=linear, optimizer=optimizer))
    converted = accepted(content)
    assert list(converted) == list(content)
    assert converted["module_state_dict"] is content["module_state_dict"]
    lr = converted["optimizer_state_dict"]["param_groups"][0]["lr"]
    assert (type(lr), lr) == (float, 0.5)
    assert type(optimizer.param_groups[0]["lr"]) is np.float64


@pytest.mark.parametrize("kind", ["longdouble", "datetime64"])
def test_a_numpy_scalar_that_python_has_no_number_for_is_refused(kind: str) -> None:
    np = make_numpy()
    value = np.longdouble(1) if kind == "longdouble" else np.datetime64("2026-01-01")
    with pytest.raises(CheckpointValueError, match=f"Hyperparameter 'x' is a numpy.{kind}"):
        stored({"x": value})


class Extended(Path("/").__class__):  # type: ignore[misc]
    """A path that may know more than its text."""


@dataclass
class Cached:
    """A dataclass with more than its fields."""

    a: int

    def __post_init__(self) -> None:
        self.more = object()


@dataclass(eq=False)
class Network(torch.nn.Module):
    """A dataclass whose parameters are not among its fields."""

    size: int

    def __post_init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(self.size, self.size)


@pytest.mark.parametrize(
    "value",
    [
        datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Berlin")),
        datetime(2026, 10, 25, 2, 30, fold=1),  # noqa: DTZ001 - such a one is meant
        Extended("/x"),
        Cached(1),
        Network.__new__(Network),
        object(),
    ],
    ids=["time zone", "fold", "path of another class", "dataclass with more", "module", "object"],
)
def test_what_a_plain_value_would_not_say_is_refused(value: Any) -> None:
    if isinstance(value, Network):
        torch.nn.Module.__init__(value)
        value.size = 1
        value.linear = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointValueError, match=r"Hyperparameter 'a'\[0\] is a "):
        stored({"a": [value]})


def test_keys_become_plain_unless_an_item_would_be_lost() -> None:
    assert stored({"by": {Color.RED: 1, Path("x"): 2}}) == {"by": {"red": 1, "x": 2}}
    for clash in ({Color.RED: 1, "red": 2}, {"red": 2, Color.RED: 1}, {Color.RED: 1, Path("red"): 2}, {Shape(1): 1}):
        with pytest.raises(CheckpointValueError, match="a key of Hyperparameter 'by'"):
            stored({"by": clash})
    for elements in ({Color.RED, "red"}, {Shape(1)}):
        with pytest.raises(CheckpointValueError, match="Hyperparameter 'by'"):
            stored({"by": elements})


def test_the_names_of_hyperparameters_become_plain_too() -> None:
    assert stored({Color.RED: 1}) == {"red": 1}
    with pytest.raises(CheckpointValueError, match=r"The name of Hyperparameter .* is a .*Shape"):
        stored({Shape(1): 1})


def test_a_hyperparameters_name_cannot_become_that_of_a_state() -> None:
    class Name(enum.Enum):
        STATE = "module_state_dict"

    linear = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointValueError, match=r"The name of Hyperparameter .*STATE.* is a "):
        accepted(content_of(PyTorchCheckpoint(linear, {Name.STATE: 1})))


def test_what_is_one_object_stays_one() -> None:
    shared = [Color.RED, torch.ones(2)]
    loop: list[Any] = [Color.RED]
    loop.append((loop,))
    loaded = stored({"a": shared, "b": shared, "loop": loop})
    assert loaded["a"] is loaded["b"]
    assert loaded["loop"][1][0] is loaded["loop"]
    assert loaded["loop"][0] == "red"


def test_a_dataclass_that_contains_itself_is_refused() -> None:
    @dataclass
    class Node:
        parent: Any = None

    node = Node()
    node.parent = [node]
    with pytest.raises(CheckpointValueError, match=r"Hyperparameter 'node'\['parent'\]\[0\] is a .*Node"):
        stored({"node": node})


def test_what_add_safe_globals_allows_stays_as_it_is() -> None:
    given = {"color": Color.RED, "shape": Shape(1), "inner": [Inner(Color.RED, Shape(1))]}
    with torch.serialization.safe_globals([Color, Shape, Inner]):
        assert stored(given) == given


def test_tensors_in_them_are_not_copied() -> None:
    weights = torch.ones(2)
    converted = accepted({"cfg": {"shape": Shape(1), "weights": weights}})
    assert converted["cfg"]["weights"] is weights


def test_content_without_such_objects_is_the_same_object() -> None:
    content = {"a": [1, {"b": torch.ones(1)}], "module_state_dict": OrderedDict(w=torch.ones(1))}
    assert loadable(content).content is content


class Odd:
    """Raises whatever it is asked."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __repr__(self) -> str:
        raise ValueError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")

    def __hash__(self) -> int:
        return 1

    def __reduce__(self) -> Any:
        if self.what == "exits":
            raise SystemExit(2)
        return Odd, (self.what,)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class Unlooked:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("not to be looked at")


class Named(type):
    def __getattribute__(cls, name: str) -> Any:
        if name == "__qualname__":
            raise RuntimeError("no name")
        return super().__getattribute__(name)


ODD: dict[str, Callable[[], Any]] = {
    "exits": lambda: Odd("exits"),
    "deep": lambda: nested(600),
    "deep, and another": lambda: {"deep": nested(600), "x": print},
    "no repr": lambda: {Odd("a"): object()},
    "no comparison": lambda: {Odd("a"): 1},
    "no class": Unlooked,
    "no name": Named("N", (), {}),
    "lambda": lambda: [lambda: None],
    "long": lambda: 1 << 3000,
}


@pytest.mark.parametrize("name", ODD)
def test_a_finished_training_is_never_thrown_away_for_a_hyperparameter(name: str) -> None:
    value = ODD[name]()
    linear = torch.nn.Linear(2, 2)
    ready = prepared(PyTorchCheckpoint(linear, {"before": 1, "odd": value, "after": 2.5}))
    file = io.BytesIO()
    torch.save(ready.content, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=not ready.needs_trust)
    assert torch.equal(loaded["module_state_dict"]["weight"], linear.weight)
    assert (loaded["before"], loaded["after"]) == (1, 2.5)
    assert 20 < len(str(ready.error("s3://b/x"))) < 2_000


def test_a_hyperparameter_with_the_name_of_a_state_is_left_out_and_said() -> None:
    linear = torch.nn.Linear(2, 2)
    ready = prepared(PyTorchCheckpoint(linear, {"module_state_dict": 1, "steps": 3}))
    assert [*ready.content] == ["module_state_dict", "steps"]
    assert torch.equal(ready.content["module_state_dict"]["weight"], linear.weight)
    assert "cannot be named 'module_state_dict'" in str(ready.error("s3://b/x"))
    assert "stored all the same, without 'module_state_dict'" in str(ready.error("s3://b/x"))


class WithExtra(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)

    def get_extra_state(self) -> Any:
        return threading.Lock()

    def set_extra_state(self, state: Any) -> None:
        pass


def test_what_cannot_be_pickled_of_a_state_is_left_out_and_the_weights_are_not() -> None:
    model = torch.nn.Sequential(WithExtra(), WithExtra())
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "fn": lambda x: x}], 0.1, momentum=0.9)
    model[0].inner(torch.ones(2)).sum().backward()
    optimizer.step()
    ready = prepared(PyTorchCheckpoint(model, {"a": 1}, optimizer))
    assert [*ready.left_out] == [
        "module_state_dict.0._extra_state",
        "module_state_dict.1._extra_state",
        "optimizer_state_dict.param_groups.0.fn",
    ]
    file = io.BytesIO()
    torch.save(ready.content, file)
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(loaded["module_state_dict"]["1.inner.weight"], model[1].inner.weight)
    assert loaded["optimizer_state_dict"]["param_groups"][0]["momentum"] == 0.9
    assert torch.equal(
        loaded["optimizer_state_dict"]["state"][0]["momentum_buffer"],
        optimizer.state[model[0].inner.weight]["momentum_buffer"],
    )
    assert "0._extra_state" in model.state_dict()  # the user's own is as it was
    assert "fn" in optimizer.state_dict()["param_groups"][0]


Name = NewType("Name", PurePosixPath)


class Options(TypedDict):
    where: Path
    days: NotRequired[date]


@dataclass
class Adam:
    lr: float
    decay: float = 0.0
    where: Path = Path()


@dataclass
class Sgd:
    lr: float
    decay: float = 0.0


@dataclass
class Momentum:
    lr: float
    decay: float = 0.0


@dataclass
class Scaled:
    lr: float
    name: Name
    kept: Final[Path]
    options: Options
    ordered: OrderedDict[str, Path]
    optimizer: Adam | Sgd

    def __post_init__(self) -> None:
        self.lr *= 2


def test_what_comes_back_is_what_was_saved_whatever_a_class_makes_of_its_arguments() -> None:
    given = Scaled(
        0.1, Name(PurePosixPath("a")), Path("b"), {"where": Path("c"), "days": DAY}, OrderedDict(x=Path("d")), Sgd(0.1)
    )
    rebuilt = LoadedCheckpoint(stored(given)).hyperparameters_as(Scaled)
    assert rebuilt == given
    assert rebuilt.lr == 0.2
    assert type(rebuilt.ordered) is OrderedDict


def test_of_classes_with_the_same_fields_nothing_tells_which_it_was() -> None:
    config = make_dataclass("Config", [("optimizer", Sgd | Momentum)])
    with pytest.raises(TypeError, match="Sgd and Momentum have the same fields"):
        LoadedCheckpoint(stored(config(Momentum(0.1)))).hyperparameters_as(config)


@dataclass
class Linked:
    lr: float
    broken: Any = None
    later: float = field(init=False)


class Raises:
    """What has no state, and is no value either."""

    def state_dict(self) -> dict[str, Any]:
        raise ValueError("not consolidated")

    def __getattr__(self, name: str) -> Any:
        raise ValueError("not now")


def test_a_field_that_cannot_be_had_is_left_out_alone() -> None:
    linked = Linked(0.1)
    linked.broken = linked  # holds itself
    ready = prepared(PyTorchCheckpoint(hyperparameters=linked))
    assert ready.content == {"lr": 0.1}
    assert ready.left_out == ("broken",)
    assert "broken" in str(ready.error("file:///x"))


@pytest.mark.parametrize("part", ["module", "optimizer"])
def test_a_state_that_cannot_be_had_leaves_the_rest(part: str) -> None:
    module = torch.nn.Linear(1, 1)
    parts: dict[str, Any] = {"module": module, "optimizer": torch.optim.SGD(module.parameters()), part: Raises()}
    ready = prepared(PyTorchCheckpoint(**parts, hyperparameters={"lr": 0.1}))
    assert ready.content.keys() == {"lr", "module_state_dict", "optimizer_state_dict"} - {f"{part}_state_dict"}
    assert f"{part}_state_dict cannot be had: ValueError: not consolidated" in str(ready.error("file:///x"))
    with pytest.raises(ValueError, match="not consolidated"):
        content_of(PyTorchCheckpoint(**{part: Raises()}))


def test_a_state_may_stand_for_its_owner() -> None:
    state = torch.nn.Linear(1, 1).state_dict()
    given: Any = {"module": state}
    assert content_of(PyTorchCheckpoint(**given))["module_state_dict"] is state


def test_what_cannot_be_pickled_is_left_out_of_a_trusted_checkpoint_too() -> None:
    ready = prepared(
        PyTorchCheckpoint(hyperparameters={"act": lambda x: x, "kept": Inner(Color.RED, Shape(1))}), trusted=True
    )
    assert ready.content == {"kept": Inner(Color.RED, Shape(1))}
    assert "weights_only=False" in str(ready.error("file:///x"))
