"""What the fork server imports last: first captures, which load and remember much.

Workers are forked from it and begin with all of that, which is no garbage: they need not look
through it for some. Jobs inside of `captured_once` also begin with the graphs of this model.
"""

import gc

import torch
from captures import captured_once
from models import flux_inputs, tiny_flux

import piflux

if not torch.cuda.device_count():  # a capture also starts CUDA, which then no fork can use
    for timestep in (torch.ones(1), torch.ones(()).expand(1)):  # which lie in memory otherwise
        with captured_once():
            model = piflux.parallelize(tiny_flux(), group=piflux.virtual_ranks(2), inner="eager")
            model(**flux_inputs() | {"timestep": timestep}, return_dict=False)
    del model
gc.collect()
gc.freeze()
gc.set_threshold(100_000)
