"""Settings of stages: `<property name= value=>` elements to typed dataclasses, with errors that list what is right."""

import dataclasses
import enum
import types
import typing
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from melcore.errors import ConfigError, unknown
from melcore.units import parse_bytes

T = TypeVar("T")


class Bytes(int):
    """A number of bytes, written as ``12GiB``."""


class Dimension(enum.StrEnum):
    """A counter of an acquisition that a gadget can trigger on, sort by, or make an axis of."""

    NONE = ""
    KSPACE_ENCODE_STEP_1 = "kspace_encode_step_1"
    KSPACE_ENCODE_STEP_2 = "kspace_encode_step_2"
    AVERAGE = "average"
    SLICE = "slice"
    CONTRAST = "contrast"
    PHASE = "phase"
    REPETITION = "repetition"
    SET = "set"
    SEGMENT = "segment"


def properties(configuration: ElementTree.Element | None, where: str) -> dict[str, str]:
    """Read the `<property>` elements of a `<gadget>`, or of the `<configuration>` of an external node (may be None)."""
    found: dict[str, str] = {}
    for element in () if configuration is None else configuration.iter("property"):
        # Gadgetron also writes <property><name>..</name><value>..</value></property>.
        name = element.get("name") or element.findtext("name")
        value = element.get("value")
        value = element.findtext("value") if value is None else value
        if not name:
            raise ConfigError(
                f'{where}: a <property> needs a name and a value, like <property name="memory" value="12GiB"/>.'
            )
        if name in found:
            raise ConfigError(f"{where}: the property {name!r} is given twice.")
        found[name] = (value or "").strip()
    return found


def parse(kind: type[T], values: Mapping[str, str], where: str) -> T:
    """Make a dataclass of settings from texts.

    Parameters
    ----------
    kind
        A dataclass whose fields all have defaults; their types decide how the texts are read.
    values
        Name to text. An empty text means the default, except where a `Dimension` may be empty.
    where
        For the error: the gadget or file.

    Raises
    ------
    ConfigError
        If a name is unknown or a value cannot be read; all right names or values are listed.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    chosen: dict[str, Any] = {}
    for name, text in values.items():
        if name not in names:
            raise ConfigError(f"{where}: {unknown('property', name, names)}")
        if text or hints[name] is Dimension:
            chosen[name] = _value(hints[name], text, f"{where}: property {name!r}")
    return kind(**chosen)


def _value(hint: Any, text: str, what: str) -> Any:
    if isinstance(hint, types.UnionType):
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if text in options:
            return text
        raise ConfigError(f"{what} is {text!r}, but can be {', '.join(map(repr, options))}.")
    if hint is bool:
        if text.lower() in ("true", "1", "yes", "false", "0", "no"):
            return text.lower() in ("true", "1", "yes")
        raise ConfigError(f"{what} is {text!r}, but can be true or false.")
    if hint is Dimension:
        lower = "" if text.lower() == "none" else text.lower()
        if lower in list(Dimension):
            return Dimension(lower)
        raise ConfigError(f"{what} is {text!r}, but can be {', '.join(repr(str(option)) for option in Dimension)}.")
    try:
        if hint is Bytes:
            return Bytes(parse_bytes(text))
        return hint(text)
    except ValueError as error:
        kind = {int: "a whole number", float: "a number", Bytes: "a size such as 12GiB"}.get(hint, "different")
        raise ConfigError(f"{what} is {text!r}, but must be {kind}.") from error
