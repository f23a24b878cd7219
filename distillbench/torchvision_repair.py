"""Lets a torchvision that cannot load its compiled part be imported, for the pure-Python parts that image packages want.

PyPI has only CUDA builds of torchvision for Linux. Beside a CPU build of torch the compiled part finds no libraries, no operator is
registered, and `import torchvision` ends in "operator torchvision::nms does not exist" (pytorch/vision#9077). With it fall diffusers,
transformers, peft, timm, open_clip, clean-fid, torchmetrics and torch-fidelity. Two empty operator schemas are enough for all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

from .errors import UsageError

_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
_kept: list[object] = []  # operators live as long as the library object that defined them


def repair_torchvision() -> bool:
    """Make `import torchvision` work; call it before importing a package that may want torchvision. True where a repair is in place.

    An install that loads is only imported, a missing one left missing, and a second call returns at once. After a repair transforms and
    models work on the CPU; torchvision's own operators and image files raise. An install that fails in another way is a `UsageError`.
    """
    if _kept or "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return bool(_kept)
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise _broken(error) from error
    except (ImportError, OSError) as error:
        raise _broken(error) from error
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _kept.append(library)
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError, OSError) as error:
        raise _broken(error) from error
    return True


def _broken(error: Exception) -> UsageError:
    first = (str(error).splitlines() or [""])[0][:160]
    return UsageError(
        f"the installed torchvision cannot be imported ({type(error).__name__}: {first}): "
        "uninstall it, or install the build that belongs to your torch (https://pytorch.org/get-started/locally)"
    )
