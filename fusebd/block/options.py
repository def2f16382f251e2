"""The option model: one declaration per driver, from which everything else about options follows.

A driver declares its options as a subclass of BlockdevOptions (a msgspec Struct; QAPI's names with
``_`` for ``-``).  From that come validation with QEMU's error texts, both spellings (a JSON object
and QEMU's ``key=value`` with dotted keys), and the listings for people (``describe``).

Meaning and spelling: QEMU's qapi/block-core.json (BlockdevOptions) and util/keyval.c.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fusebd.errors import OptionError

Json = Any
Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Size = Annotated[int, Meta(ge=0, le=2**63 - 1)]
#: QAPI's unsigned types; msgspec has no limits so large, so that ``convert`` checks them itself.  As in QEMU, a
#: negative number is taken for the 64-bit one with the same bits: who uses a Uint64 reduces it modulo 2**64
Uint32 = Annotated[int, Meta(extra={"unsigned_bits": 32})]
Uint64 = Annotated[int, Meta(extra={"unsigned_bits": 64})]

T = TypeVar("T")


class OptionStruct(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Base of every declared group of options.

    Subclasses repeat ``frozen=True, kw_only=True``, which are not inherited.
    """


class CacheOptions(OptionStruct, frozen=True):
    """How a node treats the host's caches."""

    direct: Annotated[bool | UnsetType, Meta(description="bypass the host page cache (O_DIRECT)")] = UNSET
    no_flush: Annotated[bool | UnsetType, Meta(description="ignore flush requests")] = UNSET


class BlockdevOptions(OptionStruct, frozen=True, dict=True):
    """Options that every node takes, whatever its driver (REFERENCE: QAPI BlockdevOptions).

    ``given`` is the JSON object that they were read from: it has an option that was given its default, too.
    """

    driver: Annotated[str, Meta(description="driver name")]
    node_name: Annotated[str | UnsetType, Meta(description="name of the node, and of its file")] = UNSET
    discard: Annotated[Literal["ignore", "unmap"] | UnsetType, Meta(description="what becomes of discard requests")] = (
        UNSET
    )
    cache: Annotated[CacheOptions, Meta(description="host cache behaviour")] = CacheOptions()
    read_only: Annotated[bool | UnsetType, Meta(description="open without write access")] = UNSET
    auto_read_only: Annotated[
        bool | UnsetType, Meta(description="fall back to read-only if writing is not possible")
    ] = UNSET
    force_share: Annotated[bool | UnsetType, Meta(description="ignore image locks (only with read-only)")] = UNSET
    detect_zeroes: Annotated[
        Literal["off", "on", "unmap"], Meta(description="turn writes of zeroes into zero writes")
    ] = "off"

    @property
    def given(self) -> dict[str, Json]:
        value: dict[str, Json] = self.__dict__["given"]
        return value

    def keep_given(self, value: dict[str, Json]) -> None:
        """*value* is what they were read from."""
        self.__dict__["given"] = value


class BlockdevRef:
    """The value of an option that takes a device: the name of a node, or a node's own options.

    ``reference`` is the node-name if the value was a string, else None; ``raw`` is the object that
    was given for a new node, and ``options`` its validated form.  A reference that stands in an
    image (a backing file name) has neither driver nor validated options yet: see ``fusebd.block.filename``.
    """

    __slots__ = ("options", "raw", "reference")

    def __init__(self, value: str | dict[str, Json]) -> None:
        self.reference: str | None = None
        self.raw: dict[str, Json] | None = None
        self.options: BlockdevOptions | None = None
        if isinstance(value, str):
            self.reference = value
        else:
            self.raw = value

    def __repr__(self) -> str:
        return f"BlockdevRef({self.reference if self.raw is None else self.raw!r})"


def _decode_custom(kind: type, value: Json) -> Any:
    if kind is BlockdevRef and isinstance(value, (str, dict)):
        return BlockdevRef(value)
    raise ValueError("expected BlockdevRef")


# What msgspec says, and what QEMU says instead.  {p} is the parameter's full path, {n} its last part.
_COMPLAINTS = (
    (re.compile(r"Object missing required field `(?P<f>[^`]*)`"), "Parameter '{p}' is missing"),
    (re.compile(r"Object contains unknown field `(?P<f>[^`]*)`"), "Parameter '{p}' is unexpected"),
    (re.compile(r"Invalid (?:enum )?value '?(?P<v>.*?)'?$"), "Parameter '{n}' does not accept value '{v}'"),
    (re.compile(r"Expected `int` [<>]= -?214748364[78]$"), "Parameter '{n}' expects int32_t"),
    (
        re.compile(r"Expected `int` [<>]=|Integer value out of range"),
        "Invalid parameter type for '{p}', expected: integer",
    ),
    (re.compile(r"expected (?P<t>BlockdevRef)"), "Invalid parameter type for '{n}', expected: {ref}"),
    (re.compile(r"Expected `(?P<t>[^`]*)`, got"), "Invalid parameter type for '{p}', expected: {t}"),
)
_TYPE_NAMES = {"str": "string", "int": "integer", "bool": "boolean", "float": "number"}
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")


def _complaint(error: msgspec.ValidationError, struct: type[msgspec.Struct], prefix: str) -> OptionError:
    """*error*, found while reading *struct* at the place *prefix*, in QEMU's words."""
    text = str(error)
    path = ""
    if found := _PATH.search(text):
        path, text = found["path"], text[: found.start()]
    for pattern, template in _COMPLAINTS:
        if not (found := pattern.search(text)):
            continue
        parts = found.groupdict()
        if "f" in parts:
            path = f"{path}.{parts['f']}" if path else parts["f"]
        expected = parts.get("t") or ""
        if expected and path in _unsigned_options(struct):
            return OptionError(f"Parameter '{path}' expects uint64")
        return OptionError(
            template.format(
                p=prefix + path,
                n="null" if path.endswith("]") else path.rpartition(".")[2],  # QEMU: an array's item has no name
                v=parts.get("v"),
                t=_TYPE_NAMES.get(expected.split(" | ")[0], expected.split(" | ")[0]),
                ref=_ref_name(struct, path),
            )
        )
    return OptionError(f"{prefix}{path}: {text}" if prefix or path else text)


def _ref_name(struct: type[msgspec.Struct], path: str) -> str:
    for option in declared_options(struct):
        if option.name == path:
            return option.type_name
    return "BlockdevRef"


@functools.cache
def _unsigned_options(struct: type[msgspec.Struct]) -> dict[str, int]:
    """The options of *struct* that are declared as Uint32 or Uint64: name -> number of bits."""
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    found = {}
    todo = [(field.encode_name, field.type) for field in info.fields]
    while todo:
        name, kind = todo.pop()
        if isinstance(kind, msgspec.inspect.UnionType):
            todo += [(name, member) for member in kind.types]
        elif isinstance(kind, msgspec.inspect.Metadata):
            todo.append((name, kind.type))
            if bits := (kind.extra or {}).get("unsigned_bits"):
                found[name] = bits
    return found


def _check_unsigned(value: Json, struct: type[msgspec.Struct]) -> None:
    """Refuse what is too large, or too small, in *value* for its unsigned type.  Raises OptionError."""
    for name, bits in _unsigned_options(struct).items():
        given = value.get(name, 0)
        if not -(2**63) <= given < 2**64:
            raise OptionError(f"Parameter '{name}' expects uint64")
        if bits == 32 and not 0 <= given < 2**32:
            raise OptionError(f"Parameter '{name}' expects uint32_t")


def convert(value: Json, kind: type[T], prefix: str = "") -> T:
    """*value* (plain JSON types) as *kind*, a Struct; raises OptionError in QEMU's words.

    *prefix* is put before each parameter's name: the place where the object stands, ``file.``.
    Values of BlockdevRef options are left unvalidated: ``fusebd.block.driver.parse_blockdev`` does them.
    """
    assert issubclass(kind, msgspec.Struct)
    try:
        converted = msgspec.convert(value, kind, dec_hook=_decode_custom)
        _check_unsigned(value, kind)
        return converted
    except msgspec.ValidationError as error:
        complaint = _complaint(error, kind, prefix)
    if (
        isinstance(value, dict)
        and (known := {k: v for k, v in value.items() if k in kind.__struct_encode_fields__}) != value
    ):
        # QEMU looks for what it knows first, and at what is left over only if all of that is right.
        convert(known, kind, prefix)
    raise complaint


def references(options: msgspec.Struct) -> Iterator[tuple[str, BlockdevRef]]:
    """The (option name, BlockdevRef) pairs among *options*, lists included (``children[0]``)."""
    for attribute, name in zip(options.__struct_fields__, options.__struct_encode_fields__, strict=True):
        value = getattr(options, attribute)
        if isinstance(value, BlockdevRef):
            yield name, value
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, BlockdevRef):
                    yield f"{name}[{index}]", item


# --- the declaration, read back ------------------------------------------------------------------


class Option(msgspec.Struct, frozen=True):
    """One declared option, as listings and introspection need it."""

    name: str
    type_name: str  #: QAPI's name of the type: string, boolean, integer, BlockdevRef, array, object
    required: bool
    default: Json  #: UNSET if there is none worth showing
    choices: tuple[str, ...]
    description: str
    members: tuple[Option, ...]  #: of an object, or of an array's items

    _NAMES: ClassVar[dict[str, str]] = {
        "StrType": "string",
        "BoolType": "boolean",
        "IntType": "integer",
        "FloatType": "number",
        "ListType": "array",
        "StructType": "object",
        "LiteralType": "string",
        "EnumType": "string",
    }


def declared_options(struct: type[msgspec.Struct]) -> tuple[Option, ...]:
    """The options that *struct* declares, in order."""
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    return _members(info)


def _members(struct: msgspec.inspect.StructType) -> tuple[Option, ...]:
    return tuple(_option(field) for field in struct.fields)


def _option(field: msgspec.inspect.Field) -> Option:
    kind, description, nullable = field.type, "", False
    while True:
        if isinstance(kind, msgspec.inspect.Metadata):
            description = (kind.extra_json_schema or {}).get("description", description)
            kind = kind.type
        elif isinstance(kind, msgspec.inspect.UnionType):
            nullable = any(isinstance(t, msgspec.inspect.NoneType) for t in kind.types)
            kind = next(t for t in kind.types if not isinstance(t, msgspec.inspect.NoneType))
        else:
            break
    members: tuple[Option, ...] = ()
    choices: tuple[str, ...] = ()
    name = Option._NAMES.get(type(kind).__name__, "string")
    item = kind
    if isinstance(item, msgspec.inspect.ListType):
        item = item.item_type
    if isinstance(item, msgspec.inspect.StructType):
        members = _members(item)
    elif isinstance(item, msgspec.inspect.LiteralType):
        choices = tuple(str(value) for value in item.values)
    if isinstance(kind, msgspec.inspect.CustomType):
        name = kind.cls.__name__ + ("OrNull" if nullable else "")
    default = UNSET if field.default is msgspec.NODEFAULT else field.default
    return Option(field.encode_name, name, field.required, default, choices, description, members)


def describe(struct: type[OptionStruct]) -> str:
    """A listing of declared options for people, in the manner of ``qemu-img create -o help``."""
    lines: list[str] = []

    def add(options: tuple[Option, ...], prefix: str) -> None:
        for option in options:
            name = prefix + option.name
            kind = "|".join(option.choices) if option.choices and not option.members else option.type_name
            notes = [option.description] if option.description else []
            if option.required:
                notes.append("required")
            elif option.default is not UNSET and not isinstance(option.default, msgspec.Struct):
                shown = option.default
                if isinstance(shown, bool):
                    shown = "on" if shown else "off"
                notes.append(f"default: {shown}")
            lines.append(f"  {name + '=<' + kind + '>':<36} {'; '.join(notes)}".rstrip())
            if option.members:
                add(option.members, name + (".#." if option.type_name == "array" else "."))

    add(declared_options(struct), "")
    return "\n".join(lines)


# --- key=value -----------------------------------------------------------------------------------

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\Z")


def parse_keyval(text: str, implied_key: str | None = None) -> dict[str, Json]:
    """``key=value,...`` as a tree of dicts and lists whose leaves are strings.

    A comma inside a value is doubled; ``a.b=`` makes an object, ``a.0=`` a list.  A first part
    without ``=`` is the value of *implied_key*, if there is one.  Raises OptionError.
    """
    root: dict[str, Json] = {}
    rest = text
    while rest:
        key, equals, after = rest.partition("=")
        if "," in key or not equals:
            if implied_key is None or rest is not text:
                raise OptionError(_no_equals(key.partition(",")[0]))
            key, after = implied_key, rest
        value, rest = _take_value(after)
        _store(root, key, value)
    made: dict[str, Json] = _with_lists(root, "")
    return made


def _no_equals(key: str) -> str:
    return f"Expected '=' after parameter '{key}'" if key else "Invalid parameter ''"


def _take_value(text: str) -> tuple[str, str]:
    parts = text.split(",")
    value = parts.pop(0)
    while len(parts) >= 2 and not parts[0]:
        value += "," + parts[1]
        del parts[:2]
    return value, ",".join(parts)


def _store(root: dict[str, Json], key: str, value: str) -> None:
    fragments = key.split(".")
    for depth, fragment in enumerate(fragments):
        if len(fragment) > 127 or not _KEY.match(fragment):
            raise OptionError(f"Invalid parameter '{key if depth == 0 else '.'.join(fragments[: depth + 1])}'")
    here = root
    for depth, fragment in enumerate(fragments[:-1]):
        here = here.setdefault(fragment, {})
        if not isinstance(here, dict):
            raise OptionError(f"Parameters '{'.'.join(fragments[: depth + 1])}.*' used inconsistently")
    if isinstance(here.get(fragments[-1]), dict):
        raise OptionError(f"Parameters '{key}.*' used inconsistently")
    here[fragments[-1]] = value


def _with_lists(tree: dict[str, Json], prefix: str) -> Any:
    """*tree* with every dict whose keys are 0, 1, 2, ... made a list."""
    made = {
        key: _with_lists(value, f"{prefix}{key}.") if isinstance(value, dict) else value for key, value in tree.items()
    }
    numbers = [key for key in made if key.isdecimal()]
    if not numbers:
        return made
    if len(numbers) != len(made):
        raise OptionError(f"Parameters '{prefix}*' used inconsistently")
    indices = sorted(int(key) for key in numbers)
    for index, found in enumerate(indices):
        if index != found:
            raise OptionError(f"Parameter '{prefix}{index}' missing")
    by_index = {int(key): value for key, value in made.items()}
    return [by_index[index] for index in indices]


def tree_from_dotted(flat: Mapping[str, Json]) -> dict[str, Json]:
    """*flat*, an object in which dotted keys may stand for objects and lists, as a tree; for ``json:`` names."""
    root: dict[str, Json] = {}
    for key, value in flat.items():
        here = root
        *parents, last = key.split(".")
        for parent in parents:
            inner = here.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise OptionError(f"Parameters '{key}' used inconsistently")
            here = inner
        if isinstance(value, dict):
            merged = here.setdefault(last, {})
            if not isinstance(merged, dict):
                raise OptionError(f"Parameters '{key}' used inconsistently")
            merged.update(tree_from_dotted(value))
        else:
            here[last] = value
    made = _with_lists(root, "")
    assert isinstance(made, dict)
    return made


def type_keyval(tree: Mapping[str, Json], options: tuple[Option, ...], prefix: str = "") -> dict[str, Json]:
    """*tree* from ``parse_keyval`` with its strings made the JSON types that *options* declare.

    Parameters that are not declared stay as they are, for ``convert`` to refuse.
    """
    by_name = {option.name: option for option in options}
    typed: dict[str, Json] = {}
    for key, value in tree.items():
        option = by_name.get(key)
        typed[key] = value if option is None else _typed(value, option, prefix + key)
    return typed


def _typed(value: Json, option: Option, name: str) -> Json:
    if option.members and isinstance(value, dict) and option.type_name == "object":
        return type_keyval(value, option.members, name + ".")
    if option.members and isinstance(value, list):
        return [
            type_keyval(item, option.members, f"{name}.{index}.") if isinstance(item, dict) else item
            for index, item in enumerate(value)
        ]
    if not isinstance(value, str):
        return value
    if option.type_name == "boolean":
        if value not in ("on", "off"):
            raise OptionError(f"Parameter '{name}' expects 'on' or 'off'")
        return value == "on"
    if option.type_name == "integer":
        try:
            number = int(value, 0) if not re.match(r"[+-]?0\d", value) else int(value, 8)
        except ValueError:
            raise OptionError(f"Parameter '{name}' expects integer") from None
        if not -(2**63) <= number < 2**64:
            raise OptionError(f"Parameter '{name}' expects integer")
        return number
    if option.type_name == "number":
        try:
            return float(value)
        except ValueError:
            raise OptionError(f"Invalid parameter type for '{name}', expected: number") from None
    return value
