"""Reads a configuration file. What is wrong with it is told with its name and the line."""

import os
from pathlib import Path

import yaml


def read_yaml(path: str | os.PathLike[str]) -> str:
    """The YAML text of a configuration file, which is UTF-8 whatever the locale. A file without keys gives ``{}``.

    Args:
        path: path of the file.

    Raises:
        ValueError: if the file is no UTF-8, no YAML or no mapping, or if a key stands in it twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        root = yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if isinstance(root, yaml.MappingNode) and _check(root, path, ("trainer", "model", "data")):
            text = yaml.serialize(root, allow_unicode=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8.") from error
    except (yaml.YAMLError, RecursionError) as error:
        number = mark.line if (mark := getattr(error, "problem_mark", None)) else 0
        has_tab = "\t" in next(iter(text.splitlines()[number:]), "")
        remedy = "indent with spaces, not with tabs" if has_tab else "correct it"
        problem = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise ValueError(f"{path}, line {number + 1}, is no YAML ({problem}): {remedy}.") from error
    if root is None:
        return "{}"
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} holds no keys: begin it with model:, data: or trainer:.")
    return f"{text}\n# jsonargparse takes a lone `trainer:` for a text, but not with this line"


def _check(node: yaml.Node, path: str | os.PathLike[str], groups: tuple[str, ...] = ("init_args",)) -> bool:
    """Refuse a key that stands twice. Make ``groups`` without keys, which hold null, empty; whether there was one."""
    if isinstance(node, yaml.SequenceNode):
        return sum(_check(item, path) for item in node.value) > 0
    changed, lines = False, dict[str, int]()
    for position, (key, value) in enumerate(node.value if isinstance(node, yaml.MappingNode) else ()):
        line = key.start_mark.line + 1
        if key.value in lines and key.value != "<<":
            raise ValueError(f"{path}: {key.value} stands in line {lines[key.value]} and in line {line}: keep one.")
        lines[str(key.value)] = line
        if key.value in groups and value.tag == "tag:yaml.org,2002:null":
            node.value[position] = (key, yaml.MappingNode("tag:yaml.org,2002:map", []))
            changed = True
        changed = _check(value, path) or changed
    return changed
