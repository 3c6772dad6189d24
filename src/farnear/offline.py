"""Whether this process may ask a network.

The field has a switch for nodes without one, HF_HUB_OFFLINE=1, which huggingface_hub and transformers read. farnear
takes it for the whole network: with it set no server is asked for anything, be it the hub, an object store or a web
server, and what a run needs must have been brought by `farnear prefetch` before.
"""


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE was set, as huggingface_hub read it when it was imported."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


PREFETCH = "HF_HUB_OFFLINE is set, so nothing is downloaded; run `farnear prefetch RUN.yaml` where there is a network"
"""How messages end."""
