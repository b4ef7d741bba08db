"""The formulas: memory of a GPU, bytes that it sends, seconds of a step. Pure functions of a workload.

P parameters of the backbone, W GPUs, B images of a micro-batch and GPU, N = B W, C classes, c = C / W, r sample rate,
D embedding dimension, K classes of a chunk. docs/scaling.md says where each term comes from and how it was checked.
"""

from dataclasses import asdict, dataclass

from launch.plan.hardware import Efficiency, Gpu
from launch.plan.workload import Workload

__all__ = ["Communication", "Memory", "Plan", "StepTime", "communication", "memory", "plan", "step_time"]

_FP32 = 4
_HALF = 2
_LATENCY_S = 30e-6  # of one collective
_ALLREDUCE_NUMBERS = 500_000_000  # that DeepSpeed without ZeRO reduces at once


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the peak of a step."""

    backbone_weights: float
    backbone_optimizer: float  #: momentum, and fp32 copies of the weights under ZeRO
    backbone_gradients: float
    buckets: float  #: gradients on their way, DeepSpeed's buffer
    activations: float
    head_state: float  #: class centres and their momentum
    head_gradient: float  #: with sampling also the copies of the sampled centres
    head_chunk: float  #: logits of a chunk and what is formed with them

    @property
    def total(self) -> float:
        """Sum of all."""
        return float(sum(asdict(self).values()))


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind in a step."""

    what: str
    kind: str  #: all_reduce, all_gather or reduce_scatter
    bytes: float  #: of the whole tensor, of one call
    calls: float  #: per optimiser step

    def sent(self, gpus: int) -> float:
        """Bytes that each GPU sends in a step, with a ring."""
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * (gpus - 1) / gpus * self.bytes * self.calls

    def seconds(self, gpus: int, gpu: Gpu, efficiency: Efficiency) -> float:
        """Time in a step: within nodes at the rate of their links, between nodes with the share of each GPU."""
        if gpus == 1:
            return 0.0
        passes = 2 if self.kind == "all_reduce" else 1
        within = min(gpus, gpu.gpus_per_node)
        nodes = -(-gpus // within)
        inner = (within - 1) / within * self.bytes / (gpu.node_bytes_per_s * efficiency.link)
        outer = (nodes - 1) / nodes * self.bytes / within / (gpu.network_bytes_per_s * efficiency.link)
        return self.calls * (passes * (inner + outer) + _LATENCY_S)


@dataclass(frozen=True)
class Communication:
    """All collectives of a step."""

    backbone: tuple[Exchange, ...]
    head: tuple[Exchange, ...]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step."""

    backbone: float
    head: float
    backbone_exchange: float  #: what is not hidden behind the backward pass
    head_exchange: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return float(sum(asdict(self).values()))


@dataclass(frozen=True)
class Plan:
    """The whole budget."""

    memory: Memory
    communication: Communication
    time: StepTime
    usable_bytes: float

    @property
    def fits(self) -> bool:
        """Whether the peak is below what a GPU can give."""
        return self.memory.total <= self.usable_bytes


def memory(work: Workload) -> Memory:
    """Peak of a step. The peaks of backward pass and update do not coincide; both are counted, which is cautious."""
    weights, optimizer, gradients, buckets = _backbone_state(work)
    counts = work.backbone
    dim, sampled, chunk, rows = work.embedding_dim, work.sampled_classes, work.chunk, work.gathered
    is_sampled = work.sample_rate < 1
    kept = 2 if chunk == sampled else 1  # one chunk: its logits are kept for the backward pass
    half = _HALF if work.logit_precision == "bf16" else 0
    return Memory(
        backbone_weights=weights,
        backbone_optimizer=optimizer,
        backbone_gradients=gradients,
        buckets=buckets,
        activations=counts.activation_bytes * work.micro_batch + counts.fixed_bytes,
        head_state=2 * _FP32 * work.local_classes * dim,
        head_gradient=_FP32 * sampled * dim * (4 if is_sampled else 1),
        head_chunk=(_FP32 * kept + half) * rows * chunk + (3 * _FP32 + half) * chunk * dim + 5 * _FP32 * rows * dim,
    )


def _backbone_state(work: Workload) -> tuple[float, float, float, float]:
    """Weights, optimiser state, gradients and buffers of DeepSpeed: fp32 everywhere, autocast casts in passing."""
    whole = float(_FP32 * work.backbone.parameters)
    part = whole / work.gpus
    # One buffer for each precision that gradients are sent in, whatever the size of the backbone: with autocast, norms
    # go in fp32 and convolutions in the low precision, whose buffer is fp32 as well up to stage 2.
    bucket = float(_FP32 * work.bucket_numbers)
    is_mixed = work.precision == "bf16"  # fp16 is the engine's own autocast: DeepSpeed sees fp32 alone
    match work.zero_stage:
        case 0:
            return whole, whole, whole, min(whole, float(_FP32 * _ALLREDUCE_NUMBERS))  # copies, to be reduced together
        case 1:
            # An fp32 copy of the weights and the momentum are partitioned; accumulated gradients are whole.
            accumulated = whole if work.accumulation > 1 else 0.0
            return whole, 2 * part, accumulated + part, bucket * (2 if is_mixed else 1)
        case 2:
            return whole, 2 * part, part, bucket * (2 if is_mixed else 1)
        case _:
            return part, 2 * part, part, bucket * (1.5 if is_mixed else 1)


def communication(work: Workload) -> Communication:
    """Collectives of a step, as DeepSpeed 0.19 and the head make them."""
    whole = float(_FP32 * work.backbone.parameters)
    # Under ZeRO with its autocast to bf16, DeepSpeed reduces in the low precision; without ZeRO in fp32.
    reduced = whole / 2 if work.precision == "bf16" and work.zero_stage > 0 else whole
    every_micro = work.accumulation if work.zero_stage >= 2 else 1
    backbone: tuple[Exchange, ...]
    match work.zero_stage:
        case 0:
            backbone = (Exchange("gradients", "all_reduce", whole, 1),)
        case 1 | 2:
            # Whole sums are formed though every rank needs its part alone (use_multi_rank_bucket_allreduce).
            backbone = (
                Exchange("gradients", "all_reduce", reduced, every_micro),
                Exchange("weights", "all_gather", whole, 1),
            )
        case _:
            backbone = (
                Exchange("gradients", "reduce_scatter", reduced, every_micro),
                Exchange("weights", "all_gather", reduced, 2 * work.accumulation),  # for forward and backward pass
            )
    backward = work.accumulation * (1 + work.attack_passes)
    forward = backward + work.accumulation * work.forward_passes
    rows = float(_FP32 * work.gathered * (work.embedding_dim + 1))
    head = (
        Exchange("embeddings and labels", "all_gather", rows, forward),
        Exchange("terms of the softmax", "all_reduce", 16.0 * work.gathered, forward),
        Exchange("gradient of the embeddings", "reduce_scatter", rows, backward),
    )
    return Communication(backbone, head)


def step_time(work: Workload, gpu: Gpu, efficiency: Efficiency) -> StepTime:
    """Time of a step from arithmetic, memory traffic of the head, and links."""
    images = work.micro_batch * work.accumulation
    extra = 2 * work.attack_passes + work.forward_passes + work.backbone_passes
    flop = work.backbone.training_flop + extra * work.backbone.forward_flop
    peak = gpu.fp32_flop_per_s if work.precision == "fp32" else gpu.bf16_flop_per_s
    exchanges = communication(work)
    times = [
        sum(exchange.seconds(work.gpus, gpu, efficiency) for exchange in group)
        for group in (exchanges.backbone, exchanges.head)
    ]
    return StepTime(
        backbone=images * flop / (peak * efficiency.backbone),
        head=work.accumulation * _head_seconds(work, gpu, efficiency),
        backbone_exchange=times[0] * (1 - efficiency.overlap),
        head_exchange=times[1],
    )


def head_flop(work: Workload) -> float:
    """Arithmetic of the head in one micro-batch and GPU: logits, again in the backward pass, and two gradients."""
    products = 3 if work.chunk == work.sampled_classes else 4
    attack = work.attack_passes * (products - 1) + work.forward_passes  # the centres get no gradient there
    return 2 * (products + attack) * work.gathered * work.sampled_classes * work.embedding_dim


def _head_seconds(work: Workload, gpu: Gpu, efficiency: Efficiency) -> float:
    peak = gpu.bf16_flop_per_s if work.logit_precision == "bf16" else gpu.fp32_flop_per_s
    logits = 6 * _FP32 * work.gathered * work.sampled_classes * (1 + work.attack_passes + work.forward_passes / 2)
    centres = 12 * _FP32 * work.sampled_classes * work.embedding_dim
    traffic = (logits + centres) / (gpu.memory_bytes_per_s * efficiency.memory)
    return head_flop(work) / (peak * efficiency.head) + traffic


def plan(work: Workload, gpu: Gpu, efficiency: Efficiency) -> Plan:
    """Memory, communication and time together."""
    return Plan(
        memory=memory(work),
        communication=communication(work),
        time=step_time(work, gpu, efficiency),
        usable_bytes=gpu.memory_bytes * efficiency.usable_memory,
    )
