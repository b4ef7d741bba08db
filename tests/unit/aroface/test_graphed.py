"""When a pass is recorded, when it is replayed and when neither; a stand-in takes the place of CUDA."""

import pytest
import torch
from torch import nn

from aroface.alignment import frozen_statistics
from aroface.engine.graphed import GraphedBackbone
from aroface.errors import ConfigError
from tests.helpers.training import train


class Recorder:
    """Replays by running the module, after a warm-up as the real one has, into one output that it keeps."""

    def __init__(self):
        self.samples = []

    def __call__(self, module, args, *, pool):
        assert pool == "pool"
        assert not torch.is_autocast_enabled("cuda")
        run = module.forward
        self.samples.append(args[0])
        run(torch.rand_like(args[0]))
        output = run(*args).detach()

        def replay(images):
            values = run(images)
            output.copy_(values.detach())
            return values.detach_().copy_(output) if not values.requires_grad else values

        module.forward = replay
        return module


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", found)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    is_replayed = GraphedBackbone._is_replayed
    monkeypatch.setattr(GraphedBackbone, "_is_replayed", lambda self, images: is_replayed(self, _OnGpu(images)))
    return found


class _OnGpu:
    def __init__(self, images):
        self.requires_grad, self.is_cuda = images.requires_grad, True


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5)).train()


def test_each_kind_of_pass_is_recorded_once_and_leaves_no_trace(recorder):
    network = _network()
    graphed = GraphedBackbone(network)
    images = torch.randn(5, 3, 6, 6)
    before = [buffer.clone() for buffer in network.buffers()]
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    graphed._record(images)
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), before, strict=True))
    recorder.samples.clear()
    for _ in range(2):
        graphed(images).sum().backward()
        with frozen_statistics(network, "batch"):
            graphed(images[:2].clone().requires_grad_()).sum().backward()
    graphed(images.clone().requires_grad_())
    graphed(images.double().float()[:3])
    shapes = [(tuple(sample.shape), sample.requires_grad) for sample in recorder.samples]
    assert shapes == [((5, 3, 6, 6), False), ((2, 3, 6, 6), True), ((5, 3, 6, 6), True), ((3, 3, 6, 6), False)]
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_what_forms_no_gradient_or_is_given_up_runs_as_it_is(recorder):
    network = _network()
    graphed = GraphedBackbone(network)
    images = torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        graphed(images)
    with frozen_statistics(network, "batch"):
        graphed(images)
    graphed.eval()(images)
    graphed.train().is_used = False
    graphed(images)
    assert not recorder.samples


def test_weights_that_moved_are_recorded_again(recorder):
    network = _network()
    graphed = GraphedBackbone(network)
    images = torch.randn(5, 3, 6, 6)
    graphed(images)
    network[0].weight.data = network[0].weight.data.clone()
    graphed(images)
    graphed(images)
    assert len(recorder.samples) == 2


def test_on_a_cpu_graphs_are_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="engine.cuda_graphs: true needs an NVIDIA GPU"):
        train(tmp_path / "run", "engine.cuda_graphs=true")
