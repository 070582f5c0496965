"""What a profile says of collectives, on made-up traces."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from overlap import Overlap, overlap_of


def kernel(name, start, duration):
    return {"cat": "kernel", "name": name, "ts": start, "dur": duration}


def test_a_collective_half_behind_a_product():
    events = [
        kernel("nvjet_gemm", 0, 3000),
        kernel("ncclDevKernel_AllGather", 2000, 2000),
        kernel("flash", 5000, 1000),
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9000},
        {"name": "process_name", "ph": "M"},
    ]
    assert overlap_of(events, "gather", 2) == Overlap("gather", 2, 1, 2.0, 1.0, 4.0, 1.0)


def test_collectives_and_kernels_that_overlap_each_other_count_once():
    events = [
        kernel("ncclA", 0, 2000),
        kernel("ncclB", 1000, 2000),
        kernel("a", 0, 4000),
        kernel("b", 500, 1000),
    ]
    assert overlap_of(events, "gather", 2) == Overlap("gather", 2, 2, 3.0, 3.0, 4.0, 0.0)


def test_copies_between_gpus_are_collectives_and_waiting_is_neither():
    events = [
        kernel("gemm", 0, 4000),
        kernel("c10d::symmetric_memory::barrier_kernel", 1000, 500),
        {"cat": "gpu_memcpy", "name": "Memcpy PtoP (Device -> Device)", "ts": 1500, "dur": 1000},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "ts": 4500, "dur": 500},
        kernel("c10d::symmetric_memory::barrier_kernel", 4000, 9000),
    ]
    assert overlap_of(events, "gather", 2) == Overlap("gather", 2, 1, 1.0, 1.0, 4.5, 0.5)


def test_a_trace_without_kernels_is_an_error():
    with pytest.raises(ValueError, match="no kernels"):
        overlap_of([{"cat": "cpu_op", "name": "x", "ts": 0, "dur": 1}], "gather", 2)
