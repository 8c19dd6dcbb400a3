"""Writing TFRecord files from their specification alone: CRC-32C, framing and the wire format of tensorflow.Example
are written out here, so that the reader, which leaves them to libraries, is checked against something else."""

import struct

import numpy as np

N_FRAMES = 30


def _table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # Castagnoli's polynomial, bits reversed
        table.append(value)
    return table


TABLE = _table()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def masked(crc):
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def framed(data):
    """One record with its length and both checksums."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(crc32c(length))) + data + struct.pack("<I", masked(crc32c(data)))


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(framed(data) for data in records))
    return path


def example(features, packed=True):
    """name -> bytes, a list of bytes, of floats or of ints, as a serialized tensorflow.Example."""
    entries = b""
    for name, values in features.items():
        entry = _field(1, name.encode()) + _field(2, _feature(values, packed))
        entries += _field(1, entry)
    return _field(1, entries)


def _feature(values, packed):
    values = [values] if isinstance(values, bytes) else values
    if isinstance(values[0], bytes):
        return _field(1, b"".join(_field(1, value) for value in values))
    if isinstance(values[0], float):
        one_by_one = b"".join(_varint(1 << 3 | 5) + struct.pack("<f", value) for value in values)
        return _field(2, _field(1, struct.pack(f"<{len(values)}f", *values)) if packed else one_by_one)
    return _field(3, _field(1, b"".join(_varint(value) for value in values)))


def _field(number, content):
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def bair_clip(seed):
    """Random content of one BAIR record: frames of two cameras (30, 64, 64, 3), actions (30, 4), states (30, 3)."""
    rng = np.random.default_rng(seed)
    return {
        "aux1": rng.integers(0, 256, (N_FRAMES, 64, 64, 3), np.uint8),
        "main": rng.integers(0, 256, (N_FRAMES, 64, 64, 3), np.uint8),
        "actions": rng.normal(size=(N_FRAMES, 4)).astype(np.float32),
        "states": rng.normal(size=(N_FRAMES, 3)).astype(np.float32),
    }


def bair_features(clip, views=("aux1", "main")):
    """The features of the published records: raw pixels under names that say "encoded"."""
    features = {}
    for i in range(N_FRAMES):
        for view in views:
            features[f"{i}/image_{view}/encoded"] = clip[view][i].tobytes()
        features[f"{i}/action"] = clip["actions"][i].tolist()
        features[f"{i}/endeffector_pos"] = clip["states"][i].tolist()
    return features
