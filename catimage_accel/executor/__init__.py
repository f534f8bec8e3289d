"""The executor: jobs in, images out, with all candidates that share UNet weights stepped in shared batches."""

from catimage_accel.executor.executor import Executor
from catimage_accel.executor.flight import Flight, OnStep, out_of_memory
from catimage_accel.executor.job import Finished, Job, Step
from catimage_accel.executor.samplers import SAMPLERS, SamplerTable, sampler_table

__all__ = [
    "SAMPLERS",
    "Executor",
    "Finished",
    "Flight",
    "Job",
    "OnStep",
    "SamplerTable",
    "Step",
    "out_of_memory",
    "sampler_table",
]
