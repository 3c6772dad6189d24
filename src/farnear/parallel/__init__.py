"""Ranks, collectives and strategies: the only code that imports accelerate, deepspeed or torch.distributed.

``world`` says who this process is and checks that the launcher started what the run file asks for, ``collectives`` is
what the ranks tell each other, ``strategy`` is how gradients meet and parameters change (single, ddp, ZeRO-1, 2, 3,
FSDP2).
"""
