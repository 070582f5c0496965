"""What the fork server imports last: a first capture, which loads and remembers much.

Workers are forked from it and begin with all of that, which is no garbage: they need not look
through it for some.
"""

import gc

import torch
from models import flux_inputs, tiny_flux

import piflux

if not torch.cuda.device_count():  # a capture also starts CUDA, which then no fork can use
    piflux.parallelize(tiny_flux(), group=piflux.virtual_ranks(2), inner="eager")(**flux_inputs())
gc.collect()
gc.freeze()
gc.set_threshold(20_000)
