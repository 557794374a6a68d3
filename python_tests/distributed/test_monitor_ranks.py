"""The monitor on two ranks: one measurement, one file, also of a sharded model."""

from __future__ import annotations

from pathlib import Path

import features
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dse_ext.monitor import DSEMonitor


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.Conv2d(8, 8, 1)).double()


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, rank: int) -> Path:
    shared = [str(tmp_path_factory.mktemp("monitor"))]
    dist.broadcast_object_list(shared, src=0)
    return Path(shared[0])


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_it_is_the_monitor_of_one_process(rank: int, folder: Path, wrapper: str) -> None:
    images = features.normal(6, 3, 32, 32)
    model = network()
    if wrapper == "ddp":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped = model
        fully_shard(wrapped, mesh=init_device_mesh("cpu", (2,)))
    watch = DSEMonitor(wrapped, images, every=1, layer="1", folder=folder, keep=1, batch_size=4)
    evaluation = watch.evaluate(1)
    dist.barrier()

    # What one process would have measured.
    plain = network()
    alone = DSEMonitor(plain, images, layer="1")
    ours, expected = evaluation, alone._measure(1, alone._features())
    assert ours.m_dim == pytest.approx(expected.m_dim, rel=1e-12)
    torch.testing.assert_close(
        torch.tensor(ours.replicates), torch.tensor(expected.replicates), rtol=1e-6, atol=0
    )
    files = sorted(folder.glob("*.pt"))
    assert [path.name for path in files] == ["dse-step-00000001.pt"]
    state = torch.load(files[0], weights_only=True)
    assert state.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value)


def test_rank_0_that_fails_keeps_nobody_waiting(rank: int) -> None:
    # Features with an empty axis are what only the measurement refuses.
    watch = DSEMonitor(network(), torch.rand(4, 3, 8, 8), extract=lambda x: x[:, :0, 0])
    with pytest.raises(
        ValueError if rank == 0 else RuntimeError,
        match="no empty axis" if rank == 0 else r"rank 0 could not measure .* no empty axis",
    ):
        watch.evaluate(1)
