"""asv plugin (see asv.conf.json): results of an existing environment are named by its Python version.

asv names them by the path of the interpreter, so that histories made in two checkouts would not meet.
"""

from __future__ import annotations

import platform

from asv.environment import ExistingEnvironment


def setup() -> None:
    """Called by asv when it loads the plugin."""
    version = ".".join(platform.python_version_tuple()[:2])
    ExistingEnvironment.python = version
    ExistingEnvironment.name = f"existing-py{version}"
