"""Gadgetron pipelines in process: the same XML that a server runs, over messages from anywhere.

Version 2 configurations: ``<configuration><version>2</version><readers/><writers/><stream>...``, whose stream holds
``<gadget>`` (standard gadgets, by class name) and ``<external>`` (our own targets).
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from gadgets.header import Header, parse_header
from gadgets.messages import Image, Message
from gadgets.settings import properties
from gadgets.stages import GADGETS, STAGES, Stage
from melcore.errors import ConfigError, DataError, unknown

Step = Callable[[Iterator[Message], Header], Iterator[Message]]


@dataclass(frozen=True)
class Node:
    """One element of a pipeline's stream."""

    name: str
    stage: Stage
    values: dict[str, str]
    external: bool


def find_pipeline(name: str | Path) -> Path:
    """A file, or a pipeline that ships, by its name.

    Raises
    ------
    ConfigError
        If there is neither; the pipelines that ship are listed.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_pipelines()
    if path.name.removesuffix(".xml") in shipped and len(path.parts) == 1:
        return shipped[path.name.removesuffix(".xml")]
    raise ConfigError(f"the pipeline {path} does not exist; those that ship are {', '.join(sorted(shipped))}.")


def shipped_pipelines() -> dict[str, Path]:
    """Pipelines that ship, by name."""
    import pipelines

    return {file.stem: file for file in sorted(Path(pipelines.__file__).parent.glob("*.xml"))}


def read_pipeline(path: str | Path, stages: Mapping[str, Stage] = STAGES) -> list[Node]:
    """Read the stream of a pipeline.

    Parameters
    ----------
    path
        See `find_pipeline`.
    stages
        Our own targets by name.

    Raises
    ------
    ConfigError
        If the file is not a version 2 configuration, or names a gadget or a target that has no stage here.
    """
    path = find_pipeline(path)
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except (OSError, ElementTree.ParseError) as error:
        raise ConfigError(f"the pipeline {path} cannot be read: {error}.") from error
    if root.tag != "configuration":
        raise ConfigError(
            f"the pipeline {path} begins with <{root.tag}>, not with <configuration>: a pipeline of version 2 "
            "is needed (older ones begin with gadgetronStreamConfiguration)."
        )
    version, stream = root.findtext("version"), root.find("stream")
    if version is None or version.strip() != "2" or stream is None:
        raise ConfigError(f"the pipeline {path} must hold <version>2</version> and a <stream>.")
    nodes = [_node(element, path, stages) for element in stream]
    if not nodes:
        raise ConfigError(f"the <stream> of the pipeline {path} is empty.")
    return nodes


def _node(element: ElementTree.Element, path: Path, stages: Mapping[str, Stage]) -> Node:
    if element.tag == "gadget":
        name = (element.findtext("classname") or "").strip()
        if name not in GADGETS:
            raise ConfigError(f"the pipeline {path}: {unknown('gadget in process', name, GADGETS)}")
        return Node(name, GADGETS[name], properties(element, f"{path}: {name}"), external=False)
    if element.tag == "external":
        execute = element.find("execute")
        if execute is None:
            raise ConfigError(f"the pipeline {path}: an <external> without <execute> cannot be run in process.")
        module, target = execute.get("name", ""), execute.get("target", "")
        if module != "gadgets" or target not in stages:
            raise ConfigError(
                f"the pipeline {path}: the external node {module}.{target} cannot be run in process, only "
                f"gadgets.X with X one of {', '.join(sorted(stages))}."
            )
        where = f"{path}: gadgets.{target}"
        return Node(target, stages[target], properties(element.find("configuration"), where), external=True)
    raise ConfigError(f"the pipeline {path}: <{element.tag}> cannot be run in process, only <gadget> and <external>.")


def build_chain(
    path: str | Path, overrides: Mapping[str, str] | None = None, stages: Mapping[str, Stage] = STAGES
) -> list[Step]:
    """Steps of a pipeline, their settings checked.

    Parameters
    ----------
    path
        See `find_pipeline`.
    overrides
        Property to value, for our own nodes; each must be known to at least one of them.
    stages
        Our own targets by name; a server gives its own, whose models are loaded.

    Raises
    ------
    ConfigError
        If the pipeline or a setting is wrong.
    """
    nodes = read_pipeline(path, stages)
    left = dict(overrides or {})
    steps = []
    for node in nodes:
        values = dict(node.values)
        if node.external:
            known = {field.name for field in fields(node.stage.settings)}
            chosen = {name: value for name, value in (overrides or {}).items() if name in known}
            if {"model", "bundle"} & set(chosen):  # two names of one setting
                values = {name: value for name, value in values.items() if name not in ("model", "bundle")}
            values |= chosen
            left = {name: value for name, value in left.items() if name not in known}
        steps.append(node.stage.bind(values, f"{path}: {node.name}"))
    if left:
        known_names = {field.name for node in nodes if node.external for field in fields(node.stage.settings)}
        raise ConfigError(f"{path}: {unknown('property', next(iter(left)), known_names)}")
    return steps


def run_chain(
    path: str | Path,
    header_xml: bytes | str,
    messages: Iterable[Message],
    *,
    overrides: Mapping[str, str] | None = None,
    stages: Mapping[str, Stage] = STAGES,
) -> Iterator[Image]:
    """Stream messages through a pipeline.

    Parameters
    ----------
    path
        A pipeline's file, or the name of one that ships.
    header_xml
        ISMRMRD header.
    messages
        Acquisitions (and waveforms), in the order of acquisition.
    overrides
        Replace properties of our own nodes, such as ``{"model": "adjoint"}``.
    stages
        See `build_chain`.

    Yields
    ------
    Image
        What a client would receive; anything else that leaves the chain is an error.

    Raises
    ------
    ConfigError
        If the pipeline or a setting is wrong; before any message is taken.
    DataError
        If the data or the header cannot be used.
    """
    steps = build_chain(path, overrides, stages)
    header = parse_header(header_xml if isinstance(header_xml, bytes) else header_xml.encode())
    return _run(steps, header, iter(messages), str(path))


def _run(steps: list[Step], header: Header, stream: Iterator[Message], path: str) -> Iterator[Image]:
    for step in steps:
        stream = step(stream, header)
    for message in stream:
        if isinstance(message, Image):
            yield message
        else:
            raise DataError(
                f"a {type(message).__name__} left the chain {path}, where only images should: "
                "is a gadget missing from it?"
            )
