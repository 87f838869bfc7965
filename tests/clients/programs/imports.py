"""Imports the three clients and what they train with; prints where each comes from, as JSON."""

import importlib
import json
from importlib.metadata import version

NAMES = (
    "river_client",
    "river_client.rl",
    "tinker",
    "tinker_cookbook",
    "tinker_cookbook.renderers",
    "tinker_cookbook.rl.train",
    "tinker_cookbook.supervised.train",
    "tinker_cookbook.preference.train_dpo",
    "tinker_cookbook.weights",
    "torch",
    "transformers",
    "numpy",
    "datasets",
)

files = {name: importlib.import_module(name).__file__ for name in NAMES}
versions = {name: version(name) for name in ("river-client", "tinker", "tinker-cookbook")}
print(json.dumps({"files": files, "versions": versions}))
