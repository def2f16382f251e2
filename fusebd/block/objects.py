"""The user-creatable objects of a daemon: throttle groups, secrets, and what QEMU has event loops configured with.

An object is made by object-add or ``--object``, has an id, and lasts until object-del.  Nodes and other objects name
it by the id.

Behaviour and texts: QEMU qom/object_interfaces.c, qom/object.c, util/id.c.
"""

from __future__ import annotations

from collections.abc import Iterator

from fusebd.block.eventloop import IoThread, MainLoop
from fusebd.block.identifiers import is_well_formed
from fusebd.block.options import Json, convert, declared_options, parse_keyval, type_keyval
from fusebd.block.qjson import loads
from fusebd.block.secret import Secret
from fusebd.block.throttlegroup import ThrottleGroup
from fusebd.block.userobject import ObjectOptions, UserObject
from fusebd.errors import CommandError, OptionError

#: the types that can be made, by name
OBJECT_TYPES: dict[str, type[UserObject]] = {
    kind.qom_type: kind for kind in (IoThread, MainLoop, Secret, ThrottleGroup)
}
#: the other types that QEMU has (QAPI ObjectType): they exist, but not here
_FOREIGN_TYPES = frozenset(
    {
        *("acpi-generic-initiator", "acpi-generic-port", "authz-list", "authz-listfile", "authz-pam", "authz-simple"),
        *("can-bus", "can-host-socketcan", "colo-compare", "cryptodev-backend", "cryptodev-backend-builtin"),
        *("cryptodev-backend-lkcf", "cryptodev-vhost-user", "dbus-vmstate", "filter-buffer", "filter-dump"),
        *("filter-mirror", "filter-redirector", "filter-replay", "filter-rewriter", "input-barrier", "input-linux"),
        *("iommufd", "memory-backend-epc", "memory-backend-file", "memory-backend-memfd", "memory-backend-ram"),
        *("memory-backend-shm", "pef-guest", "pr-manager-helper", "qtest", "rng-builtin", "rng-egd", "rng-random"),
        *("s390-pv-guest", "secret_keyring", "sev-guest", "sev-snp-guest", "thread-context", "tls-cipher-suites"),
        *("tls-creds-anon", "tls-creds-psk", "tls-creds-x509", "x-remote-object", "x-vfio-user-server"),
    }
)
_TYPE = "qom-type"


class Objects:
    """All objects of one daemon, in the order in which they were made."""

    def __init__(self) -> None:
        self._objects: dict[str, UserObject] = {}

    def __iter__(self) -> Iterator[UserObject]:
        return iter(self._objects.values())

    async def add(self, value: Json) -> UserObject:
        """Make the object that the JSON object *value*, object-add's arguments, describes.

        Suspends only where a secret is read from a file.  Raises FusebdError; there is no new object then.
        """
        options = parse_object(value)
        if not is_well_formed(options.id):
            hint = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
            raise OptionError("Parameter 'id' expects an identifier", hint=hint)
        if options.qom_type not in OBJECT_TYPES:
            raise OptionError(f"invalid object type: {options.qom_type}")
        made = OBJECT_TYPES[options.qom_type](options)
        # "type" is a property that the container has already
        if options.id in self._objects or options.id == "type":
            raise CommandError(f"attempt to add duplicate property '{options.id}' to object (type 'container')")
        self._objects[options.id] = made
        try:
            await made.complete(self)
        except BaseException:
            del self._objects[options.id]
            raise
        made.completed = True
        return made

    def remove(self, object_id: str) -> None:
        """object-del.  Raises CommandError if there is no such object, or it is in use."""
        found = self.get(object_id)
        if found is None:
            raise CommandError(f"object '{object_id}' not found")
        if found.in_use:
            raise CommandError(f"object '{object_id}' is in use, can not be deleted")
        del self._objects[object_id]

    def get(self, object_id: str) -> UserObject | None:
        """The object called *object_id*, if there is one that is ready."""
        found = self._objects.get(object_id)
        return found if found is not None and found.completed else None

    def is_iothread(self, name: str) -> bool:
        """Whether there is an iothread *name*."""
        return isinstance(self.get(name), IoThread)

    def throttle_group(self, name: str) -> ThrottleGroup:
        """The throttle group *name*.  Raises OptionError."""
        found = self.get(name)
        if not isinstance(found, ThrottleGroup):
            raise OptionError(f"Throttle group '{name}' does not exist")
        return found

    def secret(self, name: str) -> Secret:
        """The secret *name*.  Raises OptionError."""
        found = self.get(name)
        if found is None:
            raise OptionError(f"No secret with id '{name}'")
        if not isinstance(found, Secret):
            raise OptionError(f"Object with id '{name}' is not a secret")
        return found

    def password(self, name: str) -> bytes:
        """What the secret *name* is as a password: UTF-8, up to the first NUL.  Raises OptionError."""
        value = self.secret(name).value
        try:
            value.decode()
        except UnicodeDecodeError:
            raise OptionError(f"Data from secret {name} is not valid UTF-8") from None
        return value.partition(b"\0")[0]


def parse_object(value: Json) -> ObjectOptions:
    """*value*, a JSON object as object-add takes it, validated by the declaration of its type.

    The result is an ObjectOptions alone where QEMU has the type and fusebd has not.  Raises OptionError.
    """
    if not isinstance(value, dict):
        raise OptionError("Invalid parameter type for 'object', expected: object")
    # the members that all types have come first, as in QEMU
    common = convert({"id": "", **{name: value[name] for name in (_TYPE, "id") if name in value}}, ObjectOptions)
    if common.qom_type not in OBJECT_TYPES and common.qom_type not in _FOREIGN_TYPES:
        raise OptionError(f"Parameter '{_TYPE}' does not accept value '{common.qom_type}'")
    if "id" not in value:
        raise OptionError("Parameter 'id' is missing")
    if common.qom_type in _FOREIGN_TYPES:
        return common
    return convert(value, OBJECT_TYPES[common.qom_type].options_class)


def parse_object_text(text: str) -> dict[str, Json]:
    """The JSON object for ``Objects.add`` that *text* spells, as ``--object`` takes it: JSON, or key=value.

    The strings of key=value have the types that the object's type declares; otherwise nothing is validated.
    Raises OptionError.
    """
    if text.startswith("{"):
        value = loads(text)
        assert isinstance(value, dict)
        return value
    return type_object(parse_keyval(text, implied_key=_TYPE))


def type_object(tree: dict[str, Json]) -> dict[str, Json]:
    """*tree* from ``parse_keyval`` with its strings made the JSON types that the object's type declares."""
    kind = OBJECT_TYPES.get(tree[_TYPE]) if isinstance(tree.get(_TYPE), str) else None
    return tree if kind is None else type_keyval(tree, declared_options(kind.options_class))
