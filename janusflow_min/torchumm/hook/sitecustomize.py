# SPDX-License-Identifier: MIT
"""Makes `janus_flow` ours in a Python process that runs TorchUMM's code.

`launcher` calls `install` in its own process and puts this folder first on PYTHONPATH: Python imports a module of
this name when it starts, so however a runner starts another program (torchrun, a shell script, an environment of
its own), no process below the launcher can get TorchUMM's own adapter. Standard library only, nothing is imported
ahead of time, and what has nothing to do with TorchUMM goes on as it would.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGES = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))  # the folder that holds janusflow_min
OVERRIDES = "JANUSFLOW_TORCHUMM_SET"  # a JSON list of "a.b=value", which `umm eval` does not hand on
OURS = ("janus_flow", "janus-flow")


def our_backbone(*args, **options):
    if PACKAGES not in sys.path:
        sys.path.append(PACKAGES)
    from janusflow_min.torchumm import JanusFlowBackbone

    return JanusFlowBackbone(*args, **options)


class Hook(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Adds to two of TorchUMM's modules once they are imported, and stands for its `umm.backbones` and all in it."""

    def find_spec(self, name, path=None, target=None):
        if name == "umm.backbones" or name.startswith("umm.backbones."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        after = {"umm.core.registry": register, "umm.core.config": override}.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if after else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                after(module)

            spec.loader.exec_module = exec_module
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        backbone = module.__name__.split(".")[-1]

        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            if backbone == OURS[0]:
                return our_backbone

            def refused(*_, **__):
                raise RuntimeError(
                    f"backbone {backbone!r} is TorchUMM's own; under janusflow-min there is only {OURS[0]!r}"
                )

            return refused

        module.__getattr__ = attribute


def register(registry):
    for name in OURS:
        registry.register("backbone", name, our_backbone)


def override(config):
    if os.environ.get(OVERRIDES):
        config.set_config_overrides(json.loads(os.environ[OVERRIDES]))


def install():
    """Returns what was added to sys.meta_path."""
    hook = Hook()
    sys.meta_path.insert(0, hook)
    return hook


def next_sitecustomize():
    """The environment's own module of this name, which this one hides."""
    others = [path for path in sys.path if os.path.abspath(path) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if __name__ == "sitecustomize":
    install()
    next_sitecustomize()
