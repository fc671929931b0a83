"""timm's VisionTransformer and what belongs to it, imported without timm's hundred other model families.

`import timm.models.vision_transformer` first runs timm's two package files, which import every family and with one of them
torch's compiler. Here the two packages are entered without running their files; the first look for a name that is not there
yet, such as `timm.create_model`, runs them after all. timm's module of downloads, which imports the hub's client, is likewise
left until one of its functions is called. Where timm was imported before, nothing changes.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

__all__ = ["Attention", "Block", "PretrainedCfg", "VisionTransformer", "checkpoint_filter_fn", "timm_version"]

HUB = "timm.models._hub"


class _OnDemand(ModuleType):
    """A package whose file runs when a name is missed."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":  # timm asks itself for it; the package's file would ask for the same module
            return importlib.import_module("timm.version").__version__
        assert self.__spec__ is not None and self.__spec__.loader is not None
        object.__setattr__(self, "__class__", ModuleType)  # first, since what runs now may look here as well
        if isinstance(sys.modules.get(HUB), _Functions):  # who gets the whole timm gets this module whole
            del sys.modules[HUB]
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


class _Functions(ModuleType):
    """A module of functions alone, imported when one of them is first called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
            return getattr(importlib.import_module(self.__name__), name)(*args, **kwargs)

        return call


def _enter(name: str, path: list[str] | None) -> list[str] | None:
    """Enters a package without running its file; returns where its modules lie, None if it is not installed."""
    spec = PathFinder.find_spec(name, path)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        return None
    module = importlib.util.module_from_spec(spec)
    object.__setattr__(module, "__class__", _OnDemand)
    sys.modules[name] = module
    return list(spec.submodule_search_locations)


def _import_one_family() -> None:
    if "timm" in sys.modules or (inside := _enter("timm", None)) is None:
        return
    _enter("timm.models", inside)
    vars(sys.modules["timm"])["models"] = sys.modules["timm.models"]
    sys.modules[HUB] = _Functions(HUB)
    try:
        importlib.import_module("timm.models.vision_transformer")
    except ImportError:  # a timm whose family needs names of the packages: it gets all of them, in timm's order
        for name in [n for n in sys.modules if n.partition(".")[0] == "timm"]:
            del sys.modules[name]


_import_one_family()

from timm.models._pretrained import PretrainedCfg  # noqa: E402
from timm.models.vision_transformer import Attention, Block, VisionTransformer, checkpoint_filter_fn  # noqa: E402
from timm.version import __version__ as timm_version  # noqa: E402
