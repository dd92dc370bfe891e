"""Device, dtype, free memory under cgroups, and the size of the KV cache that follows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from torchweave_ray.attention.base import block_bytes
from torchweave_ray.config import CacheConfig
from torchweave_ray.errors import ArtifactError, ConfigError
from torchweave_ray.kernels.cgroup import cpu_quota
from torchweave_ray.kernels.machine import num_cores
from torchweave_ray.runner.device import (
    free_host_memory,
    free_memory,
    resolve_device,
    resolve_dtype,
    set_num_threads,
)
from torchweave_ray.runner.kv_cache import KVCache, KVShape, KVSize, size_kv_cache

GIB = 1 << 30


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _machine(root: Path, available: int = 8 * GIB, **files: str) -> Path:
    meminfo = f"MemTotal: 99 kB\nMemAvailable:   {available // 1024} kB\n"
    return _write(root, {"proc/meminfo": meminfo, **files})


def test_free_memory_without_cgroups_is_what_is_available(tmp_path: Path) -> None:
    assert free_host_memory(_machine(tmp_path)) == 8 * GIB


def test_a_cgroup_v2_limit_counts_less_its_droppable_page_cache(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/system/pod/"
    root = _machine(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/system/pod\n",
            f"{group}memory.max": f"{4 * GIB}\n",
            f"{group}memory.current": f"{3 * GIB}\n",
            f"{group}memory.stat": f"anon 1\ninactive_file {GIB}\n",
        },
    )
    assert free_host_memory(root) == 2 * GIB
    _write(
        root,
        {
            "sys/fs/cgroup/system/memory.max": f"{GIB}",
            "sys/fs/cgroup/system/memory.current": "0",
            "sys/fs/cgroup/system/memory.stat": "",
        },
    )
    assert free_host_memory(root) == GIB  # a parent's limit holds too
    _write(root, {f"{group}memory.max": "max\n", "sys/fs/cgroup/system/memory.max": "max\n"})
    assert free_host_memory(root) == 8 * GIB


def test_a_cgroup_v1_limit_counts_also_where_the_path_is_the_hosts(tmp_path: Path) -> None:
    root = _machine(
        tmp_path,
        **{
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/not-mounted-here\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}",
            "sys/fs/cgroup/memory/memory.stat": "inactive_file 5\ntotal_inactive_file 0\n",
        },
    )
    assert free_host_memory(root) == GIB
    _write(root, {"sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}"})
    assert free_host_memory(root) == 0


def test_this_machine_answers() -> None:
    assert 0 < free_memory(torch.device("cpu")) < 1 << 50
    assert resolve_device("cpu") == torch.device("cpu")
    threads = torch.get_num_threads()
    try:
        assert set_num_threads(None) >= 1
        assert set_num_threads(1) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match=r"runner\.device"):
        resolve_device("cuda")


def test_dtype_is_the_artifacts_unless_asked() -> None:
    assert resolve_dtype("auto", "bfloat16") is torch.bfloat16
    assert resolve_dtype("float32", "bfloat16") is torch.float32
    with pytest.raises(ArtifactError, match="int3"):
        resolve_dtype("auto", "int3")


def _size(cache: CacheConfig, free: int, seqs: int, length: int | None, model: int) -> KVSize:
    return size_kv_cache(cache, 1000, free, seqs, length, model)


def test_auto_takes_a_share_of_free_memory_for_this_replica() -> None:
    cache = CacheConfig(kv_memory_share=0.5, replicas_per_node=2)
    assert _size(cache, 400_000, 100, None, 4096) == KVSize(100, 1600)
    assert _size(cache, 400_000, 100, 320, 4096) == KVSize(100, 320)


def test_blocks_are_capped_at_what_all_sequences_could_use() -> None:
    assert _size(CacheConfig(), 10**9, 4, 100, 4096) == KVSize(4 * 7, 100)
    assert _size(CacheConfig(kv_memory=10**8), 10**9, 1, None, 64) == KVSize(4, 64)


@pytest.mark.parametrize(
    ("cache", "length", "words"),
    [
        (CacheConfig(kv_memory=500_000), None, ["kv_memory", "exceeds"]),
        (CacheConfig(kv_memory=1_999), None, ["kv_memory", "holds 1 KV blocks"]),
        (CacheConfig(kv_memory_share=0.001), None, ["kv_memory auto", "holds 0 KV blocks"]),
        (CacheConfig(kv_memory=50_000), 801, ["max_model_len 801", "51 KV blocks", "holds 50"]),
        (CacheConfig(), 4097, ["max_model_len 4097", "4096"]),
    ],
)
def test_a_cache_that_cannot_serve_is_refused_with_numbers(
    cache: CacheConfig, length: int | None, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        _size(cache, 400_000, 8, length, 4096)
    assert all(word in str(error.value) for word in words), error.value


def test_the_cache_is_zeroed_and_copies_read_before_they_write() -> None:
    cache = KVCache(KVShape(2, 3, 4, 8, torch.bfloat16), 5, torch.device("cpu"))
    assert cache.layers[1].keys.shape == (5, 3, 4, 8)
    assert cache.num_bytes == 2 * 2 * 5 * 3 * 4 * 8 * 2
    assert not any(kv.keys.any() or kv.values.any() for kv in cache.layers)
    for layer, kv in enumerate(cache.layers):
        for block in range(5):
            kv.keys[block] = 10 * layer + block
            kv.values[block] = -10 * layer - block
    cache.copy_blocks([])
    cache.copy_blocks([(1, 2), (2, 3)])
    blocks = [[int(kv.keys[b, 0, 0, 0]) for b in range(5)] for kv in cache.layers]
    assert blocks == [[0, 1, 1, 2, 4], [10, 11, 11, 12, 14]]
    assert int(cache.layers[1].values[3].max()) == -12
    cache.close()
    assert cache.layers == ()


def test_an_int8_cache_copies_scales_with_their_codes() -> None:
    cache = KVCache(KVShape(2, 3, 4, 64, torch.int8), 5, torch.device("cpu"))
    assert cache.num_bytes == 5 * block_bytes(2, 3, 64, 4, torch.int8)
    assert cache.num_bytes * 1.88 < 5 * block_bytes(2, 3, 64, 4, torch.bfloat16)
    for layer, kv in enumerate(cache.layers):
        assert kv.key_scales is not None
        assert kv.value_scales is not None
        assert kv.key_scales.shape == (5, 3, 4)
        for block in range(5):
            kv.keys[block], kv.key_scales[block] = 10 * layer + block, 1.5 * block
            kv.values[block], kv.value_scales[block] = -10 * layer - block, -1.5 * block
    cache.copy_blocks([(1, 2), (2, 3)])
    kv = cache.layers[1]
    assert kv.key_scales is not None
    assert kv.value_scales is not None
    assert kv.keys[:, 0, 0, 0].tolist() == [10, 11, 11, 12, 14]
    assert kv.values[:, 2, 3, 63].tolist() == [-10, -11, -11, -12, -14]
    assert kv.key_scales[:, 0, 0].tolist() == [0.0, 1.5, 1.5, 3.0, 6.0]
    assert kv.value_scales[:, 2, 3].tolist() == [-0.0, -1.5, -1.5, -3.0, -6.0]
    cache.close()
    assert cache.layers == ()


def test_cores_are_those_of_the_containers_quota(tmp_path: Path) -> None:
    cores = num_cores(tmp_path)
    assert cores == len(os.sched_getaffinity(0))
    root = _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system/pod\n",
            "sys/fs/cgroup/system/pod/cpu.max": "max 100000\n",
            "sys/fs/cgroup/system/cpu.max": "190000 100000\n",
        },
    )
    assert num_cores(root) == 1  # whole ones, a parent's too
    _write(root, {"sys/fs/cgroup/system/cpu.max": "50000 100000\n"})
    assert num_cores(root) == 1
    _write(root, {"sys/fs/cgroup/system/cpu.max": "max 100000\n"})
    assert num_cores(root) == cores


def test_a_cgroup_v1_quota_counts_where_the_path_is_the_hosts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:cpu,cpuacct:/kubepods/pod1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "350000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    root = _write(tmp_path, files)
    assert cpu_quota(root) == 3.5
    _write(root, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"})
    assert cpu_quota(root) is None
