"""What drawing costs, counted before anything is computed: floating-point operations and memory.

The networks run on fake tensors, which have shapes and no values (torch._subclasses.fake_tensor), or lie on the meta
device themselves, which is faster: every operation is seen, none is carried out. Counted are operations of matrix
products, convolutions and attention, as by PyTorch's own FLOP counter (a multiplication and its addition are two), and
the bytes of tensors that live at the same time. What an allocator rounds up and a convolution borrows is not: MARGIN
leaves room for it.
"""

import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MARGIN = 0.7  # share of the free memory that counted bytes may take
MOST = 16  # pictures in a batch: more do not make a picture cheaper
PARTS = ("plain", "guided", "last")
ATEN = torch.ops.aten
COUNTED_AS = {  # a CPU's kernels that PyTorch's counter does not know
    ATEN._scaled_dot_product_flash_attention_for_cpu: ATEN._scaled_dot_product_flash_attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: ATEN._scaled_dot_product_flash_attention_backward,
}


class Counter(TorchDispatchMode):
    """While active: .flops of all operations, .peak bytes of the tensors that they made, alive together."""

    def __init__(self):
        super().__init__()
        self.flops = self.peak = self.now = 0
        self.sizes = {}  # storage: bytes; 0 of those that were there before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.sizes.setdefault(tensor.untyped_storage()._cdata, 0)
        out = func(*args, **kwargs)
        operation = COUNTED_AS.get(func._overloadpacket, func._overloadpacket)
        if operation in flop_registry:
            self.flops += flop_registry[operation](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        return out

    def watch(self, storage):
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.now -= self.sizes.pop(key, 0)


class FusedAttention(TorchFunctionMode):
    """While active, attention on the meta device is that of a fused kernel, as everywhere else, and not its formula."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            if query.is_meta:
                return ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Costs:
    """Of drawing a batch: floating-point operations, and bytes beyond the networks' own."""

    flops: int
    bytes: int


def count(call, on_meta=False):
    """The Costs of call(), on fake tensors; on_meta: all its tensors are on the meta device already."""
    with nullcontext() if on_meta else FakeTensorMode(allow_non_fake_inputs=True):
        with FusedAttention(), Counter() as counter:
            call()
    return Costs(counter.flops, counter.peak)


def parts_of(pipe, condition, latents, guidance, decoded_at_once=None, wanted=PARTS):
    """The Costs of a plain step, a guided one and the last decoding of B pictures: {part: Costs} of those wanted.

    condition: (B, T, D); latents: (B, C, h, w); guidance: terms, grad, x0, decoder, looks, as the pipeline takes them;
    without terms, no guided part. Self-attention guidance is not counted.
    """
    t = pipe.scheduler.config.num_train_timesteps // 2
    context = torch.cat([condition, condition]).to(pipe.unet.dtype)

    def plain():
        pipe.predict_noise(latents, t, context, guidance.get("looks"))

    def guided():
        pipe.guidance_gradient(latents, t, context, 1.0, **guidance, decoded_at_once=decoded_at_once)

    def last():
        for rows in latents.split(decoded_at_once or len(latents)):
            pipe.decode(rows)

    calls = dict(zip(PARTS, (plain, guided, last), strict=True))
    with torch.no_grad():
        return {part: count(calls[part], latents.is_meta) for part in wanted
                if part != "guided" or guidance["terms"]}


def total(parts, n_steps, n_guided, repeats=1):
    """The Costs of n_steps, n_guided of them guided, each `repeats` times, and the last decoding: from parts_of."""
    times = {"plain": n_steps - n_guided, "guided": repeats * n_guided, "last": 1}
    used = [(times[name], costs) for name, costs in parts.items() if times[name]]
    return Costs(sum(n * costs.flops for n, costs in used), max(costs.bytes for _, costs in used))


def of_batch(costs_of_batch, n, step=1):
    """The Costs of n pictures, from those of `step` and of twice as many (costs_of_batch: number of pictures -> Costs):
    operations and bytes grow by the same amount with each picture more."""
    few, twice = (costs_of_batch(size) for size in (step, 2 * step))

    def grown(a, b):
        return int(a + (n - step) * (b - a) / step)

    return Costs(grown(few.flops, twice.flops), grown(few.bytes, twice.bytes))


def largest_batch(costs_of_batch, free, step=1):
    """How many pictures to draw at once with `free` bytes: MARGIN of them at most, MOST pictures, and at least one.

    costs_of_batch, step: as of of_batch.
    """
    fitting = [n for n in range(1, MOST + 1) if of_batch(costs_of_batch, n, step).bytes <= MARGIN * free]
    return max(fitting, default=1)
