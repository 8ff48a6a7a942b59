"""The C core. Arrays are C-contiguous NumPy arrays of exactly the dtype named: another dtype raises TypeError, another
shape ValueError. W is (n, k): n outputs, k inputs. Ctrl-C stops a long call with KeyboardInterrupt."""

from typing import Any, Literal, TypedDict, final, overload

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

sources: str  # see quantlab.sources

class IsaInfo(TypedDict):
    built: bool
    usable: bool
    why_not: str  # "" where usable

class NumericError(ArithmeticError):
    """The numbers do not allow an answer."""

class CudaError(RuntimeError):
    """CUDA is not there, or the device refused."""

compiler: str  # "gcc 12.2.0"

# ---- backend ---------------------------------------------------------------------------------------------------------

def isa_info() -> dict[str, IsaInfo]: ...
def isa_selected() -> str: ...
def isa_select(name: str, /) -> None: ...
def threads() -> int: ...
def set_threads(n: int, /) -> None: ...
def gemv_rows() -> int: ...  # products with at most so many rows may add in another order: the ISA says
def precise() -> bool: ...
def set_precise(on: bool, /) -> None: ...  # products of 24-bit integers for bfloat16's, float32 for theirs
def op_table() -> dict[str, dict[str, str]]: ...  # {op: {format: variant in use}}

# ---- CUDA: devices by number -----------------------------------------------------------------------------------------

def cuda_built() -> bool: ...
def cuda_info(device: int, /) -> dict[str, Any]: ...  # CudaError with the reason where the device cannot be used
def cuda_reset_peak(device: int, /) -> None: ...
def cuda_fetch(out: U8, address: int, /) -> None: ...  # copies memory of another library on a device to the host
def cuda_set_folders(folders: str, /) -> None: ...  # of the libraries, separated by ':'
def cuda_library(name: str, /) -> str: ...  # path of cublas or cusolver; CudaError where it is not there
def cuda_bench(
    op: str,
    weights: tuple[Weight, ...] = ...,
    samples: int = 5,
    device: int = 0,
    format: str = "f32",
    m: int = 1,
    n: int = 1,
    k: int = 1,
    group: int = 64,
    b: int = 1,
    keys: int = 1,
    hq: int = 1,
    hkv: int = 1,
    d: int = 2,
    rotate: int = ...,
) -> NDArray[np.float64]: ...  # seconds of one launch (samples,); see csrc/quantlab.h, ql_bench
def device_select(device: int, /) -> None: ...  # single ops run there; -1: on the CPU
def device_selected() -> int: ...

# ---- weights ---------------------------------------------------------------------------------------------------------

@final
class Weight:
    """A validated view of NumPy buffers, which it keeps alive. Layouts: csrc/quantlab.h, ql_weight."""

    def __new__(
        cls,
        format: str,
        bits: int,
        n: int,
        k: int,
        group: int,
        codes: NDArray[Any],
        scales: F32 | None = None,
        zeros: U8 | None = None,
        perm: I32 | None = None,
        scale_codes: U8 | None = None,
        scale_absmax: F32 | None = None,
        scale_map: F32 | None = None,
        scale_offset: float = 0.0,
    ) -> Weight: ...
    @property
    def packed_nbytes(self) -> int: ...  # of the copy that products with few rows stream; 0 before the first of them

def decode(weight: Weight, i0: int, i1: int, out: F32 | None = None, /) -> F32: ...  # (i1 - i0, k), columns as in W

# nf4, fp4: flat blocks of `group`; int8: rows of `group`
def quantize(x: F32, format: str, group: int, /) -> tuple[NDArray[Any], F32]: ...  # codes, scales

# (n, k) -> codes (n, words), scales (n, groups), zeros (n, groups) or None where sym
def quantize_rtn(w: F32, bits: int, group: int, sym: bool, /) -> tuple[NDArray[np.uint32], F32, U8 | None]: ...
def double_quantize(scales: F32, /) -> tuple[U8, F32, F32, float]: ...  # codes, absmax, map, offset

gguf_kinds: tuple[str, ...]  # the quantized types of GGUF files that gguf_decode knows

def gguf_decode(blocks: U8, kind: str, /) -> F32: ...  # blocks (count, bytes) -> (count, values)
def first_nonfinite(x: F32, /) -> int: ...  # flat index of the first NaN or infinity, -1 where there is none

# ---- ops -------------------------------------------------------------------------------------------------------------

# `out`, where given, is filled and returned; it shares no memory with the inputs (in rope it may be x itself)
def embedding(ids: I32, table: Weight, out: F32 | None = None, /) -> F32: ...  # (t,), (vocabulary, c) -> (t, c)
def rmsnorm(
    x: F32, gain: F32, eps: float, out: F32 | None = None, inv_rms: F32 | None = None, /
) -> F32: ...  # (t, c), (c,) -> (t, c)
def rope(
    x: F32, cos: F32, sin: F32, positions: I32, out: F32 | None = None, /
) -> F32: ...  # (t, heads, d), (positions, d/2) x 2, (t,)
def attention(
    q: F32,  # (t, hq, d)
    k: F32,  # (rows, hkv, d)
    v: F32,  # (rows, hkv, d)
    q_start: I64,  # (b + 1,): sequence i has queries q_start[i] to q_start[i + 1]
    kv_start: I64,  # (b,): its first row of k and v
    kv_len: I64,  # (b,): its rows of k and v
    scale: float,
    out: F32 | None = None,
    lse: F32 | None = None,  # (t, hq), filled: log-sum-exp of the scaled scores
    /,
) -> F32: ...
def swiglu(gate: F32, up: F32, out: F32 | None = None, /) -> F32: ...  # gate * sigmoid(gate) * up
def add_into(y: F32, x: F32, /) -> None: ...  # y += x
def linear(x: F32, weight: Weight, out: F32 | None = None, accumulate: bool = False, /) -> F32: ...  # (m, k) -> (m, n)
def linear_many(
    x: F32, weights: tuple[Weight, ...], outs: tuple[F32, ...] | None = None, /
) -> tuple[F32, ...]: ...  # linear of one x with 1 to 3 weights, faster than one by one
def linear_backward_input(
    dy: F32, weight: Weight, out: F32 | None = None, accumulate: bool = False, /
) -> F32: ...  # (m, n) -> (m, k)
@overload
def cross_entropy(logits: F32, targets: I32, gradient: Literal[False] = False, /) -> F32: ...
@overload
def cross_entropy(logits: F32, targets: I32, gradient: Literal[True], /) -> tuple[F32, F32]: ...
def scatter_rows_into(out: F32, x: F32, rows: I32, /) -> None: ...  # out[rows[i]] = x[i]
def gather_rows_into(out: F32, x: F32, rows: I32, /) -> None: ...  # out[i] = x[rows[i]]
def sample(
    logits: F32, streams: I32, step: int, temperature: float, top_k: int, top_p: float, seed: int, /
) -> I32: ...  # (b, v), (b,) -> (b,); temperature 0: the largest
def gram_into(h: F32, a: F32, b: F32, lower: bool, /) -> None: ...  # h (ka, kb) += a^T b

# ---- ops of training; outputs that are not given are new arrays ----------------------------------------------------

def rmsnorm_backward(
    dy: F32, x: F32, gain: F32, inv_rms: F32, out: F32 | None = None, accumulate: bool = False, /
) -> F32: ...  # (t, c), (t, c), (c,), (t,) -> (t, c); inv_rms is rmsnorm's
def attention_backward(
    dout: F32,  # (t, hq, d)
    q: F32,  # (t, hq, d)
    k: F32,  # (rows, hkv, d)
    v: F32,  # (rows, hkv, d)
    out: F32,  # (t, hq, d), attention's
    lse: F32,  # (t, hq), attention's
    q_start: I64,
    kv_start: I64,
    kv_len: I64,
    scale: float,
    dq: F32 | None = None,
    dk: F32 | None = None,
    dv: F32 | None = None,
    /,
) -> tuple[F32, F32, F32]: ...  # rows of no sequence stay as they are, in new arrays 0
def swiglu_backward(
    dy: F32, gate: F32, up: F32, dgate: F32 | None = None, dup: F32 | None = None, /
) -> tuple[F32, F32]: ...  # each output may be one of the inputs

# x / (1 - p), or 0 where random number i of this seed and stream, in [0, 1), is below p
def dropout(x: F32, p: float, seed: int, stream: int, out: F32 | None = None, /) -> F32: ...
def scale_into(x: F32, factor: float, /) -> None: ...  # x *= factor
def square_sum(x: F32, /) -> float: ...

# One step in place, step >= 1; returns the norm of g. Where it is more than max_norm > 0, g is scaled down to that;
# where it is not finite, nothing changes. Ctrl-C waits for the end of the step.
def adamw(
    w: F32,  # (count,), as m, v and g
    m: F32,
    v: F32,
    g: F32,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    max_norm: float,
    /,
) -> float: ...

# ---- on a device: what calibration and GPTQ keep there --------------------------------------------------------------

@final
class DeviceArray:
    """An array on a device, C-contiguous: float32, bfloat16, float64, int32 or int64; its memory goes with it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    def __len__(self) -> int: ...
    def numpy(self) -> NDArray[Any]: ...  # bfloat16 as uint16
    def copy(self) -> DeviceArray: ...

@final
class DeviceWeight:
    """A copy of a weight on a device, for as long as it lives."""

    def __new__(cls, device: int, weight: Weight) -> DeviceWeight: ...
    def floats(self) -> DeviceArray: ...  # float32 (n, k)

def device_array(device: int, array: NDArray[Any], /) -> DeviceArray: ...  # a copy; uint16 is taken for bfloat16
def device_zeros(device: int, m: int, n: int, /) -> DeviceArray: ...  # float32 (m, n)
def device_embedding(ids: DeviceArray, table: DeviceWeight, /) -> DeviceArray: ...  # int32 (t,) -> float32 (t, c)

# x is the residual stream, float32 (t, c), gain float32 (c,); what comes out is bfloat16
def device_norm(x: DeviceArray, gain: DeviceArray, eps: float, /) -> DeviceArray: ...
def device_attention(
    x: DeviceArray,
    gain: DeviceArray,
    q: DeviceWeight,
    k: DeviceWeight,
    v: DeviceWeight,
    cos: DeviceArray,  # (positions, d / 2)
    sin: DeviceArray,
    positions: DeviceArray,  # int32 (t,)
    q_start: DeviceArray,  # int64 (b + 1,), whole sequences
    kv_start: DeviceArray,  # int64 (b,)
    kv_len: DeviceArray,  # int64 (b,)
    heads: int,
    kv_heads: int,
    longest: int,  # tokens of the longest sequence
    eps: float,
    /,
) -> DeviceArray: ...  # (t, heads d)
def device_gate_up(
    x: DeviceArray, gain: DeviceArray, gate: DeviceWeight, up: DeviceWeight, eps: float, /
) -> DeviceArray: ...
def device_add(x: DeviceArray, a: DeviceArray, w: DeviceWeight, /) -> None: ...  # x (t, n) += a (t, k) W^T
def device_difference(a: DeviceArray, b: DeviceArray, floats: bool, /) -> DeviceArray: ...  # a - b; floats: of float32
def device_gram(h: DeviceArray, a: DeviceArray, b: DeviceArray, lower: bool, /) -> None: ...  # h (ka, kb) += a^T b
def device_diagonal(h: DeviceArray, /) -> F32: ...
def device_finite(x: DeviceArray, /) -> bool: ...
def device_product(y: DeviceArray, x: DeviceArray, w: DeviceArray, /) -> None: ...  # y += x w, float32
def device_gptq_supports(device: int, k: int, group: int, fixed: bool, stale: bool, /) -> bool: ...

# matrix (its Cholesky factor), feedback, diagonal; None where it is not positive definite
def device_gptq_factor(
    h: DeviceArray, order: I32, factor: float, damp: float, /
) -> tuple[DeviceArray, DeviceArray, DeviceArray] | None: ...
def device_gptq_correct(
    w: DeviceArray, moments: DeviceArray, matrix: DeviceArray, order: I32, scale: float, /
) -> None: ...  # w += scale moments (H + damp)^-1
def device_gptq_quantize(
    w: DeviceArray,
    feedback: DeviceArray,
    diagonal: DeviceArray,
    order: I32,
    importance: NDArray[np.float64],
    dead: NDArray[np.uint8],
    group: int,
    bits: int,
    sym: bool,
    search: int,
    fixed: bool,
    keep_dead: bool,
    stale: bool,
    half: bool,
    store_ordered: bool,
    /,
) -> tuple[NDArray[np.uint32], F32, U8, NDArray[np.float64]]: ...  # as gptq_quantize

# ---- model -----------------------------------------------------------------------------------------------------------

@final
class Llama:
    """A model over weights and gains, which it keeps alive. A layer is (input norm (c,), q, k, v, o, second norm
    (c,), gate, up, down), matrices as `Weight`."""

    def __new__(
        cls,
        heads: int,
        kv_heads: int,
        head_dim: int,
        intermediate: int,
        eps: float,
        embed: Weight,
        norm: F32,
        layers: tuple[tuple[Any, ...], ...],
        device: int = -1,  # -1: the CPU
        adapter: Adapter | None = None,  # on a device: a copy of it
    ) -> Llama: ...
    def forward(
        self,
        input_ids: I32,  # (t,): the sequences end to end
        positions: I32,  # (t,)
        q_start: I64,  # (b + 1,)
        kv_start: I64,  # (b,)
        kv_len: I64,  # (b,)
        cos: F32,  # (positions, d / 2)
        sin: F32,
        cache_k: F32 | None = None,  # (layers, rows, kv_heads, d)
        cache_v: F32 | None = None,
        keep: I32 | None = None,  # (kept,)
        /,
    ) -> F32: ...  # hidden states after the final norm (t, c), or the rows `keep` of them
    def losses(
        self,
        input_ids: I32,
        positions: I32,
        q_start: I64,
        kv_start: I64,
        kv_len: I64,
        cos: F32,
        sin: F32,
        head: Weight,
        targets: I32,
        /,
    ) -> F32: ...  # -log p of each target (t,)
    def linear(self, x: F32, weight: Weight, /) -> F32: ...  # x W^T, where the model is

@final
class Adapter:
    """Low-rank matrices A (r, k) and B (n, r) of a model's matrices, which then give W x + scale B A x. They lie in one
    vector, which the caller may change between calls."""

    def __new__(
        cls,
        parameters: F32,  # (floats,)
        layout: I64,  # (parts, 5): layer, slot (0 to 6: q k v o gate up down), r, where A begins, where B begins
        scales: F32,  # (parts,)
    ) -> Adapter: ...

@final
class Trainer:
    """Gradients of a model's adapter, in memory that is kept from pass to pass. The same bits for any number of threads
    and whatever is recomputed. One pass at a time."""

    def __new__(
        cls,
        llama: Llama,  # with an adapter
        head: Weight | None,  # (vocabulary, c)
        gradients: F32,  # (floats,) like the adapter's parameters
        *,
        dropout: float = 0.0,  # share of each adapter's inputs that a pass leaves out
        seed: int = 0,
    ) -> Trainer: ...
    # gradients += those of factor * sum of the losses, which is returned. Whole sequences: each sees itself alone.
    # After Ctrl-C a part of the gradients was added.
    def accumulate(
        self,
        input_ids: I32,
        positions: I32,
        q_start: I64,
        kv_start: I64,
        kv_len: I64,
        cos: F32,
        sin: F32,
        targets: I32,  # (t,), -100: does not count
        factor: float,
        call: int,  # number of the pass, for its dropout
        recompute: Literal["none", "selective", "full"],
        /,
    ) -> float: ...
    # the same for the losses of some tokens under a head that is trained too: score_gradient += its gradient
    def accumulate_pooled(
        self,
        input_ids: I32,
        positions: I32,
        q_start: I64,
        kv_start: I64,
        kv_len: I64,
        cos: F32,
        sin: F32,
        pooled: I32,  # (s,) tokens, ascending
        labels: I32,  # (s,), -100: does not count
        score: F32,  # (classes, c)
        score_gradient: F32,  # (classes, c)
        factor: float,
        call: int,
        recompute: Literal["none", "selective", "full"],
        /,
    ) -> float: ...
    # On a device the parameters, gradients and moments live there: write brings the host's, read fetches them. On the
    # CPU both do nothing.
    def write(self, mean: F32, square: F32, /) -> None: ...
    def read(self, mean: F32, square: F32, /) -> None: ...
    def zero(self) -> None: ...  # the gradients
    # a step of AdamW on the parameters, as adamw; returns the norm of the gradients
    def step(
        self,
        mean: F32,  # (floats,)
        square: F32,  # (floats,)
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: int,  # from 1
        max_norm: float,  # 0: gradients are not cut
        /,
    ) -> float: ...
    # what a pass over t tokens works in; the trainer keeps the most that it needed
    def activation_bytes(self, t: int, recompute: Literal["none", "selective", "full"], /) -> int: ...

@final
class Generation:
    """Sequences that grow by a token a step, with their cache, where the model is. temperature 0: the likeliest."""

    def __new__(
        cls,
        llama: Llama,
        head: Weight,  # (vocabulary, c)
        lengths: I64,  # (b,) of the prompts
        steps: int,
        cos: F32,
        sin: F32,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Generation: ...
    @property
    def capacity(self) -> int: ...  # tokens that each sequence has room for
    def prefill(
        self, input_ids: I32, positions: I32, q_start: I64, kv_start: I64, kv_len: I64, cos: F32, sin: F32, ends: I32, /
    ) -> None: ...  # ends (b,): the token that is the last of a sequence's prompt, -1: none of these
    def next(self) -> I32: ...  # (b,)
    def keep(self, rows: I32, /) -> bool: ...  # only these of the last step's sequences go on; False: all do

# ---- GPTQ: the factor and the column loop (csrc/quant/gptq.h) --------------------------------------------------------

# factor * h + damp on the diagonal, permuted, indices reversed: lower triangle, float64 (k, k)
def gptq_matrix(h: F32, order: I32, factor: float, damp: float, /) -> NDArray[np.float64]: ...

# panels of its Cholesky factor (k, k), in place: what columns ahead of them give, then the diagonal block's inverse
gptq_panel: int  # the most columns that are finished together

def gptq_factor_update(l: NDArray[np.float64], first: int, count: int, /) -> None: ...
def gptq_factor_solve(l: NDArray[np.float64], first: int, inverse: NDArray[np.float64], /) -> None: ...

# its Cholesky factor (k, k) becomes the feedback in place; returns the diagonal (k,)
def gptq_feedback(l: NDArray[np.float64], /) -> NDArray[np.float64]: ...
def gptq_quantize(
    w: F32,  # (n, k)
    feedback: NDArray[np.float64],  # (k, k)
    diagonal: NDArray[np.float64],  # (k,)
    order: I32,  # (k,)
    importance: NDArray[np.float64],  # (k,)
    dead: NDArray[np.uint8],  # (k,)
    group: int,
    bits: int,
    sym: bool,
    search: int,
    fixed: bool,
    keep_dead: bool,
    stale: bool,
    half: bool,
    store_ordered: bool,
    /,
) -> tuple[NDArray[np.uint32], F32, NDArray[np.uint8], NDArray[np.float64]]: ...  # codes, scales, zeros, loss (n,)

# ---- roofs of the selected ISA, on threads() threads; the caller takes the time ------------------------------------

def roof_fma(tasks: int, rounds: int, /) -> int: ...  # floating-point operations done, all of them in registers
def roof_tile(tasks: int, rounds: int, /) -> int: ...  # the same for bfloat16 of tiles or pairs; else roof_fma
def roof_read(x: F32, /) -> None: ...  # loads every element of x (count,) once
def roof_copy(out: F32 | None, x: F32, /) -> F32: ...  # out = x (count,), past the caches where the ISA can
