"""Reading TFRecord files and the ``tensorflow.Example`` messages in them without TensorFlow.

A TFRecord file is a row of records, each ``uint64 length | uint32 CRC of the length | data | uint32 CRC of the data``,
all little-endian; a CRC is CRC-32C, rotated right by 15 bits plus a constant ("masked").
"""

import functools
import os
import struct
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from latentcast.config import one_line

from ...urls import Place
from ..video.reader import VideoError

HEADER, FOOTER = 12, 4  # bytes before and after a record's data
KINDS = ("bytes", "float", "int64")  # of the values of a feature, in the order of their field numbers


@dataclass(frozen=True)
class RecordFile:
    """A TFRecord file on disk, or one inside an uncompressed tar, which is read in place.

    Attributes:
        path: the file, or the tar.
        size: of the TFRecord file, bytes.
        start: its offset in ``path``, bytes.
        member: its name in the tar; None outside one.
    """

    path: Path
    size: int
    start: int = 0
    member: str | None = None

    def __str__(self):
        return str(self.path) if self.member is None else f"{self.path}: {' '.join(self.member.split())}"

    def offsets(self) -> list[int]:
        """Where the records begin, bytes from the file's start, found without reading their data.

        Damaged framing ends the list: its last entry is then the record at which ``read`` fails, for what lies behind
        it cannot be found.
        """
        offsets, offset = [], 0
        with open(self.path, "rb", buffering=0) as file:
            while offset < self.size:
                offsets.append(offset)
                try:
                    offset += HEADER + self._length(file, offset) + FOOTER
                except VideoError:
                    break
        return offsets

    def read(self, offset: int) -> bytes:
        """The data of the record at ``offset`` -> bytes.

        Raises:
            VideoError: the file ends within the record, or a CRC is wrong.
        """
        with open(self.path, "rb", buffering=0) as file:
            length = self._length(file, offset)
            data = self._bytes(file, offset + HEADER, length)
            self._check(data, self._bytes(file, offset + HEADER + length, FOOTER), offset, "data")
        return data

    def _length(self, file, offset):
        """Length of a record's data, checked against its CRC and the file's end."""
        if offset + HEADER + FOOTER > self.size:
            raise VideoError(
                f"{self}: cut off: expected a record's {HEADER}-byte header at byte {offset}, "
                f"found the end of the file at byte {self.size}"
            )
        header = self._bytes(file, offset, HEADER)
        self._check(header[:8], header[8:], offset, "length")
        (length,) = struct.unpack("<Q", header[:8])
        if offset + HEADER + length + FOOTER > self.size:
            raise VideoError(
                f"{self}: cut off: expected {length} bytes of data in the record at byte {offset}, "
                f"found the end of the file at byte {self.size}"
            )
        return length

    def _bytes(self, file, offset, n):
        held = max(0, os.fstat(file.fileno()).st_size - self.start - offset)
        if held < n:  # a tar that ends within its member
            raise VideoError(f"{self}: cut off: expected {n} bytes at byte {offset}, found {held}")
        file.seek(self.start + offset)
        return file.read(n)

    def _check(self, data, crc, offset, what):
        expected, (found,) = masked_crc(data), struct.unpack("<I", crc)
        if found != expected:
            raise VideoError(
                f"{self}: damaged: wrong CRC of the {what} of the record at byte {offset}: "
                f"expected {expected:08x} from the bytes, found {found:08x}"
            )


def masked_crc(data: bytes) -> int:
    """The masked CRC-32C of bytes, an int below 2**32."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def tar_members(path: Place) -> dict[str, RecordFile]:
    """The files in an uncompressed tar -> name -> RecordFile. Only the headers are read.

    Raises:
        OSError: it is compressed, no tar, or its headers are damaged.
    """
    members = {}
    try:
        with tarfile.open(path, "r:") as archive:
            end = 0  # of what was seen; damaged headers lead back, and round and round
            for member in archive:
                if member.offset < end or member.size < 0:
                    raise tarfile.ReadError("members overlap")
                end = member.offset_data
                if member.isreg():
                    members[member.name] = RecordFile(Path(path), member.size, member.offset_data, member.name)
    # The others are what tarfile raises of sizes below 0 or beyond what counts bytes, and of names within names.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        with open(path, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
        found = "gzip; decompress it, or give the extracted folder" if gzipped else f"none, or one cut off ({error})"
        raise OSError(f"{path}: expected an uncompressed tar, found {found}") from None
    return members


def parse_example(data: bytes, where: str) -> Mapping[str, object]:
    """A serialized ``tensorflow.Example`` -> its features, name -> message.

    Args:
        data: bytes.
        where: the file and record, for the message of an error.
    Raises:
        VideoError: these bytes are no Example.
    """
    try:
        return _example_class().FromString(data).features.feature
    except DecodeError:
        raise VideoError(f"{where}: expected a tensorflow.Example, found {len(data)} bytes that are none") from None


def feature_values(features: Mapping[str, object], name: str, kind: str, where: str) -> Sequence:
    """The values of one feature of ``parse_example`` -> sequence.

    Args:
        kind: "bytes", "float" or "int64".
        where: the file and record, for the message of an error.
    Raises:
        VideoError: no such feature, or one of another kind.
    """
    found = features[name].WhichOneof("kind") if name in features else None
    if found != f"{kind}_list":
        if found is None:
            found = f"no values of that name among its {len(features)} features, {one_line(sorted(features))}"
        raise VideoError(f"{where}: expected the feature {name!r} with {kind} values, found {found}")
    return getattr(features[name], found).value


@functools.cache
def _example_class():
    """The message class of ``tensorflow.Example``, from its published fields.

    The pool is its own, so that nothing collides with TensorFlow where that is installed too.
    """
    field = descriptor_pb2.FieldDescriptorProto
    scalar = {"bytes": field.TYPE_BYTES, "float": field.TYPE_FLOAT, "int64": field.TYPE_INT64}
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")

    feature = descriptor_pb2.DescriptorProto(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, kind in enumerate(KINDS, 1):
        values = file.message_type.add(name=f"{kind.capitalize()}List")
        values.field.add(name="value", number=1, label=field.LABEL_REPEATED, type=scalar[kind])
        feature.field.add(
            name=f"{kind}_list",
            number=number,
            label=field.LABEL_OPTIONAL,
            type=field.TYPE_MESSAGE,
            type_name=f".tensorflow.{values.name}",
            oneof_index=0,
        )
    file.message_type.append(feature)

    # A map is, on the wire and in a descriptor, a list of messages with a key and a value.
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=field.LABEL_OPTIONAL, type=field.TYPE_STRING)
    one_message = {"number": 1, "label": field.LABEL_OPTIONAL, "type": field.TYPE_MESSAGE}
    entry.field.add(name="value", **(one_message | {"number": 2}), type_name=".tensorflow.Feature")
    entries = one_message | {"label": field.LABEL_REPEATED}
    features.field.add(name="feature", **entries, type_name=".tensorflow.Features.FeatureEntry")
    example = file.message_type.add(name="Example")
    example.field.add(name="features", **one_message, type_name=".tensorflow.Features")

    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))
