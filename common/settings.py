"""Settings from a file: YAML, or JSON such as a run's config.json."""

import re
from pathlib import Path

import yaml

from common.config import from_dict, to_dict
from common.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 1e-3 is a number, not a text."""


_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


def read_settings(path):
    """Return the settings in a file, a dict by name. Raises InputError if it is unreadable or holds no settings."""
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not readable as YAML or JSON ({' '.join(str(error).split())[:150]})") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{path}: holds no settings, such as the line `seed: 1`")
    return found


def update(config, values, where):
    """Return a copy of a nested dataclass with the settings in the dict `values` replaced.

    Raises InputError, which begins with `where`, for an unknown setting and an impossible value.

    >>> from common.config import FitConfig
    >>> update(FitConfig(), {"epochs": 3}, "my.yaml").epochs
    3
    """
    return from_dict(type(config), _merge(to_dict(config), values), where)


def _merge(known, new):
    if not (isinstance(known, dict) and isinstance(new, dict)):
        return new
    return known | {name: _merge(known.get(name), value) for name, value in new.items()}
