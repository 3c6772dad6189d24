"""farnear fine-tunes visual document retrieval models: a text query finds the page screenshot that answers it.

From Python, one function does what the commands do:

    import farnear
    from farnear.config import load_config

    summary = farnear.train(load_config("run.yaml", ["training.learning_rate=1e-5"]))
"""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from farnear.config import RunConfig

__version__ = "0.1.0"


def train(config: "RunConfig", resume: Literal["newest", "auto"] | None = None) -> dict[str, Any]:
    """Train, evaluate and export one model, on the ranks that the launcher started.

    Args:
        config: The run; see `farnear.config.load_config`.
        resume: None starts and refuses a run folder that holds checkpoints; "newest" continues from the newest
            published checkpoint; "auto" continues if there is one and starts if not.

    Returns:
        What `summary.json` in the run folder holds; the same on every rank.

    Raises:
        farnear.errors.UserError: Something in the run file, the data or the launch must be mended first.
        farnear.errors.RunInterruptedError: SIGTERM, SIGUSR1 or SIGINT has come; what was done is saved.
    """
    from farnear.outcome import announce
    from farnear.signals import Signals

    with Signals() as signals:
        announce()
        # torch and transformers take seconds to import; `farnear --help` does not need them.
        from farnear.training.run import run_training

        return run_training(config, resume, signals)
