"""Reading YAML as version 1.2 has it, where PyYAML has 1.1.

There the key ``on`` of a term would be True, and 1e-3 a text.
"""

from __future__ import annotations

import re

import yaml

BOOLEAN, FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
SCIENTIFIC = r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"


class SettingsLoader(yaml.SafeLoader):
    """``true`` and ``false`` alone are booleans, and numbers may be written as 1e-3."""


SettingsLoader.yaml_implicit_resolvers = {
    first: [entry for entry in resolvers if entry[0] != BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SettingsLoader.add_implicit_resolver(BOOLEAN, re.compile(r"^(true|false)$"), list("tf"))
SettingsLoader.add_implicit_resolver(FLOAT, re.compile(SCIENTIFIC), list("-+.0123456789"))
