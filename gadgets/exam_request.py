"""What the other side of a connection wants: its first message, understood.

Two kinds of peers share the port. A **node** is the ``<connect>`` node of a Gadgetron's pipeline; its configuration
holds properties only: ``target`` names one of our stages (``reconstruct`` unless given), the others are its own::

    <configuration>
      <property name="target" value="reconstruct"/>
      <property name="model" value="primal_dual_3d"/>
    </configuration>

A **client** of the MRD protocol (Gadgetron's own client, those of scanners) names one of the pipelines that ship, as a
configuration file, ``mel_cartesian_3d`` or ``mel_cartesian_3d.xml``; or as a script that chooses a pipeline and sets
properties of our own stages in it::

    <configuration>
      <property name="pipeline" value="mel_cartesian_3d"/><property name="deadline" value="20"/>
    </configuration>

Nothing else is accepted: a client can choose and set, but neither bring a pipeline of its own nor name a file.
"""

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from typing import Literal

from gadgets.messages import ConfigFile, ConfigScript
from gadgets.settings import properties
from melcore.errors import ConfigError, unknown

Kind = Literal["client", "node"]

_LARGEST_SCRIPT = 1 << 20


@dataclass(frozen=True)
class ExamRequest:
    """Pipeline (of a client) or target (of a node), and properties for it."""

    kind: Kind
    name: str
    values: dict[str, str]


def kind_of(message: ConfigFile | ConfigScript) -> Kind:
    """Who sent this configuration, also where it cannot be used."""
    if isinstance(message, ConfigFile):
        return "client"
    try:
        root = _root(message)
    except ConfigError:
        return "client"
    # A node's configuration is never a pipeline, and never names one.
    is_node = root.tag == "configuration" and all(element.tag == "property" for element in root)
    return "client" if not is_node or any(e.get("name") == "pipeline" for e in root) else "node"


def parse_request(message: ConfigFile | ConfigScript) -> ExamRequest:
    """Understand a configuration.

    Raises
    ------
    ConfigError
        If it is none of the forms above, or names something that there is not.
    """
    from gadgets.chain import shipped_pipelines
    from gadgets.stages import STAGES

    pipelines = shipped_pipelines()
    if isinstance(message, ConfigFile):
        name = message.name.strip().removesuffix(".xml")
        if name not in pipelines:
            raise unknown("pipeline", message.name, pipelines)
        return ExamRequest("client", name, {})
    root = _root(message)
    strangers = [element.tag for element in root if element.tag != "property"]
    if root.tag != "configuration" or strangers:
        what = f"<{strangers[0]}>" if root.tag == "configuration" else f"<{root.tag}>"
        raise ConfigError(
            f"the configuration holds {what}, but may hold properties only: name one of the pipelines that ship, "
            f"{', '.join(sorted(pipelines))}."
        )
    values = properties(root, "the configuration")
    if "pipeline" in values:
        name = values.pop("pipeline").removesuffix(".xml")
        if name not in pipelines:
            raise unknown("pipeline", name, pipelines)
        return ExamRequest("client", name, values)
    target = values.pop("target", "") or "reconstruct"
    if target not in STAGES:
        raise unknown("target", target, STAGES)
    return ExamRequest("node", target, values)


def _root(message: ConfigScript) -> ElementTree.Element:
    text = message.xml
    # Entities can make a small text enormous, or read files.
    if len(text) > _LARGEST_SCRIPT or b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ConfigError("the configuration is larger than 1 MiB, or declares a document type: send properties only.")
    try:
        return ElementTree.fromstring(text.strip(b"\0 \t\r\n") or b"<configuration/>")
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ConfigError(f"the configuration is not readable XML: {error}.") from error
