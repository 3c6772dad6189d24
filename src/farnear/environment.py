"""Settings that libraries read when they are imported, the same for every process that computes."""

import os
import sys
import warnings


def prepare_environment() -> None:
    """Set what the user has not set. To be called before torch and transformers are imported."""
    # Threads of OpenMP that spin while they wait keep data workers from the cores: up to 30 times slower when busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    # Ranks and data workers fill the cores already; a tokenizer's own threads would only compete with them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # One rank speaks, and bars that redraw themselves are for a terminal.
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def quiet_libraries() -> None:
    """What libraries say about their own future and about configs is for a run, not for a plan of one."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
