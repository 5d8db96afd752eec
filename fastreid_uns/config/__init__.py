"""One YAML, completed from the signatures of the components that it names.

Order: `defaults.DEFAULTS`, `add_config(cfg)` of each plugin, the YAML chain (`_BASE_`), the command line; then every
component section is checked against the signature of its `NAME` and filled with the defaults that it has there, and
every other key against its type and its bounds.
"""

from fastreid_uns.config.comparison import FREE_KEYS, deviations, refuse_other_config
from fastreid_uns.config.loading import CfgNode, load_config, parse_config

__all__ = [
    "FREE_KEYS",
    "CfgNode",
    "deviations",
    "load_config",
    "parse_config",
    "refuse_other_config",
]
