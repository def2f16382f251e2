"""What all user-creatable objects have in common: an id, and properties that can be shown and perhaps changed.

Behaviour and texts: QEMU qom/object.c, qom/object_interfaces.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec
from msgspec import UNSET, Meta

from fusebd.block.options import Json, Option, OptionStruct, convert, declared_options
from fusebd.block.qjson import ordered
from fusebd.errors import CommandError

if TYPE_CHECKING:
    from fusebd.block.objects import Objects


class ObjectOptions(OptionStruct, frozen=True, kw_only=True):
    """What object-add takes for every type of object (QAPI ObjectOptions)."""

    qom_type: Annotated[str, Meta(description="type of the object")]
    id: Annotated[str, Meta(description="name of the object")]


class UserObject:
    """An object made by object-add.  Its properties are the options that its type declares.

    Subclasses say in ``put`` what a new value means, in ``defaults`` what a property is when it was never given.
    """

    qom_type: ClassVar[str]
    qom_parent: ClassVar[str] = "object"
    options_class: ClassVar[type[ObjectOptions]]
    defaults: ClassVar[dict[str, Json]] = {}
    #: QAPI's names of the types of properties that are neither string nor integer
    property_types: ClassVar[dict[str, str]] = {}

    def __init__(self, options: ObjectOptions) -> None:
        """An object with *options*.  Raises OptionError if one has a value that is impossible by itself."""
        self.id = options.id
        self.completed = False
        self.values = dict(self.defaults)
        given = {name: getattr(options, option_attribute(name)) for name in property_options(type(self))}
        # QEMU sets them in the order of its hash table; so the same mistake is found first
        for name, value in ordered({name: value for name, value in given.items() if value is not UNSET}):
            self.put(name, value)

    async def complete(self, objects: Objects) -> None:
        """All options are set: check them together, and get ready.  Raises FusebdError to refuse."""

    @property
    def in_use(self) -> bool:
        """Whether something depends on it, so that it cannot be deleted."""
        return False

    # -- properties -----------------------------------------------------------------------------

    def put(self, name: str, value: Json) -> None:
        """The property *name* gets the valid *value*.  Raises OptionError, and changes nothing, to refuse."""
        self.values[name] = value

    def get(self, name: str) -> Json:
        """The value of the property *name*, as QAPI has it.  Raises CommandError if there is none."""
        if name == "type":
            return self.qom_type
        self._check_exists(name)
        return self.values[name]

    def set(self, name: str, value: Json) -> None:
        """qom-set: *value*, as the client gave it, becomes that of the property *name*.  Raises FusebdError."""
        if name == "type":
            raise CommandError(f"Property '{self.qom_type}.type' is not writable")
        self._check_exists(name)
        options = convert({"qom-type": self.qom_type, "id": self.id, name: value}, self.options_class)
        self.put(name, getattr(options, option_attribute(name)))

    def _check_exists(self, name: str) -> None:
        if name not in property_options(type(self)):
            raise CommandError(f"Property '{self.qom_type}.{name}' not found")


def option_attribute(name: str) -> str:
    """The attribute of an OptionStruct that holds the option *name*."""
    return name.replace("-", "_")


def property_options(kind: type[UserObject]) -> dict[str, Option]:
    """The declared options of *kind* that are properties, by name."""
    return {option.name: option for option in declared_options(kind.options_class)[len(_COMMON) :]}


_COMMON = msgspec.structs.fields(ObjectOptions)


def property_list(kind: type[UserObject]) -> list[Json]:
    """QAPI ObjectPropertyInfo of the properties of *kind*."""
    found = [{"name": "type", "type": "string"}]
    for name, option in property_options(kind).items():
        plain = "int" if option.type_name == "integer" else option.type_name
        found.append({"name": name, "type": kind.property_types.get(name, plain)})
    return found
