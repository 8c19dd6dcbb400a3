"""What configs and ``key=value`` hold, as plain Python: YAML without its traps; paths and names as the text they are.

A config may come from a stranger: nothing here builds an object, or grows beyond MAX_SIZE.
"""

import copy
import functools
import os
import re

import yaml

MAX_DEPTH = 30  # levels of mappings and lists
MAX_SIZE = 200_000  # bytes of a file; values and characters, aliases written out
NAMES = ("name", "project", "entity", "group", "tags", "subfolder", "filename")
PATHS = ("root", "path", "dirpath")  # and whatever ends in _dir
TAG = "tag:yaml.org,2002:"
HASH = "\ue000"  # of Unicode's private use; stands for # where that begins no comment


class ConfigError(ValueError):
    """A config, an override or a target that cannot be used; the message is one line and names it."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))


def short(value):
    """``value`` as errors show it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def is_path(key):
    """Whether the last part of a key says that the value is a path, whose ``~`` is the user's home."""
    return key in PATHS or key.endswith("_dir")


def is_text(key):
    """Whether the last part of a key says that the value is text, or a list of it, whatever it looks like."""
    return key in NAMES or is_path(key)


def parse(text, source, key="", comments=True):
    """YAML -> dict, list, str, int, float, bool or None.

    ``1e-3`` is a number; ``12:30`` and ``2024-05-01`` are text.

    Args:
        text: the YAML.
        source: what errors call it.
        key: the last part of the key whose value it is, if any.
        comments: whether `` #`` begins one.
    Raises:
        ConfigError: not YAML, tags other than those of plain values, keys that are no text or stand twice, more than
            MAX_DEPTH levels, or more than MAX_SIZE values and characters.
    """
    try:
        loader = _Loader(text, comments)
        node = loader.get_single_node()
        return None if node is None else loader.plain(node, key)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested more than {MAX_DEPTH} levels deep") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from None
    except (ValueError, LookupError) as error:  # "!!bool 5", a number of 5000 digits
        raise ConfigError(f"{source}: not valid YAML ({short(error)})") from None


def read_yaml(path):
    """The mapping in a YAML file of at most MAX_SIZE bytes, {} of an empty one; raises ConfigError where it is none, or
    cannot be read."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_SIZE + 1)
        if len(text) > MAX_SIZE:
            raise ConfigError(f"{path}: expected a config of at most {MAX_SIZE} bytes")
        found = copy.deepcopy(_parse(text.decode(), path, os.path.expanduser("~")))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict | None):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(found).__name__}")
    return found or {}


@functools.lru_cache(maxsize=256)
def _parse(text, path, home):
    """``parse``, once for all readings of a file: a check of what fits reads the same ones dozens of times."""
    return parse(text, path)


def dump(content):
    """Plain Python -> YAML that ``parse`` reads as the same, whatever file names it holds."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def split_overrides(overrides):
    """["prior.n_layers=4"] -> [("prior.n_layers", "4")]; raises ConfigError."""
    pairs = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"override {short(override)}: expected key=value")
        if key.count(".") >= MAX_DEPTH:
            raise ConfigError(f"override {short(override)}: nested more than {MAX_DEPTH} levels deep")
        pairs.append((key, text))
    return pairs


def override_value(key, text):
    """The value in the override ``key=text``: YAML, in which ``#`` begins no comment.

    For a key that is a path or a name it is the text as it stands, but for null and for quotes around the whole.

    Raises:
        ConfigError: not YAML.
    """
    last, source = key.rpartition(".")[2], f"override {short(f'{key}={text}')}"
    if not is_text(last) or last == "tags" or text in ("", "null", "Null", "NULL"):
        return parse(text, source, last, comments=False)
    if re.fullmatch(r"'(?:[^']|'')*'|\"(?:[^\"\\]|\\.)*\"", text, re.DOTALL):
        return parse(text, source, last, comments=False)
    return os.path.expanduser(text) if is_path(last) else text


def nested(key, value):
    """("a.b", 1) -> {"a": {"b": 1}}"""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def flattened(mapping, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}: ``nested`` undone, of a whole mapping; empty mappings leave nothing."""
    flat = {}
    for key, value in mapping.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class _Loader(yaml.SafeLoader):
    """PyYAML's parser; ``plain`` takes the place of its constructors."""

    def __init__(self, text, comments):
        super().__init__(text if comments else text.replace("#", HASH))
        self.comments, self.size = comments, 0

    def fetch_flow_collection_start(self, token):
        if self.flow_level > MAX_DEPTH:  # the scanner looks far ahead in them
            raise ConfigError(f"nested more than {MAX_DEPTH} levels deep")
        super().fetch_flow_collection_start(token)

    def plain(self, node, key="", depth=0):
        """A node as plain Python; ``key`` is the last key above it."""
        self.size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if depth > MAX_DEPTH:  # or in a circle
            raise ConfigError(f"nested more than {MAX_DEPTH} levels deep")
        if self.size > MAX_SIZE:
            raise ConfigError(f"it comes to more than {MAX_SIZE} values and characters")
        kind = node.tag.removeprefix(TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, depth + 1)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.plain(item, key, depth + 1) for item in node.value]
        if not isinstance(node, yaml.ScalarNode) or kind not in ("null", "bool", "int", "float", "str"):
            raise ConfigError(f"line {node.start_mark.line + 1}: expected no tag, found {short(node.tag)}")
        if kind == "str" or (is_text(key) and kind != "null"):
            text = self._text(node)
            return os.path.expanduser(text) if is_path(key) else text
        return getattr(self, f"construct_yaml_{kind}")(node)

    def _text(self, node):
        return node.value if self.comments else node.value.replace(HASH, "#")

    def _mapping(self, node, depth):
        found, merged = {}, {}
        for key, value in node.value:
            where = f"line {key.start_mark.line + 1}"
            if key.tag == f"{TAG}merge":
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    part = self.plain(source, depth=depth)
                    if not isinstance(part, dict):
                        raise ConfigError(f"{where}: expected a mapping after <<, found {short(part)}")
                    merged = part | merged
                continue
            if key.tag != f"{TAG}str" or not isinstance(key, yaml.ScalarNode):
                shown = short(key.value) if isinstance(key, yaml.ScalarNode) else "a mapping or list"
                raise ConfigError(f"{where}: expected text as a key, found {shown}; quotes make text of a number")
            name = self._text(key)
            if name in found:
                raise ConfigError(f"{where}: not valid YAML (the key {short(name)} stands twice)")
            found[name] = self.plain(value, name, depth)
        return merged | found


INT = r"[-+]?(0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)"
FLOAT = (
    r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.removeprefix(TAG) in ("null", "bool", "merge")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in (("int", INT), ("float", FLOAT)):
    _Loader.add_implicit_resolver(TAG + _kind, re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """In Python, as the one in C refuses file names that are no UTF-8; quotes text that _Loader takes for more."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
