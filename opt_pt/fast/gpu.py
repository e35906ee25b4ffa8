"""One token a row, as fast as the GPU reads the weights: the model's step as a row of hand-written kernels. Or several
tokens of one row, which cost little more than one.

B rows   E embedding width   H hidden   F feed-forward   S slots   V vocabulary
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import parallel
from ..cache import KVCache
from ..quantized import QuantizedLinear
from .plain import LINEARS, Linears, standard, unwatched

if TYPE_CHECKING:
    from ..generation.text import Text

CHUNKS = 16  # programs that share the search for a row's likeliest token


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def can_step(model: Any, token: Tensor) -> bool:
    """Whether `Step` computes what this model does: standard modules in half precision on an NVIDIA GPU of compute
    capability 8.0 or more."""
    device = token.device
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if not unwatched(token):
        return False
    modules = standard(model, _linears(model), lambda spec: parallel.shape(spec, model.tp_size))
    return modules is not None and usual(model, modules, device)


def usual(model: Any, modules: list[nn.Module], device: torch.device) -> bool:
    """Whether all parameters are on the device, in one half precision and perhaps packed, contiguous, and the
    activation has a kernel."""
    parameters, decoder = [p for m in modules for p in m._parameters.values() if p is not None], model.model.decoder
    activations = {_activation(layer.activation_fn) for layer in decoder.layers}
    packed: list[Any] = [m for m in modules if isinstance(m, QuantizedLinear)]
    return (
        {p.dtype for p in parameters} - {torch.int32} in ({torch.float16}, {torch.bfloat16})
        and all(p.device == device and p.is_contiguous() for p in parameters)
        and len(activations) == 1
        and None not in activations
        and len({f.packing for f in packed}) <= 1
        and not any(f in (decoder.project_in, decoder.project_out) for f in packed)
        and all(block_quantized(f) for f in packed)
    )


KINDS: tuple[Linears, ...] = (
    LINEARS,
    (QuantizedLinear, QuantizedLinear),
    (parallel.LinearByOutputs, parallel.LinearByInputs),
    (parallel.QuantizedByOutputs, parallel.QuantizedByInputs),
)


def _linears(model: Any) -> Linears:
    """Which of `KINDS` all the layers have to have."""
    for layer in model.model.decoder.layers:
        if (type(layer.fc1), type(layer.fc2)) in KINDS:
            return type(layer.fc1), type(layer.fc2)
    return LINEARS


def _activation(module: nn.Module) -> str | None:
    """What the kernels call it; None for one they do not compute."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh"}.get(type(module))


def _pairs(linear: Any) -> int:
    """Of how many numbers of its input the even ones are to lie before the odd ones, if several rows are."""
    if isinstance(linear, QuantizedLinear) and linear.packing.bits == 4:
        return block_quantized(linear)
    return 0


# The shapes of the kernels' tiles are those that were fastest on an H100, of about fifteen tried for each product, at
# opt-350m's and opt-2.7b's sizes, and for packed weights at opt-6.7b's and opt-13b's (benchmarks/NOTES.md)


def tiles_one(M: int, K: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_K and warps of `linear_one`."""
    if M >= 32768:  # the head
        return 4, min(512, _power(K)), 2
    if K <= 1024:
        return 2, _power(K), 2
    if M <= 4096:
        return (2, 2048, 4) if K <= 4096 else (4, 1024, 4)
    return (16, 256, 4) if M <= 8192 else (4, 512, 4)  # 8192: all programs of 16 rows run at once


def tiles_many(B: int, M: int, K: int, parts: int, gpu: GPU) -> tuple[int, int, int, int, int, int, int]:
    """BLOCK_B, BLOCK_M, BLOCK_K, warps, pipeline stages, early tiles and SPLITS of `linear_many`, of so many products
    with M results each."""
    block_b, block_m, block_k = min(64, max(16, _power(B))), 64, min(128, max(16, _power(K)))
    # programs a multiprocessor: two, unless their tiles of x are so large that one with a longer pipeline does better
    stages, early, programs, least = (3, 2, 2, 256) if block_b == 16 or parts * M > 8192 else (6, 0, 1, 512)
    room = gpu.shared - 2 * early * block_m * block_k - 2048
    stages = max(2, min(stages, room // (2 * block_k * (block_b + block_m))))
    tiles = parts * -(-M // block_m) * -(-B // block_b)
    splits = max(1, min(programs * gpu.multiprocessors // tiles, K // least, 12))
    return block_b, block_m, block_k, 4, stages, early, splits


def block_quantized(linear: QuantizedLinear) -> int:
    """BLOCK_K of `quantized_many`: a power of two that divides the inputs and, unless a row has one scale, the group.

    0 if there is none that the matrix units take."""
    K, bits = linear.in_features, linear.packing.bits
    block = math.gcd(K, linear.packing.group_size or 0, 128)
    return block if block * bits >= 16 * 8 else 0


def tiles_quantized_one(M: int, K: int, bits: int) -> tuple[int, int, int]:
    """BLOCK_M, WORDS and warps of `quantized_one`."""
    if bits == 8:
        rows, words, warps = (8, 128, 2) if M >= 16384 and K <= 5120 else (2, 1024, 4) if K > 16384 > M else (8, 256, 4)
    elif M >= 8192:
        rows, words, warps = 8, 128, 4
    elif K % 4096 == 0:
        rows, words, warps = (4, 512, 4) if K >= 8192 else (8, 512, 8)
    else:
        rows, words, warps = (4, 256, 2) if K >= 8192 else (8, 256, 4)
    return rows, min(words, _power(K * bits // 32)), warps


def tiles_quantized_many(B: int, M: int, K: int, parts: int, gpu: GPU) -> tuple[int, int, int, int, int, int]:
    """BLOCK_B, BLOCK_M, warps, pipeline stages, early tiles and SPLITS of `quantized_many`."""
    block_b, block_m, stages, early = min(64, max(16, _power(B))), 64, 3, 0 if parts * M > 32768 else 1
    programs = 64 // block_b  # a multiprocessor
    tiles = parts * -(-M // block_m) * -(-B // block_b)
    splits = max(1, min(programs * gpu.multiprocessors // tiles, K // 512, 12))
    return block_b, block_m, 4, stages, early, splits


def tiles_attend(B: int, N: int, slots: int) -> tuple[int, int, int]:
    """BLOCK_S, warps and SPLITS of `attend`."""
    if B * N >= 256:
        return 32, 4, 1
    return (64, 8, 1) if slots <= 512 else (32, 4, min(16, _power(-(-slots // 128))))


class GPU(NamedTuple):
    """What the shapes of tiles depend on: multiprocessors, bytes of shared memory that a program may have, and whether
    a kernel may start before the one before it ends (Hopper and later)."""

    multiprocessors: int
    shared: int
    early_start: bool

    @classmethod
    def of(cls, device: torch.device) -> GPU:
        if device.type != "cuda":
            return cls(16, 1 << 17, False)  # Triton's interpreter
        properties, capability = torch.cuda.get_device_properties(device), torch.cuda.get_device_capability(device)
        return cls(properties.multi_processor_count, properties.shared_memory_per_block_optin, capability >= (9, 0))


class Step:
    """token [B] -> logits [B, V], each call one slot further in the cache. Nothing is allocated and nothing waits, so
    that a call can be captured as a CUDA graph.

    mask: [B, cache.length], what of the cache is not padding; position: [B], where the next token stands; token: [B],
    int64, the tensor that holds it at each call.
    table: [B, S] int32, in which row's cache what each row sees in a slot is, if not in its own; a new token goes to
    its own. tail: every so many rows are tokens of one text, one behind the other, with one row of cache and mask.
    """

    def __init__(
        self, model: Any, cache: KVCache, mask: Tensor, position: Tensor, token: Tensor,
        table: Tensor | None = None, tail: int = 1,
    ) -> None:  # fmt: skip
        from . import kernels, quantized  # Triton comes with PyTorch for NVIDIA GPUs, and is not there elsewhere

        self.kernels, self.packed, self.model, self.cache = kernels, quantized, model, cache
        config, device, dtype = model.config, mask.device, cache.k[0].dtype
        self.config = config
        B, H, slots = len(token), config.hidden_size, cache.k[0].shape[2]
        self.heads = cache.k[0].shape[1]  # this process's

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        self.B, self.slots = B, slots
        self.token, self.table, self.tail, after = token, table, tail, torch.arange(B, device=device) % tail
        self.position = (position + after).to(torch.int32)
        self.slot = (cache.length + after).to(torch.int32)
        self.visible = torch.zeros(B // tail, slots, device=device, dtype=torch.uint8)
        self.visible[:, : cache.length] = mask
        self.words, self.place = empty(B, config.embed_dim), empty(B, H)
        self.x, self.y = empty(B, H), empty(B, H)
        self.q, self.attended = (empty(B, self.heads * config.head_dim) for _ in range(2))
        self.between, self.logits = empty(B, config.ffn_dim // model.tp_size), empty(B, config.vocab_size)
        self.normed = empty(B, max(H, config.embed_dim))
        self.narrow = empty(B, config.embed_dim)
        N, D = self.heads, _power(config.head_dim)
        self.block, self.warps, self.splits = tiles_attend(B, N, slots)
        self.partial = empty(B, N, self.splits, 2 + D, dtype=torch.float32)
        self.arrived = torch.zeros(B, N, device=device, dtype=torch.int32)
        self.best, self.where = empty(B, CHUNKS, dtype=torch.float32), empty(B, CHUNKS, dtype=torch.int32)
        self.sum = parallel.Sum(B, H, device=device) if model.tp_size > 1 else None
        self.lying = 0  # the `_pairs` of what `normed` holds
        self.gpu = GPU.of(device)
        self.pdl = self.gpu.early_start
        # of products that are shared out: a multiprocessor has at most one piece [64, 64], or four [64, 16]
        self.pieces = empty(self.gpu.multiprocessors * 64 * 64 if B > 1 else 1, dtype=torch.float32)
        self.counted = torch.zeros(2 * self.gpu.multiprocessors, device=device, dtype=torch.int32)
        self.layers: list[Any] = list(model.model.decoder.layers)
        self.activation = _activation(self.layers[0].activation_fn)
        # what the kernels are compiled for
        self.variant = (config.to_json(), B, tail, table is None, self.block, self.splits, dtype, device)
        self.variant += (self.heads, model.tp_rank > 0)
        self.compiling: list[Any] | None = None  # the kernels of a call that only compiles

    def __call__(self) -> Tensor:
        """The logits [B, V] of `token`; the buffer is written again by the next call.

        Between two calls the device must come to a stop, as it does between two launches of a graph: kernels of one
        call read, before they wait, what `keep` wrote behind the call before."""
        decoder, pre_norm = self.model.model.decoder, self.config.do_layer_norm_before
        E, H = self.config.embed_dim, self.config.hidden_size
        x, y = self.x, self.y
        self._run(
            self.kernels.embed, (self.B,),
            self.token, self.position, self.slot, decoder.embed_tokens.weight, decoder.embed_positions.weight,
            x if E == H else self.words, self.place, self.visible, self.slots,
            E=E, H=H, TAIL=self.tail, BLOCK=_power(max(E, H)), PDL=self.pdl,
        )  # fmt: skip
        if decoder.project_in is not None:
            self._linear(self.words, [decoder.project_in], x, residual=self.place)

        # In a post-norm model x is kept as it was before its last norm, and each reader norms it
        last: nn.LayerNorm | None = None
        for i, layer in enumerate(self.layers if self.compiling is None else self.layers[:2]):  # two: all that differ
            attention = layer.self_attn
            norm = layer.self_attn_layer_norm if pre_norm else last
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            self._linear(x, qkv, self.q, norm=norm, layer=i)
            self._attend(i, attention.out_proj)
            self._linear(self.attended, [attention.out_proj], y, residual=x, residual_norm=last)
            if not pre_norm:
                last = layer.self_attn_layer_norm
            norm = layer.final_layer_norm if pre_norm else last
            self._linear(y, [layer.fc1], self.between, norm=norm, activation=self.activation, reader=layer.fc2)
            self._linear(self.between, [layer.fc2], x, residual=y, residual_norm=last)
            if not pre_norm:
                last = layer.final_layer_norm
        last = decoder.final_layer_norm if pre_norm else last
        if decoder.project_out is not None:
            self._linear(x, [decoder.project_out], self.narrow, norm=last)
            x, last = self.narrow, None
        self._linear(x, [self.model.lm_head], self.logits, norm=last)
        return self.logits

    def keep(self, text: Text, chosen: Tensor | None) -> None:
        """Keep `chosen` [B], or the likeliest of the logits if None, as the next token, and go one slot further."""
        V, greedy = self.config.vocab_size, chosen is None
        self._run(
            self.kernels.keep, (self.B, CHUNKS if greedy else 1),
            self.logits, self.token if chosen is None else chosen, text.is_eos, self.best, self.where, self.arrived,
            text.token, text.ids, text.done, text.at, self.position, self.slot, text.ids.shape[1],
            text.pad, V=V, GREEDY=greedy, CHUNKS=CHUNKS if greedy else 1,
            BLOCK=_power(-(-V // CHUNKS)), PDL=self.pdl, num_warps=4,
        )  # fmt: skip

    def compile(self, text: Text, greedy: bool) -> None:
        """Compile and load the kernels of a call and of `keep`, all at the same time. Without it each is compiled at
        its first launch, one after the other."""
        import triton

        if not hasattr(triton, "AsyncCompileMode"):  # before Triton 3.5
            return

        def load(kernel: Any) -> None:
            with torch.cuda.device(self.token.device):  # a thread of the pool has a current device of its own
                _ = kernel.run  # the launcher is compiled here, by a C compiler, which takes as long as the kernel

        with ThreadPoolExecutor() as pool:
            with triton.AsyncCompileMode(pool):
                self.compiling = []
                self()
                self.keep(text, None if greedy else self.token)
                kernels, self.compiling = self.compiling, None
            kernels = [kernel.result() if hasattr(kernel, "result") else kernel for kernel in kernels]
            list(pool.map(load, {id(kernel): kernel for kernel in kernels}.values()))

    def _run(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if self.pdl:
            constants["launch_pdl"] = True
        if self.compiling is not None:
            self.compiling.append(kernel.warmup(*arguments, grid=grid, **constants))
        else:
            kernel[grid](*arguments, **constants)

    def _linear(self, x: Tensor, linears: list[Any], out: Tensor, **how: Any) -> None:
        """As `_product`; what is split by inputs is summed over the processes, the first of which adds the rest."""
        if self.sum is None or not isinstance(linears[0], parallel.ByInputs):
            self._product(x, linears, out, **how)
            return
        if self.model.tp_rank > 0:
            how |= {"residual": None, "residual_norm": None}
        self._product(x, linears, self.sum.mine, **how)
        if self.compiling is None:
            self.sum.into(out)

    def _product(
        self,
        x: Tensor,
        linears: list[Any],
        out: Tensor,
        norm: nn.LayerNorm | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
        residual_norm: nn.LayerNorm | None = None,
        layer: int | None = None,
        reader: nn.Module | None = None,
    ) -> None:
        """out = act(norm(x) wᵀ + b) + residual_norm(residual). With `layer` the weights are those of q, k and v, of
        which k and v go to that layer's cache. `reader`: the Linear that reads out."""
        first, qkv, parts = linears[0], layer is not None, len(linears)
        quantized = isinstance(first, QuantizedLinear)
        M, K = (first.out_features, first.in_features) if quantized else first.weight.shape
        bias = first.bias is not None and not (isinstance(first, parallel.ByInputs) and self.model.tp_rank > 0)
        # three of each; what is not there is anything that is a pointer: it is not read
        ws = [f.weight_packed if quantized else f.weight for f in linears] * (3 // parts)
        bs = [w if f.bias is None else f.bias for f, w in zip(linears, ws, strict=False)] * (3 // parts)
        name = activation or "none"
        k, v = (self.cache.k[layer], self.cache.v[layer]) if layer is not None else (out, out)
        affine = self.config.layer_norm_elementwise_affine
        H, D = M if qkv else self.config.hidden_size, self.config.head_dim
        if self.B == 1 and not quantized:
            BLOCK_M, BLOCK_K, warps = tiles_one(parts * M, K)
            gain, shift = (norm.weight, norm.bias) if norm is not None and affine else (x, x)
            r_norm = residual_norm if affine else None
            r_gain, r_shift = (r_norm.weight, r_norm.bias) if r_norm is not None else (x, x)
            self._run(
                self.kernels.linear_one, (parts * -(-M // BLOCK_M),),
                x, *ws, *bs, out, k, v, self.slot, gain, shift, x if residual is None else residual, r_gain, r_shift,
                self.slots, K=K, M=M, H=H, D=D,
                NORM=norm is not None, AFFINE=affine, BIAS=bias, ACTIVATION=name,
                RESIDUAL=0 if residual is None else 1 if residual_norm is None else 2, QKV=qkv,
                BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, BLOCK_X=_power(K), BLOCK_R=_power(H), PDL=self.pdl,
                num_warps=warps,
            )  # fmt: skip
            return
        pairs = 0 if self.B == 1 else _pairs(first)
        if norm is not None:
            gain, shift = (norm.weight, norm.bias) if affine else (x, x)
            self._run(
                self.kernels.norm, (self.B,), x, gain, shift, self.normed,
                K=K, AFFINE=affine, BLOCK=_power(K), PDL=self.pdl, PAIRS=pairs, num_warps=8,
            )  # fmt: skip
            x, self.lying = self.normed, pairs
        elif pairs and qkv:  # the first layer of a post-norm model: nothing before it could lay x out in pairs
            lying = self.normed.view(-1)[: self.B * K].view(self.B, K // pairs, 2, pairs // 2)
            lying.copy_(x.view(self.B, K // pairs, pairs // 2, 2).transpose(2, 3))
            x = self.normed
        residual_pairs = 0
        if residual is not None and residual_norm is not None:
            # it was normed for the product before this one, and lies there still
            residual, residual_pairs = self.normed, self.lying
        constants = {"K": K, "M": M, "H": H, "D": D, "BIAS": bias, "ACTIVATION": name}
        constants |= {"RESIDUAL": int(residual is not None), "QKV": qkv, "PDL": self.pdl}
        residual = x if residual is None else residual
        if not quantized:
            BLOCK_B, BLOCK_M, BLOCK_K, warps, stages, early, splits = tiles_many(self.B, M, K, parts, self.gpu)
            self._run(
                self.kernels.linear_many, (parts * -(-M // BLOCK_M), -(-self.B // BLOCK_B), splits),
                x, *ws, *bs, out, k, v, self.slot, residual, self.pieces, self.counted, self.B, self.slots,
                TAIL=self.tail, BLOCK_B=BLOCK_B, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, STAGES=stages, EARLY=early,
                SPLITS=splits, num_warps=warps, **constants,
            )  # fmt: skip
            return
        scales = [f.weight_scale for f in linears] * (3 // parts)
        constants |= {"BITS": first.packing.bits, "GROUP": first.packing.group_size or K, "ASM": x.is_cuda}
        if self.B == 1:
            BLOCK_M, WORDS, warps = tiles_quantized_one(parts * M, K, first.packing.bits)
            self._run(
                self.packed.quantized_one, (parts * -(-M // BLOCK_M),),
                x, *ws, *scales, *bs, out, k, v, self.slot, residual, self.slots,
                BLOCK_M=BLOCK_M, WORDS=WORDS, num_warps=warps, **constants,
            )  # fmt: skip
            return
        BLOCK_K = block_quantized(first)
        BLOCK_B, BLOCK_M, warps, stages, early, splits = tiles_quantized_many(self.B, M, K, parts, self.gpu)
        self._run(
            self.packed.quantized_many, (parts * -(-M // BLOCK_M), -(-self.B // BLOCK_B), splits),
            x, *[w.view(torch.uint8) for w in ws], *scales, *bs, out, k, v, self.slot, residual, self.pieces,
            self.counted, self.B, self.slots,
            TAIL=self.tail, PAIRS=0 if reader is None else _pairs(reader), RESIDUAL_PAIRS=residual_pairs,
            BLOCK_B=BLOCK_B, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, STAGES=stages, EARLY=early, SPLITS=splits,
            num_warps=warps, **constants,
        )  # fmt: skip

    def _attend(self, layer: int, reader: nn.Module) -> None:
        N, D = self.heads, self.config.head_dim
        self._run(
            self.kernels.attend, (N, self.B, self.splits),
            self.q, self.cache.k[layer], self.cache.v[layer], self.visible, self.slot,
            self.slot if self.table is None else self.table, self.attended,
            self.partial, self.arrived, self.slots, D**-0.5,
            N=N, D=D, SPLITS=self.splits, TAIL=self.tail, TABLE=self.table is not None,
            BLOCK_D=_power(D), BLOCK_S=self.block, PDL=self.pdl, PAIRS=0 if self.B == 1 else _pairs(reader),
            num_warps=self.warps,
        )  # fmt: skip
