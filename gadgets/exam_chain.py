"""The chain of one exam of a server: what was asked for, with the warm models, its images labelled."""

from collections.abc import Iterator

from gadgets.chain import run_chain
from gadgets.exam_feed import ExamFeed
from gadgets.exam_record import Record
from gadgets.exam_request import parse_request
from gadgets.header import parse_header
from gadgets.image_headers import with_attributes
from gadgets.messages import ConfigFile, ConfigScript, HeaderXml, Image, ImageArray, Message
from gadgets.warm_models import WarmModels
from melcore.io.mrd_header import scan_info
from melcore.reconstruct import Reconstruction


class ExamChain:
    """Reconstructs an exam, and notes in its record what was asked for and which paths were taken.

    Attributes
    ----------
    makes_images
        False for targets that only pass messages on, or change them.
    warned
        Whether an image is not what was asked for.
    seconds
        Of each part of the reconstructions, added up.
    """

    def __init__(self, record: Record, models: WarmModels, feed: ExamFeed) -> None:
        self.makes_images = True
        self.warned = False
        self.seconds: dict[str, float] = {}
        self._record, self._models, self._feed = record, models, feed

    def run(self, config: ConfigFile | ConfigScript, header: HeaderXml) -> Iterator[Message]:
        """Messages to send back, as they come.

        Raises
        ------
        MelError
            If the request cannot be met or the data cannot be used.
        """
        for message in self._stream(config, header):
            if self.makes_images and isinstance(message, Image | ImageArray):
                yield self._labelled(message)
            else:
                yield message

    def _stream(self, config: ConfigFile | ConfigScript, header: HeaderXml) -> Iterator[Message]:
        request, record, models = parse_request(config), self._record, self._models
        record.name, record.values = request.name, dict(request.values)
        stages = models.stages(self._observe)
        parsed = parse_header(header.xml)
        record.protocol = scan_info(parsed.document).protocol
        values = dict(request.values)
        self.makes_images = request.kind == "client" or request.name == "reconstruct"
        if models.model is not None and self.makes_images and not {"model", "bundle"} & set(values):
            values["model"] = models.model
        if request.kind == "client":
            return run_chain(request.name, header.xml, self._feed, overrides=values, stages=stages)
        return stages[request.name].bind(values, f"target {request.name}")(iter(self._feed), parsed)

    def _observe(self, result: Reconstruction, waited: float) -> None:
        for name, value in {"wait": waited, **result.timings}.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        self.warned = self.warned or bool(result.warning)
        if result.path_taken not in self._record.paths:
            self._record.paths.append(result.path_taken)

    def _labelled(self, message: Image | ImageArray) -> Image | ImageArray:
        """An image that says which exam it is of, and what the operator should know of that."""
        warning = ""
        if self._feed.unspooled:
            warning = f"the raw data of this exam are not kept, their disk failed: {self._feed.unspooled}"
        elif self.warned:
            warning = f"the raw data are kept: mel replay {self._record.id}"
        new = {"MEL_exam": self._record.id, "MEL_warning": warning}
        if isinstance(message, Image):
            return Image(message.header, with_attributes(message.meta, new), message.data)
        metas = message.meta or ("",) * message.headers.size
        labelled = tuple(with_attributes(meta, new) for meta in metas)
        return ImageArray(message.data, message.headers, labelled, message.waveforms, message.acquisition_headers)
