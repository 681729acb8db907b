import gc
import os
import platform
from pathlib import Path

import pytest
import torch
from tiny_training import make_trainer

from trainer import devices, sep_mldc_trainer


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_holes_on_the_heap_go_back_to_the_operating_system():
    # Too small for pages of their own; every fortieth stays, so that the heap does not shrink by itself.
    blocks = [torch.ones(16 * 1024) for _ in range(4000)]  # 64 KiB each
    blocks = blocks[::40]
    gc.collect()
    before = resident_bytes()
    devices.release_freed_memory()
    assert before - resident_bytes() > 100 * 2**20
    assert all(block[0] == 1 for block in blocks)


def test_training_on_a_cpu_releases_memory_at_intervals(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(sep_mldc_trainer, "release_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(sep_mldc_trainer, "RELEASE_EVERY", 3)
    make_trainer(tmp_path, max_steps=7).train()
    assert len(calls) == 2
