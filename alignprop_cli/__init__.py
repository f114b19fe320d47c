"""Fine-tune text-to-image diffusion models by backpropagating a reward through sampling.

The command line is `alignprop`; from Python its four commands are functions (docs/python.md):

    train, evaluate, soup, score    what the commands do; each returns a dataclass
    load_reward                     a reward by itself, for tensors of images
    AlignPropError and its kinds    what they raise: ConfigError (a mistake in what was given; of
                                    these NothingToDo), AssetError (something is missing), RunError
                                    (it failed), InterruptedRun (a signal came; all is saved)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignprop_cli.api.functions import evaluate, score, soup, train
    from alignprop_cli.api.process import Progress
    from alignprop_cli.api.results import EvaluateResult, ScoreResult, SoupResult, TrainResult
    from alignprop_cli.api.reward import LoadedReward, load_reward
    from alignprop_cli.errors import (
        AlignPropError,
        AssetError,
        ConfigError,
        InterruptedRun,
        NothingToDo,
        RunError,
    )

__version__ = "0.1.0"

__all__ = [
    "AlignPropError",
    "AssetError",
    "ConfigError",
    "EvaluateResult",
    "InterruptedRun",
    "LoadedReward",
    "NothingToDo",
    "Progress",
    "RunError",
    "ScoreResult",
    "SoupResult",
    "TrainResult",
    "__version__",
    "evaluate",
    "load_reward",
    "score",
    "soup",
    "train",
]


def __getattr__(name: str) -> object:
    """Import what is asked for, so that `import alignprop_cli` alone loads nothing."""
    if name.startswith("__") or name not in __all__:
        raise AttributeError(f"module 'alignprop_cli' has no attribute '{name}'")
    # In each branch a module of its own: a function does not load torch, a result does.
    if name.endswith(("Error", "Run", "ToDo")):
        from alignprop_cli import errors as home
    elif name.endswith("Result"):
        from alignprop_cli.api import results as home
    elif name == "Progress":
        from alignprop_cli.api import process as home
    elif name in ("LoadedReward", "load_reward"):
        from alignprop_cli.api import reward as home
    else:
        from alignprop_cli.api import functions as home
    return getattr(home, name)


def __dir__() -> list[str]:
    """Return the names, for completion: those that are not imported yet too."""
    return sorted({*globals(), *__all__})
