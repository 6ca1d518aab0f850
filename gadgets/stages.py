"""All stages by name: what a chain may consist of, and what a server may start.

A stage is a generator from messages to messages, ``stage(messages, header, settings) -> Iterator[Message]``; messages
that are not its business pass. Stages compose in one process (`gadgets.chain`) and work alone behind a socket
(`gadgets.targets`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gadgets import acquisition_stages, buffer_stage, image_stages, reconstruct_stage
from gadgets.header import Header
from gadgets.messages import Message
from gadgets.settings import parse

Run = Callable[[Iterator[Message], Header, Any], Iterator[Message]]


@dataclass(frozen=True)
class Stage:
    """A stage with its settings' type, and the name of the Gadgetron gadget that it stands for."""

    run: Run
    settings: type[Any]
    gadget: str | None = None

    def bind(self, values: Mapping[str, str], where: str) -> Callable[[Iterator[Message], Header], Iterator[Message]]:
        """Check the settings now; the result runs the stage.

        Raises
        ------
        ConfigError
            If a setting is unknown or wrong.
        """
        settings = parse(self.settings, values, where)
        return lambda messages, header: self.run(messages, header, settings)


def passthrough(
    messages: Iterator[Message], _header: Header, _settings: acquisition_stages.NoSettings
) -> Iterator[Message]:
    """Pass everything."""
    yield from messages


_NONE = acquisition_stages.NoSettings

#: Name (as a target of `gadgets`) to stage.
STAGES: dict[str, Stage] = {
    "noise_adjust": Stage(acquisition_stages.noise_adjust, _NONE, "NoiseAdjustGadget"),
    "adjust_asymmetric_echo": Stage(acquisition_stages.adjust_asymmetric_echo, _NONE, "AsymmetricEchoAdjustROGadget"),
    "remove_readout_oversampling": Stage(
        acquisition_stages.remove_readout_oversampling, _NONE, "RemoveROOversamplingGadget"
    ),
    "accumulate_trigger": Stage(
        acquisition_stages.accumulate_trigger, acquisition_stages.TriggerSettings, "AcquisitionAccumulateTriggerGadget"
    ),
    "bucket_to_buffer": Stage(buffer_stage.bucket_to_buffer, buffer_stage.BufferSettings, "BucketToBufferGadget"),
    "reconstruct": Stage(reconstruct_stage.reconstruct, reconstruct_stage.ReconstructSettings),
    "simple_recon": Stage(image_stages.simple_recon, _NONE, "SimpleReconGadget"),
    "split_image_array": Stage(image_stages.split_image_array, _NONE, "ImageArraySplitGadget"),
    "extract": Stage(image_stages.extract, image_stages.ExtractSettings, "ExtractGadget"),
    "finish": Stage(passthrough, _NONE, "ImageFinishGadget"),
    "passthrough": Stage(passthrough, _NONE),
}

#: Class name of a Gadgetron gadget to the stage that does the same.
GADGETS: dict[str, Stage] = {stage.gadget: stage for stage in STAGES.values() if stage.gadget is not None}
