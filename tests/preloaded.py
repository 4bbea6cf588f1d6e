"""What a forked rank of `tests.ranks.run_ranks` finds imported: torch, DeepSpeed, and all that training imports."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # read where torch is loaded: no thread but this one
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # nor one of pyarrow's allocator
os.environ["DS_ACCELERATOR"] = "cpu"  # as `pipeline.distributed.session` sets it before DeepSpeed is imported

import torch._inductor.compile_fx  # noqa: F401 - DeepSpeed's first engine imports torch's compiler
from matplotlib.figure import Figure  # noqa: F401

import pipeline.runs
import pipeline.train  # noqa: F401
from pipeline.tracking.store import load_deepspeed

load_deepspeed()
threads = len(os.listdir("/proc/self/task"))
if threads > 1:  # a fork has only the thread that forked: locks that others hold would stay held
    raise RuntimeError(f"{threads} threads run once all is imported; tests.ranks cannot fork them")
gc.freeze()  # DeepSpeed collects garbage for each engine; modules are none
