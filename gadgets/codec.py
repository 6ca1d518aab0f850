"""Messages to and from the bytes of the Gadgetron protocol: `gadgets.decode` reads, `gadgets.encode` writes."""

from gadgets.decode import Bytes, Source, TransportError, read_message
from gadgets.encode import Part, message_parts

__all__ = ["Bytes", "Part", "Source", "TransportError", "message_parts", "read_message"]
